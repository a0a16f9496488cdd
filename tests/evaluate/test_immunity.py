import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from spikedistill.data.noise import CORRUPTIONS, SEVERITIES
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import predict
from spikedistill.evaluate.immunity import (
    ATTACKS,
    FAULTS,
    Score,
    area,
    attack,
    fault,
    immunity,
    mean_corruption_error,
)
from spikedistill.neuron.dynamics import IF
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import Frames
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Teacher


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def trio():
    teacher = Teacher(network(), (0.5,), (0.25,))
    student, _ = to_spiking(teacher, Conversion(timesteps=3), calibrate=torch.rand(16, 1, 8, 8))
    for layer in student.neurons.values():
        layer.backend = "reference"
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=Generator().manual_seed(2))
    with torch.no_grad():
        labels = teacher(images.float() / 255).argmax(-1)
    return teacher, student.eval(), images, labels


def test_every_perturbation_is_measured_and_nothing_is_changed(trio):
    teacher, student, images, labels = trio
    before = copy.deepcopy(student.state_dict())
    scores = immunity({"ann": teacher, "snn": student}, images, labels, attacked=20)
    again = immunity({"ann": teacher, "snn": student}, images, labels, attacked=20)
    assert scores == again
    found = {(score.network, score.name) for score in scores}
    pixels = [name for name, corruption in CORRUPTIONS.items() if corruption.kind != "event"]
    assert found >= {("snn", name) for name in (*pixels, *FAULTS, *ATTACKS, "clean")}
    assert ("ann", "weight-noise") in found and ("ann", "stuck-neurons") not in found
    assert next(score.accuracy for score in scores if score.network == "ann") == 100.0
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in student.neurons.values())


def test_kinds_are_chosen(trio):
    teacher, _, images, labels = trio
    scores = immunity({"ann": teacher}, images, labels, kinds=("noise",))
    assert {score.kind for score in scores} == {"clean", "noise"}
    with pytest.raises(ConfigError, match=r"'noises'.*Did you mean 'noise'"):
        immunity({"ann": teacher}, images, labels, kinds=("noises",))


@pytest.fixture(scope="module")
def event_student():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)
    student, _ = to_spiking(nn.Sequential(*layers), Conversion(timesteps=4, inherit=False, coding=Frames()))
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student.eval()


@pytest.fixture(scope="module")
def frames():
    counts = torch.poisson(torch.full((30, 4, 2, 8, 8), 0.8), generator=Generator().manual_seed(1))
    return counts.to(torch.uint8)


class TestEvents:
    def test_a_student_sees_counts_with_time_first(self, event_student, frames):
        with torch.no_grad():
            expected = event_student(frames.transpose(0, 1).float())
        assert torch.allclose(predict(event_student, frames, batch_size=7), expected, atol=1e-6)

    def test_what_event_cameras_do_wrong_and_faults_are_measured(self, event_student, frames):
        labels = predict(event_student, frames).mean(0).argmax(-1)
        scores = immunity({"snn": event_student}, frames, labels)
        assert {score.kind for score in scores} == {"clean", "event", "hardware"}
        assert scores[0].accuracy == 100.0 and len(scores) == 1 + 5 * (5 + len(FAULTS))
        lost = [score.accuracy for score in scores if score.name == "dropped-events"]
        assert lost[-1] < lost[0] <= 100.0
        assert immunity({"snn": event_student}, frames, labels, kinds=["event"])[1] in scores

    def test_kinds_that_do_not_fit_the_input_are_refused(self, event_student, frames, trio):
        labels = torch.zeros(30, dtype=torch.long)
        with pytest.raises(ConfigError, match=r"'attack' is not for inputs of shape .*Choose among event, hardware"):
            immunity({"snn": event_student}, frames, labels, kinds=["event", "attack"])
        with pytest.raises(ConfigError, match=r"'event' is not for inputs of shape \(60, 1, 8, 8\): 'event' is for"):
            immunity({"ann": trio[0]}, trio[2], trio[3], kinds=["event"])


def spikes_of(student, images):
    seen = []
    layer = next(iter(student.neurons.values()))
    handle = layer.register_forward_hook(lambda _, __, result: seen.append(result[0]))
    with torch.no_grad():
        student(images)
    handle.remove()
    return seen[0]


class TestFaults:
    """On one layer of many neurons, which fires at every step."""

    @pytest.fixture
    def firing(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(1, 4000, bias=False), nn.ReLU(), nn.Linear(4000, 2))
        student, _ = to_spiking(net, Conversion(timesteps=4, neuron=IF, inherit=False))
        next(iter(student.neurons.values())).backend = "reference"
        student.core.get_submodule("1").weight.data.fill_(1.0)
        return student.eval()

    ONE = torch.ones(2, 1, 1, 1)

    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_shares_are_the_stated_ones(self, firing, severity):
        assert spikes_of(firing, self.ONE).mean() == 1
        lost = 1 - spikes_of(fault(firing, "dropped-spikes", severity), self.ONE).mean()
        assert float(lost) == pytest.approx(FAULTS["dropped-spikes"][1][severity - 1], rel=0.1)
        silent = spikes_of(fault(firing, "stuck-neurons", severity), self.ONE) == 0
        assert torch.equal(silent, silent[:1].expand_as(silent))  # the same neurons at every step, for every image
        assert float(silent.float().mean()) == pytest.approx(FAULTS["stuck-neurons"][1][severity - 1] / 2, abs=0.003)
        always = spikes_of(fault(firing, "stuck-neurons", severity), 0 * self.ONE)
        assert float(always.mean()) == pytest.approx(FAULTS["stuck-neurons"][1][severity - 1] / 2, abs=0.003)

    def test_a_mismatch_moves_the_current_at_which_a_neuron_fires(self, firing):
        # in thresholds of the layer: a current of 1 fires at the first step where the own threshold is at most 1
        half = spikes_of(fault(firing, "threshold-mismatch", 1), self.ONE)[:2].mean()
        assert float(half) == pytest.approx(0.5, abs=0.03)
        rare = spikes_of(fault(firing, "threshold-mismatch", 5), 0.4 * self.ONE)[:2].mean()
        expected = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(-0.6 / 0.3))
        assert float(rare) == pytest.approx(float(expected), abs=0.01)

    def test_membrane_noise_fires_as_often_as_the_normal_law_says(self, firing):
        first = spikes_of(fault(firing, "membrane-noise", 5), 0.8 * self.ONE)[:2].mean()
        assert float(first) == pytest.approx(
            1 - float(torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(1.0))), abs=0.02
        )

    def test_weights_move_by_the_stated_deviation(self, firing):
        moved = fault(firing, "weight-noise", 3).core.get_submodule("1").weight.detach()
        assert float(moved.mean()) == pytest.approx(1.0, abs=0.01)
        assert float(moved.std()) == pytest.approx(0.15, rel=0.05)

    def test_the_seed_is_all_that_is_drawn_from(self, firing):
        for name in FAULTS:
            one, same, other = (spikes_of(fault(firing, name, 5, seed), 0.9 * self.ONE) for seed in (1, 1, 2))
            assert torch.equal(one, same), name
            if name != "weight-noise":
                assert not torch.equal(one, other), name

    def test_unknown_names_and_severities_are_refused(self, firing):
        with pytest.raises(ConfigError, match=r"'dropped'.*Known"):
            fault(firing, "dropped", 1)
        with pytest.raises(ConfigError, match=r"severity \(=0\)"):
            fault(firing, "weight-noise", 0)


class TestAttacks:
    def test_one_step_on_a_linear_network_is_the_worst_case(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        images = torch.full((3, 1, 2, 2), 0.5)
        labels = torch.tensor([0, 1, 0])
        changed = attack(net, images, labels, reach=0.1, steps=1, generator=Generator())
        weight = net[1].weight.detach()
        for image, label in zip(changed, labels):
            worst = 0.5 + 0.1 * torch.sign(weight[1 - label] - weight[label])
            torch.testing.assert_close(image.flatten(), worst)

    @pytest.mark.parametrize("steps", [1, 10])
    def test_images_stay_within_reach_and_the_loss_rises(self, trio, steps):
        _, student, images, labels = trio
        clean = images.float() / 255
        changed = attack(student, clean, labels, reach=8 / 255, steps=steps, generator=Generator().manual_seed(0))
        assert float((changed - clean).abs().max()) <= 8 / 255 + 1e-6
        assert float(changed.min()) >= 0 and float(changed.max()) <= 1
        with torch.no_grad():
            before, after = (F.cross_entropy(student(x).mean(0), labels) for x in (clean, changed))
        assert after > before


class TestSummaries:
    SCORES = [Score("a", "clean", "clean", 0, 90.0), Score("b", "clean", "clean", 0, 80.0)] + [
        Score(who, "natural", "fog", severity, start - step * severity)
        for who, start, step in (("a", 90.0, 10.0), ("b", 80.0, 4.0))
        for severity in SEVERITIES
    ]

    def test_the_area_under_a_straight_line_is_its_middle(self):
        assert area(self.SCORES, "a", "fog") == pytest.approx(65.0)
        assert area(self.SCORES, "b", "fog") == pytest.approx(70.0)

    def test_errors_are_in_relation_to_the_baseline(self):
        # errors of a: 20 30 40 50 60; of b: 24 28 32 36 40
        assert mean_corruption_error(self.SCORES, "a", "b") == pytest.approx(100 * 200 / 160)
        assert mean_corruption_error(self.SCORES, "b", "b") == pytest.approx(100.0)

    def test_what_was_not_measured_is_refused(self):
        with pytest.raises(ConfigError, match="no 'noise' of 'a'"):
            mean_corruption_error(self.SCORES, "a", "b", "noise")
        with pytest.raises(ConfigError, match="0 severities of 'fog' for 'c'"):
            mean_corruption_error(self.SCORES, "a", "c")
