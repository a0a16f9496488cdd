import pickle
import re
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from students import Own, Sized, can_learn, convert
from torch import Tensor, fx, nn

from spikedistill.errors import ConversionError
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.student import Student
from spikedistill.student.trace import trace

HERE = Path(__file__)


class TestFunctionalDropout:
    def test_functional_dropout_follows_train_and_eval(self):
        student, _ = convert(Own(), torch.rand(4, 1, 8, 8))
        images = torch.rand(4, 1, 8, 8)
        student.eval()
        assert torch.equal(student(images), student(images))
        student.train()
        assert not torch.equal(student(images), student(images))

    def test_a_feature_that_ends_in_functional_dropout_is_found(self):
        class Dropping(nn.Module):
            def forward(self, x):
                return F.dropout(x, 0.5, self.training)

        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), Dropping(), nn.Flatten(), nn.Linear(8, 3))
        student, _ = convert(network, torch.rand(2, 1, 4, 4))
        features = student.eval().observe(torch.rand(2, 1, 4, 4), ["1", "2"]).features
        assert torch.equal(features["1"], features["2"])

    def test_functional_dropout_keeps_its_probability_and_its_neighbours(self):
        class Dropping(Sized):
            def __init__(self) -> None:
                super().__init__()
                self.dropout_0 = nn.Dropout(0.25)

            def forward(self, x):
                x = self.dropout_0(F.relu(self.conv(x)))
                return self.fc(F.dropout2d(F.dropout(x, p=0.125, training=self.training)).flatten(1))

        student, _ = convert(Dropping(), torch.rand(2, 1, 4, 4))
        dropped = [module for module in student.modules() if isinstance(module, nn.Dropout | nn.Dropout2d)]
        assert sorted((type(module).__name__, module.p) for module in dropped) == [
            ("Dropout", 0.125),
            ("Dropout", 0.25),
            ("Dropout2d", 0.5),
        ]


class Normed(nn.Module):
    """A batch norm that is a function, as timm's BatchNormAct2d has it."""

    def __init__(self, own: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), own(4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        bn, x = self.bn, self.conv(x)
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum, bn.eps)
        return self.fc(F.relu(x).flatten(1))


class Called(Normed):
    """The same with its module called."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).flatten(1))


class Around(nn.Module):
    """A network with one part in its middle."""

    def __init__(self, part) -> None:
        super().__init__()
        self.conv, self.part, self.fc = nn.Conv2d(1, 4, 3, padding=1), part, nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = self.part(x)  # the part
        return self.fc(x.flatten(1))


class TestFunctionalBatchNorm:
    images = torch.rand(6, 1, 4, 4)

    def pair(self, **options) -> list[Student]:
        networks = [Normed(), Called()]
        networks[1].load_state_dict(networks[0].state_dict())
        return [convert(network, self.images, 3, **options)[0] for network in networks]

    def test_learns_and_remembers_as_the_module_does(self):
        functional, module = self.pair()
        for student in (functional, module):
            optimizer = torch.optim.SGD(student.train().parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                student(self.images).mean(0).square().sum().backward()
                optimizer.step()
        found = {name.replace("norm.", ""): value for name, value in functional.state_dict().items()}
        torch.testing.assert_close(found, dict(module.state_dict()))
        torch.testing.assert_close(functional.eval()(self.images), module.eval()(self.images))

    def test_of_fresh_weights_forgets_the_ann(self):
        network = Normed()
        network.bn.running_mean.fill_(3.0)
        network.bn.weight.data.fill_(2.0)
        student, _ = to_spiking(network, Conversion(inherit=False))
        (norm,) = (layer for layer in student.modules() if isinstance(layer, nn.BatchNorm2d))
        assert not norm.running_mean.any() and torch.equal(norm.weight.data, torch.ones(4))
        assert float(network.bn.running_mean[0]) == 3.0

    def test_is_the_ann_s_only_as_long_as_it_is_shared(self):
        network = Normed()
        student, _ = convert(network, self.images)
        student.train()(self.images)
        assert not network.bn.running_mean.any()

    def test_without_running_statistics_is_refused(self):
        class Batch(Around):
            def __init__(self) -> None:
                super().__init__(lambda x: F.batch_norm(x, None, None, training=True))

        with pytest.raises(
            ConversionError, match=r"batch norm without running statistics .* computes statistics of every input"
        ):
            convert(Batch(), torch.rand(2, 1, 4, 4))

    def test_of_timm_s_networks_learns(self):
        student, _ = convert(timm.create_model("regnetx_002", num_classes=3), torch.rand(2, 3, 32, 32))
        norms = [layer for layer in student.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert norms and all(type(layer) is nn.BatchNorm2d for layer in norms)
        can_learn(student, torch.rand(2, 3, 32, 32))
        assert all(int(layer.num_batches_tracked) == 1 for layer in norms)


class ViewAfter(Sized):
    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.fc(x.view(x.size(0), -1))


class ViewBefore(Sized):
    def forward(self, x):
        x = self.conv(x)
        return self.fc(F.relu(x.view(x.shape[0], -1)))


class SizeOfTheInput(Sized):
    def forward(self, x):
        batch = x.size(0)
        return self.fc(F.relu(self.conv(x)).view(batch, -1))


class ShapeUnpacked(Sized):
    def forward(self, x):
        x = F.relu(self.conv(x))
        batch, channels, height, width = x.shape
        return self.fc(x.reshape(batch, channels * height * width))


class ShapeTimesNumber(Sized):
    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.fc(x.reshape(x.shape[0], 4 * x.shape[2] * x.shape[3]))


class Flag(Sized):
    def forward(self, x, spread: bool = False):
        return super().forward(x if not spread else x * 2)


class Mutated(Sized):
    """The activation works in place, its result is not looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        self.act(x)
        return self.fc(x.flatten(1))


class MutatedByFunction(Sized):
    def forward(self, x):
        x = self.conv(x)
        F.relu(x, inplace=True)
        return self.fc(x.flatten(1))


class MutatedBySum(Sized):
    """A branch joins in place, and the sum is not bound to a name."""

    def forward(self, x):
        x = F.relu(self.conv(x))
        y = x / 2
        y.add_(x).sub_(x / 4)
        y.mul_(4).div_(5)
        return self.fc(y.flatten(1))


class GivenByName(Sized):
    def forward(self, x):
        return self.fc(F.relu(input=self.conv(input=x)).flatten(1))


class NamedAsTheStudentsOwn(Sized):
    def forward(self, states):
        return super().forward(states)


WAYS = [
    *(ViewAfter, ViewBefore, SizeOfTheInput, ShapeUnpacked, ShapeTimesNumber, Flag, Mutated, MutatedByFunction),
    *(MutatedBySum, GivenByName, NamedAsTheStudentsOwn),
]


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_sizes_flags_and_work_in_place_mean_what_they_mean_in_the_ann(kind):
    images, plain = torch.rand(3, 1, 4, 4), Sized()
    other = kind()
    other.load_state_dict(plain.state_dict())
    expected, _ = convert(plain, images, timesteps=3, per_channel=False)
    found, _ = convert(other, images, timesteps=3, per_channel=False)
    torch.testing.assert_close(found(images), expected(images))
    assert found(images[:2]).shape == (3, 2, 3)


class TestNumbersAndLists:
    """What a forward computes from the size of its input, or cuts it into, is a node under every torch."""

    WORK: ClassVar = {
        "avg_pool2d": lambda x: x + F.avg_pool2d(x, x.size(3)),
        "reshape": lambda x: torch.reshape(x, (x.size(0), -1)),
        "cat": lambda x: torch.cat(torch.chunk(x, 2, dim=1), 1),
        "stack": lambda x: torch.stack(x.unbind(1), 1),
    }

    @pytest.mark.parametrize("name", WORK)
    def test_are_traced_and_traced_again_out_of_pickle(self, name):
        network, images = Around(self.WORK[name]), torch.rand(2, 1, 4, 4)
        module, _ = trace(network)
        function = getattr(F, name) if hasattr(F, name) else getattr(torch, name)
        for each in (module, pickle.loads(pickle.dumps(module))):
            assert [node.target for node in each.graph.nodes if node.name == name] == [function]
            assert torch.equal(each(images), network(images))

    def test_are_recorded_where_the_function_refuses_a_proxy(self, monkeypatch):
        def cat(tensors, dim=0):
            if isinstance(tensors, fx.Proxy):
                raise TypeError("cat(): argument 'tensors' (position 1) must be tuple of Tensors, not Proxy")
            return plain(tensors, dim)

        plain = torch.cat
        monkeypatch.setattr(torch, "cat", cat)
        module, _ = trace(Around(lambda x: torch.cat(x.chunk(2, 1), 1)))
        assert [node.target for node in module.graph.nodes if node.name == "cat"] == [cat]
        assert torch.cat is cat  # tracing leaves torch as it was

    def test_a_call_that_is_wrong_in_itself_is_refused_at_its_line(self):
        kernel = F.avg_pool2d
        with pytest.raises(ConversionError, match=rf"avg_pool2d.*{re.escape(str(HERE))}"):
            trace(Around(lambda x: F.avg_pool2d(x)))
        assert F.avg_pool2d is kernel


class TestRefusals:
    @pytest.mark.parametrize(
        "branch",
        [
            lambda x: x if x.sum() > 0 else -x,  # by value
            lambda x: x * float(x.max()),
            lambda x: torch.from_numpy(x.detach().numpy()),
        ],
        ids=["if", "float", "numpy"],
    )
    def test_of_a_network_that_depends_on_values(self, branch):
        said = rf"Around cannot be traced by torch.fx .*{re.escape(str(HERE))}:\d+.* pass only the inner network"
        with pytest.raises(ConversionError, match=said):
            convert(Around(branch), torch.rand(2, 1, 4, 4))
