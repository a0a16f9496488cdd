"""Synaptic operations with a gradient: the counts of ``evaluate.operations``, and what the gradient is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.evaluate.operations import operations
from spikedistill.neuron.dynamics import Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import Conversion
from spikedistill.student.synapses import fan_out
from spikedistill.teacher.load import Architecture

pytestmark = pytest.mark.usefixtures("without_compiler")


class Pooled(nn.Module):
    """Layers of neurons with an average pooling, a sum, a concatenation and a function with weights behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(5, 8, 3, 3) / 6)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        y = F.avg_pool2d(F.relu(self.second(x)) + x, 2)
        y = torch.cat([y, F.max_pool2d(x, 2)], 1)
        return self.last(torch.flatten(F.relu(F.conv2d(y, self.weight, stride=2)).mean((2, 3)), 1))


def student_of(network, timesteps, levels, size=16, **more):
    network.eval()
    images = torch.rand(12, 3, size, size)
    neuron = Neuron(levels=levels, initial=0.5, learn_threshold=True)
    return to_spiking(network, Conversion(timesteps=timesteps, neuron=neuron, **more), calibration_images=images)[
        0
    ], images


def measured(student, images):
    with operations(student.eval()) as counts, torch.no_grad():
        student(images)
    return counts.per_image()["acs"] + counts.per_image()["macs"]


@pytest.mark.parametrize("timesteps, levels", [(4, 1), (1, 4), (2, 2), (1, 1)])
@pytest.mark.parametrize("network", ["resnet20", "vgg9", "pooled", "wrn16-2"])
def test_agree_with_the_measured_ones(network, timesteps, levels):
    torch.manual_seed(0)
    ann = Pooled() if network == "pooled" else Architecture(network, 5, 3, 4).build()
    student, images = student_of(ann, timesteps, levels)
    found = student.eval().observe(images, operations=True).operations
    assert found.shape == (timesteps, len(images)) and found.requires_grad
    assert float(found.detach().sum(0).mean()) == pytest.approx(measured(student, images), rel=0.01)


@pytest.mark.parametrize("max_pool", ["or", "average"])
def test_agree_with_the_measured_ones_for_every_pooling(max_pool):
    torch.manual_seed(0)
    student, images = student_of(Architecture("vgg9", 5, 3, 4).build(), 4, 1, max_pool=max_pool)
    found = student.eval().observe(images, operations=True).operations
    assert float(found.detach().sum(0).mean()) == pytest.approx(measured(student, images), rel=0.01)


@pytest.mark.parametrize("timesteps, levels", [(2, 4), (1, 3)])
@pytest.mark.parametrize("network", ["vgg9", "pooled"])
def test_agree_with_the_measured_ones_for_event_frames(network, timesteps, levels):
    torch.manual_seed(0)
    ann = Pooled() if network == "pooled" else Architecture(network, 5, 3, 4).build()
    student, images = student_of(ann, timesteps, levels, coding=FrameCoding())
    frames = torch.poisson(0.4 * torch.rand(timesteps, *images.shape))
    found = student.eval().observe(frames, operations=True).operations
    assert found.shape == (timesteps, len(images))
    assert float(found.detach().sum(0).mean()) == pytest.approx(measured(student, frames), rel=0.01)


def test_agree_with_the_measured_ones_where_spikes_are_scaled():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(400, 3)

        def forward(self, x):
            x = F.relu(self.first(x))
            x = F.relu(self.second(x * 0.5)) / 3
            return self.last(torch.flatten(x[..., :10, :10], 1))

    torch.manual_seed(0)
    student, images = student_of(Scaled(), 1, 4)
    found = student.eval().observe(images, operations=True).operations
    assert float(found.detach().sum(0).mean()) == pytest.approx(measured(student, images), rel=0.01)
    slopes = torch.autograd.grad(found.sum(), [student.core.first.bias, student.core.second.bias])
    assert all(slope.any() for slope in slopes)


def test_connections_are_those_of_the_weights_as_they_are_now():
    torch.manual_seed(0)
    ann = Pooled()
    with torch.no_grad():
        ann.second.weight[:2] = 0
        ann.weight[:, 3] = 0
    student, images = student_of(ann, 2, 2)
    with operations(student.eval()) as counts, torch.no_grad():
        for change in (0.0, 0.1):
            for weight in (student.core.second.weight, student.core.weight):
                weight += change
            student(images)
            found = student.observe(images, operations=True).operations
            copied = copy.deepcopy(student)  # has counted nothing yet
            assert torch.equal(found, copied.observe(images, operations=True).operations)
    both = counts.per_image()["acs"] + counts.per_image()["macs"]
    assert both > 1.05 * measured(student_of(ann, 2, 2)[0], images)


def test_the_other_outputs_are_the_same():
    student, images = student_of(Pooled(), 2, 1)
    (layer, *_), path = student.layers(), "second"
    usual, counted = (student.observe(images, [path], spikes=[layer], operations=asked) for asked in (False, True))
    assert usual.operations is None and torch.equal(usual.logits, counted.logits)
    assert torch.equal(usual.features[path], counted.features[path])
    assert torch.equal(usual.spikes[layer], counted.spikes[layer])


def test_the_gradient_of_a_count_is_its_connections():
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2))
    student, _ = student_of(ann, 1, 4, size=4)
    (layer,), images = student.layers(), torch.rand(5, 3, 4, 4)
    answer = student.observe(images, potentials=[layer], operations=True)
    charged = answer.potentials[layer][0]
    inside = (charged >= 0.5) & (charged <= 4.5)
    threshold = student.neurons[layer].threshold.detach()
    slopes = inside * fan_out(ann[2], (2, 4, 4)) / threshold.view(-1, 1, 1)
    (found,) = torch.autograd.grad(answer.operations.sum(), student.core.get_submodule("0").bias)
    torch.testing.assert_close(found, slopes.sum((0, 2, 3)).float())


@pytest.mark.parametrize("gradient", ["rate", "quantised"])
def test_a_gradient_without_spikes_is_refused(gradient):
    student, images = student_of(Pooled(), 2, 1)
    student.gradient = gradient
    with pytest.raises(ConfigError, match="no operations"):
        student.train().observe(images, operations=True)
