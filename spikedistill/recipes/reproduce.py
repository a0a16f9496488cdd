"""``reproduce``: a study is trained, cell by cell, measured, and written down as CSV, Markdown and pictures."""

import datetime
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

import torch

from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.immunity import Score
from spikedistill.files import write_csv, write_text
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.energy import measure_energy
from spikedistill.recipes.energy import table as energy_table
from spikedistill.recipes.figures import bars, curves
from spikedistill.recipes.immunity import markdown, measure_immunity
from spikedistill.recipes.immunity import panels as immunity_panels
from spikedistill.recipes.runs import evaluate, unless_done
from spikedistill.recipes.studies import FOLLOWED, Cell, Study
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run


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


def reproduce(
    study: Study, out: Path, seeds: int | None = None, progress: Progress | None = None, jobs: int = 1
) -> str:
    """Train what is missing of a study, measure it, and write ``NAME.csv``, ``NAME.md`` and pictures to ``out``.

    A student that cannot be trained, as its loss diverges, is left out of a comparison of pairs, and named in it.

    Args:
        study: of ``studies.STUDIES``.
        out: where the files go; beside it the page of all studies, ``OUT.md``.
        seeds: only the first so many seeds.
        progress: what shows the work.
        jobs: how many students are trained side by side, each in a process with its share of the processor's cores.

    Returns:
        The report in Markdown.

    Raises:
        ConfigError: if the study does not have so many seeds, ``jobs`` is not positive, or a teacher or student cannot
            be trained.
        RunError: if a finished run was made by another recipe than the study's.
    """
    if seeds is not None and not 1 <= seeds <= study.seeds:
        raise ConfigError(f"seeds (={seeds}) must be 1 or more, and at most the {study.seeds} of '{study.name}'.")
    if jobs < 1:
        raise ConfigError(f"jobs (={jobs}) must be 1 or more: students trained side by side.")
    progress, out = progress or Progress.silent(), out.resolve()
    cells = [cell for cell in study.cells if cell.seed < (seeds or study.seeds)]
    failed = _train(study, cells, progress, jobs)
    cells = [cell for cell in cells if cell.path.name not in failed]
    if not cells:
        raise ConfigError(f"No student of '{study.name}' could be trained: {next(iter(failed.values()))}")
    rows, shown = MEASURES[study.kind](study, cells, out, progress)
    shown += "".join(f"\nLeft out: `{name}` ({reason})\n" for name, reason in failed.items())
    write_csv(out / f"{study.name}.csv", [field.name for field in fields(Row)], map(astuple, rows))
    report = _report(study, cells, shown)
    write_text(out / f"{study.name}.md", report)
    write_text(out.parent / f"{out.name}.md", _page(out))
    return report


def _train(study: Study, cells: Sequence[Cell], progress: Progress, jobs: int) -> dict[str, str]:
    """Train what is missing; which students of a comparison of pairs could not be trained, and why."""
    for made, path in study.teachers.values():
        _check_recipe(path, made)
    for cell in cells:
        _check_recipe(cell.path, cell.recipe)
    for made, path in study.teachers.values():
        job = partial(teach, made, path, progress=Progress.stderr(path.name))
        if _needed_again(path, cells):
            progress.say(f"{path.name}, whose weights are gone")
            job(resume=True)
        else:
            unless_done(path, job, partial(progress.say, path.name))
    missing = [cell for cell in cells if not Run(cell.path).finished]
    failed: dict[str, str] = {}
    for number, (cell, finish) in enumerate(side_by_side(missing, jobs), 1):
        progress.say(f"{number} of {len(missing)}: {cell.path.name}")
        try:
            finish()
        except ConfigError as error:
            if study.kind != "pairs":
                raise
            failed[cell.path.name] = str(error)
            progress.say(f"{cell.path.name} is left out: {error}")
    return failed


def side_by_side(missing: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, Callable[[], object]]]:
    """Students with what finishes them: their training, or with several jobs what has become of it, in order of ends.

    Args:
        missing: students that are not finished.
        jobs: how many are trained at once, each in a process with its share of the cores.
    """
    if jobs == 1:
        yield from ((cell, partial(_student, cell, Progress.stderr(cell.path.name))) for cell in missing)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _take_share, (jobs,)) as pool:
        waiting, running = list(missing), dict[Future[None], Cell]()
        while waiting or running:
            while waiting and len(running) < jobs:  # none is handed over before its time: it could not be called back
                cell = waiting.pop(0)
                running[pool.submit(_student, cell)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result


def _student(cell: Cell, progress: Progress | None = None) -> None:
    """Train a student, or go on with it; one of several says what it did line by line, as bars would collide."""
    progress = progress or Progress.lines(cell.path.name)
    unless_done(cell.path, partial(distill, cell.recipe, cell.path, progress=progress))


def _take_share(jobs: int) -> None:
    """Leave the other processes their share of the cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _needed_again(teacher: Path, cells: Sequence[Cell]) -> bool:
    """Whether a finished teacher's weights are gone, and students are still to be taught.

    So the small files of finished runs can be kept without their weights, and a study goes on elsewhere.
    """
    if not Run(teacher).finished or Run(teacher).model.exists():
        return False
    return any(cell.recipe.who.teacher == str(teacher) and not Run(cell.path).finished for cell in cells)


def _check_recipe(path: Path, recipe: Teach | Distill) -> None:
    """Refuse a finished run that another recipe made, wherever its data lay.

    Raises:
        RunError: if there is one.
    """
    if Run(path).finished:
        changes = Run(path).changes(recipe.written(), type(recipe)().written())
        changes = [line for line in changes if not line.startswith("data_dir ")]
        if changes:
            raise RunError(
                f"'{path}' was made by another recipe ({'; '.join(changes[:3])}): move it away, or give another --runs."
            )


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


def _paths(study: Study, cells: Sequence[Cell]) -> list[Path]:
    """The runs of teachers and students, in this order."""
    return [path for _, path in study.teachers.values()] + [cell.path for cell in cells]


def _result(path: Path, name: str) -> float:
    return float(Run(path).read("results")[name])


def measure_pairs(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy, mean and deviation over seeds, and the gain over direct training."""
    rows = _accuracies(study, cells)
    pairs = list(dict.fromkeys((cell.teacher, cell.student) for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    lines = []
    for teacher, student in pairs:
        found = {
            method: [row.value for row in rows if (row.teacher, row.student, row.method) == (teacher, student, method)]
            for method in methods
        }
        means = {method: (statistics.mean(values), _deviation(values)) for method, values in found.items() if values}
        groups[f"{teacher}\n-> {student}"] = means
        ann = next(row.value for row in rows if row.method == "teacher" and row.teacher == teacher)
        direct = means.get("direct", (float("nan"), 0.0))[0]
        gains = [f"{means[m][0] - direct:+.2f}" if m in means else "-" for m in methods if m != "direct"]
        lines.append([f"{teacher} -> {student}", f"{ann:.2f}", *map(_shown, found.values()), ", ".join(gains)])
    bars(out / f"{study.name}.png", groups, "test accuracy (%)")
    rest = ", ".join(method for method in methods if method != "direct")
    columns = ["teacher -> student", "teacher (ANN)", *methods, f"gain over direct: {rest}"]
    return rows, markdown(columns, lines) + f"\n![{study.title}]({study.name}.png)\n"


def _shown(values: Sequence[float]) -> str:
    """Mean and deviation as people write them; of one value no deviation, of none nothing."""
    if not values:
        return ""
    deviation = f" ± {_deviation(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measure_timesteps(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy of students at their T, of conversions at every T up to 256, and where conversion catches up."""
    converted = [cell for cell in cells if cell.method.startswith("conversion")]
    trained = [cell for cell in cells if cell not in converted]
    rows = _accuracies(study, trained)
    for cell in converted:
        if cell.recipe.what.trains:
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
    return rows, markdown(columns, lines) + "\n" + "".join(caught) + f"\n![{study.title}]({study.name}.png)\n"


def _followed(cell: Cell, progress: Progress) -> list[float]:
    """Accuracy of a converted student after every step up to the longest, measured once and kept."""
    run = Run(cell.path)
    longest = FOLLOWED[-1]
    name = f"results-t{longest}"
    if not (cell.path / f"{name}.json").exists():
        progress.say(f"{cell.path.name}: {longest} time steps")
        run.write(name, evaluate(cell.path, longest, cell.recipe.data.data_dir))
    return [float(value) for value in run.read(name)["accuracy_by_step"]]


NOISE_COLUMNS = """Accuracies in percent; `noise` and `natural` are means over their members and five severities. mCE,
the mean corruption error of the natural ones (Hendrycks and Dietterich, arXiv 1903.12261) with the direct student as
its baseline of 100, is better when small. Better: a larger area under the curve from severity 0 to 5.

"""
ENERGY_COLUMNS = """Of one image. AC: an accumulate, where a spike meets a weight; MAC: a multiply-accumulate. The ANN
of so many bits, what T steps are worth, is counted, not trained; its float32 column has 32 bits all the same. Zeros
skipped: without the connections whose input is zero at every step.

"""
"""What the columns of the tables mean."""


def measure_noise(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy under every noise and natural corruption at five severities."""
    paths = _paths(study, cells)
    folder = cells[0].path.parent / study.name
    direct = next(cell.path.name for cell in cells if cell.method == "direct")
    columns, lines = measure_immunity(
        paths,
        folder,
        kinds=("noise", "natural"),
        baseline=direct,
        data_dir=cells[0].recipe.data.data_dir,
        resume=(folder / "recipe.json").exists(),
        say=progress.say,
    )
    scores = [Score(**line) for line in Run(folder).lines("scores")]
    rows = []
    for score in scores:
        setting = f"{score.name}:{score.severity}" if score.severity else "clean"
        for name, (_, path) in study.teachers.items():
            if score.network == path.name:
                rows.append(_teacher_row(study, name, "accuracy", score.accuracy, setting))
        for cell in cells:
            if score.network == cell.path.name:
                rows.append(_row(study, cell, "accuracy", score.accuracy, setting))
    names = [path.name for path in paths]
    pictures = ""
    for kind in ("noise", "natural"):
        curves(out / f"{study.name}-{kind}.png", immunity_panels(scores, names, kind), "severity", "test accuracy (%)")
        pictures += f"\n![{kind}]({study.name}-{kind}.png)\n"
    ours = next((cell.path.name for cell in cells if cell.method == "kdsnn"), direct)
    return rows, NOISE_COLUMNS + markdown(columns, lines) + _gaps(columns, lines, ours, direct) + pictures


def _gaps(columns: Sequence[str], lines: Sequence[Sequence[str]], ours: str, direct: str) -> str:
    """What the distilled student has more than the direct one, in points, column by column."""
    values = {line[0]: line[1:4] for line in lines}
    gaps = (float(one) - float(other) for one, other in zip(values[ours], values[direct]))
    said = ", ".join(f"{column} {gap:+.2f}" for column, gap in zip(columns[1:4], gaps))
    return f"\nHere the distilled student has, in points more than the direct one: {said}.\n"


def measure_energies(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Spikes, synaptic operations and energies of one image, from the whole test set."""
    bills = measure_energy(_paths(study, cells), None, cells[0].recipe.data.data_dir)
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


def _report(study: Study, cells: Sequence[Cell], shown: str) -> str:
    machines: dict[str, None] = {}
    for path in _paths(study, cells):
        machine = Run(path).read("environment")
        hardware = machine["cuda"] or f"{machine['processor']}, {machine['cores']} cores"
        machines[f"{hardware}, torch {machine['versions']['torch']}"] = None
    epochs = {
        f"{made.training.epochs} ({_sized(name, made.width)}, teacher)": None
        for name, (made, _) in study.teachers.items()
    }
    for cell in cells:
        if cell.recipe.what.trains:
            student = _sized(cell.student, cell.recipe.student.student_width)
            epochs[f"{cell.recipe.training.epochs} ({cell.teacher} -> {student})"] = None
    seeds = ", ".join(str(seed) for seed in sorted({cell.seed for cell in cells}))
    return (
        f"## {study.title}\n\n"
        f"`spikedistill reproduce {study.name} --budget {study.budget}`, {datetime.date.today().isoformat()}, on"
        f" {'; '.join(machines)}. Test set, last epoch. Seeds: {seeds}. Epochs:"
        f" {', '.join(epochs)}.\nThe paper's claim, as readers report it: {study.claim}.\n\n{shown}"
    )


def _sized(name: str, width: int | None) -> str:
    return name if width is None else f"{name} of width {width}"


def _page(out: Path) -> str:
    """The page that joins the reports of all studies in a folder."""
    parts = [file.read_text(encoding="utf-8") for file in sorted(out.glob("*.md"))]
    joined = "\n".join(parts).replace("](", f"]({out.name}/")
    said = f"accuracies, spikes and energies are in `{out.name}/*.csv`, what is computed from them stands here alone."
    return f"# Results\n\nWritten by `spikedistill reproduce STUDY`; {said}\n\n{joined}"
