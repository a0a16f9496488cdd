"""Means and deviations as tables give them."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikedistill.evaluate.paired import with_deviation


@pytest.mark.parametrize(
    "values, said",
    [
        ([], ""),
        ([2.0], "2.00"),
        ([1.0, 3.0], "2.00 ± 1.41"),
        ([1.0, 2.0, 6.0], "3.00 ± 2.65"),
        ([4.0] * 3, "4.00 ± 0.00"),
    ],
)
def test_the_deviation_is_that_of_a_sample(values, said):
    assert with_deviation(values) == said


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6))
def test_a_sign_is_given_where_asked(values):
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert with_deviation(values, sign=True) == f"{mean:+.2f} ± {deviation:.2f}"
