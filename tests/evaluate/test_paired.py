import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from spikedistill.evaluate.paired import (
    beyond,
    holm,
    interval_of,
    p_value,
    paired_differences,
    verdict,
    with_deviation,
    with_test,
)

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Hours of sleep gained by ten patients, the example of Student's paper of 1908: t = 4.0621 with 9 degrees."""


@given(st.floats(-50, 50))
def test_with_one_and_two_degrees_the_closed_forms(t):
    assert beyond(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)), abs=1e-12)
    assert beyond(t, 2) == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t), abs=1e-12)


@given(st.floats(-40, 40), st.integers(1, 60))
def test_any_degrees_agree_with_scipy(t, degrees):
    assert beyond(t, degrees) == pytest.approx(2 * scipy.stats.t.sf(abs(t), degrees), abs=1e-9)


@pytest.mark.parametrize(
    "degrees, critical", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_five_percent_lie_beyond_the_tables_critical_values(degrees, critical):
    assert beyond(critical, degrees) == pytest.approx(0.05, abs=5e-5)


def test_students_own_example():
    assert p_value(SLEEP) == pytest.approx(0.00283289, rel=1e-5)


@given(
    st.lists(st.integers(-500, 500).map(lambda n: n / 100), min_size=2, max_size=8).filter(lambda x: len(set(x)) > 1)
)
def test_p_is_that_of_the_paired_test(gains):
    direct = [70.0 + seed for seed in range(len(gains))]
    taught = [base + gain for base, gain in zip(direct, gains)]
    found = paired_differences(dict(enumerate(taught)), dict(enumerate(direct)))
    assert p_value(found) == pytest.approx(scipy.stats.ttest_rel(taught, direct).pvalue, abs=1e-6)
    assert p_value(found) == pytest.approx(p_value([-gain for gain in found]))
    ends = scipy.stats.t.interval(0.95, len(found) - 1, np.mean(found), scipy.stats.sem(found))
    assert interval_of(found) == pytest.approx(ends, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("gains", [[], [1.87], [0.5, 0.5, 0.5], [0.0, 0.0], [0.1 + 0.2, 0.3]])
def test_one_seed_and_seeds_without_difference_are_not_tested(gains):
    assert p_value(gains) is None and interval_of(gains) is None
    assert "p =" not in with_test(gains)


def test_plus_minus_is_the_sample_deviation():
    assert with_deviation([1.0, 2.0, 3.0]) == "2.00 ± 1.00"  # of the population 0.82, of the mean 0.58
    assert with_deviation([1.5]) == "1.50" and with_deviation([]) == "" and with_deviation([0.5], sign=True) == "+0.50"
    assert with_test([1.0, 2.0, 3.0]) == "+2.00 ± 1.00 (p = 0.074)"
    assert with_test([1.0, 1.01, 0.99]) == "+1.00 ± 0.01 (p < 0.001)"


def test_holm_counts_the_number_of_tests_in():
    assert holm([0.04]) == 1 and holm([0.04, 0.04]) == 0 and holm([0.04, 0.02]) == 2
    assert holm([0.01, 0.04, 0.03]) == 1  # 0.01 x 3, then 0.03 x 2 = 0.06
    assert holm([]) == 0


def test_a_verdict_names_both_sides():
    said = verdict(
        {"sure": [1.0, 1.1, 0.9], "loss": [-1.0, -1.1, -0.9], "chance": [1.0, -1.0, 0.5], "same": [1.0, 1.0]}
    )
    assert ": 2 of 3 (sure; loss). Not significant: chance." in said
    assert "Holm's correction for all these tests: 2." in said and "too few: same." in said
    assert verdict({"one": [1.0], "seed": [2.0]}) == "" and verdict({}) == ""
