"""Gains over seeds: mean, standard deviation and paired t-test.

Two methods are compared seed by seed, since runs with one seed have the same teacher and the same batches. ``±`` is the
sample standard deviation of a value or a gain over seeds, not a confidence interval. The test asks whether the mean
gain could be zero (Student, Biometrika 6, 1908). It is two-sided and tests each gain by itself; ``holm`` corrects for
the number of tests.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

LEVEL = 0.05
"""A gain with p below this is significant."""


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Our value minus theirs for each seed that both have."""
    return [value - theirs[seed] for seed, value in ours.items() if seed in theirs]


def p_value(gains: Sequence[float]) -> float | None:
    """The two-sided p value of a t-test that the mean gain is zero, in 0..1.

    None if it is not defined: for fewer than two gains, and for gains that are all equal.
    """
    if len(gains) < 2:
        return None
    mean, deviation = statistics.fmean(gains), deviation_of(gains)
    if deviation <= 1e-9 * max(abs(gain) for gain in gains):
        return None
    return beyond(mean / (deviation / math.sqrt(len(gains))), len(gains) - 1)


def beyond(t: float, degrees: int) -> float:
    """The probability that Student's t lies farther from zero than ``t``, on either side.

    Args:
        t: any number.
        degrees: degrees of freedom, 1 or more. The sums are from Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (power - 1) / power
    within = math.sin(angle) * total
    if odd:
        within = 2 / math.pi * (angle + within)
    return min(1.0, max(0.0, 1.0 - within))


def deviation_of(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def error_of(gains: Sequence[float]) -> float | None:
    """The standard error of a mean gain: sample deviation over the square root of n; None for fewer than two seeds."""
    return deviation_of(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None


def interval_of(gains: Sequence[float]) -> tuple[float, float] | None:
    """The confidence interval of a mean gain at 95 % (1 - ``LEVEL``), by Student's t; None where ``p_value`` is.

    >>> [round(end, 2) for end in interval_of([1.0, 2.0, 3.0])]
    [-0.48, 4.48]
    """
    error = error_of(gains)
    if error is None or p_value(gains) is None:
        return None
    low, high = 0.0, 1e3  # of t, which is 12.7 for two gains and less for more
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle, len(gains) - 1) > LEVEL else (low, middle)
    mean = statistics.fmean(gains)
    return mean - high * error, mean + high * error


def error_over(ours: Mapping[int, Sequence[float]], theirs: Mapping[int, Sequence[float]]) -> float | None:
    """The standard error of a mean gain, if seeds and test samples are both drawn at random.

    The variances of the mean over seeds and of the mean over samples are added. What seeds and samples vary together
    counts in both, so the error is rather too large than too small.

    Args:
        ours: seed -> a value per sample, for instance 1 for a correct answer.
        theirs: likewise, for the same samples in the same order.

    Returns:
        None for fewer than two seeds that both have, or fewer than two samples.

    >>> round(error_over({0: [1.0, 1.0], 1: [1.0, 0.0]}, {0: [0.0, 1.0], 1: [0.0, 1.0]}), 4)
    0.7906
    """
    gains = [[a - b for a, b in zip(value, theirs[seed])] for seed, value in ours.items() if seed in theirs]
    over_seeds = error_of([statistics.fmean(of_seed) for of_seed in gains])
    over_samples = error_of([statistics.fmean(of_sample) for of_sample in zip(*gains)])
    if over_seeds is None or over_samples is None:
        return None
    return math.hypot(over_seeds, over_samples)


def with_deviation(values: Sequence[float], sign: bool = False) -> str:
    """Mean ± sample deviation as text; only the mean for one value, empty for none."""
    if not values:
        return ""
    deviation = f" ± {deviation_of(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if sign else ''}.2f}{deviation}"


def with_test(gains: Sequence[float]) -> str:
    """A mean gain with its deviation and the p value of its test, as text."""
    p = p_value(gains)
    if p is None:
        return with_deviation(gains, sign=True)
    return f"{with_deviation(gains, sign=True)} ({'p < 0.001' if p < 0.001 else f'p = {p:.3f}'})"


def holm(p_values: Sequence[float], level: float = LEVEL) -> int:
    """How many of several tests stay significant after Holm's correction (Scand. J. Stat. 6, 1979)."""
    passed = 0
    for p in sorted(p_values):
        if p * (len(p_values) - passed) >= level:
            break
        passed += 1
    return passed


def verdict(gains: Mapping[str, Sequence[float]]) -> str:
    """Which mean gains are significant and which are not, in a few sentences; empty if there is only one seed."""
    if all(len(found) < 2 for found in gains.values()):
        return ""
    tested = {name: p for name, found in gains.items() if (p := p_value(found)) is not None}
    passed = [name for name, p in tested.items() if p < LEVEL]
    others = [name for name in tested if name not in passed]
    equal = [name for name in gains if name not in tested]
    said = (
        "Significant at 5 % (paired t-test over seeds, two-sided, not corrected for multiple tests):"
        f" {len(passed)} of {len(tested)} ({'; '.join(passed) or 'none'})."
        f" Not significant: {'; '.join(others) or 'none'}."
    )
    if len(tested) > 1:
        said += f" With Holm's correction for all these tests: {holm([*tested.values()])}."
    return (
        said + (f" Not tested, as the seeds do not differ or are too few: {'; '.join(equal)}." if equal else "") + "\n"
    )
