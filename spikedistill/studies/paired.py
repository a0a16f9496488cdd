"""Gains over seeds: mean, deviation, and what the paired t-test says of them.

Two methods are compared seed by seed, since both begin from one teacher and meet the same batches. ``±`` is the sample
standard deviation of a value, or of a gain, over seeds; it is no confidence interval. The test asks whether the mean
gain could be zero (Student, Biometrika 6, 1908): two-sided, each gain by itself. ``holm`` counts their number in.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

LEVEL = 0.05
"""A gain with a smaller p counts as significant."""


def gaps(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """What one method has more than another, seed by seed; of seeds that both have."""
    return [value - theirs[seed] for seed, value in ours.items() if seed in theirs]


def p_value(gains: Sequence[float]) -> float | None:
    """The two-sided p of a t-test that the mean gain is zero, in 0..1.

    None where it cannot be told: of fewer than two gains, and of gains that do not differ.
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
        degrees: of freedom, 1 or more; the finite sums for whole numbers of Abramowitz and Stegun, 26.7.3 and 26.7.4.
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
    """The sample standard deviation; of one value 0."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def with_deviation(values: Sequence[float], sign: bool = False) -> str:
    """Mean and sample deviation as people write them; of one value no deviation, of none nothing."""
    if not values:
        return ""
    deviation = f" ± {deviation_of(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if sign else ''}.2f}{deviation}"


def with_test(gains: Sequence[float]) -> str:
    """A mean gain with its deviation and the p of its test."""
    p = p_value(gains)
    if p is None:
        return with_deviation(gains, sign=True)
    return f"{with_deviation(gains, sign=True)} ({'p < 0.001' if p < 0.001 else f'p = {p:.3f}'})"


def holm(chances: Sequence[float], level: float = LEVEL) -> int:
    """How many of several tests stay significant when their number is counted in (Holm, Scand. J. Stat. 6, 1979)."""
    passed = 0
    for chance in sorted(chances):
        if chance * (len(chances) - passed) >= level:
            break
        passed += 1
    return passed


def verdict(gains: Mapping[str, Sequence[float]]) -> str:
    """Which mean gains are significant, and which are not, in a few sentences; nothing where there is but one seed."""
    if all(len(found) < 2 for found in gains.values()):
        return ""
    tested = {name: p for name, found in gains.items() if (p := p_value(found)) is not None}
    passed = [name for name, p in tested.items() if p < LEVEL]
    others = [name for name in tested if name not in passed]
    equal = [name for name in gains if name not in tested]
    said = (
        f"Significant at 5 % (paired t-test over seeds, two-sided, each by itself): {len(passed)} of {len(tested)}"
        f" ({'; '.join(passed) or 'none'}). Not significant: {'; '.join(others) or 'none'}."
    )
    if len(tested) > 1:
        said += f" With Holm's correction for so many tests: {holm([*tested.values()])}."
    return (
        said + (f" Not tested, as the seeds do not differ or are too few: {'; '.join(equal)}." if equal else "") + "\n"
    )
