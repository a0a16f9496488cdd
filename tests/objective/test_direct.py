import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.logits import cross_entropy_of_mean, cross_entropy_per_step
from spikedistill.objective.terms import Batch, Needs, total

NONE = nn.ModuleDict()


def drawn():
    """A batch of three steps, four samples and five classes."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    return Batch(labels=torch.randint(0, 5, (4,), generator=generator), student=Answer(logits))


class TestDirect:
    def test_its_term_is_the_judgement_of_the_mean(self):
        batch = drawn()
        terms = Direct(label_smoothing=0.1)(batch, NONE)
        assert terms.keys() == {"labels"}
        torch.testing.assert_close(terms["labels"], cross_entropy_of_mean(batch.student.logits, batch.labels, 0.1))

    def test_an_undecided_student_costs_the_logarithm_of_the_classes(self):
        batch = Batch(labels=torch.tensor([0, 4]), student=Answer(torch.zeros(3, 2, 5)))
        assert float(Direct()(batch, NONE)["labels"]) == pytest.approx(math.log(5))

    @pytest.mark.parametrize("wrong", [-0.1, 1.5])
    def test_a_smoothing_outside_its_range_is_refused(self, wrong):
        with pytest.raises(ConfigError, match="label_smoothing"):
            Direct(label_smoothing=wrong)


class TestTET:
    def test_its_terms_are_the_mixed_judgement_and_distance_of_every_step(self):
        batch = drawn()
        logits, labels = batch.student.logits, batch.labels
        terms = TET(lam=0.25, target=2.0)(batch, NONE)
        every = [float(value) for value in logits.flatten()]
        assert terms.keys() == {"labels", "spread"}
        assert float(terms["labels"]) == pytest.approx(0.75 * float(cross_entropy_per_step(logits, labels)))
        assert float(terms["spread"]) == pytest.approx(0.25 * sum((z - 2.0) ** 2 for z in every) / len(every))

    def test_without_its_regulariser_only_the_judgement_is_left(self):
        batch = drawn()
        loss = total(TET(lam=0.0)(batch, NONE))
        torch.testing.assert_close(loss, cross_entropy_per_step(batch.student.logits, batch.labels))

    def test_with_its_regulariser_alone_logits_at_the_target_cost_nothing(self):
        there = replace(drawn(), student=Answer(torch.full((3, 4, 5), 0.5)))
        assert total(TET(lam=1.0, target=0.5)(there, NONE)) == 0

    def test_it_needs_every_step_and_direct_does_not(self):
        assert (TET().needs, Direct().needs) == (Needs(every_step=True), Needs())

    @pytest.mark.parametrize("wrong", [{"lam": -0.1}, {"lam": 1.1}, {"label_smoothing": 2.0}])
    def test_a_weight_outside_its_range_is_refused(self, wrong):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TET(**wrong)
