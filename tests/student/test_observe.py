import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikedistill.answer import Answer, Learner
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import IF, LIF, Neuron, step
from spikedistill.neuron.layer import Spiking
from spikedistill.neuron.surrogate import Rectangle
from spikedistill.student import student as student_module
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import INHERITED_NEURON, Conversion
from spikedistill.teacher.zoo import ZOO

LEARNED = dataclasses.replace(INHERITED_NEURON, learn_threshold=True)


class Net(nn.Module):
    """Seven neurons, functional and shared ones among them, so that stages can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()
        self.body = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        x = self.act(self.stem(x))
        for layer in self.body:
            x = F.relu(layer(x)) + x
        return self.fc(self.act(x).flatten(1))


def convert(network=None, **fields):
    fields = {"timesteps": 4, **fields}
    given = torch.rand(8, 1, 4, 4)
    student, report = to_spiking(network or Net(), Conversion(**fields), calibration_images=given)
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student, report


images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(2))


def test_a_student_is_a_learner():
    student, report = convert()
    assert isinstance(student, Learner)
    assert student.layers() == [site.name for site in report.sites]
    assert student.layers() == ["act", "relu", "relu_1", "relu_2", "relu_3", "relu_4", "act#2"]


class TestSpikes:
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_are_exact_counts(self, per_channel, dtype):
        student, _ = convert(per_channel=per_channel, neuron=LEARNED)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            answer = student.eval().observe(images, ["act"], spikes=["act", "act#2"])
        for path in ("act", "act#2"):
            assert answer.spikes[path].shape == (4, 3, 4, 4, 4)
            assert set(answer.spikes[path].unique().tolist()) == {0.0, 1.0}
        assert answer.spikes["act#2"].dtype == dtype

    def test_get_the_gradient_of_the_spike_and_not_of_its_height(self):
        # a flat surrogate of 0 at these currents: nothing of the threshold is left
        class Far(nn.Module):
            def forward(self, x):
                return F.relu(x).flatten(1)

        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), Far(), nn.Linear(5, 3))
        neuron = Neuron(threshold=0.5, learn_threshold=True, surrogate=Rectangle(width=1e-6), detach_reset=True)
        student, _ = to_spiking(network, Conversion(timesteps=3, neuron=neuron, inherit=False))
        (layer,) = student.neurons.values()
        layer.backend = "reference"
        answer = student.train().observe(images, spikes=student.layers())
        (count,) = answer.spikes.values()
        (grad,) = torch.autograd.grad(count.sum(), layer.threshold)
        assert count.any() and abs(float(grad)) < 1e-4

    def test_have_the_gradient_of_dynamics(self):
        student, _ = convert(nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)))
        (layer,) = student.neurons.values()
        weight = student.core.get_submodule("1").weight
        counts = student.train().observe(images, spikes=["2"]).spikes["2"]
        current = student.core.get_submodule("1")(images.flatten(1)) / layer.threshold
        potential, by_hand = torch.full_like(current, 0.5), []
        for _ in range(4):
            spikes, potential = step(current, potential, layer.neuron, torch.ones(()))
            by_hand.append(spikes)
        assert torch.equal(counts, torch.stack(by_hand))
        (found,) = torch.autograd.grad(counts.square().sum(), weight)
        (expected,) = torch.autograd.grad(torch.stack(by_hand).square().sum(), weight)
        torch.testing.assert_close(found, expected)

    def test_by_the_rate_based_gradient_are_their_mean_at_every_step(self):
        student, _ = convert(neuron=LIF)
        exact = student.train().observe(images, spikes=["relu_2"]).spikes["relu_2"]
        student.gradient = "rate"
        found = student.observe(images, spikes=["relu_2"]).spikes["relu_2"]
        assert found.requires_grad and found.stride(0) == 0
        torch.testing.assert_close(found, exact.mean(0, keepdim=True).expand(4, 3, 4, 4, 4))

    def test_of_a_learned_threshold_get_no_gradient_by_rates(self):
        student, _ = convert(neuron=dataclasses.replace(LIF, learn_threshold=True))
        student.gradient = "rate"
        student.train().observe(images, spikes=student.layers()).spikes["relu_2"].sum().backward()
        assert all(layer.threshold.grad is None for layer in student.neurons.values())

    @pytest.mark.parametrize("recompute", ["neurons", "stages"])
    def test_and_features_are_those_of_a_pass_that_is_computed_again(self, recompute):
        kept, _ = convert(neuron=LEARNED)
        again = copy.deepcopy(kept)
        again.recompute = recompute
        answers = []
        for student in (kept, again):
            answer = student.train().observe(images, ["stem", "body.2", "act", "fc"], spikes=student.layers())
            loss = sum(spikes.mean() for spikes in answer.spikes.values()) + answer.logits.square().mean()
            (loss + sum(feature.square().mean() for feature in answer.features.values())).backward()
            answers.append(answer)
        for kind in ("features", "spikes"):
            for path, expected in getattr(answers[0], kind).items():
                assert torch.equal(getattr(answers[1], kind)[path], expected)
        for expected, found in zip(kept.parameters(), again.parameters()):
            torch.testing.assert_close(found.grad, expected.grad)


class TestPotentials:
    def test_are_those_before_the_reset_in_thresholds(self):
        student, _ = convert(per_channel=True)
        answer = student.eval().observe(images, spikes=["relu_1"], potentials=["relu_1"])
        potentials, spikes = answer.potentials["relu_1"], answer.spikes["relu_1"]
        assert potentials.shape == spikes.shape == (4, 3, 4, 4, 4)
        assert torch.equal((potentials >= 1).float(), spikes)
        torch.testing.assert_close(answer.logits, student(images))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize(
        "neuron", [IF, LIF, dataclasses.replace(LEARNED, learn_initial=True)], ids=["if", "lif", "l"]
    )
    def test_add_up_to_what_came_in_less_what_was_spiked(self, neuron, layout):
        student, _ = convert(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), neuron=neuron
        )
        given = images.to(memory_format=layout)
        student = student.to(memory_format=layout)
        answer = student.train().observe(given, ["0"], spikes=["1"], potentials=["1"])
        (layer,) = student.neurons.values()
        current = answer.features["0"] / layer.heights(answer.features["0"][0])
        before = torch.full_like(current[0], neuron.initial)
        for t in range(4):
            charged = float(layer.leak) * before + current[t]
            torch.testing.assert_close(answer.potentials["1"][t], charged)
            before = charged - answer.spikes["1"][t]
        answer.potentials["1"].sum().backward()
        assert student.core.get_submodule("0").weight.grad.abs().sum() > 0

    def test_of_frames_too(self):
        student, _ = convert(coding=FrameCoding())
        answer = student.eval().observe(torch.rand(4, 3, 1, 4, 4), potentials=["act"], spikes=["act"])
        assert torch.equal((answer.potentials["act"] >= 1).float(), answer.spikes["act"])

    def test_of_a_fused_layer_are_those_of_the_reference(self):
        student, _ = convert()
        fused = copy.deepcopy(student)
        for layer in fused.neurons.values():
            layer.backend = "fused"
        found, expected = (each.eval().observe(images, potentials=["act"]) for each in (fused, student))
        assert torch.equal(found.potentials["act"], expected.potentials["act"])
        torch.testing.assert_close(found.logits, expected.logits)


class TestWhatIsNotAskedFor:
    def test_costs_nothing(self, monkeypatch):
        student, _ = convert()
        expected = student.eval()(images)
        walks, heights, runs = [], [], []
        monkeypatch.setattr(student_module, "PotentialRecorder", lambda *_: walks.append(1))
        monkeypatch.setattr(Spiking, "heights", lambda *_: heights.append(1))
        for layer in student.neurons.values():
            layer.register_forward_hook(lambda *_: runs.append(1))
        answer = student.observe(images)
        assert torch.equal(answer.logits, expected) and answer == Answer(answer.logits)
        assert not walks and not heights and len(runs) == 7

    def test_features_alone_make_one_pass_without_heights(self, monkeypatch):
        student, _ = convert()
        heights, runs = [], []
        monkeypatch.setattr(Spiking, "heights", lambda *_: heights.append(1))
        for layer in student.neurons.values():
            layer.register_forward_hook(lambda *_: runs.append(1))
        answer = student.eval().observe(images, ["act", "fc"])
        assert list(answer.features) == ["act", "fc"] and not answer.spikes and not answer.potentials
        assert not heights and len(runs) == 7

    def test_the_student_is_not_changed(self):
        student, _ = convert()
        code, kept = student.core.code, dict(vars(student))
        student.eval().observe(images, ["act"], spikes=["relu"], potentials=["relu_2"])
        assert student.core.code == code
        assert {name for name, value in vars(student).items() if value is not kept.get(name)} <= {"training"}


class TestRefusals:
    NEEDS = ("every_step", "spikes", "features", "potentials")

    def refusal(self, student, *needs):
        return student.refusal(**{name: name in needs for name in self.NEEDS})

    @pytest.mark.parametrize("asked", [{"spikes": ["act"]}, {"potentials": ["act"]}], ids=["spikes", "potentials"])
    def test_the_quantised_stand_in_has_neither(self, asked):
        student, _ = convert()
        student.gradient = "quantised"
        with pytest.raises(
            ConfigError, match=r"gradient \(='quantised'\) trains all steps as one.*use gradient='exact'"
        ):
            student.train().observe(images, **asked)
        assert student.observe(images, ["act"]).features["act"].shape == (1, 3, 4, 4, 4)
        assert student.eval().observe(images, **asked).logits.shape == (4, 3, 3)

    def test_rates_have_no_potentials(self):
        student, _ = convert()
        student.gradient = "rate"
        with pytest.raises(
            ConfigError, match=r"gradient \(='rate'\) computes firing rates only, no potentials: use gradient="
        ):
            student.train().observe(images, potentials=["act"])
        with torch.no_grad():
            assert student.observe(images, potentials=["act"]).potentials["act"].shape == (4, 3, 4, 4, 4)

    def test_what_is_computed_again_has_no_potentials(self):
        student, _ = convert()
        student.recompute = "stages"
        with pytest.raises(ConfigError, match=r"recompute \(='stages'\) keeps no potentials and no operations: use"):
            student.train().observe(images, potentials=["act"])
        assert student.eval().observe(images, potentials=["act"]).potentials["act"].shape == (4, 3, 4, 4, 4)

    def test_an_unknown_layer_is_refused_with_the_nearest(self):
        student, _ = convert()
        for asked in ({"spikes": ["act#3"]}, {"potentials": ["act#3"]}):
            with pytest.raises(ConfigError, match=r"no layer of neurons 'act#3'\. Did you mean 'act#2'"):
                student.observe(images, **asked)

    def test_are_known_before(self):
        student, _ = convert()
        assert self.refusal(student, *self.NEEDS) == ""
        student.recompute = "neurons"
        assert "recompute" in self.refusal(student, "potentials")
        assert self.refusal(student, "every_step", "spikes", "features") == ""
        student.gradient = "rate"
        assert self.refusal(student, "every_step") == self.refusal(student, "spikes", "features") == ""
        for needs in (("every_step", "spikes"), ("every_step", "features"), ("potentials",)):
            assert "gradient (='rate')" in self.refusal(student, *needs)
        student.gradient = "quantised"
        assert self.refusal(student, "features") == ""
        for need in ("every_step", "spikes", "potentials"):
            assert "gradient (='quantised')" in self.refusal(student, need)


def test_printing_names_time_steps_and_coding():
    student, _ = to_spiking(ZOO["resnet20"](width=4), Conversion(inherit=False, timesteps=7, coding=FrameCoding()))
    assert "timesteps=7" in repr(student) and "coding=FrameCoding()" in repr(student)
