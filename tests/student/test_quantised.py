import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import cumulative
from spikedistill.neuron.dynamics import LIF, Neuron, Reset, run
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import Frames
from spikedistill.student.conversion import ROUNDING, Conversion
from spikedistill.student.quantised import clip_floor_shift

ONE = torch.ones(())


class TestClipFloorShift:
    @settings(max_examples=60)
    @given(st.integers(1, 12), st.integers(-40, 200), st.sampled_from([0.25, 1.0, 4.0]))
    def test_is_what_a_neuron_answers_to_a_constant_current(self, levels, eighths, threshold):
        # currents between the stairs, in sixteenths of a level
        current = torch.tensor([[(2 * eighths + 1) * threshold / (16 * levels)]])
        spikes, _ = run(current, None, Neuron(initial=0.5), ONE, ONE * threshold, levels)
        expected = spikes.float().mean(0) if len(spikes) == levels else spikes.float()
        torch.testing.assert_close(clip_floor_shift(current, ONE * threshold, levels)[0], expected.flatten())

    def test_hands_gradients_straight_through_inside_its_range(self):
        x = torch.tensor([-1.0, 0.1, 0.9, 1.9, 2.4], requires_grad=True)
        clip_floor_shift(x, torch.tensor(2.0), 4).sum().backward()
        assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]

    def test_the_gradient_of_the_threshold_is_the_rounding_error_over_it(self):
        # inside: (rounded - x) / threshold; above: 1; below: 0
        threshold = torch.tensor(2.0, requires_grad=True)
        for x, expected in ((0.9, (1.0 - 0.9) / 2), (0.1, (0.0 - 0.1) / 2), (5.0, 1.0), (-3.0, 0.0)):
            (slope,) = torch.autograd.grad(clip_floor_shift(torch.tensor(x), threshold, 4), threshold)
            assert float(slope) == pytest.approx(expected, abs=1e-6)

    def test_keeps_the_number_format(self):
        assert clip_floor_shift(torch.ones(2, dtype=torch.bfloat16), ONE, 4).dtype == torch.bfloat16


def learner(*layers, **options):
    student, _ = to_spiking(nn.Sequential(*layers), Conversion(**options), calibrate=torch.rand(32, 1, 4, 4))
    for layer in student.neurons.values():
        layer.backend = "reference"
    student.gradient = "quantised"
    return student


class TestStudent:
    def test_of_one_layer_answers_as_its_neurons_do(self):
        student = learner(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3), timesteps=4)
        images = torch.rand(8, 1, 4, 4)
        trained = student.train()(images)
        spiking = student.eval()(images)
        assert trained.shape == (1, 8, 3) and spiking.shape == (4, 8, 3)
        torch.testing.assert_close(trained[0], cumulative(spiking)[-1], atol=1e-5, rtol=1e-4)

    def test_trains_every_weight_and_threshold(self):
        neuron = Neuron(initial=0.5, learn_threshold=True)
        layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        student = learner(*layers, neuron=neuron).train()
        student(torch.rand(8, 1, 4, 4)).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())

    def test_observes_features_without_time(self):
        student = learner(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3), timesteps=4).train()
        answer = student.observe(torch.rand(5, 1, 4, 4), ["1"])
        logits, features = answer.logits, answer.features
        assert logits.shape == (1, 5, 3) and features["1"].shape == (1, 5, 6, 2, 2)

    def test_refuses_frames(self):
        layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        student = learner(*layers, timesteps=4, coding=Frames()).train()
        with pytest.raises(ConfigError, match=r"has no time steps: give images \(no frames\)"):
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
            ann, Conversion(timesteps=512, rule="max", neuron=ROUNDING), calibrate=torch.rand(16, 1, 4, 4)
        )
        student.gradient = "quantised"
        images = torch.rand(4, 1, 4, 4)
        # with many levels the stand-in is the ANN, as far as no activation is larger than those it was calibrated on
        torch.testing.assert_close(student.train()(images)[0], ann(images), atol=0.05, rtol=0.05)
