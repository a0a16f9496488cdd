import copy
import math
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from spikedistill.errors import ConversionError
from spikedistill.student.build import Report, Student, to_spiking
from spikedistill.student.surgery import LARGEST_SLOPE
from spikedistill.teacher.zoo import ZOO

HERE = Path(__file__)


def line(marker: str) -> str:
    """``file:line`` of the one line of this file that ends with a marker."""
    numbers = [n for n, text in enumerate(HERE.read_text().splitlines(), 1) if text.endswith(f"# {marker}")]
    assert len(numbers) == 1
    return f"{HERE}:{numbers[0]}"


def convert(network: nn.Module, images: Tensor, timesteps: int = 2, **options) -> tuple[Student, Report]:
    """A student whose neurons run step by step, so that nothing is compiled."""
    student, report = to_spiking(network, timesteps=timesteps, calibrate=images, **options)
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student, report


def can_learn(student: Student, images: Tensor) -> None:
    student.train()
    student(images).square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert any(parameter.grad.abs().max() > 0 for parameter in student.parameters())


class Accumulate(nn.Module):
    """Integrate and fire, written again: remembers its potential, and is called once a step."""

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold, self.potential = threshold, None

    def forward(self, x: Tensor) -> Tensor:
        threshold = self.threshold.to(x).view(-1, *[1] * (x.ndim - 2))
        before = threshold.expand_as(x) / 2 if self.potential is None else self.potential
        spikes = (before + x >= threshold).to(x.dtype) * threshold
        self.potential = before + x - spikes
        return spikes


def stepped(network: nn.Module, student: Student, report: Report, images: Tensor) -> Tensor:
    """The ANN itself with its activations exchanged for neurons with a memory, called T times."""
    spiking = copy.deepcopy(network).eval()
    thresholds = {site.name: layer.threshold for site, layer in zip(report.sites, student.neurons.values())}
    for name, module in list(spiking.named_modules()):
        if isinstance(module, nn.ReLU):
            spiking.set_submodule(name, Accumulate(thresholds.pop(name)))
    assert not thresholds
    return torch.stack([spiking(images) for _ in range(report.timesteps)])


@pytest.mark.parametrize("name", ZOO)
def test_every_zoo_network_becomes_the_same_network_with_neurons(name):
    network = ZOO[name](classes=3, channels=1, width=4).double()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    student, report = convert(network, images, timesteps=3)
    activations = [path for path, module in network.named_modules() if isinstance(module, nn.ReLU)]
    assert sorted(site.name for site in report.sites) == sorted(activations)
    assert len(student.neurons) == len(activations)
    with torch.no_grad():
        found, expected = student.eval()(images), stepped(network, student, report, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    can_learn(student, images)


class TestNetworksOfOthers:
    def test_torchvision_resnet18_with_activations_called_twice(self):
        network = torchvision.models.resnet18(num_classes=3)
        student, report = convert(network, torch.rand(2, 3, 32, 32))
        names = [site.name for site in report.sites]
        assert names[:3] == ["relu", "layer1.0.relu", "layer1.0.relu#2"]
        assert len(set(names)) == len(student.neurons) == 17
        assert all(re.search(r"torchvision.models.resnet\.py:\d+$", site.source) for site in report.sites)
        can_learn(student, torch.rand(2, 3, 32, 32))

    def test_timm_resnet10t(self):
        network = timm.create_model("resnet10t", pretrained=False, num_classes=3)
        calls = []
        copied = copy.deepcopy(network).eval()
        for module in copied.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda *_: calls.append(1))
        copied(torch.rand(1, 3, 32, 32))
        student, report = convert(network, torch.rand(2, 3, 32, 32))
        assert len(report.sites) == len(student.neurons) == len(calls) > 8
        can_learn(student, torch.rand(2, 3, 32, 32))


class Own(nn.Module):
    """What users write: functions, methods, one module called twice, a skip, pooling, dropout, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))  # first
        x = torch.add(self.act(self.conv2(x)), x)  # second
        x = self.pool(self.act(x))
        x = F.max_pool2d(torch.relu(x), 2)
        x = F.dropout(x, 0.5, self.training)
        x = x.view(x.size(0), -1)
        return self.fc2(self.fc1(x).relu())  # last


class TestCallSites:
    def test_each_becomes_a_neuron_of_its_own(self):
        student, report = convert(Own(), torch.rand(4, 1, 8, 8))
        assert [(site.name, site.kind) for site in report.sites] == [
            ("relu", "relu"),
            ("act", "ReLU"),
            ("act#2", "ReLU"),
            ("relu_1", "relu"),
            ("relu_2", "relu"),
        ]
        assert [float(neuron.threshold.mean()) for neuron in student.neurons.values()] == [
            pytest.approx(site.threshold) for site in report.sites
        ]
        can_learn(student, torch.rand(4, 1, 8, 8))

    def test_are_reported_with_their_line_and_finite_numbers(self):
        _, report = convert(Own(), torch.rand(4, 1, 8, 8))
        assert report.sites[0].source == line("first")
        assert report.sites[1].source == line("second")
        assert report.sites[-1].source == line("last")
        for site in report.sites:
            assert 0 < site.threshold < math.inf and 0 <= site.expected_rate <= 1
        text = str(report)
        assert text.splitlines()[0] == "5 layers of neurons, inherited weights, T=2"
        assert all(site.name in text and site.source in text for site in report.sites)

    def test_whose_names_differ_only_in_punctuation_stay_apart(self):
        network = nn.Sequential()
        network.add_module("flat", nn.Flatten())
        network.add_module("a", nn.Sequential())
        network.a.add_module("act", nn.ReLU())
        network.add_module("a_act", nn.ReLU())
        network.add_module("fc", nn.Linear(16, 3))
        student, report = convert(network, torch.rand(2, 1, 4, 4))
        assert len(student.neurons) == len(report.sites) == 2
        assert student(torch.rand(2, 1, 4, 4)).shape == (2, 2, 3)

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
        _, features = student.eval().observe(torch.rand(2, 1, 4, 4), ["1", "2"])
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

    def test_a_network_may_call_a_part_of_its_own_neurons(self):
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.neurons, self.fc = nn.Linear(16, 5), nn.Linear(5, 3)

            def forward(self, x):
                return self.fc(F.relu(self.neurons(x.flatten(1))))

        images = torch.rand(2, 1, 4, 4)
        network = Named()
        student, _ = convert(network, images, timesteps=64)
        torch.testing.assert_close(student(images).mean(0), network(images), rtol=0, atol=0.05)


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
        student, _ = to_spiking(network, inherit=False)
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

        with pytest.raises(ConversionError, match=r"batch norm without running statistics .* measures each input anew"):
            convert(Batch(), torch.rand(2, 1, 4, 4))

    def test_of_timm_s_networks_learns(self):
        student, _ = convert(timm.create_model("regnetx_002", num_classes=3), torch.rand(2, 3, 32, 32))
        norms = [layer for layer in student.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert norms and all(type(layer) is nn.BatchNorm2d for layer in norms)
        can_learn(student, torch.rand(2, 3, 32, 32))
        assert all(int(layer.num_batches_tracked) == 1 for layer in norms)


class Sized(nn.Module):
    """A convolution, an activation, a classifier; how they are joined is up to the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


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


USES = {
    "scale": lambda x, scale: x * scale,
    "shift": lambda x, scale: x + scale,
    "shaped": lambda x, scale: x * scale.view(1, 4, 1, 1),
    "divided": lambda x, scale: x / (scale + 1).reshape(1, -1, 1, 1),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_learned_scale_or_shift_is_no_gate(use):
    class Scaled(Sized):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((1, 4, 1, 1), 0.5))

        def forward(self, x):
            return self.fc(use(F.relu(self.conv(x)), self.scale).flatten(1))

    images, network = torch.rand(3, 1, 4, 4), Scaled()
    student, _ = convert(network, images, timesteps=64)
    torch.testing.assert_close(student(images).mean(0), network(images), rtol=0, atol=0.05)
    can_learn(student, images)


class TestOtherActivations:
    def test_relu6_and_leaky_relu_are_taken_and_the_slope_is_noted(self):
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.ReLU6(), nn.Linear(8, 8), nn.LeakyReLU(0.125), nn.Linear(8, 3)
        )
        student, report = convert(network, torch.rand(2, 1, 4, 4))
        assert [(site.kind, site.note) for site in report.sites] == [
            ("ReLU6", ""),
            ("LeakyReLU", "negative slope 0.125 dropped"),
        ]
        assert "(negative slope 0.125 dropped)" in str(report)
        can_learn(student, torch.rand(2, 1, 4, 4))

    def test_functional_ones_are_taken_too(self):
        class Functional(Sized):
            def forward(self, x):
                return self.fc(F.leaky_relu(F.relu6(self.conv(x)), negative_slope=0.2).flatten(1))

        _, report = convert(Functional(), torch.rand(2, 1, 4, 4))
        assert [(site.kind, site.note) for site in report.sites] == [
            ("relu6", ""),
            ("leaky_relu", "negative slope 0.2 dropped"),
        ]

    @pytest.mark.parametrize("slope", [0.5, -0.5])
    def test_too_steep_a_slope_is_refused(self, slope):
        said = rf"'part' at {re.escape(line('the part'))} has a negative slope of {slope}.*train the ANN with ReLU"
        with pytest.raises(ConversionError, match=said):
            convert(Around(nn.LeakyReLU(slope)), torch.rand(2, 1, 4, 4))
        assert LARGEST_SLOPE == 0.3


class Around(nn.Module):
    """A network with one part in its middle."""

    def __init__(self, part) -> None:
        super().__init__()
        self.conv, self.part, self.fc = nn.Conv2d(1, 4, 3, padding=1), part, nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = self.part(x)  # the part
        return self.fc(x.flatten(1))


GATE = "leave it out with its product where it is a gate"
EXCHANGE, ATTENTION = "exchange it for nn.ReLU", "use a convolutional network"
NORM, RECURRENT, OTHER = "use batch norm", "use a feed-forward network", "use convolutions, linear layers"


class TestRefusals:
    @pytest.mark.parametrize(
        ("part", "remedy"),
        [
            (nn.GELU(), EXCHANGE),
            (nn.SiLU(), EXCHANGE),
            (nn.PReLU(), EXCHANGE),
            (nn.Sigmoid(), GATE),
            (nn.Hardsigmoid(), GATE),
            (nn.Hardswish(), EXCHANGE),
            (nn.Softmax(1), ATTENTION),
            (nn.TransformerEncoderLayer(4, 1, batch_first=True), ATTENTION),
            (nn.LayerNorm(4), NORM),
            (nn.GroupNorm(2, 4), NORM),
            (nn.InstanceNorm2d(4), NORM),
            (nn.LSTM(4, 4), RECURRENT),
            (nn.GRU(4, 4), RECURRENT),
            (nn.CosineSimilarity(), OTHER),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_of_a_layer_name_it_its_line_and_a_remedy(self, part, remedy):
        said = rf"'part' \({type(part).__name__}\) at {re.escape(line('the part'))} has no spiking meaning: .*{remedy}"
        with pytest.raises(ConversionError, match=said):
            convert(Around(part), torch.rand(2, 1, 4, 4))

    @pytest.mark.parametrize(
        ("part", "name", "remedy"),
        [
            (F.gelu, "'gelu' (node gelu)", EXCHANGE),
            (lambda x: x * torch.sigmoid(x), "'sigmoid' (node sigmoid)", GATE),
            (lambda x: x.tanh(), "'tanh' (node tanh)", EXCHANGE),
            (lambda x: x.softmax(1), "'softmax' (node softmax)", ATTENTION),
            (lambda x: F.scaled_dot_product_attention(x, x, x), "'scaled_dot_product_attention'", ATTENTION),
            (lambda x: x @ x.transpose(2, 3), "'matmul' (node matmul)", ATTENTION),
            (lambda x: F.layer_norm(x, (4,)), "'layer_norm' (node layer_norm)", NORM),
            (lambda x: x * F.relu(x - 1), "the product 'mul' of two signals (node mul)", OTHER),
            (lambda x: x * x, "the product 'mul' of two signals (node mul)", OTHER),
            (lambda x: torch.mul(x, other=x), "the product 'mul' of two signals (node mul)", OTHER),
            (lambda x: x.mul_(x), "the product 'mul' of two signals (node mul_)", OTHER),
            (lambda x: x / (x + 1), "the product 'truediv' of two signals (node truediv)", OTHER),
            (lambda x: 1 / (x + 1), "'truediv'", OTHER),
            (lambda x: x // 2, "'floordiv'", OTHER),
            (lambda x: torch.exp(x), "'exp' (node exp)", OTHER),
            (lambda x: x.abs(), "'abs' (node abs_1)", OTHER),
        ],
        ids=lambda value: value if isinstance(value, str) and value[0] in "'t" else "",
    )
    def test_of_a_function_name_it_its_line_and_a_remedy(self, part, name, remedy):
        said = rf"{re.escape(name)}.* at {re.escape(str(HERE))}:\d+ has no spiking meaning: .*{remedy}"
        with pytest.raises(ConversionError, match=said):
            convert(Around(part), torch.rand(2, 1, 4, 4))

    def test_of_multi_head_attention(self):
        class Attending(Around):
            def __init__(self) -> None:
                super().__init__(nn.MultiheadAttention(16, 1, batch_first=True))

            def forward(self, x):
                x = F.relu(self.conv(x)).flatten(2)
                x, _ = self.part(x, x, x)  # attended
                return self.fc(x.flatten(1))

        said = rf"'part' \(MultiheadAttention\) at {re.escape(line('attended'))} has no spiking .*{ATTENTION}"
        with pytest.raises(ConversionError, match=said):
            convert(Attending(), torch.rand(2, 1, 4, 4))

    def test_of_a_layer_that_multiplies_two_signals(self):
        class Squaring(Around):
            def __init__(self) -> None:
                super().__init__(nn.Bilinear(4, 4, 4))

            def forward(self, x):
                x = F.relu(self.conv(x))
                return self.fc(self.part(x, x).flatten(1))  # squared

        with pytest.raises(
            ConversionError, match=rf"'part' \(Bilinear\) at {re.escape(line('squared'))} has no spiking"
        ):
            convert(Squaring(), torch.rand(2, 1, 4, 4))

    def test_in_a_bare_sequence_do_not_point_into_torch(self):
        with pytest.raises(ConversionError, match=r"'1' \(GELU\)") as caught:
            convert(nn.Sequential(nn.Flatten(), nn.GELU(), nn.Linear(16, 3)), torch.rand(2, 1, 4, 4))
        assert "proxy.py" not in str(caught.value)

    def test_of_a_network_without_activations(self):
        with pytest.raises(
            ConversionError, match="no ReLU, ReLU6 or LeakyReLU, so nothing would spike: give a network"
        ):
            convert(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(2, 1, 4, 4))

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
        said = rf"Around cannot be traced by torch.fx .*{re.escape(str(HERE))}:\d+.* pass the inner network alone"
        with pytest.raises(ConversionError, match=said):
            convert(Around(branch), torch.rand(2, 1, 4, 4))

    @pytest.mark.parametrize("options", [{}, {"inherit": False}], ids=["inherited", "fresh"])
    def test_of_a_network_with_two_inputs(self, options):
        class Two(Sized):
            def forward(self, x, y):
                return super().forward(x + y)

        with pytest.raises(
            ConversionError, match=r"takes 2 inputs and returns a tensor: expected one tensor in.*wrap it"
        ):
            convert(Two(), torch.rand(2, 1, 4, 4), **options)

    @pytest.mark.parametrize("options", [{}, {"inherit": False}], ids=["inherited", "fresh"])
    def test_of_a_network_with_two_outputs(self, options):
        class Pair(Sized):
            def forward(self, x):
                logits = super().forward(x)
                return logits, logits

        with pytest.raises(ConversionError, match=r"takes 1 inputs and returns tuple: expected one tensor in.*wrap it"):
            convert(Pair(), torch.rand(2, 1, 4, 4), **options)

    def test_of_images_that_the_network_does_not_take(self):
        said = (
            r"does not accept the calibration images of shape \(2, 1, 9, 9\) \(mat1.*give images as it was trained on"
        )
        with pytest.raises(ConversionError, match=said):
            convert(Sized(), torch.rand(2, 1, 9, 9))


class TestMaxPooling:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
            self.body = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveMaxPool2d(1))

        def forward(self, x):
            return self.fc(self.body(self.conv(x)).flatten(1))

    def test_is_kept_and_over_spikes_a_logical_or(self):
        student, _ = convert(self.Pooled(), torch.rand(2, 1, 4, 4))
        _, features = student.observe(torch.rand(2, 1, 4, 4), ["body.0", "body.1"])
        spikes, pooled = features["body.0"], features["body.1"]
        (layer,) = student.neurons.values()
        assert set((pooled / layer.threshold[:, None, None]).unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(pooled[..., 0, 0] > 0, (spikes[..., :2, :2] > 0).flatten(3).any(-1))

    def test_becomes_average_pooling_where_asked(self):
        network = self.Pooled()
        student, _ = convert(network, torch.rand(2, 1, 4, 4), max_pool="average")
        _, features = student.observe(torch.rand(2, 1, 4, 4), ["body.0", "body.1", "body.2"])
        expected = features["body.0"][..., :2, :2].mean((-2, -1))
        torch.testing.assert_close(features["body.1"][..., 0, 0], expected)
        torch.testing.assert_close(features["body.2"][..., 0, 0], features["body.1"].mean((-2, -1)))
        assert isinstance(network.body[1], nn.MaxPool2d)

    def test_with_a_dilation_cannot_be_exchanged(self):
        layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2, 1, dilation=2), nn.Flatten(), nn.Linear(8, 3)
        with pytest.raises(ConversionError, match="'2' has a dilation of 2, average pooling has none: keep it"):
            convert(nn.Sequential(*layers), torch.rand(2, 1, 6, 6), max_pool="average")

    def test_as_a_function_cannot_be_exchanged(self):
        class Functional(Sized):
            def forward(self, x):
                x = F.max_pool2d(F.relu(self.conv(x)), 1)  # pooled
                return self.fc(x.flatten(1))

        with pytest.raises(
            ConversionError, match=rf"max pooling at {re.escape(line('pooled'))} .*write it as nn.MaxPool2d"
        ):
            convert(Functional(), torch.rand(2, 1, 4, 4), max_pool="average")
