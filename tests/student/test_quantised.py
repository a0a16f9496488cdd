"""``gradient="quantised"``: T steps of D levels are trained as one step of T D levels, and run as T steps."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import cumulative
from spikedistill.neuron.dynamics import LIF, Neuron, Reset, run
from spikedistill.neuron.layer import Spiking
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import INHERITED_NEURON, Conversion

ONE = torch.ones(())


def clip_floor_shift(x: Tensor, threshold: Tensor, levels: int) -> Tensor:
    """The activation of QCFS (arXiv 2303.04347, equation 10) with the gradients that its authors compute."""
    counts = (x / threshold).clamp(0, 1) * levels
    whole = counts + ((counts + 0.5).floor() - counts).detach()
    return whole * (threshold / levels)


def layer(threshold=1.0, levels=1, backend="reference", **options):
    return Spiking(dataclasses.replace(INHERITED_NEURON, levels=levels, **options), threshold, backend)


class TestOneStep:
    @settings(max_examples=60)
    @given(st.integers(1, 12), st.integers(-40, 200), st.sampled_from([0.25, 1.0, 4.0]))
    def test_is_what_a_neuron_answers_to_a_constant_current(self, steps, eighths, threshold):
        # currents between the stairs, in sixteenths of a level
        current = torch.tensor([[(2 * eighths + 1) * threshold / (16 * steps)]])
        spikes, _ = run(current, None, Neuron(initial=0.5), ONE, ONE * threshold, steps)
        expected = spikes.float().mean(0) if len(spikes) == steps else spikes.float()
        torch.testing.assert_close(layer(threshold).in_one_step(current, steps)[0], expected.flatten())

    @pytest.mark.parametrize("levels, steps", [(1, 4), (2, 2), (4, 1)])
    def test_rounds_up_at_ties(self, levels, steps):
        stairs = torch.tensor([[0.124, 0.125, 0.375, 0.625, 0.874, 0.875, 5.0, -1.0]])
        made = layer(1.0, levels).in_one_step(stairs * levels, steps)
        assert (made / levels).tolist() == [[0.0, 0.25, 0.5, 0.75, 0.75, 1.0, 1.0, 0.0]]

    def test_hands_gradients_straight_through_inside_its_range(self):
        x = torch.tensor([[-1.0, 0.1, 0.9, 1.9, 2.4]], requires_grad=True)
        layer(2.0).in_one_step(x, 4).sum().backward()
        assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]

    def test_the_gradient_of_the_threshold_is_the_rounding_error_over_it(self):
        # inside: (rounded - x) / threshold; above: 1; below: 0
        for x, expected in ((0.9, (1.0 - 0.9) / 2), (0.1, (0.0 - 0.1) / 2), (5.0, 1.0), (-3.0, 0.0)):
            made = layer(2.0, learn_threshold=True)
            made.in_one_step(torch.tensor([[x]]), 4).sum().backward()
            assert float(made.threshold.grad) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("backend", ["reference", "fused"])
    @pytest.mark.parametrize("steps", [1, 3, 4])
    def test_is_the_activation_of_qcfs_with_its_gradients(self, steps, backend):
        torch.manual_seed(0)
        made = layer(torch.rand(6) + 0.5, backend=backend, learn_threshold=True)
        ours, theirs = (torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        for x in (ours, theirs):
            x.requires_grad_()
        weights, found = torch.randn(5, 6, 3, 3), []
        for one, value in (
            (ours, made.in_one_step(ours, steps)),
            (theirs, clip_floor_shift(theirs, made.heights(theirs), steps)),
        ):
            made.threshold.grad = None
            (value * weights).sum().backward()
            found.append((value.detach(), one.grad, made.threshold.grad))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)

    def test_keeps_number_format_and_memory_order(self):
        current = torch.rand(2, 3, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last)
        made = layer(torch.ones(3)).in_one_step(current, 4)
        assert made.dtype == torch.bfloat16 and made.is_contiguous(memory_format=torch.channels_last)


def learner(*layers, **options):
    student, _ = to_spiking(nn.Sequential(*layers), Conversion(**options), calibration_images=torch.rand(32, 1, 4, 4))
    for one in student.neurons.values():
        one.backend = "reference"
    student.gradient = "quantised"
    return student


class TestStudent:
    @pytest.mark.parametrize("timesteps, levels", [(4, 1), (2, 2), (1, 4), (3, 2)])
    def test_of_one_layer_answers_as_its_neurons_do(self, timesteps, levels):
        neuron = dataclasses.replace(INHERITED_NEURON, levels=levels)
        layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        student = learner(*layers, timesteps=timesteps, neuron=neuron)
        images = torch.rand(8, 1, 4, 4)
        trained = student.train()(images)
        spiking = student.eval()(images)
        assert trained.shape == (1, 8, 3) and spiking.shape == (timesteps, 8, 3)
        torch.testing.assert_close(trained[0], cumulative(spiking)[-1], atol=1e-5, rtol=1e-4)

    def test_trains_every_weight_and_threshold(self):
        neuron = Neuron(initial=0.5, learn_threshold=True)
        layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        student = learner(*layers, neuron=neuron).train()
        student(torch.rand(8, 1, 4, 4)).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())

    def test_trains_a_student_of_one_step_as_the_exact_gradient_does(self):
        # T = 1, D = 4: there is one step anyway
        neuron = dataclasses.replace(INHERITED_NEURON, levels=4, learn_threshold=True)
        layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        student, found = learner(*layers, timesteps=1, neuron=neuron).train(), []
        images = torch.rand(8, 1, 4, 4)
        for student.gradient in ("exact", "quantised"):
            student.zero_grad()
            student(images).square().sum().backward()
            found.append([parameter.grad.clone() for parameter in student.parameters()])
        for exact, quantised in zip(*found):
            torch.testing.assert_close(quantised, exact)

    def test_observes_features_without_time(self):
        student = learner(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3), timesteps=4).train()
        answer = student.observe(torch.rand(5, 1, 4, 4), ["1"])
        logits, features = answer.logits, answer.features
        assert logits.shape == (1, 5, 3) and features["1"].shape == (1, 5, 6, 2, 2)

    def test_refuses_frames(self):
        layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        student = learner(*layers, timesteps=4, coding=FrameCoding()).train()
        with pytest.raises(ConfigError, match=r"trains all time steps as one: give images \(no frames\)"):
            student(torch.rand(4, 5, 1, 4, 4))

    @pytest.mark.parametrize("neuron", [LIF, Neuron(initial=0.5, reset=Reset.ZERO), Neuron()], ids=["lif", "zero", "0"])
    def test_refuses_neurons_that_answer_otherwise(self, neuron):
        student = learner(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3), neuron=neuron).train()
        with pytest.raises(
            ConfigError,
            match=r"needs IF neurons with a fixed initial potential of 0\.5 and reset by subtraction",
        ):
            student(torch.rand(4, 1, 4, 4))

    def test_follows_the_skip_connections_of_a_residual_network(self):
        class Skip(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
                self.head = nn.Linear(64, 3)

            def forward(self, x):
                x = self.first(x)
                return self.head(torch.relu(x + self.second(torch.relu(x))).flatten(1))

        ann = Skip()
        student, _ = to_spiking(
            ann,
            Conversion(timesteps=512, rule="max", neuron=INHERITED_NEURON),
            calibration_images=torch.rand(16, 1, 4, 4),
        )
        student.gradient = "quantised"
        images = torch.rand(4, 1, 4, 4)
        # with many levels it is the ANN, as far as no activation is larger than those it was calibrated on
        torch.testing.assert_close(student.train()(images)[0], ann(images), atol=0.05, rtol=0.05)
