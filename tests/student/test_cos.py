import pytest
import torch
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import LIF, Neuron, Reset
from spikedistill.neuron.layer import Spiking
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import INHERITED_NEURON, Conversion
from spikedistill.student.cos import _offset, _Offsets, run_with_offsets


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 4, 5))


def converted(ann, images, **options):
    return to_spiking(ann, Conversion(**options), calibration_images=images)[0].eval()


def counted(currents, steps):
    """The spikes of one neuron over all steps, after its calibration on the first of them."""
    student = converted(network(), torch.rand(8, 1, 8, 8), timesteps=len(currents))
    walk = _Offsets(student.core, (), ())
    walk.steps = steps
    layer = Spiking(INHERITED_NEURON, 1.0)
    spikes, _ = walk.fire(layer, torch.tensor(currents).view(-1, 1), len(currents), 1, None, False)
    return spikes.flatten().tolist()


@pytest.mark.parametrize(
    "currents, plain, calibrated",
    [
        ([1.0, 0.0, -1.0, 0.0], 1, 0),  # the spike came before the inhibition: 0.5 + 0 asks for none
        ([0.2, 2.5, 0.0], 2, 3),  # after two steps 2.2 thresholds are left, so the first step fires too
        ([0.6, 0.7, 0.7], 2, 2),  # nothing to shift
        ([3.0, -3.2, 0.0], 1, 0),  # the only spike began at 3.5, and one threshold less would not have stopped it
    ],
)
def test_spikes_by_hand(currents, plain, calibrated):
    layer = Spiking(INHERITED_NEURON, 1.0)
    assert float(layer(torch.tensor(currents).view(-1, 1), len(currents))[0].sum()) == plain
    assert sum(counted(currents, len(currents) - 1)) == calibrated


def test_the_shift_is_one_threshold_or_what_it_takes():
    potentials = torch.tensor([[1.5, 3.5, 0.7, 0.2, 0.5], [0.5, 0.1, 3.2, 0.4, 0.9]])
    fired = potentials >= 1
    left = torch.tensor([-0.5, -0.1, 2.2, 0.4, -0.3])
    torch.testing.assert_close(_offset(potentials, fired, left), torch.tensor([-1.0, -2.501, 1.0, 0.0, 0.0]))
    ever = torch.ones(2, 1)
    assert torch.isfinite(_offset(2 * ever, ever > 0, 2 * ever[0])).all()


def test_a_constant_current_needs_no_offset():
    images = torch.rand(6, 1, 8, 8)
    ann = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
    student = converted(ann, images, timesteps=4, rule="max")
    with torch.no_grad():
        torch.testing.assert_close(run_with_offsets(student, images, 4), student(images))


def test_counts_come_nearer_to_those_of_a_constant_current():
    currents = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0)) + 0.3
    ideal = (currents.sum(0) + 0.5).floor().clamp(0, 8)
    plain = Spiking(INHERITED_NEURON, 1.0, "reference")(currents.view(-1, 1), 8)[0].view(8, -1).sum(0)
    walk = _Offsets(converted(network(), torch.rand(8, 1, 8, 8)).core, (), ())
    walk.steps = 8
    found = walk.fire(Spiking(INHERITED_NEURON, 1.0, "reference"), currents.view(-1, 1), 8, 1, None, False)[0]
    before, after = ((one - ideal).abs().mean() for one in (plain, found.view(8, -1).sum(0)))
    assert after < 0.6 * before


def test_more_steps_of_calibration_than_steps():
    images = torch.rand(3, 1, 8, 8)
    student = converted(network(), images, timesteps=2)
    assert run_with_offsets(student, images, 4).shape == (2, 3, 5)


@pytest.mark.parametrize("neuron", [LIF, Neuron(reset=Reset.ZERO), Neuron(levels=2)])
def test_other_neurons_are_refused(neuron):
    images = torch.rand(3, 1, 8, 8)
    student = converted(network(), images, neuron=neuron)
    with pytest.raises(ConfigError, match="Offsets are for neurons without leak"):
        run_with_offsets(student, images, 4)
    with pytest.raises(ConfigError, match="must be 1 or more"):
        run_with_offsets(converted(network(), images), images, 0)
