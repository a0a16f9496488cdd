"""Windows over spike trains against counting by hand, and the objective on top of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikedistill.answer import Answer
from spikedistill.data.feed import MemoryFeed
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import Neuron
from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNNResponse
from spikedistill.objective.spikes import DistillingSpikes, layers_at_ends, relative_distance, window_rates, windows_of
from spikedistill.objective.terms import Batch, total
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Architecture, Normalised
from spikedistill.train.loop import fit
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run
from spikedistill.train.training_step import settle_objective

pytestmark = pytest.mark.usefixtures("without_compiler")
CLOSED = {"spike_pairs": (("layer3.8", "layer3.8"),), "adapt": False}


@given(steps=st.integers(1, 8), window=st.integers(1, 8), stride=st.integers(1, 4), times=st.integers(1, 3))
def test_windows_count_what_a_loop_counts(steps, window, stride, times):
    if window > steps:
        return
    train = torch.randint(0, 5, (steps * times, 2, 3), generator=torch.Generator().manual_seed(0)).float()
    windows = windows_of(steps, window, stride)
    assert windows[0][0] == 0 and windows[-1][1] <= steps < windows[-1][1] + stride
    found = window_rates(train, windows, steps)
    for rates, (first, after) in zip(found, windows, strict=True):
        by_hand = sum(train[step] for step in range(first * times, after * times)) / (window * times)
        torch.testing.assert_close(rates, by_hand)


@given(theirs=st.integers(1, 7), ours=st.integers(1, 7))
def test_windows_side_by_side_hold_every_spike_once_whatever_the_teachers_steps(theirs, ours):
    train = torch.rand(theirs, 4, generator=torch.Generator().manual_seed(1))
    found = window_rates(train, windows_of(ours, 1, 1), ours)
    torch.testing.assert_close(found.mean(0), train.mean(0))


def test_windows_are_counted_in_float32_whatever_networks_compute_in():
    train = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        found = window_rates(train, windows_of(5, 3, 1), 5)
    torch.testing.assert_close(found[:, 0], torch.tensor([1 / 3, 1 / 3, 2 / 3]))


def test_the_whole_train_is_a_window():
    train = torch.rand(5, 2, 3)
    torch.testing.assert_close(window_rates(train, windows_of(4, 0, 1), 4), train.mean(0, keepdim=True))


@pytest.mark.parametrize("kind, expected", [("l2", (1 + 4) / (4 + 16)), ("l1", (1 + 2) / (2 + 4))])
def test_distances_are_relative_to_the_teacher(kind, expected):
    student, teacher = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    assert float(relative_distance(student, teacher, kind)) == pytest.approx(expected)
    assert float(relative_distance(0 * teacher, teacher, kind)) == pytest.approx(1)


def batch(theirs, ours):
    return Batch(
        labels=torch.tensor([0, 2]),
        student=Answer(torch.randn(len(ours), 2, 3), spikes={"b": ours}),
        teacher=Answer(torch.randn(len(theirs), 2, 3), spikes={"a": theirs}),
    )


def test_equal_trains_leave_cross_entropy_only():
    train = torch.randint(0, 2, (4, 2, 3, 4, 4)).float()
    made = DistillingSpikes(spike_pairs=(("a", "b"),), adapt=False, window=2)
    given = batch(train, train)
    terms = made(given, made.modules(given, None))
    assert terms.keys() == {"labels", "distance"} and terms["distance"] == 0
    torch.testing.assert_close(total(terms), total(Direct()(given, nn.ModuleDict())))


def test_the_same_counts_at_other_steps_differ_only_in_windows():
    early, late = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 1])
    given = batch(*(train.view(4, 1, 1).expand(4, 2, 3) for train in (early, late)))
    for window, expected in ((0, 0.0), (2, (1 + 0 + 1) / (1 + 0.25 + 0)), (1, 4 / 2)):
        made = DistillingSpikes(spike_pairs=(("a", "b"),), adapt=False, window=window, weight=3.0)
        assert float(made(given, made.modules(given, None))["distance"]) == pytest.approx(3 * expected)


@pytest.mark.parametrize("distance, stride", [("l1", 1), ("l2", 2), ("l1", 2), ("l2", 1)])
@pytest.mark.parametrize("more", [0.0, 1.0])
def test_distance_and_stride_are_those_asked_for_and_several_processes_have_one_scale(distance, stride, more):
    theirs, ours = (torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    made = DistillingSpikes(
        spike_pairs=(("a", "b"),), adapt=False, window=2, stride=stride, distance=distance, weight=3.0
    )
    given = replace(batch(theirs, ours), mean_over_processes=lambda value: value + more)
    wanted, seen = (
        torch.stack([train[first : first + 2].mean(0) for first in range(0, 5, stride)]) for train in (theirs, ours)
    )
    power = {"l1": 1, "l2": 2}[distance]
    expected = (seen - wanted).abs().pow(power).mean() / (wanted.pow(power).mean() + more)
    assert float(made(given, made.modules(given, None))["distance"]) == pytest.approx(3 * float(expected), rel=1e-5)


def test_other_channels_and_sizes_are_adapted():
    given = batch(torch.rand(2, 2, 3, 8, 8), torch.rand(4, 2, 5, 4, 4))
    made = DistillingSpikes(spike_pairs=(("a", "b"),), adapt=False, alpha=0.5)
    adapters = made.modules(given, None)
    assert adapters["0"].weight.shape == (3, 5, 1, 1)
    assert made(given, adapters).keys() == {"labels", "soft", "distance"}


def student(name, timesteps=2, width=4, levels=1, classes=5):
    neuron = Neuron(initial=0.5, levels=levels)
    return to_spiking(
        Architecture(name, classes, 3, width).build(),
        Conversion(timesteps, neuron),
        calibration_images=torch.rand(4, 3, 16, 16),
    )[0]


class TestWithoutLabels:
    """Spikes alone teach unless soft targets were asked for."""

    def given(self):
        return batch(torch.rand(4, 2, 3), torch.rand(4, 2, 3))

    @pytest.mark.parametrize("alpha, names", [(0.0, {"distance"}), (1.0, {"distance", "soft"})])
    def test_the_terms_are_those_with_labels_but_for_the_cross_entropy(self, alpha, names):
        given = self.given()
        made = DistillingSpikes(spike_pairs=(("a", "b"),), adapt=False, alpha=alpha)
        free, modules = made.without_labels(), made.modules(given, None)
        assert free == made and free.hard(replace(given, labels=None)) == {}
        alone, beside = free(replace(given, labels=None), modules), made(given, modules)
        assert alone.keys() == names == beside.keys() - {"labels"}
        torch.testing.assert_close(alone, {name: beside[name] for name in names}, rtol=0, atol=0)

    def test_soft_targets_are_those_of_kdsnn(self):
        given = replace(self.given(), labels=None)
        made = DistillingSpikes(spike_pairs=(("a", "b"),), adapt=False, alpha=1.0).without_labels()
        theirs = KDSNNResponse().without_labels()(given, nn.ModuleDict())
        assert torch.equal(made(given, made.modules(given, None))["soft"], theirs["soft"])

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"alpha": 0.4}, r"alpha \(=0\.4\) weights labels.*give 0, .* or 1 for soft targets"),
            ({"label_smoothing": 0.1}, r"label_smoothing \(=0\.1\).*leave it out"),
            ({"alpha": 1.0, "label_smoothing": 0.1}, "label_smoothing"),
        ],
    )
    def test_values_for_labels_are_refused(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            DistillingSpikes(**fields).without_labels()

    def test_the_loop_trains_every_layer_before_the_spikes_and_none_behind(self, blobs, tmp_path):
        teacher, learner = student("vgg9", classes=3), student("vgg9", classes=3)
        before = {name: value.clone() for name, value in learner.named_parameters()}
        made = settle_objective(DistillingSpikes().without_labels(), learner, teacher, False)
        free = blobs.without_labels()
        config = Training(epochs=2, batch_size=16, lr=0.1, precision="fp32", device="cpu", weight_decay=0.0)
        fit(learner, made, MemoryFeed(free, 16, 0), config, Run(tmp_path), teacher=teacher)
        lines = Run(tmp_path).lines("metrics")
        assert all(line["loss"] == line["distance"] and "soft" not in line for line in lines)
        assert lines[1]["distance"] < lines[0]["distance"] and 0 <= lines[1]["train_agreement"] <= 100
        still = {name for name, value in learner.named_parameters() if torch.equal(value, before[name])}
        assert still == {f"core.classifier.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}


class TestSettled:
    def test_pairs_the_last_layers_of_stages(self):
        made = settle_objective(DistillingSpikes(), student("wrn16-2"), student("resnet18"), False)
        assert made.adapt and made.needs.teacher_spikes == ("layer2.1.relu2", "layer3.1.relu2", "layer4.1.relu2")
        assert made.needs.student_spikes == ("layer1.1.relu2", "layer2.1.relu2", "layer3.1.relu2")

    def test_pairs_depths_where_there_are_no_stages(self):
        assert layers_at_ends("abcdef", "ABC") == (("b", "A"), ("d", "B"), ("f", "C"))

    @pytest.mark.parametrize("fields", [{}, CLOSED], ids=["open", "closed"])
    def test_refuses_an_ann(self, fields):
        with pytest.raises(ConfigError, match=r"spiking teacher.*distill.*kdsnn"):
            DistillingSpikes(**fields).settled(Normalised(nn.Flatten(), [0.5], [0.5]), student("vgg9"), False)

    @pytest.mark.parametrize("inherits", [False, True])
    @pytest.mark.parametrize("pairs", [(), CLOSED["spike_pairs"]], ids=["open", "closed"])
    def test_refuses_counts_of_other_scale_unless_they_are_adapted(self, pairs, inherits):
        graded, binary = student("vgg9", levels=4), student("vgg9")
        for adapt in (False, *([None] if inherits else [])):
            with pytest.raises(ConfigError, match=r"up to 4 and 1 spikes per step.*--adapt True.*--levels"):
                DistillingSpikes(spike_pairs=pairs, adapt=adapt).settled(graded, binary, inherits)
        for adapt, teacher in ((True, graded), (False, binary)):
            made = DistillingSpikes(spike_pairs=pairs, adapt=adapt).settled(teacher, binary, inherits)
            assert made.adapt is adapt and made.spike_pairs[-1] == CLOSED["spike_pairs"][-1]

    def test_refuses_open_fields_without_a_teacher(self):
        assert DistillingSpikes(**CLOSED).settled(None, student("vgg9"), False) == DistillingSpikes(**CLOSED)
        for name in CLOSED:
            with pytest.raises(ConfigError, match="needs a teacher, and no teacher was given"):
                DistillingSpikes(**{name: CLOSED[name]}).settled(None, student("vgg9"), False)

    def test_refuses_a_window_longer_than_the_train(self):
        with pytest.raises(ConfigError, match=r"window \(=3\).*at most 2"):
            DistillingSpikes(window=3).settled(student("vgg9"), student("vgg9"), True)

    @pytest.mark.parametrize("fields", [{"window": -1}, {"stride": 0}, {"weight": -1.0}, {"alpha": 2.0}])
    def test_refuses_values_outside_their_range(self, fields):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            DistillingSpikes(**fields)
