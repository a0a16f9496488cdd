from dataclasses import replace

import pytest
import torch
from torch import nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError
from spikedistill.objective.direct import Direct
from spikedistill.objective.features import feature_distance, margin_relu
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.logits import cross_entropy_of_mean, soft_target_divergence
from spikedistill.objective.terms import Batch, total

NONE = nn.ModuleDict()
PAIRS = (("deep", "late"), ("flat", "even"))


def drawn(seed, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture
def batch():
    """Two pairs of features: maps with other channels and sizes, and vectors of equal length."""
    ours = {"late": drawn(1, 3, 4, 2, 4, 4).float(), "even": drawn(2, 3, 4, 6).float()}
    theirs = {"deep": drawn(4, 1, 4, 3, 2, 2).float(), "flat": drawn(5, 1, 4, 6).float()}
    return Batch(
        labels=torch.tensor([0, 1, 2, 4]),
        student=Answer(drawn(0, 3, 4, 5).float(), ours),
        teacher=Answer(drawn(3, 1, 4, 5).float(), theirs),
    )


def soft(batch, temperature):
    return soft_target_divergence(batch.student.logits.mean(0), batch.teacher.logits.mean(0), temperature)


@pytest.mark.parametrize("kind", [KDSNNFeature, KDSNN])
@pytest.mark.parametrize("adapt, weights", [(False, ["0.weight"]), (True, ["0.weight", "1.weight"])])
def test_there_is_an_adapter_for_each_pair_with_weights_where_they_are_needed(batch, kind, adapt, weights):
    adapters = kind(PAIRS, adapt=adapt).modules(batch, None)
    assert list(adapters) == ["0", "1"]
    assert [name for name, _ in adapters.named_parameters()] == weights


class TestResponse:
    def test_its_terms_are_the_mixed_labels_and_answers(self, batch):
        terms = KDSNNResponse(temperature=3.0, alpha=0.4)(batch, NONE)
        assert terms.keys() == {"labels", "soft"}
        hard = cross_entropy_of_mean(batch.student.logits, batch.labels)
        torch.testing.assert_close(terms["labels"], 0.6 * hard)
        torch.testing.assert_close(terms["soft"], 0.4 * soft(batch, 3.0))

    def test_with_alpha_0_it_is_training_on_labels(self, batch):
        torch.testing.assert_close(
            total(KDSNNResponse(alpha=0.0, label_smoothing=0.1)(batch, NONE)), total(Direct(0.1)(batch, NONE))
        )

    def test_with_alpha_1_it_forgets_the_labels(self, batch):
        other = replace(batch, labels=batch.labels.flip(0))
        first, second = (total(KDSNNResponse(alpha=1.0)(each, NONE)) for each in (batch, other))
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, soft(batch, 2.0))


class TestFeature:
    def test_its_features_are_the_weighted_mean_distance_over_pairs(self, batch):
        objective = KDSNNFeature(PAIRS, weight=2.0)
        adapters = objective.modules(batch, None)
        terms = objective(batch, adapters)
        adapted = torch.einsum(
            "oi,bihw->bohw", adapters["0"].weight[:, :, 0, 0], batch.student.features["late"].mean(0)
        )
        small = adapted.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-1, -3))
        deep, flat = (batch.teacher.features[path][0] for path in ("deep", "flat"))
        first = (small - deep).square().sum() / deep.square().sum()
        second = (batch.student.features["even"].mean(0) - flat).square().sum() / flat.square().sum()
        torch.testing.assert_close(terms["features"], 2.0 * (first + second) / 2)
        torch.testing.assert_close(terms["labels"], cross_entropy_of_mean(batch.student.logits, batch.labels))

    def test_margin_and_partial_are_those_of_the_functions(self, batch):
        pairs = (("flat", "even"),)
        objective = KDSNNFeature(pairs, margin=True, partial=True)
        lifted = margin_relu(batch.teacher.features["flat"][0])
        expected = feature_distance(batch.student.features["even"].mean(0), lifted, partial=True)
        torch.testing.assert_close(objective(batch, objective.modules(batch, None))["features"], expected)

    def test_with_weight_0_it_is_training_on_labels(self, batch):
        objective = KDSNNFeature(PAIRS, weight=0.0)
        torch.testing.assert_close(
            total(objective(batch, objective.modules(batch, None))), total(Direct()(batch, NONE))
        )

    def test_its_gradient_reaches_the_features_and_the_adapter(self, batch):
        batch.student.features["late"].requires_grad_()
        objective = KDSNNFeature(PAIRS)
        adapters = objective.modules(batch, None)
        objective(batch, adapters)["features"].backward()
        assert batch.student.features["late"].grad.abs().sum() > 0
        assert adapters["0"].weight.grad.abs().sum() > 0


def test_both_forms_at_once_are_their_terms_together(batch):
    settings = {"weight": 2.0, "margin": True, "partial": True, "label_smoothing": 0.1}
    adapters = KDSNN(PAIRS).modules(batch, None)
    terms = KDSNN(PAIRS, temperature=3.0, alpha=0.4, **settings)(batch, adapters)
    answered = KDSNNResponse(3.0, 0.4, 0.1)(batch, NONE)
    compared = KDSNNFeature(PAIRS, **settings)(batch, adapters)
    assert terms.keys() == {"labels", "soft", "features"}
    torch.testing.assert_close(terms, {**answered, "features": compared["features"]})


@pytest.mark.parametrize("kind", [KDSNNResponse, KDSNN])
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"label_smoothing": 1.1},
    ],
    ids=repr,
)
def test_a_constant_of_the_response_outside_its_range_is_refused(kind, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=rf"{name} \(={value}\)"):
        kind(**wrong) if kind is KDSNNResponse else kind(pairs=PAIRS, **wrong)


@pytest.mark.parametrize("kind", [KDSNNFeature, KDSNN])
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"weight": -0.5}, r"weight \(=-0\.5\)"),
        ({"weight": float("nan")}, r"weight \(=nan\)"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
    ],
)
def test_a_constant_of_the_features_outside_its_range_is_refused(kind, wrong, message):
    with pytest.raises(ConfigError, match=message):
        kind(**{"pairs": PAIRS, **wrong})


@pytest.mark.parametrize("kind", [KDSNNFeature, KDSNN])
def test_pairs_left_open_are_refused_when_terms_are_asked_for(batch, kind):
    with pytest.raises(ConfigError, match=r"pairs of features are left open: give \(teacher path, student path\)"):
        kind()(batch, NONE)
