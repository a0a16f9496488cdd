"""Measurements on the finished runs of a study: the rows of its CSV file. ``reports`` makes tables of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from spikedistill.deliver.energy import measure_energy
from spikedistill.deliver.energy import table as energy_table
from spikedistill.deliver.immunity import measure_immunity
from spikedistill.deliver.record import evaluate, read_records
from spikedistill.deliver.tables import markdown
from spikedistill.evaluate.accuracy import accuracy_by_step, predict
from spikedistill.evaluate.early_exit import predict_early
from spikedistill.evaluate.immunity import Score
from spikedistill.evaluate.paired import error_over
from spikedistill.recipes.distill import Distill
from spikedistill.student.save import load_student
from spikedistill.studies import reports
from spikedistill.studies.kdsnn import FOLLOWED
from spikedistill.studies.reports import ALL_SEEDS, CONFIDENCE, ENERGY, ENERGY_COLUMNS, NOISE_KINDS, Row
from spikedistill.studies.study import Cell, Study
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run


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
    """A number of a student, at its own T unless another is given."""
    steps = timesteps or cell.recipe.student.timesteps
    return Row(study.name, cell.teacher, cell.student, cell.method, setting, cell.seed, steps, metric, value)


def _teacher_row(study: Study, name: str, metric: str, value: float, setting: str = "") -> Row:
    made, _ = study.teachers[name]
    steps = made.student.timesteps if isinstance(made, Distill) else 1
    return Row(study.name, name, name, "teacher", setting, made.training.seed, steps, metric, value)


def paths_of(study: Study, cells: Sequence[Cell]) -> list[Path]:
    """The runs of teachers and students, in this order."""
    return [path for _, path in study.teachers.values()] + [cell.path for cell in cells]


def _test_images(cells: Sequence[Cell]) -> int | None:
    """The number of test images; None for older runs, which did not write it."""
    file = cells[0].path / "data.json"
    return int(Run(cells[0].path).read("data")["data"]["test_images"]) if file.exists() else None


def _result(path: Path, name: str) -> float:
    return float(Run(path).read("results")[name])


def measure_pairs(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy over seeds; the gain over direct training, and of feature-based over response-based distillation."""
    rows = _accuracies(study, cells)
    reports.draw_pairs(study.name, study.title, rows, out, _test_images(cells))
    return rows, reports.report_pairs(rows) + f"\n![{study.title}]({study.name}.png)\n"


def measure_samples(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """As ``measure_pairs``, with standard errors of gains over seeds and test samples, and early exit."""
    rows, right = _accuracies(study, cells), dict[str, dict[int, list[float]]]()
    records, images = read_records([cell.path for cell in cells], cells[0].recipe.data.data_dir)
    for cell, record in zip(cells, records):
        progress.say(f"{cell.path.name}: test samples, early exit")
        place = record.place()
        network = load_student(cell.path).to(place.device)
        logits = predict(network, images.test_images, place.dtype).mean(0)
        right.setdefault(cell.method, {})[cell.seed] = (logits.argmax(-1) == images.test_labels).double().tolist()
        left = predict_early(network, images.test_images, CONFIDENCE, place.dtype)
        found = {"early_exit_steps": left.mean_steps}
        (found["early_exit_accuracy"],) = accuracy_by_step(left.logits[None], images.test_labels)
        rows += [_row(study, cell, metric, value) for metric, value in found.items()]
    for cell in {cell.method: cell for cell in cells if cell.method != "direct"}.values():
        error = error_over(right[cell.method], right.get("direct", {}))
        if error is not None:
            rows.append(replace(_row(study, cell, "gain_error", 100 * error), seed=ALL_SEEDS))
    reports.draw_pairs(study.name, study.title, rows, out, len(images.test_images))
    return rows, reports.report_samples(rows) + f"\n![{study.title}]({study.name}.png)\n"


def measure_timesteps(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy of students at their T and of conversions at every T up to 256; the T at which conversion catches up."""
    converted = [cell for cell in cells if cell.method.startswith("conversion")]
    rows = _accuracies(study, [cell for cell in cells if cell not in converted])
    for cell in converted:
        if cell.recipe.method is not None:
            steps = _followed(cell, progress)
            rows += [_row(study, cell, "accuracy", steps[T - 1], timesteps=T) for T in FOLLOWED]
        else:
            rows.append(_accuracy(study, cell))
    reports.draw_timesteps(study.name, study.title, rows, out, _test_images(cells))
    return rows, reports.report_timesteps(rows) + f"\n![{study.title}]({study.name}.png)\n"


def _followed(cell: Cell, progress: Progress) -> list[float]:
    """Accuracy of a converted student after every step up to the largest T, measured once and saved."""
    run = Run(cell.path)
    longest = FOLLOWED[-1]
    name = f"results-t{longest}"
    if not (cell.path / f"{name}.json").exists():
        progress.say(f"{cell.path.name}: {longest} time steps")
        run.write(name, evaluate(cell.path, longest, cell.recipe.data.data_dir, progress=progress))
    return [float(value) for value in run.read(name)["accuracy_by_step"]]


def measure_noise(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy under every noise and corruption at five severities, and what distillation gains there."""
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
    pictures = reports.draw_noise(study.name, study.title, rows, out, _test_images(cells))
    shown = "".join(f"\n![{kind}]({picture})\n" for kind, picture in zip(NOISE_KINDS, pictures))
    return rows, reports.report_noise(rows) + shown


def _setting(score: Score) -> str:
    return f"{score.name}:{score.severity}" if score.severity else "clean"


def _scores(paths: Sequence[Path], folder: Path, cell: Cell, progress: Progress) -> list[Score]:
    """Scores of runs under noise and corruptions, measured once and saved in a folder."""
    measure_immunity(
        paths,
        folder,
        kinds=NOISE_KINDS,
        data_dir=cell.recipe.data.data_dir,
        resume=(folder / "recipe.json").exists(),
        progress=progress,
    )
    return [Score(**line) for line in Run(folder).lines("scores")]


def measure_energies(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Spikes, synaptic operations and energy per image, on the whole test set."""
    estimates = measure_energy(paths_of(study, cells), None, cells[0].recipe.data.data_dir, progress)
    rows = []
    for name, estimate in zip(study.teachers, estimates):
        found = {"synops": estimate.cost.dense, "accuracy": estimate.accuracy}
        found |= {f"{ENERGY}{model}": kinds["ann"] for model, kinds in estimate.energy.items()}
        rows += [_teacher_row(study, name, metric, value) for metric, value in found.items()]
    for cell, estimate in zip(cells, estimates[len(study.teachers) :]):
        found = {
            "accuracy": estimate.accuracy,
            "spikes": estimate.cost.spikes,
            "synops": estimate.cost.acs + estimate.cost.macs,
        }
        found |= {f"{ENERGY}{model}": kinds["student"] for model, kinds in estimate.energy.items()}
        rows += [_row(study, cell, metric, value) for metric, value in found.items()]
        for model, kinds in estimate.energy.items():
            for kind in ("quantised", "quantised-sparse"):
                rows.append(_row(study, cell, f"{ENERGY}{model}", kinds[kind], f"{kind}-ann"))
    reports.draw_energy(study.name, study.title, rows, out, estimates[0].images)
    warned = "".join(f"- {line}\n" for estimate in estimates for line in estimate.warnings)
    shown = ENERGY_COLUMNS + markdown(*energy_table(estimates)) + f"\n{warned}"
    return rows, shown + f"\n![{study.title}]({study.name}.png)\n"


def measure_front(study: Study, cells: Sequence[Cell], out: Path, progress: Progress) -> tuple[list[Row], str]:
    """Accuracy, and spikes per image on the whole test set, of every method at every setting."""
    rows = _accuracies(study, [])
    estimates = measure_energy([cell.path for cell in cells], None, cells[0].recipe.data.data_dir, progress)
    for cell, estimate in zip(cells, estimates):
        rows.append(_row(study, cell, "accuracy", _result(cell.path, "test_accuracy"), cell.setting))
        rows.append(_row(study, cell, "spikes", estimate.cost.spikes, cell.setting))
    reports.draw_front(study.name, study.title, rows, out, _test_images(cells))
    return rows, reports.report_front(rows) + f"\n![{study.title}]({study.name}.png)\n"


Measure = Callable[[Study, Sequence[Cell], Path, Progress], tuple[list[Row], str]]
MEASURES: dict[str, Measure] = {
    "pairs": measure_pairs,
    "samples": measure_samples,
    "timesteps": measure_timesteps,
    "noise": measure_noise,
    "energy": measure_energies,
    "front": measure_front,
}
