import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.objective.logits import (
    cross_entropy_of_mean,
    cross_entropy_per_step,
    entropy_per_step,
    soft_target_divergence,
    soft_target_divergences,
)

seeds = st.integers(0, 10**6)


def drawn(seed, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def answered(seed=0, steps=3, count=4, classes=5):
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


def probabilities(logits):
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
class TestCrossEntropyAgainstPlainPython:
    def test_the_mean_over_time_is_judged(self, smoothing):
        logits, labels = answered()
        assert float(cross_entropy_of_mean(logits, labels, smoothing)) == pytest.approx(
            reference(logits, labels, smoothing)
        )

    def test_every_step_is_judged(self, smoothing):
        logits, labels = answered()
        expected = sum(reference(step[None], labels, smoothing) for step in logits) / len(logits)
        assert float(cross_entropy_per_step(logits, labels, smoothing)) == pytest.approx(expected)


class TestCrossEntropy:
    @settings(max_examples=30)
    @given(seed=st.integers(0, 10**6), smoothing=st.floats(0, 1))
    def test_judging_every_step_costs_no_less_than_judging_their_mean(self, seed, smoothing):
        logits, labels = answered(seed)
        assert cross_entropy_per_step(logits, labels, smoothing) >= cross_entropy_of_mean(logits, labels, smoothing)

    def test_with_one_step_both_are_one(self):
        logits, labels = answered(steps=1)
        torch.testing.assert_close(cross_entropy_per_step(logits, labels), cross_entropy_of_mean(logits, labels))

    def test_an_undecided_student_costs_the_logarithm_of_the_classes(self):
        _, labels = answered()
        assert float(cross_entropy_of_mean(torch.zeros(3, 4, 5), labels)) == pytest.approx(math.log(5))

    def test_the_gradient_is_probability_minus_truth_spread_over_time_and_batch(self):
        logits, labels = answered()
        logits.requires_grad_()
        cross_entropy_of_mean(logits, labels).backward()
        answer = logits.detach().mean(0).softmax(-1)
        expected = (answer - torch.eye(5, dtype=torch.float64)[labels]) / (3 * 4)
        torch.testing.assert_close(logits.grad, expected.expand(3, 4, 5))


class TestSoftTargetDivergence:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_are_numpys_divergence_times_the_squared_temperature(self, temperature):
        student, teacher = drawn(0, 4, 5, scale=3.0), drawn(1, 4, 5, scale=3.0)
        p, q = (probabilities(logits.numpy() / temperature) for logits in (teacher, student))
        expected = temperature**2 * np.mean(np.sum(p * np.log(p / q), axis=-1))
        assert float(soft_target_divergence(student, teacher, temperature)) == pytest.approx(expected, rel=1e-9)

    @settings(max_examples=30)
    @given(seed=seeds, temperature=st.floats(0.5, 20))
    def test_of_the_teachers_own_answer_cost_nothing_and_others_no_less(self, seed, temperature):
        student, teacher = drawn(seed, 3, 4), drawn(seed + 1, 3, 4)
        assert float(soft_target_divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)
        assert float(soft_target_divergence(teacher + 7.0, teacher, temperature)) == pytest.approx(0, abs=1e-9)
        assert soft_target_divergence(student, teacher, temperature) > 0

    @settings(max_examples=30)
    @given(seed=seeds)
    def test_approach_the_squared_difference_of_centred_logits_as_the_temperature_grows(self, seed):
        student, teacher = drawn(seed, 3, 4, scale=2.0), drawn(seed + 1, 3, 4, scale=2.0)
        difference = (teacher - teacher.mean(-1, keepdim=True)) - (student - student.mean(-1, keepdim=True))
        expected = difference.square().sum(-1).mean() / (2 * 4)
        assert float(soft_target_divergence(student, teacher, 1e5)) == pytest.approx(
            float(expected), rel=1e-3, abs=1e-5
        )

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_have_the_gradient_of_the_difference_of_probabilities(self, temperature):
        student, teacher = drawn(0, 4, 5).requires_grad_(), drawn(1, 4, 5)
        soft_target_divergence(student, teacher, temperature).backward()
        p, q = (probabilities(logits.detach().numpy() / temperature) for logits in (teacher, student))
        np.testing.assert_allclose(student.grad, temperature * (q - p) / 4, atol=1e-12)

    def test_have_the_gradient_that_differences_give(self):
        student, teacher = drawn(0, 2, 3).requires_grad_(), drawn(1, 2, 3)
        assert torch.autograd.gradcheck(lambda answer: soft_target_divergence(answer, teacher, 2.0), student)


class TestSoftTargetDivergences:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_are_those_of_each_step_and_sample(self, temperature):
        student, teacher = drawn(0, 3, 4, 5, scale=3.0), drawn(1, 4, 5, scale=3.0)
        found = soft_target_divergences(student, teacher, temperature)
        p, q = (probabilities(logits.numpy() / temperature) for logits in (teacher, student))
        np.testing.assert_allclose(found, temperature**2 * np.sum(p * np.log(p / q), axis=-1), rtol=1e-9)
        each = [
            [soft_target_divergence(z[b : b + 1], teacher[b : b + 1], temperature) for b in range(4)] for z in student
        ]
        torch.testing.assert_close(found, torch.tensor(each, dtype=torch.float64))

    @settings(max_examples=30)
    @given(seed=seeds, temperature=st.floats(0.5, 20))
    def test_cost_no_less_than_the_mean_of_the_steps_for_any_sample(self, seed, temperature):
        student, teacher = drawn(seed, 3, 4, 5, scale=2.0), drawn(seed + 1, 4, 5, scale=2.0)
        found = soft_target_divergences(student, teacher, temperature).mean(0)
        mean = soft_target_divergences(student.mean(0, keepdim=True), teacher, temperature)[0]
        assert (found >= mean).all()
        torch.testing.assert_close(mean.mean(), soft_target_divergence(student.mean(0), teacher, temperature))

    def test_of_logits_that_differ_much_are_finite(self):
        far = torch.tensor([[[0.0, 1e4]]])
        assert float(soft_target_divergences(far, far[0], 1.0)) == 0
        assert float(soft_target_divergences(far.flip(-1), far[0], 1.0)) == pytest.approx(1e4)


class TestEntropy:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_is_numpys(self, temperature):
        logits = drawn(0, 3, 4, 5, scale=3.0)
        p = probabilities(logits.numpy() / temperature)
        expected = -np.mean(np.sum(p * np.log(p), axis=-1))
        assert float(entropy_per_step(logits, temperature)) == pytest.approx(expected, rel=1e-9)

    def test_is_the_logarithm_of_the_classes_at_most_and_0_for_a_sure_answer(self):
        assert float(entropy_per_step(torch.zeros(3, 4, 5), 1.0)) == pytest.approx(math.log(5))
        assert float(entropy_per_step(1e4 * torch.eye(5)[None], 2.0)) == 0
