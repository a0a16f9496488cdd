import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.evaluate.agreement import agreement, divergence


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestAgreement:
    def test_counts_equal_answers_of_the_mean_over_time_in_percent(self):
        steps = [
            [[3.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]],
            [[0.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]],
        ]
        teacher = torch.tensor([[1.0, 0.0], [0.0, 9.0], [0.0, 1.0], [0.2, 0.1]])
        assert agreement(torch.tensor(steps), teacher) == 75.0

    def test_with_itself_is_100(self):
        teacher = drawn(0, 5, 3)
        assert agreement(teacher[None], teacher) == 100.0

    def test_counts_wrong_answers_too(self):
        assert agreement(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1.0, 0.0]])) == 0.0


class TestDivergence:
    def test_is_measured_in_nats(self):
        teacher = torch.tensor([[0.5, 0.5]]).log()
        student = torch.tensor([[[0.75, 0.25]]]).log()
        assert divergence(student, teacher) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)

    def test_is_the_mean_over_samples(self):
        student, teacher = drawn(0, 2, 4, 3), drawn(1, 4, 3)
        each = [divergence(student[:, row : row + 1], teacher[row : row + 1]) for row in range(4)]
        assert divergence(student, teacher) == pytest.approx(sum(each) / 4)

    @settings(max_examples=20)
    @given(seed=st.integers(0, 10**6), shift=st.floats(-5, 5))
    def test_is_0_for_equal_answers_and_positive_for_others(self, seed, shift):
        teacher = drawn(seed, 4, 3)
        assert divergence((teacher + shift).expand(2, 4, 3), teacher) == pytest.approx(0, abs=1e-6)
        assert divergence(drawn(seed + 1, 2, 4, 3), teacher) > 0

    def test_of_very_confident_answers_is_finite(self):
        teacher = torch.tensor([[1000.0, 0.0]])
        assert divergence(teacher.flip(-1)[None], teacher) == pytest.approx(1000)
