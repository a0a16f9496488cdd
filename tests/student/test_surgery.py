import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from students import Own, Sized, can_learn, convert, line
from torch import Tensor, nn

from spikedistill.errors import ConversionError
from spikedistill.student.report import ConversionReport
from spikedistill.student.student import Student
from spikedistill.teacher.zoo import ZOO

HERE = Path(__file__)


def place(marker: str) -> str:
    """A pattern for the line of this file that ends with a marker."""
    return re.escape(line(marker, HERE))


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


class Growing(nn.Module):
    """Max pooling of what came so far, less what was passed on so far."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool, self.come, self.passed = pool, 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.come = self.come + x
        grown = self.pool(self.come) - self.passed
        self.passed = self.passed + grown
        return grown


def stepped(network: nn.Module, student: Student, report: ConversionReport, images: Tensor) -> Tensor:
    """The ANN itself with its activations replaced by neurons with a memory, called T times."""
    spiking = copy.deepcopy(network).eval()
    thresholds = {site.name: layer.threshold for site, layer in zip(report.sites, student.neurons.values())}
    for name, module in list(spiking.named_modules()):
        if isinstance(module, nn.ReLU):
            spiking.set_submodule(name, Accumulate(thresholds.pop(name)))
        elif isinstance(module, nn.MaxPool2d):
            spiking.set_submodule(name, Growing(module))
    assert not thresholds
    return torch.stack([spiking(images) for _ in range(report.timesteps)])


WITH_MODULES = [name for name in ZOO if not name.endswith("-a")]
"""Networks whose activations are modules; those of option A call a function."""


@pytest.mark.parametrize("name", WITH_MODULES)
def test_every_zoo_network_becomes_the_same_network_with_neurons(name):
    network = ZOO[name](classes=3, channels=1, width=4).double()
    images = torch.rand(3, 1, 9, 9, dtype=torch.float64)
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


class TestMaxPooling:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
            self.body = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveMaxPool2d(1))

        def forward(self, x):
            return self.fc(self.body(self.conv(x)).flatten(1))

    def test_of_each_step_by_itself_is_over_spikes_a_logical_or(self):
        student, _ = convert(self.Pooled(), torch.rand(2, 1, 4, 4), max_pool="or")
        features = student.observe(torch.rand(2, 1, 4, 4), ["body.0", "body.1"]).features
        spikes, pooled = features["body.0"], features["body.1"]
        (layer,) = student.neurons.values()
        assert set((pooled / layer.threshold[:, None, None]).unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(pooled[..., 0, 0] > 0, (spikes[..., :2, :2] > 0).flatten(3).any(-1))

    def test_becomes_average_pooling_where_asked(self):
        network = self.Pooled()
        student, _ = convert(network, torch.rand(2, 1, 4, 4), max_pool="average")
        features = student.observe(torch.rand(2, 1, 4, 4), ["body.0", "body.1", "body.2"]).features
        expected = features["body.0"][..., :2, :2].mean((-2, -1))
        torch.testing.assert_close(features["body.1"][..., 0, 0], expected)
        torch.testing.assert_close(features["body.2"][..., 0, 0], features["body.1"].mean((-2, -1)))
        assert isinstance(network.body[1], nn.MaxPool2d)

    def test_with_a_dilation_cannot_be_exchanged(self):
        layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2, 1, dilation=2), nn.Flatten(), nn.Linear(8, 3)
        with pytest.raises(
            ConversionError, match="'2' has a dilation of 2, and average pooling has none: keep max pooling"
        ):
            convert(nn.Sequential(*layers), torch.rand(2, 1, 6, 6), max_pool="average")

    @pytest.mark.parametrize("pool", [F.max_pool2d, torch.max_pool2d])
    @pytest.mark.parametrize("how", ["cumulative", "or", "average"])
    def test_as_a_function_is_that_as_a_module(self, pool, how):
        class Functional(Sized):
            def forward(self, x):
                return self.fc(pool(F.relu(self.conv(x)), 3, 1, padding=1).flatten(1))

        functional, images = Functional(), torch.rand(2, 1, 4, 4)
        layers = functional.conv, nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Flatten(), functional.fc
        found, expected = (
            convert(network, images, 5, max_pool=how)[0].eval() for network in (functional, nn.Sequential(*layers))
        )
        assert torch.equal(found(images), expected(images))

    def test_of_a_size_that_comes_from_the_input_is_refused_unless_each_step_is_pooled(self):
        class Whole(Sized):
            def forward(self, x):
                x = F.relu(self.conv(x))
                x = F.max_pool2d(x, x.size()[2:])  # whole
                return self.fc(x.expand(-1, -1, 4, 4).flatten(1))

        message = rf"max pooling at {place('whole')} takes its size from the input: write nn.AdaptiveMaxPool2d"
        for how in ("cumulative", "average"):
            with pytest.raises(ConversionError, match=message):
                convert(Whole(), torch.rand(2, 1, 4, 4), max_pool=how)
        convert(Whole(), torch.rand(2, 1, 4, 4), max_pool="or")

    def test_that_returns_indices_is_refused(self):
        layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True), nn.Flatten(), nn.Linear(8, 3)

        class Indexed(nn.Sequential):
            def forward(self, x):
                x, _ = self[2](self[1](self[0](x)))
                return self[4](self[3](x))

        with pytest.raises(ConversionError, match=r"max pooling '2' at .* returns indices"):
            convert(Indexed(*layers), torch.rand(2, 1, 6, 6))


class Sliced(Sized):
    """Names its nodes in another order than the neurons take them: slices before and after."""

    def forward(self, x):
        x = F.relu(self.conv(x)[:, :, :, :])
        return self.fc(F.relu(x[:, :, :, :] + x).flatten(1))


class TestNames:
    def test_of_nodes_outlive_pickling(self):
        student, _ = convert(Sliced(), torch.rand(2, 1, 4, 4))
        twin = pickle.loads(pickle.dumps(student))
        names, again = ([node.name for node in each.core.graph.nodes] for each in (student, twin))
        assert names == again
        given = torch.rand(2, 1, 4, 4)
        found, expected = (each.eval().observe(given, spikes=each.layers()).spikes for each in (twin, student))
        assert list(found) == ["relu", "relu_1"] and all(torch.equal(found[path], expected[path]) for path in found)

    def test_of_layers_are_those_of_the_report(self):
        network = torchvision.models.resnet18(num_classes=3)
        student, report = convert(network, torch.rand(2, 3, 32, 32))
        for each in (student, copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
            assert each.layers() == [site.name for site in report.sites]

    def test_the_graph_returns_output_and_states(self):
        student, _ = convert(Sized(), torch.rand(2, 1, 4, 4))
        output, states = student.core(torch.rand(2, 1, 4, 4), 2, 2, (None,), True)
        assert output.shape == (4, 3) and [state.shape for state in states] == [(2, 4, 4, 4)]
