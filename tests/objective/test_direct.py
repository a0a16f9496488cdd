import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.objective.direct import TET, Direct, cross_entropy_of_mean, cross_entropy_per_step
from spikedistill.objective.terms import Batch, total

NONE = nn.ModuleDict()


def drawn(seed=0, steps=3, count=4, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(steps, count, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(0, classes, (count,), generator=generator)


def judged(scores, label, smoothing=0.0):
    """Cross-entropy of one list of scores, in plain Python."""
    whole = math.log(sum(math.exp(score) for score in scores))
    target = [(1 - smoothing) * (number == label) + smoothing / len(scores) for number in range(len(scores))]
    return -sum(share * (score - whole) for share, score in zip(target, scores))


def reference(logits, labels, smoothing=0.0):
    """The mean over samples of the judgement of the mean over time."""
    steps, count, classes = logits.shape
    means = [[sum(float(z[b, k]) for z in logits) / steps for k in range(classes)] for b in range(count)]
    return sum(judged(means[b], int(labels[b]), smoothing) for b in range(count)) / count


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
class TestAgainstPlainPython:
    def test_the_mean_over_time_is_judged(self, smoothing):
        logits, labels = drawn()
        assert float(cross_entropy_of_mean(logits, labels, smoothing)) == pytest.approx(
            reference(logits, labels, smoothing)
        )

    def test_every_step_is_judged(self, smoothing):
        logits, labels = drawn()
        expected = sum(reference(step[None], labels, smoothing) for step in logits) / len(logits)
        assert float(cross_entropy_per_step(logits, labels, smoothing)) == pytest.approx(expected)


class TestLaws:
    @settings(deadline=None, max_examples=30)
    @given(seed=st.integers(0, 10**6), smoothing=st.floats(0, 1))
    def test_judging_every_step_costs_no_less_than_judging_their_mean(self, seed, smoothing):
        logits, labels = drawn(seed)
        assert cross_entropy_per_step(logits, labels, smoothing) >= cross_entropy_of_mean(logits, labels, smoothing)

    def test_with_one_step_both_are_one(self):
        logits, labels = drawn(steps=1)
        torch.testing.assert_close(cross_entropy_per_step(logits, labels), cross_entropy_of_mean(logits, labels))

    def test_an_undecided_student_costs_the_logarithm_of_the_classes(self):
        _, labels = drawn()
        assert float(cross_entropy_of_mean(torch.zeros(3, 4, 5), labels)) == pytest.approx(math.log(5))

    def test_the_gradient_is_probability_minus_truth_spread_over_time_and_batch(self):
        logits, labels = drawn()
        logits.requires_grad_()
        cross_entropy_of_mean(logits, labels).backward()
        answer = logits.detach().mean(0).softmax(-1)
        expected = (answer - torch.eye(5, dtype=torch.float64)[labels]) / (3 * 4)
        torch.testing.assert_close(logits.grad, expected.expand(3, 4, 5))


class TestDirect:
    def test_its_term_is_the_judgement_of_the_mean(self):
        logits, labels = drawn()
        terms = Direct(label_smoothing=0.1)(Batch(logits, labels), NONE)
        assert terms.keys() == {"labels"}
        assert float(terms["labels"]) == pytest.approx(reference(logits, labels, 0.1))

    @pytest.mark.parametrize("wrong", [-0.1, 1.5])
    def test_a_smoothing_outside_its_range_is_refused(self, wrong):
        with pytest.raises(ConfigError, match="label_smoothing"):
            Direct(label_smoothing=wrong)


class TestTET:
    def test_its_terms_are_the_mixed_judgement_and_distance_of_every_step(self):
        logits, labels = drawn()
        terms = TET(lam=0.25, target=2.0)(Batch(logits, labels), NONE)
        every = [float(value) for value in logits.flatten()]
        assert terms.keys() == {"labels", "spread"}
        assert float(terms["labels"]) == pytest.approx(0.75 * float(cross_entropy_per_step(logits, labels)))
        assert float(terms["spread"]) == pytest.approx(0.25 * sum((z - 2.0) ** 2 for z in every) / len(every))

    def test_without_its_regulariser_only_the_judgement_is_left(self):
        logits, labels = drawn()
        loss = total(TET(lam=0.0)(Batch(logits, labels), NONE))
        torch.testing.assert_close(loss, cross_entropy_per_step(logits, labels))

    def test_with_its_regulariser_alone_logits_at_the_target_cost_nothing(self):
        _, labels = drawn()
        assert total(TET(lam=1.0, target=0.5)(Batch(torch.full((3, 4, 5), 0.5), labels), NONE)) == 0

    @pytest.mark.parametrize("wrong", [{"lam": -0.1}, {"lam": 1.1}, {"label_smoothing": 2.0}])
    def test_a_weight_outside_its_range_is_refused(self, wrong):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TET(**wrong)
