"""What is no number stays so through a whole student, in every way of running it."""

import dataclasses

import pytest
import torch
from torch import nn

from spikedistill.neuron.dynamics import IF, LIF, PLIF
from spikedistill.neuron.layer import Spiking
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import INHERITED_NEURON, Conversion


def student_of(neuron=INHERITED_NEURON):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    student, _ = to_spiking(network, Conversion(timesteps=3, neuron=neuron), calibration_images=torch.rand(20, 1, 6, 6))
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student


def broken_images(value):
    images = torch.rand(3, 1, 6, 6)
    images[1] = value
    return images


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
class TestImages:
    @pytest.mark.parametrize("gradient", ["exact", "rate", "quantised"])
    @pytest.mark.parametrize("recompute", ["nothing", "neurons", "stages"])
    def test_give_logits_and_gradients_that_are_nan_and_leave_others_alone(self, value, gradient, recompute):
        student, images = student_of(), broken_images(value)
        student.gradient, student.recompute = gradient, recompute
        logits = student(images)
        assert logits.isnan().all(-1).tolist() == [[False, True, False]] * len(logits)
        whole = images.clone()
        whole[1] = 0.5
        torch.testing.assert_close(logits[:, [0, 2]], student(whole)[:, [0, 2]], rtol=1e-5, atol=1e-6)
        logits.sum().backward()
        assert not student.core.get_submodule("10").weight.grad.isfinite().all()

    @pytest.mark.parametrize("neuron", [IF, LIF, PLIF], ids=["if", "lif", "plif"])
    def test_give_a_stream_that_is_nan(self, value, neuron):
        student, images, state = student_of(neuron).eval(), broken_images(value), None
        for _ in range(3):
            answer, state = student.step(images, state)
            assert answer.isnan().all(-1).tolist() == [False, True, False]
        answer, _ = student.step(torch.rand(3, 1, 6, 6), state)
        assert answer.isnan().all(-1).tolist() == [False, True, False]  # what is in the state stays there


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_broken_weight_breaks_every_answer(value):
    student = student_of().eval()
    student.core.get_submodule("2").weight.data[0, 0, 0, 0] = value
    assert student(torch.rand(2, 1, 6, 6)).isnan().any()


def test_bfloat16_keeps_it_too():
    layer = Spiking(IF, 1.0, "reference")
    spikes, _ = layer(torch.tensor([[0.6, torch.nan, torch.inf]], dtype=torch.bfloat16).repeat(2, 1), 2)
    assert spikes.dtype == torch.bfloat16 and spikes.tolist()[1][0] == 1.0 and spikes[:, 1:].isnan().all()


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_all_steps_trained_as_one_have_no_level_for_it(backend):
    currents = torch.tensor([[0.3, torch.nan, torch.inf, -torch.inf]])
    layer = Spiking(dataclasses.replace(IF, initial=0.5), 1.0, backend)
    assert layer.in_one_step(currents, 4).isnan().tolist() == [[False, True, True, True]]
