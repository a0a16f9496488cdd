"""The report of a study: tables in Markdown and pictures, only from the rows of its CSV file."""

import csv
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spikedistill.data.noise import SEVERITIES
from spikedistill.deliver.figures import bars, curves
from spikedistill.deliver.immunity import draw_kind, summary
from spikedistill.deliver.tables import markdown
from spikedistill.evaluate.energy import MODELS
from spikedistill.evaluate.immunity import Score, perturbations
from spikedistill.evaluate.paired import deviation_of, p_value, paired_differences, verdict, with_deviation, with_test

PAIRS_COLUMNS = """Accuracies are in percent: mean ± sample standard deviation over seeds. Gains are in points over
direct training (cross-entropy only), paired by seed, with the p value of a paired t-test. Each teacher was trained
once, so ± does not include the variation of teachers.

"""
TIMESTEPS_COLUMNS = """Accuracies are in percent. Every kdsnn student was trained with the T that it is measured at.
All conversions begin with the same teacher and have thresholds per channel. `conversion-max` and
`conversion-percentile` train nothing: their thresholds are the largest activation or the 99.9th percentile, and their
biases are corrected for each T. `conversion-qcfs` trains the teacher for as many more epochs as a student, with
activations quantised to the levels of T=4, then runs it as a spiking network.

"""
NOISE_COLUMNS = """Accuracies are in percent, means over seeds. `noise` and `natural` are means over all perturbations
of this kind and five severities. Relative mCE is the relative mean corruption error (Hendrycks and Dietterich, arXiv
1903.12261): the accuracy lost under corruptions, in percent of what the direct student loses. Below 100 a network loses
less. mCE compares the errors under natural corruptions, which favours the network that is better on clean images. Falls
less: the mean over severities is nearer to the clean accuracy than for the direct student. ± is the sample standard
deviation over seeds of students, p the p value of a paired t-test. The teacher was trained once.

"""
ENERGY_COLUMNS = """All numbers are per image. AC: an accumulate, one spike times one weight; MAC: a
multiply-accumulate. Energies are in microjoules (µJ), under three models of the cost of an operation. The rows below
each student are its ANN of equal information, whose activations have as many bits as T steps can distinguish. Its
operations are counted; it is not trained. In the float32 column it has 32 bits. Zeros skipped: connections whose input
is zero at every step do not count. Student / ANN: the student's energy divided by that ANN's, model by model; below 1
the student takes less.

"""
FRONT_COLUMNS = """Accuracies are in percent, spikes per image over all neurons and time steps: mean ± sample standard
deviation over seeds. Gains in accuracy are in points over the usual distillation, which is the first row, paired by
seed, with the p value of a paired t-test. Fewer spikes are in percent of its spikes.

"""
SAMPLES_COLUMNS = """
Gains over direct training in points, with their standard error over seeds and test samples: both are taken as drawn at
random. Early exit: a sample leaves once its likeliest class has a probability above 0.9; steps are means per sample.

"""
"""What the columns of the tables mean, above each table."""
CONFIDENCE = 0.9
"""The probability above which samples leave early."""
ALL_SEEDS = -1
"""The seed of a row that is about all seeds."""
STAGES = "distilling-spikes-stages"
"""The method whose students are taught by an assistant, not by the teacher of their pair."""
TAUGHT_BY = "Accuracy of the teacher"
CONTRASTS = {
    ("kdsnn-feature", "kdsnn-response"): "Feature-based gains more than response-based",
    (STAGES, "distilling-spikes"): "Two stages gain more than one",
    ("distilling-spikes", "kdsnn-response"): "Spikes of the teacher gain more than its logits",
    ("cross-kd", "tet"): "Cross KD gains more than its loss on events alone",
    ("cross-kd", "cross-kd-without-replacement"): "Replacement adds to Cross KD",
    ("cross-kd", "cross-kd-without-similarity"): "Similarity adds to Cross KD",
    ("cross-kd", "cross-kd-without-teacher"): "The teacher's logits add to Cross KD",
}
"""Pairs of methods that are compared, and what is said if the first wins."""
ENERGY = "energy_uJ_"
"""The names of energies in microjoules in the CSV file begin with this; the name of the cost model follows."""
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
    students = [row for row in rows if row.method != "teacher" and row.metric == "accuracy"]
    methods = dict.fromkeys(row.method for row in students)
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in students:
        pair = found.setdefault(f"{row.teacher} -> {row.student}", {method: {} for method in methods})
        pair[row.method][row.seed] = row.value
    return found


def draw_pairs(name: str, title: str, rows: Sequence[Row], out: Path, images: int | None = None) -> None:
    """Mean accuracy and deviation of every method in every pair."""
    groups = {
        pair.replace(" -> ", "\n-> "): {
            _label(method): (statistics.mean(by_seed.values()), deviation_of([*by_seed.values()]))
            for method, by_seed in found.items()
            if by_seed
        }
        for pair, found in _pairs(rows).items()
    }
    steps = ", ".join(str(T) for T in sorted({row.timesteps for row in rows if row.method != "teacher"}))
    title, note = f"{title}: accuracy of students, T={steps}", f"{_note(rows, images)} ± sample standard deviation"
    bars(out / f"{name}.png", {"": groups}, "test accuracy (%)", title=title, note=note)


def _label(method: str) -> str:
    """The name of a method in pictures."""
    return {"direct": "direct (cross-entropy only)", "teacher": "teacher (ANN)"}.get(method, method)


def _note(rows: Sequence[Row], images: int | None) -> str:
    """The note below a picture: the number of test images, if known, and the seeds of the students."""
    seeds = sorted({row.seed for row in rows if row.method != "teacher"} - {ALL_SEEDS})
    some = f"{images} test images" if images else "test set"
    if len(seeds) < 2:
        return f"{some}, one seed ({', '.join(map(str, seeds))})"
    students = {
        (row.method, row.setting, row.seed) for row in rows if row.method != "teacher" and row.seed != ALL_SEEDS
    }
    counts = Counter((method, setting) for method, setting, _ in students).values()
    fewest = f"{min(counts)} to " if min(counts) < len(seeds) else ""
    return f"{some}, mean of n = {fewest}{len(seeds)} seeds ({', '.join(map(str, seeds))})"


def report_pairs(rows: Sequence[Row]) -> str:
    """Accuracy over seeds; the gain over direct training, and of feature-based over response-based distillation."""
    pairs = _pairs(rows)
    anns = {row.teacher: row.value for row in rows if row.method == "teacher"}
    methods = list(next(iter(pairs.values())))
    gains: dict[str, dict[str, list[float]]] = {method: {} for method in methods if method != "direct"}
    lines: list[list[str]] = []
    contrasts: dict[str, dict[str, list[float]]] = {}
    for pair, found in pairs.items():
        for method in gains:
            gains[method][pair] = paired_differences(found[method], found.get("direct", {}))
        equal = len({len(by_seed) for by_seed in found.values()}) == 1
        accuracies = [
            with_deviation([*by_seed.values()]) + ("" if equal else f" (n = {len(by_seed)})")
            for by_seed in found.values()
        ]
        written = [with_test(of_pair[pair]) for of_pair in gains.values()]
        lines.append([pair, f"{anns[pair.split(' -> ')[0]]:.2f}", *accuracies, *written])
        for (first, second), said in CONTRASTS.items():
            if more := paired_differences(found.get(first, {}), found.get(second, {})):
                contrasts.setdefault(said, {})[pair] = more
    columns = ["teacher -> student", "teacher", *methods, *(f"gain of {method}" for method in gains)]
    others = _teachers(rows, "Accuracy of the other teachers", {pair.split(" -> ")[0] for pair in pairs})
    if STAGES in methods and "assistant" in anns:
        others += f"\nThe students of {STAGES} were taught by the assistant.\n"
    return PAIRS_COLUMNS + markdown(columns, lines) + others + _verdicts(gains, contrasts)


def _teachers(rows: Sequence[Row], said: str, without: Collection[str] = ()) -> str:
    """A line with the accuracy of each teacher; empty if there is none."""
    accuracies = [row for row in rows if row.method == "teacher" and row.metric == "accuracy"]
    found = {row.teacher: f"{row.teacher} {row.value:.2f} %" for row in accuracies if row.teacher not in without}
    return f"\n{said}: {', '.join(found.values())}.\n" if found else ""


def _verdicts(
    gains: Mapping[str, Mapping[str, Sequence[float]]], contrasts: Mapping[str, Mapping[str, Sequence[float]]]
) -> str:
    """Which gains are significant, their range over pairs, and how methods compare with one another."""
    each = verdict({f"{method} of {pair}": gain for method, found in gains.items() for pair, gain in found.items()})
    said = f"\n{each}" if each else ""
    means = {method: [statistics.mean(gain) for gain in found.values() if gain] for method, found in gains.items()}
    spans = [f"{m} {min(found):+.2f} to {max(found):+.2f}" for m, found in means.items() if len(found) > 1]
    said += f"\nMean gains over direct training, from pair to pair: {', '.join(spans)} points.\n" if spans else ""
    for told, by_pair in contrasts.items():
        won = sum(statistics.mean(more) > 0 for more in by_pair.values())
        each = "; ".join(f"{pair}: {with_test(more)}" for pair, more in by_pair.items())
        said += f"\n{told} in {won} of {len(by_pair)} pairs ({each}).\n"
    return said


def report_samples(rows: Sequence[Row]) -> str:
    """The report of pairs, then every gain beside its standard error over seeds and samples, and early exit."""
    accuracies, found = _by_method(rows, "accuracy"), []
    errors, steps, early = (_by_method(rows, f) for f in ("gain_error", "early_exit_steps", "early_exit_accuracy"))
    for method, by_seed in accuracies.items():
        gains = paired_differences(by_seed, accuracies.get("direct", {})) if method != "direct" else []
        error = errors.get(method, {}).get(ALL_SEEDS)
        said = f"{statistics.fmean(gains):+.2f} ± {error:.2f}" if gains and error is not None else ""
        ratio = f"{statistics.fmean(gains) / error:.1f}" if gains and error else ""
        left = (f"{statistics.fmean(values[method].values()):.2f}" for values in (steps, early))
        found.append([method, said, ratio, *left])
    columns = ["method", "gain ± standard error", "gain / error", "early exit: steps", "early exit: accuracy"]
    return report_pairs(rows) + SAMPLES_COLUMNS + markdown(columns, found)


def _by_method(rows: Sequence[Row], metric: str) -> dict[str, dict[int, float]]:
    """Method -> seed -> value of a metric of students."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.method != "teacher" and row.metric == metric:
            found.setdefault(row.method, {})[row.seed] = row.value
    return found


def draw_energy(name: str, title: str, rows: Sequence[Row], out: Path, images: int | None = None) -> None:
    """Energy of each network under every model, students beside their quantised ANNs."""
    kinds = {"": "student (SNN)", "quantised-ann": "its ANN of equal information"}
    kinds["quantised-sparse-ann"] = "the same, zeros skipped"
    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for row in rows:
        if row.metric.startswith(ENERGY):
            model = next(model for model in MODELS if row.metric == f"{ENERGY}{model.name}")
            student = f"{row.teacher} ->\n{row.student}\n{row.method}, T={row.timesteps}"
            ann = row.method == "teacher"
            groups = panels.setdefault(f"{model.name}: {model.what}", {})
            group = groups.setdefault(f"{row.teacher}\n(teacher)" if ann else student, {})
            group["teacher (ANN, 8 bits)" if ann else kinds[row.setting]] = (row.value, 0.0)
    title = f"{title}: estimates for 45 nm, not measurements"
    bars(out / f"{name}.png", panels, "energy (µJ per image)", title=title, note=_note(rows, images))


def _fronts(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """Method and setting -> metric -> seed -> value, in the order of the study."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.method != "teacher":
            found.setdefault((row.method, row.setting), {}).setdefault(row.metric, {})[row.seed] = row.value
    return found


def draw_front(name: str, title: str, rows: Sequence[Row], out: Path, images: int | None = None) -> None:
    """Accuracy over spikes per image: a curve for each method, a point for each setting."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for (method, _), found in _fronts(rows).items():
        means = (statistics.fmean(found[metric].values()) for metric in ("spikes", "accuracy"))
        drawn.setdefault(_label(method), []).append(tuple(means))  # type: ignore[arg-type]
    curves(
        out / f"{name}.png",
        {"": {method: sorted(points) for method, points in drawn.items()}},
        "spikes per image",
        "test accuracy (%)",
        title=title,
        note=_note(rows, images),
    )


def report_front(rows: Sequence[Row]) -> str:
    """Accuracy and spikes of every setting beside those of the first, and who has the fewest spikes at no loss."""
    found = _fronts(rows)
    usual, *_ = found.values()
    lines, free = [], {}
    for (method, setting), each in found.items():
        gains = [] if each is usual else paired_differences(each["accuracy"], usual["accuracy"])
        fewer = {seed: 100 * (1 - count / usual["spikes"][seed]) for seed, count in each["spikes"].items()}
        accuracy = with_deviation([*each["accuracy"].values()])
        spikes = f"{statistics.fmean(each['spikes'].values()):.0f}"
        lines.append([method, setting, accuracy, spikes, with_test(gains), with_deviation([*fewer.values()])])
        if gains and statistics.fmean(gains) >= 0:
            free[f"{method} {setting}".strip()] = (statistics.fmean(fewer.values()), gains)
    columns = ["method", "setting", "accuracy", "spikes", "gain in accuracy", "fewer spikes (%)"]
    return FRONT_COLUMNS + markdown(columns, lines) + _teachers(rows, TAUGHT_BY) + _fewest(free)


def _fewest(free: Mapping[str, tuple[float, Sequence[float]]]) -> str:
    """Which setting has the fewest spikes without a loss of accuracy."""
    if not free:
        return "\nEvery setting loses accuracy against the usual distillation.\n"
    name, (fewer, gains) = max(free.items(), key=lambda one: one[1][0])
    return f"\nFewest spikes at no loss of mean accuracy: {name}, {fewer:.1f} % fewer, {with_test(gains)} points.\n"


def _steps(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Method -> T -> accuracy, for one seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row.method, {})[row.timesteps] = row.value
    return found


def draw_timesteps(name: str, title: str, rows: Sequence[Row], out: Path, images: int | None = None) -> None:
    """Accuracy over time steps, and the teacher's accuracy as a horizontal line."""
    found = _steps(rows)
    (ann,) = found.pop("teacher").values()
    drawn = {method: [(float(T), value) for T, value in at.items()] for method, at in found.items()}
    longest = max(T for at in found.values() for T in at)
    drawn["teacher (ANN)"] = [(1.0, ann), (float(longest), ann)]
    axes, note = ("time steps T", "test accuracy (%)"), _note(rows, images)
    curves(out / f"{name}.png", {"": drawn}, *axes, title=title, note=note, doubling=True)


def report_timesteps(rows: Sequence[Row]) -> str:
    """Accuracy of students at their T and of conversions at every measured T; the T at which conversion catches up."""
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
    shown = markdown(["method, T =", *map(str, every)], lines) + _teachers(rows, TAUGHT_BY)
    return TIMESTEPS_COLUMNS + shown + "\n" + "".join(caught)


def _by_seed(rows: Sequence[Row]) -> BySeed:
    found: BySeed = {}
    for row in rows:
        found.setdefault(row.method, {}).setdefault(row.setting, {})[row.seed] = row.value
    return found


def _means(by_seed: BySeed) -> list[Score]:
    """Means over seeds: one score per method and setting."""
    kinds = {name: kind for kind, name in perturbations(NOISE_KINDS)}
    means = []
    for method, settings in by_seed.items():
        for setting, values in settings.items():
            name, _, severity = setting.partition(":")
            mean = statistics.fmean(values.values())
            means.append(Score(method, kinds.get(name, "clean"), name, int(severity or 0), mean))
    return means


def draw_noise(name: str, title: str, rows: Sequence[Row], out: Path, images: int | None = None) -> list[str]:
    """Draw one picture per kind (see ``draw_kind``), for corruptions without the teacher. Returns their names."""
    means = _means(_by_seed(rows))
    scores = [replace(score, network=_label(score.network)) for score in means]
    names = list(dict.fromkeys(score.network for score in scores))
    students = [other for other in names if other != _label("teacher")]
    for kind, shown in zip(NOISE_KINDS, (names, students)):
        draw_kind(out / f"{name}-{kind}.png", scores, shown, kind, _label("direct"), title, _note(rows, images))
    return [f"{name}-{kind}.png" for kind in NOISE_KINDS]


def report_noise(rows: Sequence[Row]) -> str:
    """Accuracy lost under noise compared with the direct student, then accuracy and KDSNN's gain per perturbation."""
    by_seed = _by_seed(rows)
    columns, lines = summary(_means(by_seed), list(by_seed), NOISE_KINDS, "direct")
    return NOISE_COLUMNS + markdown(columns, lines) + _by_perturbation(by_seed)


def _by_perturbation(by_seed: BySeed) -> str:
    """Mean accuracy over severities of every method, KDSNN's gain over direct training, and how much more it falls."""
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
    """For each seed the mean over severities and perturbations; the clean accuracy if no perturbation is given."""
    settings = [f"{name}:{severity}" for name in names for severity in SEVERITIES] if names else ["clean"]
    return {seed: statistics.fmean(of_method[setting][seed] for setting in settings) for seed in of_method["clean"]}


def _gains(by_seed: BySeed, names: Sequence[str]) -> list[float]:
    """KDSNN's accuracy minus that of direct training, in points for each seed."""
    return paired_differences(
        _mean(by_seed.get("kdsnn", {"clean": {}}), names), _mean(by_seed.get("direct", {"clean": {}}), names)
    )
