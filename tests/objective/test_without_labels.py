"""Objectives for images without labels: their terms, and which refuse."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError
from spikedistill.objective.decoupled import TemporalDecoupling
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.qcfs import QCFS
from spikedistill.objective.terms import Batch, Objective, Sum, total

PAIRS = (("deep", "late"),)
LEARN = [
    KDSNNResponse(temperature=3.0),
    KDSNNResponse(alpha=1.0),
    KDSNNFeature(PAIRS, weight=2.0),
    KDSNN(PAIRS, temperature=3.0),
    TemporalDecoupling(entropy=0.1),
    Sum(((0.5, KDSNNResponse()), (2.0, KDSNNFeature(PAIRS)))),
]
NEED = [Direct(), TET(), QCFS(), Objective(), Sum(((1.0, KDSNNResponse()), (1.0, Direct())))]


@pytest.fixture
def batch():
    student = Answer(torch.randn(3, 4, 5, requires_grad=True), {"late": torch.randn(3, 4, 6, requires_grad=True)})
    return Batch(
        labels=torch.tensor([0, 1, 2, 4]),
        student=student,
        teacher=Answer(torch.randn(1, 4, 5), {"deep": torch.randn(1, 4, 6)}),
    )


@pytest.mark.parametrize("objective", LEARN, ids=repr)
def test_the_terms_are_those_of_the_teacher_and_no_others(objective, batch):
    free, modules = objective.without_labels(), objective.modules(batch, None)
    alone, beside = (free(one, modules) for one in (replace(batch, labels=None), batch))
    assert "labels" not in alone and alone.keys() == beside.keys() - {"labels"}
    torch.testing.assert_close(alone, {name: beside[name] for name in alone}, rtol=0, atol=0)
    assert free.without_labels() == free


def test_soft_targets_have_the_whole_weight(batch):
    soft = KDSNNResponse(temperature=3.0, alpha=1.0)(batch, nn.ModuleDict())["soft"]
    for kind in (KDSNNResponse(temperature=3.0), KDSNN(PAIRS, temperature=3.0)):
        terms = kind.without_labels()(replace(batch, labels=None), kind.modules(batch, None))
        torch.testing.assert_close(terms["soft"], soft, rtol=0, atol=0)


def test_the_gradient_is_that_of_alpha_1(batch):
    losses = [total(KDSNNResponse(alpha=1.0)(one, nn.ModuleDict())) for one in (replace(batch, labels=None), batch)]
    first, second = (torch.autograd.grad(loss, batch.student.logits)[0] for loss in losses)
    assert torch.equal(first, second) and first.abs().sum() > 0


@pytest.mark.parametrize("objective", NEED, ids=lambda one: type(one).__name__)
def test_one_that_needs_labels_says_so(objective):
    with pytest.raises(ConfigError, match="needs labels, and the images have none"):
        objective.without_labels()


@pytest.mark.parametrize("objective", [Direct(), TET(), QCFS()], ids=repr)
def test_one_that_is_called_without_them_says_so(objective, batch):
    with pytest.raises(ConfigError, match="needs labels"):
        objective(replace(batch, labels=None), nn.ModuleDict())


@pytest.mark.parametrize(
    "objective, field",
    [
        (KDSNNResponse(alpha=0.3), "alpha"),
        (KDSNN(alpha=0.0), "alpha"),
        (KDSNNResponse(label_smoothing=0.1), "label_smoothing"),
        (KDSNNFeature(label_smoothing=0.1), "label_smoothing"),
        (KDSNN(label_smoothing=0.1), "label_smoothing"),
    ],
)
def test_values_for_labels_are_refused(objective, field):
    with pytest.raises(ConfigError, match=rf"{field} \(=.*the images have none: leave it out"):
        objective.without_labels()
