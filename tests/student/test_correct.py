import copy

import pytest
import torch
from torch import nn

from spikedistill.neuron.dynamics import IF, LIF, Neuron
from spikedistill.student import correct
from spikedistill.student.build import starting_from, to_spiking
from spikedistill.student.coding import FrameCoding, RateCoding
from spikedistill.student.conversion import Conversion

GRADED = Neuron(initial=0.5, levels=4)


class Block(nn.Module):
    """A network with batch norm, a sum with a skip connection, a depthwise convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv, self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.head = nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6 * 16, 5)

    def forward(self, x):
        x = torch.relu(self.first(self.stem(x)))
        x = torch.relu(self.second(self.conv(x)) + x)
        return self.head(torch.relu(self.deep(x)).flatten(1))


def network(kind=Block):
    torch.manual_seed(0)
    ann = kind()
    ann.train()
    with torch.no_grad():
        for _ in range(30):
            ann(pictures(64))  # batch norms see the images
    return ann.eval()


def pictures(count):
    return torch.nn.functional.interpolate(torch.rand(count, 1, 4, 4), (8, 8), mode="bilinear")


def converted(ann, images, **options):
    return to_spiking(ann, Conversion(**options), calibration_images=images)


def test_a_channel_that_batch_norm_silences_keeps_its_weights():
    images = pictures(64)
    ann = network()
    ann.second.weight.data[1] = 0
    student, _ = converted(ann, images, timesteps=1, neuron=GRADED, correct="layers")
    held = student.state_dict()
    assert all(value.isfinite().all() for value in held.values() if value.is_floating_point())
    assert torch.equal(student.core.conv.weight[1], ann.conv.weight[1])
    assert not torch.equal(student.core.conv.weight[0], ann.conv.weight[0])


@torch.no_grad()
def error(ann, student, images):
    wanted = ann(images)
    return float((student.eval()(images).mean(0) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


OPTIONS = {
    "one spike a step": {"timesteps": 4},
    "two steps": {"timesteps": 2, "rule": "max"},
    "graded": {"timesteps": 1, "neuron": GRADED},
    "graded, two steps": {"timesteps": 2, "neuron": GRADED},
    "leaky": {"timesteps": 4, "neuron": LIF},
    "one threshold": {"timesteps": 4, "per_channel": False},
    "learned": {"timesteps": 4, "neuron": Neuron(learn_threshold=True, learn_initial=True)},
    "rounding down": {"timesteps": 4, "neuron": IF},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_images_that_were_not_used_have_less_error(name):
    ann, images, others = network(), pictures(400), pictures(200)
    plain, corrected = (converted(ann, images, correct=how, **OPTIONS[name])[0] for how in ("nothing", "layers"))
    assert error(ann, corrected, others) < 0.97 * error(ann, plain, others)


def test_the_means_behind_every_layer_are_those_of_the_ann():
    ann, images = network(), pictures(60)  # few enough that every place is seen
    student, _ = converted(ann, images, correct="layers", timesteps=3)
    paths = ["second", "deep", "head"]
    with torch.no_grad():
        seen = student.eval().observe(images, paths).features
    wanted = {}
    handles = [
        ann.get_submodule(path).register_forward_hook(lambda _, __, value, path=path: wanted.update({path: value}))
        for path in paths
    ]
    with torch.no_grad():
        ann(images)
    for handle in handles:
        handle.remove()
    for path in ("deep", "head"):
        ours, theirs = (one.transpose(0, 1).flatten(1).mean(1) for one in (seen[path].mean(0), wanted[path]))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0.05 * float(wanted[path].std()))


def test_a_student_with_hardly_any_error_stays_nearly_as_it_is():
    ann, images = network(), pictures(50)
    fine = Neuron(initial=0.5, levels=2**14)
    student, report = converted(ann, images, correct="layers", timesteps=1, neuron=fine, rule="max")
    assert all(one.before < 1e-2 and one.after <= one.before for one in report.corrected)
    for name, value in ann.named_parameters():
        change = student.core.get_parameter(name) - value
        assert change.norm() < 0.03 * value.norm() + 1e-3, name


def test_the_report_names_what_was_corrected_in_order():
    student, report = converted(network(), pictures(50), correct="layers")
    names = [one.name.split(".")[-1] for one in report.corrected]
    assert [name for name in names if not name.startswith("relu")] == ["conv", "deep", "head"]
    assert len(names) == 6
    assert all(one.after <= one.before for one in report.corrected)
    assert "6 layers corrected, error of 'head'" in str(report)
    thresholds = [float(layer.threshold.mean()) for layer in student.neurons.values()]
    assert [site.threshold for site in report.sites] == thresholds
    _, plain = converted(network(), pictures(50))
    assert not plain.corrected and "corrected" not in str(plain)


def test_nothing_else_changes():
    ann, images = network(), pictures(50)
    before, state = copy.deepcopy(ann.state_dict()), torch.get_rng_state()
    plain = converted(ann, images)[0]
    student, again = (converted(ann, images, correct="layers")[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(ann.state_dict()[name], value) for name, value in before.items())
    ours, theirs = student.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    changed = {name.removeprefix("core.") for name in ours if not torch.equal(ours[name], theirs[name])}
    allowed = {"first.bias", "conv.weight", "second.bias", "deep.weight", "deep.bias", "head.weight", "head.bias"}
    assert allowed - {"first.bias"} <= {name for name in changed if "neurons" not in name} <= allowed
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.items())
    assert student.training == plain.training
    assert all(one.requires_grad == two.requires_grad for one, two in zip(student.parameters(), plain.parameters()))


class Shared(nn.Module):
    """A layer that is called twice, and two that share their weights."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.other = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.other.weight = self.one.weight
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.other(torch.relu(self.one(x)))).flatten(1))


def test_layers_that_are_used_twice_keep_their_weights():
    ann = network(Shared)
    student, report = converted(ann, pictures(50), correct="layers")
    for name in ("twice.weight", "one.weight"):
        assert torch.equal(student.core.get_parameter(name), ann.get_parameter(name))
    assert {one.name for one in report.corrected} & {"twice", "one", "other"} == set()
    assert report.corrected[-1].name == "head"


@pytest.mark.parametrize("coding", [RateCoding(seed=0), FrameCoding()])
def test_other_codings_are_corrected_too(coding):
    _, report = converted(network(), pictures(40), correct="layers", coding=coding)
    assert len(report.corrected) >= 6


def test_images_that_do_not_fit_into_memory_are_left_out(monkeypatch):
    ann, images = network(), pictures(100)
    seen = []
    monkeypatch.setattr(correct, "LARGEST", 6 * 36 * 4 * 20)  # twenty images at T=4
    whole = correct._Stepwise
    monkeypatch.setattr(correct, "_Stepwise", lambda *given: seen.append(len(given[1])) or whole(*given))
    converted(ann, images, correct="layers")
    assert seen == [20, 20]


def test_layers_that_are_too_wide_have_their_bias_corrected(monkeypatch):
    monkeypatch.setattr(correct, "WIDEST", 60)
    ann = network()
    student, _ = converted(ann, pictures(50), correct="layers")
    assert torch.equal(student.core.get_parameter("head.weight"), ann.head.weight)
    assert not torch.equal(student.core.get_parameter("head.bias"), ann.head.bias)
    assert not torch.equal(student.core.get_parameter("conv.weight"), ann.conv.weight)


STARTED = {
    "of one spike a step": ({"timesteps": 4}, "graded"),
    "of two steps": ({"timesteps": 2, "neuron": Neuron(initial=0.5, levels=2)}, "graded"),
    "that leaks": ({"timesteps": 4, "neuron": LIF}, "graded"),
    "graded, from single spikes": ({"timesteps": 1, "neuron": GRADED}, "one spike a step"),
}


def started(name, images, shown):
    """A student with another's weights, corrected on the images shown; that other one; the report."""
    options, origin = STARTED[name]
    other, _ = converted(network(), images, **OPTIONS[origin])
    student, report = converted(network(), images, **options)
    student.load_state_dict(other.state_dict(), strict=False)
    for layer, one in zip(student.neurons.values(), other.neurons.values()):
        layer.set_threshold(one.threshold.detach() * one.neuron.levels / layer.neuron.levels)
    before = copy.deepcopy(other.state_dict())
    report = starting_from(student, report, "runs/other", None if shown is None else other, shown)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    return student.eval(), other.eval(), report


@pytest.mark.parametrize("name", STARTED)
def test_a_student_that_starts_from_another_has_its_means(name):
    images = pictures(60)

    def distance(shown):
        student, other, report = started(name, images, shown)
        with torch.no_grad():
            ours, theirs = (one(images).mean(0) for one in (student, other))
        return float(((ours - theirs).mean(0) / theirs.std()).abs().max()), student, report

    plain, _, untouched = distance(None)
    near, student, report = distance(images)
    assert near < 1e-5 and plain > 1e-2
    assert [one.name for one in report.corrected if "relu" not in one.name] == ["conv", "deep", "head"]
    assert not untouched.corrected
    assert [site.threshold for site in report.sites] == [
        float(one.threshold.mean()) for one in student.neurons.values()
    ]
    assert str(report).startswith("3 layers of neurons, those of 'runs/other' as weights, T=")


def test_a_student_that_leaks_comes_near_to_one_that_does_not():
    images, others = pictures(400), pictures(200)
    (plain, wanted, _), (corrected, _, _) = (started("that leaks", images, shown) for shown in (None, images))
    assert error(lambda x: wanted(x).mean(0), corrected, others) < 0.5 * error(
        lambda x: wanted(x).mean(0), plain, others
    )


def test_a_student_that_starts_from_one_of_its_kind_stays_as_it_is():
    images = pictures(50)
    other, report = converted(network(), images, timesteps=3)
    student = copy.deepcopy(other)
    made = starting_from(student, report, "runs/other", other, images)
    assert not made.corrected
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in other.state_dict().items())
