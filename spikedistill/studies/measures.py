"""What a study says: the numbers of its finished runs, as rows of a file, tables in Markdown and pictures."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spikedistill.data.noise import SEVERITIES
from spikedistill.deliver.energy import measure_energy
from spikedistill.deliver.energy import table as energy_table
from spikedistill.deliver.figures import bars, curves
from spikedistill.deliver.immunity import measure_immunity, panels, summary
from spikedistill.deliver.record import evaluate
from spikedistill.deliver.tables import markdown
from spikedistill.evaluate.immunity import Score, perturbations
from spikedistill.studies.kdsnn import FOLLOWED, Cell, Study
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run

PAIRS_COLUMNS = """Accuracies in percent, mean ± standard deviation over seeds; gains are points more than direct
training, seed by seed.

"""
TIMESTEPS_COLUMNS = """Accuracies in percent; every student of kdsnn is trained with the T that it is measured at. The
conversions are of the same teacher, thresholds per channel: `conversion-max` and `-percentile` train nothing, their
thresholds are the largest activation or the 99.9th percentile, their biases are corrected at each T; `conversion-qcfs`
is the teacher trained on as long as a student, its activations quantised to the levels of T=4, then run with neurons.

"""
NOISE_COLUMNS = """Accuracies in percent, means over seeds; `noise` and `natural` are means over their members and five
severities. mCE, the mean corruption error of the natural ones (Hendrycks and Dietterich, arXiv 1903.12261) with the
direct student as its baseline of 100, is better when small. Better: a larger area under the curve from severity 0 to 5.

"""
ENERGY_COLUMNS = """Of one image. AC: an accumulate, where a spike meets a weight; MAC: a multiply-accumulate. The ANN
of so many bits, what T steps are worth, is counted, not trained; its float32 column has 32 bits all the same. Zeros
skipped: without the connections whose input is zero at every step.

"""
"""What the columns of the tables mean."""


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


def _accuracies(study: Study, cells: Sequence[Cell]) -> list[Row]:
    """The last-epoch test accuracy of every teacher and student."""
    rows = [
        _teacher_row(study, name, "accuracy", _result(path, "test_accuracy"))
        for name, (_, path) in study.teachers.items()
    ]
    return rows + [_accuracy(study, cell) for cell in cells]


def _accuracy(study: Study, cell: Cell) -> Row:
    """The last-epoch test accuracy of a student."""
    return _row(study, cell, "accuracy", _result(cell.path, "test_accuracy"))


def _row(study: Study, cell: Cell, metric: str, value: float, setting: str = "", timesteps: int | None = None) -> Row:
    """A number of a student, at its own T unless another is named."""
    steps = timesteps or cell.recipe.student.timesteps
    return Row(study.name, cell.teacher, cell.student, cell.method, setting, cell.seed, steps, metric, value)


def _teacher_row(study: Study, name: str, metric: str, value: float, setting: str = "") -> Row:
    made, _ = study.teachers[name]
    return Row(study.name, name, name, "teacher", setting, made.training.seed, 1, metric, value)


def paths_of(study: Study, cells: Sequence[Cell]) -> list[Path]:
    """The runs of teachers and students, in this order."""
    return [path for _, path in study.teachers.values()] + [cell.path for cell in cells]


def _result(path: Path, name: str) -> float:
    return float(Run(path).read("results")[name])


def measure_pairs(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy, mean and deviation over seeds; the gain over direct training, and of features over answers."""
    rows = _accuracies(study, cells)
    pairs = list(dict.fromkeys((cell.teacher, cell.student) for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    lines, features = [], []
    ranges: dict[str, list[float]] = {method: [] for method in methods if method != "direct"}
    for teacher, student in pairs:
        found: dict[str, dict[int, float]] = {method: {} for method in methods}
        for row in rows:
            if (row.teacher, row.student) == (teacher, student) and row.method in found:
                found[row.method][row.seed] = row.value
        groups[f"{teacher}\n-> {student}"] = {
            method: (statistics.mean(by_seed.values()), _deviation([*by_seed.values()]))
            for method, by_seed in found.items()
            if by_seed
        }
        ann = next(row.value for row in rows if row.method == "teacher" and row.teacher == teacher)
        direct = found.get("direct", {})
        gains = {method: _gaps(found[method], direct) for method in ranges}
        for method, gain in gains.items():
            ranges[method] += [statistics.mean(gain)] if gain else []
        accuracies = [with_deviation([*by_seed.values()]) for by_seed in found.values()]
        written = [with_deviation(gain, sign=True) for gain in gains.values()]
        lines.append([f"{teacher} -> {student}", f"{ann:.2f}", *accuracies, *written])
        more = _gaps(found.get("kdsnn-feature", {}), found.get("kdsnn-response", {}))
        features += [(f"{teacher} -> {student}", more)] if more else []
    bars(out / f"{study.name}.png", groups, "test accuracy (%)")
    table = markdown(
        ["teacher -> student", "teacher (ANN)", *methods, *(f"gain of {method}" for method in ranges)], lines
    )
    said = PAIRS_COLUMNS + table + _verdict(ranges, features)
    return rows, said + f"\n![{study.title}]({study.name}.png)\n"


def _verdict(ranges: Mapping[str, Sequence[float]], features: Sequence[tuple[str, Sequence[float]]]) -> str:
    """What each method gains over direct training from pair to pair, and whether features gain more than answers."""
    spans = [f"{m} {min(found):+.2f} to {max(found):+.2f}" for m, found in ranges.items() if len(found) > 1]
    said = f"\nMean gains over direct training, from pair to pair: {', '.join(spans)} points.\n" if spans else ""
    if not features:
        return said
    won = sum(statistics.mean(more) > 0 for _, more in features)
    each = "; ".join(f"{pair}: {with_deviation(more, sign=True)}" for pair, more in features)
    return said + f"\nFeature-based gains more than response-based in {won} of {len(features)} pairs ({each}).\n"


def _gaps(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """What one method has more than another, seed by seed; of seeds that both have."""
    return [value - theirs[seed] for seed, value in ours.items() if seed in theirs]


def with_deviation(values: Sequence[float], sign: bool = False) -> str:
    """Mean and deviation as people write them; of one value no deviation, of none nothing."""
    if not values:
        return ""
    deviation = f" ± {_deviation(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if sign else ''}.2f}{deviation}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measure_timesteps(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy of students at their T, of conversions at every T up to 256, and where conversion catches up."""
    converted = [cell for cell in cells if cell.method.startswith("conversion")]
    trained = [cell for cell in cells if cell not in converted]
    rows = _accuracies(study, trained)
    for cell in converted:
        if cell.recipe.method is not None:
            steps = _followed(cell, progress)
            rows += [_row(study, cell, "accuracy", steps[T - 1], timesteps=T) for T in FOLLOWED]
        else:
            rows.append(_accuracy(study, cell))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    drawn = {method: [(float(row.timesteps), row.value) for row in rows if row.method == method] for method in methods}
    ann = next(row.value for row in rows if row.method == "teacher")
    drawn["teacher (ANN)"] = [(1.0, ann), (float(FOLLOWED[-1]), ann)]
    curves(out / f"{study.name}.png", {study.title: drawn}, "time steps", "test accuracy (%)", doubling=True)
    every = sorted({row.timesteps for row in rows if row.method != "teacher"})
    lines = []
    for method in methods:
        at = {int(T): f"{value:.2f}" for T, value in drawn[method]}
        lines.append([method, *(at.get(T, "") for T in every)])
    caught = []
    for cell in trained:
        goal = _result(cell.path, "test_accuracy")
        for method in dict.fromkeys(other.method for other in converted):
            reached = [int(T) for T, value in drawn[method] if value >= goal]
            when = f"first at T={min(reached)}" if reached else f"not up to T={FOLLOWED[-1]}"
            caught.append(f"- {method} reaches the T={cell.recipe.student.timesteps} student ({goal:.2f} %): {when}.\n")
    columns = ["method, T =", *map(str, every)]
    shown = TIMESTEPS_COLUMNS + markdown(columns, lines) + "\n" + "".join(caught)
    return rows, shown + f"\n![{study.title}]({study.name}.png)\n"


def _followed(cell: Cell, progress: Progress) -> list[float]:
    """Accuracy of a converted student after every step up to the longest, measured once and kept."""
    run = Run(cell.path)
    longest = FOLLOWED[-1]
    name = f"results-t{longest}"
    if not (cell.path / f"{name}.json").exists():
        progress.say(f"{cell.path.name}: {longest} time steps")
        run.write(name, evaluate(cell.path, longest, cell.recipe.data.data_dir))
    return [float(value) for value in run.read(name)["accuracy_by_step"]]


def measure_noise(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy under every noise and natural corruption at five severities, and what distillation gains there."""
    rows: list[Row] = []
    for seed in dict.fromkeys(cell.seed for cell in cells):
        own = [cell for cell in cells if cell.seed == seed]
        paths = [cell.path for cell in own] if rows else paths_of(study, own)
        scores = _scores(paths, own[0].path.with_name(f"{study.name}-s{seed}"), own[0], progress)
        for name, (_, path) in study.teachers.items():
            found = [score for score in scores if score.network == path.name]
            rows += [_teacher_row(study, name, "accuracy", score.accuracy, _setting(score)) for score in found]
        for cell in own:
            found = [score for score in scores if score.network == cell.path.name]
            rows += [_row(study, cell, "accuracy", score.accuracy, _setting(score)) for score in found]
    by_seed: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        by_seed.setdefault(row.method, {}).setdefault(row.setting, {})[row.seed] = row.value
    means = _means(by_seed)
    kinds = ("noise", "natural")
    columns, lines = summary(means, list(by_seed), kinds, "direct")
    report = NOISE_COLUMNS + markdown(columns, lines) + _by_perturbation(by_seed, means, kinds)
    for kind in kinds:
        picture = f"{study.name}-{kind}.png"
        curves(out / picture, panels(means, list(by_seed), kind), "severity", "test accuracy (%)")
        report += f"\n![{kind}]({picture})\n"
    return rows, report


def _setting(score: Score) -> str:
    return f"{score.name}:{score.severity}" if score.severity else "clean"


def _scores(paths: Sequence[Path], folder: Path, cell: Cell, progress: Progress) -> list[Score]:
    """What runs score under noise and natural corruptions, measured once and kept in a folder."""
    measure_immunity(
        paths,
        folder,
        kinds=("noise", "natural"),
        data_dir=cell.recipe.data.data_dir,
        resume=(folder / "recipe.json").exists(),
        say=progress.say,
    )
    return [Score(**line) for line in Run(folder).lines("scores")]


def _means(by_seed: Mapping[str, Mapping[str, Mapping[int, float]]]) -> list[Score]:
    """Means over seeds: of method -> setting -> seed -> accuracy one score a method and setting."""
    kinds = {name: kind for kind, name in perturbations(("noise", "natural"))}
    means = []
    for method, settings in by_seed.items():
        for setting, values in settings.items():
            name, _, severity = setting.partition(":")
            mean = statistics.fmean(values.values())
            means.append(Score(method, kinds.get(name, "clean"), name, int(severity or 0), mean))
    return means


def _by_perturbation(
    by_seed: Mapping[str, Mapping[str, Mapping[int, float]]], means: Sequence[Score], kinds: Sequence[str]
) -> str:
    """The mean over severities of every method under each perturbation, and what KDSNN gains over direct training."""
    known = perturbations(kinds)

    def mean(method: str, names: Sequence[str]) -> dict[int, float]:
        settings = [f"{name}:{severity}" for name in names for severity in SEVERITIES] if names else ["clean"]
        seeds = by_seed[method]["clean"]
        return {seed: statistics.fmean(by_seed[method][setting][seed] for setting in settings) for seed in seeds}

    groups: dict[str, list[str]] = {"clean": []}
    groups |= {f"all {kind}": [name for found, name in known if found == kind] for kind in kinds}
    groups |= {name: [name] for _, name in known}
    lines = []
    for title, names in groups.items():
        found = {method: mean(method, names) for method in by_seed}
        gain = _gaps(found.get("kdsnn", {}), found.get("direct", {}))
        values = [f"{statistics.fmean(by_own.values()):.2f}" for by_own in found.values()]
        lines.append([title, *values, with_deviation(gain, sign=True)])
    return "\n" + markdown(["mean over severities", *by_seed, "kdsnn more than direct, points"], lines)


def measure_energies(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Spikes, synaptic operations and energies of one image, from the whole test set."""
    bills = measure_energy(paths_of(study, cells), None, cells[0].recipe.data.data_dir, progress.say)
    rows = []
    for name, bill in zip(study.teachers, bills):
        found = {"synops": bill.cost.dense, "accuracy": bill.accuracy}
        found |= {f"energy_{model}": kinds["ann"] for model, kinds in bill.energy.items()}
        rows += [_teacher_row(study, name, metric, value) for metric, value in found.items()]
    for cell, bill in zip(cells, bills[len(study.teachers) :]):
        found = {"accuracy": bill.accuracy, "spikes": bill.cost.spikes, "synops": bill.cost.acs + bill.cost.macs}
        found |= {f"energy_{model}": kinds["student"] for model, kinds in bill.energy.items()}
        rows += [_row(study, cell, metric, value) for metric, value in found.items()]
        for model, kinds in bill.energy.items():
            for kind in ("quantised", "quantised-sparse"):
                rows.append(_row(study, cell, f"energy_{model}", kinds[kind], f"{kind}-ann"))
    groups = {bill.network: {kind: (energy, 0.0) for kind, energy in bill.energy["memory"].items()} for bill in bills}
    bars(out / f"{study.name}.png", groups, "nJ an image, with memory traffic")
    warned = "".join(f"- {line}\n" for bill in bills for line in bill.warnings)
    shown = ENERGY_COLUMNS + markdown(*energy_table(bills)) + f"\n{warned}"
    return rows, shown + f"\n![{study.title}]({study.name}.png)\n"


Measure = Callable[[Study, Sequence[Cell], Path, Progress], tuple[list[Row], str]]
MEASURES: dict[str, Measure] = {
    "pairs": measure_pairs,
    "timesteps": measure_timesteps,
    "noise": measure_noise,
    "energy": measure_energies,
}
