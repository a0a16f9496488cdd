import copy
import dataclasses
import math

import pytest
import torch
from torch import Generator, nn

from spikedistill.data.noise import CORRUPTIONS, SEVERITIES
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import predict, standard_error
from spikedistill.evaluate.attacks import ATTACKS
from spikedistill.evaluate.immunity import (
    FAULTS,
    Score,
    fault,
    immunity,
)
from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import Conversion


def test_every_perturbation_is_measured_and_nothing_is_changed(trio, attacked):
    teacher, student, images, labels = trio
    before = copy.deepcopy(student.state_dict())
    networks, kinds = {"ann": teacher, "snn": student}, ["noise", "natural", "hardware"]
    scores = immunity(networks, images, labels, kinds=kinds)
    assert scores == immunity(networks, images, labels, kinds=kinds)
    found = {(score.network, score.name) for score in (*scores, *attacked)}
    pixels = {name for name, corruption in CORRUPTIONS.items() if corruption.kind != "event"} - {"saturate"}
    assert found >= {("snn", name) for name in (*pixels, *FAULTS, *ATTACKS, "clean", "attacked")}
    assert ("snn", "saturate") not in found  # of grey there is none
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


def test_every_score_says_how_many_images_in_which_format_with_which_error(trio, attacked):
    teacher, _, images, labels = trio
    in_bfloat16 = immunity({"ann": teacher}, images, labels, kinds=["noise"], dtypes={"ann": torch.bfloat16})
    for score in (*attacked, *in_bfloat16):
        assert score.format == {"ann": "bfloat16", "snn": "float32"}[score.network]
        assert score.images == (20 if score.kind in ("attack", "gradient", "attacked") else 60)
        right = score.accuracy / 100 * score.images
        share = (round(right) + 1) / (score.images + 2)
        assert score.error == pytest.approx(100 * math.sqrt(share * (1 - share) / score.images))
        assert right == pytest.approx(round(right))


def test_accuracies_are_of_the_format_that_is_told():
    """In bfloat16 an image between two classes falls to the other."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 200))
    images = torch.randint(0, 256, (300, 1, 8, 8), generator=Generator().manual_seed(0)).to(torch.uint8)
    close = predict(net, images, torch.bfloat16)[0].argmax(-1)
    networks = {"exact": net, "short": net}
    scores = immunity(networks, images, close, kinds=["attack"], attacked=300, dtypes={"short": torch.bfloat16})
    for name in ("clean", "attacked"):
        found = {score.network: score.accuracy for score in scores if score.name == name}
        assert found["short"] == 100.0 > found["exact"]


def test_the_error_of_an_accuracy_by_hand():
    assert standard_error(50.0, 100) == pytest.approx(5.0)
    assert standard_error(100.0, 10) == pytest.approx(100 * math.sqrt(11 / 12 / 12 / 10))
    assert math.isnan(standard_error(50.0, 0)) and math.isnan(Score("a", "clean", "clean", 0, 50.0).error)


@pytest.mark.parametrize(
    "given, labels, message",
    [
        (torch.rand(4, 1, 8, 8), torch.zeros(4), r"torch.float32 were given .*expected bytes"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(3), r"labels of shape \(3,\)"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0), "at least one sample"),
    ],
)
def test_images_that_are_no_bytes_or_have_no_labels_are_refused(trio, given, labels, message):
    with pytest.raises(ConfigError, match=message):
        immunity({"ann": trio[0]}, given, labels.long())


@pytest.fixture(scope="module")
def event_student():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)
    student, _ = to_spiking(nn.Sequential(*layers), Conversion(timesteps=4, inherit=False, coding=FrameCoding()))
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
        assert lost[-1] < lost[0]
        assert immunity({"snn": event_student}, frames, labels, kinds=["event"])[1] in scores

    def test_kinds_that_do_not_fit_the_input_are_refused(self, event_student, frames, trio):
        labels = torch.zeros(30, dtype=torch.long)
        with pytest.raises(ConfigError, match=r"'attack' is not for inputs of shape .*Choose from event, hardware"):
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

    @pytest.mark.parametrize("severity", (1, 5))
    def test_of_counts_hit_each_spike_of_its_own(self, severity):
        """Neurons that fire 0 to 5 of 5 spikes within a step: each spike is lost, or stuck, as a single one is."""
        net = nn.Sequential(nn.Flatten(), nn.Linear(1, 6000, bias=False), nn.ReLU(), nn.Linear(6000, 2))
        neuron = dataclasses.replace(IF, levels=5, threshold=0.5)
        student, _ = to_spiking(net, Conversion(timesteps=1, neuron=neuron, inherit=False))
        (layer,) = student.neurons.values()
        layer.backend = "reference"
        drive = torch.arange(6000) % 6
        student.eval().core.get_submodule("1").weight.data = 0.5 * drive[:, None].float()
        assert torch.equal(spikes_of(student, self.ONE)[0], 0.5 * drive)
        share = FAULTS["dropped-spikes"][1][severity - 1]
        kept = spikes_of(fault(student, "dropped-spikes", severity), self.ONE) / 0.5
        assert torch.equal(kept, kept.round()) and (kept <= drive).all()
        for count in range(1, 6):  # binomial: mean n (1 - p), variance n p (1 - p)
            some = kept[:, drive == count]
            assert float(some.mean()) == pytest.approx(count * (1 - share), abs=4 * (count * share / 2000) ** 0.5)
            assert float(some.var()) == pytest.approx(count * share * (1 - share), rel=0.35)
        stuck = spikes_of(fault(student, "stuck-neurons", severity), 0 * self.ONE) / 0.5
        assert set(stuck.unique().tolist()) == {0.0, 5.0}

    def test_lost_spikes_of_what_is_no_number_stay_no_number(self, firing):
        assert spikes_of(fault(firing, "dropped-spikes", 5), torch.nan * self.ONE).isnan().all()

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

    @pytest.mark.parametrize("severity", SEVERITIES)
    @pytest.mark.parametrize(
        "neuron",
        [
            IF,
            LIF,
            PLIF,
            dataclasses.replace(PLIF, leak=0.9),
            dataclasses.replace(PLIF, leak=0.99),
            Neuron(leak=0.8, decay_input=True),
            Neuron(leak=0.3, learn_leak=True, initial=0.5, learn_initial=True),
        ],
    )
    def test_membrane_noise_reaches_every_potential_by_its_full_height(self, neuron, severity):
        """With the leak l, what a layer that does not fire keeps of it after t steps: the sum of l ** 2k, k < t."""
        net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 900, 2))
        student, _ = to_spiking(net, Conversion(timesteps=3, neuron=neuron, inherit=False))
        (layer,) = student.neurons.values()
        layer.set_threshold(torch.tensor([0.5, 40.0]))
        layer.backend = "reference"
        student.core.get_submodule("0").weight.data.zero_()
        images, path = torch.zeros(4, 1, 30, 30), student.layers()
        with torch.no_grad():
            quiet, shaken = (
                network.eval().observe(images, potentials=path).potentials[path[0]]
                for network in (student, fault(student, "membrane-noise", severity))
            )
        noise = shaken - quiet  # [T, B, C, H, W], in thresholds
        deviation = FAULTS["membrane-noise"][1][severity - 1]
        for channel in (0, 1):
            for t in range(3):
                kept = sum(neuron.leak ** (2 * k) for k in range(t + 1))
                found = float(noise[t, :, channel].std())
                assert found == pytest.approx(deviation * kept**0.5, rel=0.06)

    def test_membrane_noise_of_a_learned_leak_is_that_of_the_leak_it_has(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(1, 4000, bias=False), nn.ReLU(), nn.Linear(4000, 2))
        student, _ = to_spiking(net, Conversion(timesteps=1, neuron=PLIF, inherit=False))
        (layer,) = student.neurons.values()
        layer.backend = "reference"
        layer.leak_logit.data.fill_(4.0)  # trained from 0.5 to 0.98
        (path,) = student.layers()
        shaken = fault(student.eval(), "membrane-noise", 5).observe(0 * self.ONE, potentials=[path]).potentials[path]
        assert float(shaken.detach().std()) == pytest.approx(0.2, rel=0.05)

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
