import pytest
import torch
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.objective.terms import Batch, Objective, positive, share, total


@pytest.fixture
def batch():
    return Batch(torch.zeros(2, 3, 4), torch.tensor([0, 1, 2]))


def test_the_loss_is_the_sum_of_all_terms():
    assert total({"labels": torch.tensor(0.25), "soft": torch.tensor(1.5), "features": torch.tensor(2.0)}) == 3.75


def test_a_single_term_is_the_loss_and_passes_its_gradient_on():
    term = torch.tensor(3.0, requires_grad=True)
    total({"labels": 2 * term}).backward()
    assert term.grad == 2


def test_the_loss_keeps_the_number_format_of_its_terms():
    assert total({"labels": torch.tensor(0.1, dtype=torch.float64)}).dtype == torch.float64


def test_a_batch_without_a_teacher_has_no_answer_and_no_features_of_it(batch):
    assert batch.teacher_logits is None
    assert (dict(batch.features), dict(batch.teacher_features)) == ({}, {})


def test_an_objective_asks_no_teacher_and_has_no_layers_unless_it_says_so(batch):
    objective = Objective()
    assert (objective.teacher, objective.pairs, len(objective.adapters(batch))) == (False, (), 0)
    with pytest.raises(NotImplementedError):
        objective(batch, nn.ModuleDict())


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_share_from_0_to_1_is_given_back(value):
    assert share("alpha", value) == value


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused(value):
    with pytest.raises(ConfigError, match=rf"alpha \(={value}\) mixes two terms: give a value from 0 to 1"):
        share("alpha", value)


@pytest.mark.parametrize("value", [1e-6, 4.0])
def test_a_scale_above_0_is_given_back(value):
    assert positive("temperature", value) == value


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_above_0_and_finite_is_refused(value):
    with pytest.raises(ConfigError, match=rf"temperature \(={value}\) must be above 0"):
        positive("temperature", value)
