"""What every objective owes the training loop. A new objective needs one line in ``SETTINGS``."""

import dataclasses
import importlib
import pkgutil

import pytest
import torch

import spikedistill.objective
from spikedistill.errors import ConfigError
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.terms import Batch, Objective, total

PAIRS = (("deep", "late"), ("flat", "even"))

SETTINGS = {
    Direct: [{}, {"label_smoothing": 0.1}],
    TET: [{}, {"label_smoothing": 0.1, "lam": 0.3, "target": 0.5}],
    KDSNNResponse: [{}, {"temperature": 4.0, "alpha": 0.3, "label_smoothing": 0.1}],
    KDSNNFeature: [{"pairs": PAIRS}, {"pairs": PAIRS, "weight": 0.5, "adapt": True, "margin": True, "partial": True}],
    KDSNN: [{"pairs": PAIRS}, {"pairs": PAIRS, "temperature": 4.0, "adapt": True, "margin": True, "partial": True}],
}
ALL = [kind(**fields) for kind, choices in SETTINGS.items() for fields in choices]


def subclasses(kind):
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch():
    return Batch(
        drawn(0, 3, 6, 4).requires_grad_(),
        torch.tensor([0, 1, 2, 3, 3, 1]),
        {"late": drawn(1, 3, 6, 2, 4, 4), "even": drawn(2, 3, 6, 5)},
        drawn(3, 6, 4),
        {"deep": drawn(4, 6, 3, 2, 2), "flat": drawn(5, 6, 5)},
    )


def permuted(batch, order):
    return Batch(
        batch.logits[:, order],
        batch.labels[order],
        {path: feature[:, order] for path, feature in batch.features.items()},
        batch.teacher_logits[order],
        {path: feature[order] for path, feature in batch.teacher_features.items()},
    )


def test_every_objective_is_listed():
    for found in pkgutil.walk_packages(spikedistill.objective.__path__, "spikedistill.objective."):
        importlib.import_module(found.name)
    ours = {kind for kind in subclasses(Objective) if kind.__module__.startswith("spikedistill.objective.")}
    assert ours - {Objective} == SETTINGS.keys()


@pytest.mark.parametrize("objective", ALL, ids=repr)
class TestEvery:
    def test_returns_finite_scalars_by_name(self, objective, batch):
        terms = objective(batch, objective.adapters(batch))
        assert terms
        for name, term in terms.items():
            assert name.isidentifier()
            assert term.shape == ()
            assert torch.isfinite(term)

    def test_sums_to_the_loss(self, objective, batch):
        terms = objective(batch, objective.adapters(batch))
        assert total(terms).item() == pytest.approx(sum(term.item() for term in terms.values()))

    def test_does_not_depend_on_the_order_of_the_batch(self, objective, batch):
        adapters = objective.adapters(batch)
        other = permuted(batch, torch.tensor([4, 2, 0, 5, 1, 3]))
        torch.testing.assert_close(objective(other, adapters), objective(batch, adapters))

    def test_gives_the_same_terms_twice(self, objective, batch):
        adapters = objective.adapters(batch)
        torch.testing.assert_close(objective(batch, adapters), objective(batch, adapters), rtol=0, atol=0)

    def test_teaches_every_answer_of_the_student(self, objective, batch):
        total(objective(batch, objective.adapters(batch))).backward()
        assert torch.isfinite(batch.logits.grad).all()
        assert (batch.logits.grad.abs().sum(-1) > 0).all()

    def test_descends_along_its_gradient(self, objective, batch):
        adapters = objective.adapters(batch)
        before = total(objective(batch, adapters))
        (slope,) = torch.autograd.grad(before, batch.logits)
        moved = dataclasses.replace(batch, logits=batch.logits.detach() - 0.01 * slope)
        assert total(objective(moved, adapters)) < before

    def test_is_a_frozen_value(self, objective, batch):
        assert objective == type(objective)(
            **{f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
        )
        assert hash(objective) == hash(dataclasses.replace(objective))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(objective, dataclasses.fields(objective)[0].name, None)


@pytest.mark.parametrize("objective", [each for each in ALL if each.teacher], ids=repr)
def test_without_a_teacher_it_says_so(objective, batch):
    adapters = objective.adapters(batch)
    alone = Batch(batch.logits, batch.labels, batch.features)
    with pytest.raises(ConfigError, match="asks the teacher, and no teacher was given"):
        objective(alone, adapters)
    if objective.pairs:
        with pytest.raises(ConfigError, match="asks the teacher, and no teacher was given"):
            objective.adapters(alone)


@pytest.mark.parametrize("objective", [each for each in ALL if not each.teacher], ids=repr)
def test_an_objective_that_asks_no_teacher_needs_none(objective, batch):
    alone = Batch(batch.logits, batch.labels)
    torch.testing.assert_close(objective(alone, objective.adapters(alone)), objective(batch, objective.adapters(batch)))
