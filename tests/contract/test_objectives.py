"""What every objective owes the training loop. A new objective needs one line in ``SETTINGS``."""

import dataclasses
import importlib
import pkgutil
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

import spikedistill.objective
from spikedistill.answer import Answer
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import Neuron
from spikedistill.objective.budget import Budget, Penalty
from spikedistill.objective.cross_kd import CrossKD
from spikedistill.objective.decoupled import TemporalDecoupling
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.qcfs import QCFS
from spikedistill.objective.schedule import Ramp
from spikedistill.objective.spikes import DistillingSpikes
from spikedistill.objective.temperatures import HeterogeneousTemperatures
from spikedistill.objective.terms import Batch, Objective, Sum, total
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Teacher

PAIRS = (("layer1", "late"), ("layer2", "even"))
SPIKES = {"spike_pairs": (("relu", "relu"),), "adapt": False}
LAYERS = ("relu",)

SETTINGS = {
    Direct: [{}, {"label_smoothing": 0.1}],
    TET: [{}, {"label_smoothing": 0.1, "lam": 0.3, "target": 0.5}],
    QCFS: [{}, {"label_smoothing": 0.1}],
    KDSNNResponse: [{}, {"temperature": 4.0, "alpha": 0.3, "label_smoothing": 0.1, "mirror": True}],
    KDSNNFeature: [{"pairs": PAIRS}, {"pairs": PAIRS, "weight": 0.5, "adapt": True, "margin": True, "partial": True}],
    KDSNN: [{"pairs": PAIRS}, {"pairs": PAIRS, "temperature": 4.0, "adapt": True, "margin": True, "partial": True}],
    HeterogeneousTemperatures: [{}, {"temperature": 6.0, "student_temperature": 1.5, "alpha": 0.3}],
    TemporalDecoupling: [
        {},
        {"alpha": 0.0, "entropy": 0.1},
        {"temperature": 1.0, "self_teachers": "all", "mirror": True},
    ],
    Budget: [{"spikes": 2.0, "layers": LAYERS}, {"operations": 50.0, "penalty": 0.5, "layers": LAYERS}],
    Penalty: [{"spikes": 2.0, "layers": LAYERS}, {"spikes": 3.0, "operations": 50.0, "layers": LAYERS}],
    DistillingSpikes: [SPIKES, {**SPIKES, "window": 1, "distance": "l1", "weight": 0.5, "alpha": 0.4, "adapt": True}],
    CrossKD: [{"layer": "relu"}, {"layer": "relu", "temperature": 4.0, "alpha": 0.3, "similarity": 0.0}],
    Sum: [
        {"parts": ((0.5, Direct()),)},
        {"parts": ((1.0, TET()), (Ramp(1.0, 0.5), KDSNNFeature(PAIRS, adapt=True)), (0.0, KDSNNResponse()))},
    ],
}
ALL = [kind(**fields) for kind, choices in SETTINGS.items() for fields in choices]
TEACHING = [each for each in ALL if not isinstance(each, Penalty)]
"""Those that change the student's logits by themselves."""
OPEN = [KDSNNFeature(), KDSNN(), Sum(((1.0, KDSNNFeature()), (1.0, KDSNN(adapt=True)), (1.0, Direct())))]


def subclasses(kind):
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counts(seed, *shape):
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def make_batch(steps=1):
    """A student's answer of three steps and a teacher's, with all that an answer can hold."""
    ours = {"late": drawn(1, 3, 6, 2, 4, 4), "even": drawn(2, 3, 6, 5)}
    theirs = {"layer1": drawn(4, steps, 6, 3, 2, 2), "layer2": drawn(5, steps, 6, 5)}
    student = Answer(
        drawn(0, 3, 6, 4).requires_grad_(),
        ours,
        {"relu": counts(7, 3, 6, 5)},
        {"relu": drawn(8, 3, 6, 5)},
        30 * counts(10, 3, 6),
    )
    teacher = Answer(drawn(3, steps, 6, 4), theirs, {"relu": counts(9, steps, 6, 5)})
    return Batch(labels=torch.tensor([0, 1, 2, 3, 3, 1]), student=student, teacher=teacher, source=student)


@pytest.fixture
def batch():
    return make_batch()


def of_each(answer, change):
    """An answer whose every tensor is changed."""
    kinds = ("features", "spikes", "potentials")
    inner = ({path: change(x) for path, x in getattr(answer, kind).items()} for kind in kinds)
    return Answer(change(answer.logits), *inner, None if answer.operations is None else change(answer.operations))


def permuted(batch, order):
    said = {name: of_each(getattr(batch, name), lambda x: x[:, order]) for name in ("student", "teacher", "source")}
    return replace(batch, labels=batch.labels[order], **said)


def some(tensors, paths):
    return {path: x for path, x in tensors.items() if path in paths}


def pared(batch, needs):
    """The batch without anything that is not needed."""
    ours, theirs = {b for _, b in needs.pairs}, {a for a, _ in needs.pairs}
    spikes, potentials = (
        some(batch.student.spikes, needs.student_spikes),
        some(batch.student.potentials, needs.potentials),
    )
    done = batch.student.operations if needs.operations else None
    student = Answer(batch.student.logits, some(batch.student.features, ours), spikes, potentials, done)
    said = batch.teacher
    teacher = Answer(said.logits, some(said.features, theirs), some(said.spikes, needs.teacher_spikes))
    source = batch.source if needs.source else None
    return replace(batch, student=student, teacher=teacher if needs.needs_teacher else None, source=source)


def test_every_objective_is_listed():
    for found in pkgutil.walk_packages(spikedistill.objective.__path__, "spikedistill.objective."):
        importlib.import_module(found.name)
    ours = {kind for kind in subclasses(Objective) if kind.__module__.startswith("spikedistill.objective.")}
    assert ours - {Objective} == SETTINGS.keys()


@pytest.mark.parametrize("objective", ALL, ids=repr)
class TestEvery:
    def test_returns_finite_scalars_by_name(self, objective, batch):
        terms = objective(batch, objective.modules(batch, None))
        assert terms
        for name, term in terms.items():
            assert name.isidentifier()
            assert term.shape == ()
            assert torch.isfinite(term)

    def test_sums_to_the_loss(self, objective, batch):
        terms = objective(batch, objective.modules(batch, None))
        assert total(terms).item() == pytest.approx(sum(term.item() for term in terms.values()))

    def test_does_not_depend_on_the_order_of_the_batch(self, objective, batch):
        modules = objective.modules(batch, None)
        other = permuted(batch, torch.tensor([4, 2, 0, 5, 1, 3]))
        torch.testing.assert_close(objective(other, modules), objective(batch, modules))

    def test_gives_the_same_terms_twice(self, objective, batch):
        modules = objective.modules(batch, None)
        torch.testing.assert_close(objective(batch, modules), objective(batch, modules), rtol=0, atol=0)

    def test_is_a_frozen_value(self, objective, batch):
        assert objective == type(objective)(
            **{f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
        )
        assert hash(objective) == hash(replace(objective))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(objective, dataclasses.fields(objective)[0].name, None)

    def test_looks_at_nothing_that_it_does_not_need(self, objective, batch):
        modules, bare = objective.modules(batch, None), pared(batch, objective.needs)
        assert objective.modules(bare, None).state_dict().keys() == modules.state_dict().keys()
        torch.testing.assert_close(objective(bare, modules), objective(batch, modules), rtol=0, atol=0)


@pytest.mark.parametrize("objective", TEACHING, ids=repr)
class TestTeaching:
    def test_teaches_every_answer_of_the_student(self, objective, batch):
        total(objective(batch, objective.modules(batch, None))).backward()
        assert torch.isfinite(batch.student.logits.grad).all()
        assert (batch.student.logits.grad.abs().sum(-1) > 0).all()

    def test_descends_along_its_gradient(self, objective, batch):
        modules = objective.modules(batch, None)
        before = total(objective(batch, modules))
        (slope,) = torch.autograd.grad(before, batch.student.logits)
        moved = replace(batch, student=replace(batch.student, logits=batch.student.logits.detach() - 0.01 * slope))
        assert total(objective(moved, modules)) < before


@pytest.mark.parametrize("objective", [each for each in ALL if each.needs.pairs], ids=repr)
def test_without_one_of_its_features_it_cannot_go_on(objective, batch):
    modules = objective.modules(batch, None)
    for pair in objective.needs.pairs:
        for name, path in zip(("teacher", "student"), pair):
            said = getattr(batch, name)
            left = {other: x for other, x in said.features.items() if other != path}
            with pytest.raises((ConfigError, KeyError)):
                objective(replace(batch, **{name: replace(said, features=left)}), modules)


@pytest.mark.parametrize("objective", [each for each in ALL if not each.needs.every_step], ids=repr)
def test_single_steps_of_a_teacher_do_not_matter_where_they_are_not_needed(objective):
    batch = make_batch(steps=3)
    mean = replace(batch, teacher=batch.teacher.averaged())
    modules = objective.modules(mean, None)
    torch.testing.assert_close(objective(batch, modules), objective(mean, modules))


class Step(nn.Module):
    """What a neuron of threshold 1 does in a single step from 0, as an activation of an ANN."""

    def forward(self, x):
        return (x >= 1).float()


def network(activation):
    """Two stages of the shapes of ``PAIRS``, from images of one channel and 4 x 4 pixels."""
    first = nn.Sequential(nn.Conv2d(1, 3, 3), activation())
    second = nn.Sequential(nn.Linear(12, 5), activation())
    parts = {"layer1": first, "flat": nn.Flatten(), "layer2": second, "head": nn.Linear(5, 4)}
    return nn.Sequential(OrderedDict(parts))


@pytest.fixture(scope="module")
def teachers():
    """A student of one step, and an ANN that answers and sees the same."""
    torch.manual_seed(0)
    student, _ = to_spiking(network(nn.ReLU), Conversion(timesteps=1, neuron=Neuron(), inherit=False))
    ann = network(Step)
    with torch.no_grad():
        for ours, theirs in zip(student.core.parameters(), ann.parameters(), strict=True):
            theirs.copy_(ours.mul_(3))
    return student.eval(), Teacher(ann, (0.0,), (1.0,))


@pytest.mark.parametrize("objective", [each for each in ALL if not each.needs.teacher_spikes], ids=repr)
def test_it_does_not_matter_whether_the_teacher_is_an_ann_or_a_student_of_one_step(objective, batch, teachers):
    images = 2 * torch.rand(6, 1, 4, 4)
    said = [teacher.observe(images, ["layer1", "layer2"]) for teacher in teachers]
    assert 0.05 < said[0].features["layer1"].mean() < 0.95 and said[0].logits.std() > 0.1
    first, second = (replace(batch, teacher=replace(answer, logits=answer.logits.detach())) for answer in said)
    modules = objective.modules(first, teachers[0])
    assert objective.modules(second, teachers[1]).state_dict().keys() == modules.state_dict().keys()
    torch.testing.assert_close(objective(first, modules), objective(second, modules))


@pytest.mark.parametrize("inherits", [False, True])
class TestSettled:
    @pytest.mark.parametrize("objective", ALL + OPEN, ids=repr)
    def test_twice_is_once(self, objective, inherits, teachers):
        student, ann = teachers
        teacher = student if objective.needs.teacher_spikes else ann
        once = objective.settled(teacher, student, inherits)
        assert type(once) is type(objective)
        assert once.settled(teacher, student, inherits) == once
        assert once.settled(None, student, not inherits) == once  # nothing is open that a teacher could close
        assert objective in OPEN or once.needs == objective.needs

    @pytest.mark.parametrize("objective", [each for each in ALL if not each.needs.pairs], ids=repr)
    def test_what_is_closed_is_handed_on(self, objective, inherits, teachers):
        assert objective.settled(None, teachers[0], inherits) == objective

    @pytest.mark.parametrize("kind", [KDSNNFeature, KDSNN])
    @pytest.mark.parametrize("adapt", [None, False, True])
    def test_pairs_and_adapters_are_closed_where_they_were_open(self, kind, adapt, inherits, teachers):
        student, ann = teachers
        stages = (("layer1", "layer1"), ("layer2", "layer2"))
        for pairs, expected in (((), stages), (PAIRS[:1], PAIRS[:1])):
            once = kind(pairs, adapt=adapt, weight=0.5).settled(ann, student, inherits)
            assert once == kind(expected, adapt=not inherits if adapt is None else adapt, weight=0.5)
            assert once.needs.pairs == expected

    @pytest.mark.parametrize("objective", OPEN, ids=repr)
    def test_without_a_teacher_pairs_cannot_be_closed(self, objective, inherits, teachers):
        with pytest.raises(ConfigError, match="needs a teacher, and no teacher was given"):
            objective.settled(None, teachers[0], inherits)

    def test_every_part_of_a_sum_is_settled(self, inherits, teachers):
        student, ann = teachers
        weights, parts = zip(*OPEN[-1].parts)
        settled = tuple(part.settled(ann, student, inherits) for part in parts)
        assert OPEN[-1].settled(ann, student, inherits) == Sum(tuple(zip(weights, settled)))


@pytest.mark.parametrize("objective", [each for each in ALL if each.needs.needs_teacher], ids=repr)
def test_without_a_teacher_it_says_so(objective, batch):
    modules, alone = objective.modules(batch, None), replace(batch, teacher=None)
    with pytest.raises(ConfigError, match="needs a teacher, and no teacher was given"):
        objective(alone, modules)
    if objective.needs.pairs:
        with pytest.raises(ConfigError, match="needs a teacher, and no teacher was given"):
            objective.modules(alone, None)


@pytest.mark.parametrize("objective", [each for each in ALL if not each.needs.needs_teacher], ids=repr)
def test_an_objective_that_asks_no_teacher_needs_none(objective, batch):
    alone = Batch(labels=batch.labels, student=pared(batch, objective.needs).student)
    found, expected = (objective(each, objective.modules(each, None)) for each in (alone, batch))
    torch.testing.assert_close(found, expected)
