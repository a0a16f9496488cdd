"""What a study says: tables in Markdown and pictures, from the rows of its CSV file and nothing else."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spikedistill.data.noise import SEVERITIES
from spikedistill.deliver.figures import bars, curves
from spikedistill.deliver.immunity import panels, summary
from spikedistill.deliver.tables import markdown
from spikedistill.evaluate.immunity import Score, perturbations
from spikedistill.studies.paired import deviation_of, gaps, p_value, verdict, with_deviation, with_test

PAIRS_COLUMNS = """Accuracies in percent, mean ± sample standard deviation over seeds; gains are points more than direct
training, seed by seed, with the p of a paired t-test. Each teacher was trained once: ± is without its part.

"""
TIMESTEPS_COLUMNS = """Accuracies in percent; every student of kdsnn is trained with the T that it is measured at. The
conversions are of the same teacher, thresholds per channel: `conversion-max` and `-percentile` train nothing, their
thresholds are the largest activation or the 99.9th percentile, their biases are corrected at each T; `conversion-qcfs`
is the teacher trained on as long as a student, its activations quantised to the levels of T=4, then run with neurons.

"""
NOISE_COLUMNS = """Accuracies in percent, means over seeds; `noise` and `natural` are means over their members and five
severities. Relative mCE, the relative mean corruption error (Hendrycks and Dietterich, arXiv 1903.12261), is what
corruptions cost beside the clean accuracy, in percent of what they cost the direct student: below 100 a network loses
less. mCE, of natural corruptions, compares errors as they are, which favours the network that is better on clean
images. Falls less: the mean over severities is nearer to the clean accuracy than that of the direct student. ± is the
sample standard deviation over seeds of students, p that of a paired t-test. The teacher was trained once.

"""
ENERGY_COLUMNS = """Of one image. AC: an accumulate, where a spike meets a weight; MAC: a multiply-accumulate. The ANN
of so many bits, what T steps are worth, is counted, not trained; its float32 column has 32 bits all the same. Zeros
skipped: without the connections whose input is zero at every step.

"""
"""What the columns of the tables mean."""
NOISE_KINDS = ("noise", "natural")
BySeed = dict[str, dict[str, dict[int, float]]]
"""Method -> setting -> seed -> accuracy."""


@dataclass(frozen=True)
class Row:
    """One number of a study, a line of its CSV file."""

    study: str
    teacher: str
    student: str
    method: str
    setting: str
    seed: int
    timesteps: int
    metric: str
    value: float


def read_rows(path: Path) -> list[Row]:
    """The rows of a study's CSV file."""
    numbers = {"seed": int, "timesteps": int, "value": float}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(**{key: numbers.get(key, str)(text) for key, text in line.items()}) for line in csv.DictReader(file)
        ]


def _pairs(rows: Sequence[Row]) -> dict[str, dict[str, dict[int, float]]]:
    """Pair of networks -> method -> seed -> accuracy; methods in the order of the study."""
    students = [row for row in rows if row.method != "teacher"]
    methods = dict.fromkeys(row.method for row in students)
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in students:
        pair = found.setdefault(f"{row.teacher} -> {row.student}", {method: {} for method in methods})
        pair[row.method][row.seed] = row.value
    return found


def draw_pairs(name: str, rows: Sequence[Row], out: Path) -> None:
    """Mean accuracy and deviation of every method in every pair."""
    groups = {
        pair.replace(" -> ", "\n-> "): {
            method: (statistics.mean(by_seed.values()), deviation_of([*by_seed.values()]))
            for method, by_seed in found.items()
            if by_seed
        }
        for pair, found in _pairs(rows).items()
    }
    bars(out / f"{name}.png", groups, "test accuracy (%)")


def report_pairs(rows: Sequence[Row]) -> str:
    """Accuracy, mean and deviation over seeds; the gain over direct training, and of features over logits."""
    pairs = _pairs(rows)
    anns = {row.teacher: row.value for row in rows if row.method == "teacher"}
    methods = list(next(iter(pairs.values())))
    gains: dict[str, dict[str, list[float]]] = {method: {} for method in methods if method != "direct"}
    lines: list[list[str]] = []
    features: dict[str, list[float]] = {}
    for pair, found in pairs.items():
        for method in gains:
            gains[method][pair] = gaps(found[method], found.get("direct", {}))
        accuracies = [with_deviation([*by_seed.values()]) for by_seed in found.values()]
        written = [with_test(of_pair[pair]) for of_pair in gains.values()]
        lines.append([pair, f"{anns[pair.split(' -> ')[0]]:.2f}", *accuracies, *written])
        more = gaps(found.get("kdsnn-feature", {}), found.get("kdsnn-response", {}))
        features |= {pair: more} if more else {}
    columns = ["teacher -> student", "teacher (ANN)", *methods, *(f"gain of {method}" for method in gains)]
    return PAIRS_COLUMNS + markdown(columns, lines) + _verdicts(gains, features)


def _verdicts(gains: Mapping[str, Mapping[str, Sequence[float]]], features: Mapping[str, Sequence[float]]) -> str:
    """Which gains are significant, their range from pair to pair, and whether features gain more than logits."""
    each = verdict({f"{method} of {pair}": gain for method, found in gains.items() for pair, gain in found.items()})
    said = f"\n{each}" if each else ""
    means = {method: [statistics.mean(gain) for gain in found.values() if gain] for method, found in gains.items()}
    spans = [f"{m} {min(found):+.2f} to {max(found):+.2f}" for m, found in means.items() if len(found) > 1]
    said += f"\nMean gains over direct training, from pair to pair: {', '.join(spans)} points.\n" if spans else ""
    if not features:
        return said
    won = sum(statistics.mean(more) > 0 for more in features.values())
    by_pair = "; ".join(f"{pair}: {with_test(more)}" for pair, more in features.items())
    return said + f"\nFeature-based gains more than response-based in {won} of {len(features)} pairs ({by_pair}).\n"


def _steps(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Method -> T -> accuracy, of one seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row.method, {})[row.timesteps] = row.value
    return found


def draw_timesteps(name: str, title: str, rows: Sequence[Row], out: Path) -> None:
    """Accuracy over time steps, and the teacher's as a level line."""
    found = _steps(rows)
    (ann,) = found.pop("teacher").values()
    drawn = {method: [(float(T), value) for T, value in at.items()] for method, at in found.items()}
    longest = max(T for at in found.values() for T in at)
    drawn["teacher (ANN)"] = [(1.0, ann), (float(longest), ann)]
    curves(out / f"{name}.png", {title: drawn}, "time steps", "test accuracy (%)", doubling=True)


def report_timesteps(rows: Sequence[Row]) -> str:
    """Accuracy of students at their T, of conversions at every T that was measured, and where conversion catches up."""
    found = _steps([row for row in rows if row.method != "teacher"])
    every = sorted({T for at in found.values() for T in at})
    lines = [[method, *(f"{at[T]:.2f}" if T in at else "" for T in every)] for method, at in found.items()]
    conversions = {method: at for method, at in found.items() if method.startswith("conversion")}
    caught = []
    for own, goal in (
        (T, value) for method, at in found.items() if method not in conversions for T, value in at.items()
    ):
        for method, at in conversions.items():
            reached = [T for T, value in at.items() if value >= goal]
            when = f"first at T={min(reached)}" if reached else f"not up to T={max(at)}"
            caught.append(f"- {method} reaches the T={own} student ({goal:.2f} %): {when}.\n")
    return TIMESTEPS_COLUMNS + markdown(["method, T =", *map(str, every)], lines) + "\n" + "".join(caught)


def _by_seed(rows: Sequence[Row]) -> BySeed:
    found: BySeed = {}
    for row in rows:
        found.setdefault(row.method, {}).setdefault(row.setting, {})[row.seed] = row.value
    return found


def _means(by_seed: BySeed) -> list[Score]:
    """Means over seeds: one score a method and setting."""
    kinds = {name: kind for kind, name in perturbations(NOISE_KINDS)}
    means = []
    for method, settings in by_seed.items():
        for setting, values in settings.items():
            name, _, severity = setting.partition(":")
            mean = statistics.fmean(values.values())
            means.append(Score(method, kinds.get(name, "clean"), name, int(severity or 0), mean))
    return means


def draw_noise(name: str, rows: Sequence[Row], out: Path) -> list[str]:
    """For each kind the curves over severity; names of the pictures."""
    by_seed = _by_seed(rows)
    for kind in NOISE_KINDS:
        drawn = panels(_means(by_seed), list(by_seed), kind)
        curves(out / f"{name}-{kind}.png", drawn, "severity", "test accuracy (%)")
    return [f"{name}-{kind}.png" for kind in NOISE_KINDS]


def report_noise(rows: Sequence[Row]) -> str:
    """What noise costs beside the direct student, then accuracy under each perturbation and what KDSNN gains there."""
    by_seed = _by_seed(rows)
    columns, lines = summary(_means(by_seed), list(by_seed), NOISE_KINDS, "direct")
    return NOISE_COLUMNS + markdown(columns, lines) + _by_perturbation(by_seed)


def _by_perturbation(by_seed: BySeed) -> str:
    """The mean over severities of every method, what KDSNN gains over direct training, and how much more it falls."""
    met = [found for found in perturbations(NOISE_KINDS) if f"{found[1]}:1" in next(iter(by_seed.values()))]
    groups: dict[str, list[str]] = {"clean": []}
    groups |= {f"all {kind}": [name for found, name in met if found == kind] for kind in NOISE_KINDS}
    groups |= {name: [name] for _, name in met}
    clean = _gains(by_seed, [])
    lines: list[list[str]] = []
    gains: dict[str, list[float]] = {}
    falls: dict[str, list[float]] = {}
    for title, names in groups.items():
        values = [f"{statistics.fmean(_mean(by_seed[method], names).values()):.2f}" for method in by_seed]
        gains[title] = _gains(by_seed, names)
        more = [before - after for before, after in zip(clean, gains[title])] if names else []
        falls |= {title: more} if names else {}
        lines.append([title, *values, with_test(gains[title]), with_test(more)])
    columns = ["mean over severities", *by_seed, "kdsnn more than direct, points", "falls further than direct, points"]
    said = "\n" + markdown(columns, lines)
    if p_value(clean) is not None:
        said += f"\nDifferences in accuracy. {verdict(gains)}\nDifferences in the fall. {verdict(falls)}"
    return said


def _mean(of_method: Mapping[str, Mapping[int, float]], names: Sequence[str]) -> dict[int, float]:
    """Of each seed the mean over severities and perturbations; of no perturbation the clean accuracy."""
    settings = [f"{name}:{severity}" for name in names for severity in SEVERITIES] if names else ["clean"]
    return {seed: statistics.fmean(of_method[setting][seed] for setting in settings) for seed in of_method["clean"]}


def _gains(by_seed: BySeed, names: Sequence[str]) -> list[float]:
    """Points that KDSNN has more than direct training, seed by seed."""
    return gaps(_mean(by_seed.get("kdsnn", {"clean": {}}), names), _mean(by_seed.get("direct", {"clean": {}}), names))
