"""Finished runs, read back: evaluate one, compare many."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spikedistill.data.images import ImageSet, evenly, load_images
from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.early_exit import check_confidence
from spikedistill.recipes.choices import Method, StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, fill, find_teacher, measure, read_student
from spikedistill.recipes.teach import measure as measure_teacher
from spikedistill.student.build import Student, to_spiking
from spikedistill.student.coding import CODINGS
from spikedistill.teacher.load import Architecture, Teacher, load_teacher
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run


def load_student(path: str | Path) -> tuple[Student, Distill]:
    """A finished student from its run directory or ``model.safetensors``, and the recipe that made it.

    Raises:
        WeightsError: if the file is missing, broken or not a student.
        RunError: if it holds no recipe.
    """
    file, tensors, facts = read_student(path)
    try:
        recipe = to_recipe(facts["recipe"])
        architecture = Architecture(**facts["architecture"])
    except (KeyError, TypeError) as error:
        raise RunError(f"'{file}' holds no recipe that this version knows ({error}): distill it again.") from error
    student, _ = to_spiking(
        architecture.build(),
        timesteps=recipe.student.timesteps,
        neuron=recipe.student.make_neuron(),
        inherit=False,
        max_pool=recipe.student.max_pool,
        coding=CODINGS[recipe.student.coding](),
        mean=facts["mean"],
        std=facts["std"],
    )
    fill(student, tensors, f"'{file}'")
    return student.eval(), recipe


@dataclass(frozen=True)
class Finished:
    """The network of a finished run, and on what it was trained."""

    name: str
    network: Student | Teacher
    data: Data
    training: Training


def load_run(path: str | Path) -> Finished:
    """The trained network of a run of ``teach`` or ``distill``.

    Raises:
        RunError: if the directory holds no finished run.
        WeightsError: if its weights cannot be read.
    """
    run = Run(Path(path))
    recipe = run.read("recipe")
    if not run.model.exists():
        raise RunError(f"'{path}' holds no finished run: end it by the same command with --resume.")
    name = run.path.resolve().name
    if recipe.get("kind") == "distill":
        student, made = load_student(path)
        return Finished(name, student, made.data, made.training)
    if recipe.get("kind") == "teach":
        return Finished(name, load_teacher(path)[0], Data(**recipe["data"]), Training(**recipe["training"]))
    raise RunError(f"'{path}' holds a run of kind {recipe.get('kind')!r}: give runs of 'teach' or 'distill'.")


def load_runs(paths: Sequence[Path], data_dir: str | None = None) -> tuple[list[Finished], ImageSet]:
    """Several runs on one data set, and that set.

    Raises:
        ConfigError: if none is given, two have one name, or they were trained on different data.
    """
    if not paths:
        raise ConfigError("No runs were given: name one or more run directories.")
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    sets = [f"{run.data.data} at {run.data.image_size}" if run.data.image_size else run.data.data for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two of the runs have one name ({', '.join(names)}): give directories of other names.")
    if len(set(sets)) > 1:
        raise ConfigError(f"The runs were trained on different data ({', '.join(sets)}): compare runs of one set.")
    data = runs[0].data
    return runs, load_images(data.data, data_dir or data.data_dir, data.image_size)


def some(images: ImageSet, count: int | None) -> tuple[Tensor, Tensor]:
    """So many test images, evenly spaced, and their labels; all by default.

    Raises:
        ConfigError: if the count is below 1.
    """
    if count is not None and count < 1:
        raise ConfigError(f"images (={count}) must be 1 or more; leave it away for the whole test set.")
    everything = len(images.test_images)
    chosen = evenly(everything, everything if count is None else count)
    return images.test_images[chosen], images.test_labels[chosen]


def unless_done(path: Path, work: Callable[[bool], object], say: Callable[[], object] = lambda: None) -> None:
    """Leave a finished run alone; begin any other, or go on with it.

    Args:
        path: its directory.
        work: told whether to resume.
        say: called before.
    """
    if not Run(path).finished:
        say()
        work((path / "recipe.json").exists())


def to_recipe(content: Mapping[str, Any]) -> Distill:
    """A recipe from its JSON form."""
    parts = {"who": TeacherChoice, "student": StudentChoice, "what": Method, "data": Data, "training": Training}
    return Distill(**{name: kind(**_tuples(content[name])) for name, kind in parts.items()})


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuple(value) for name, value in fields.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(part) for part in value) if isinstance(value, list) else value


def evaluate(
    path: Path, timesteps: int | None = None, data_dir: str | None = None, confidence: float | None = None
) -> dict[str, Any]:
    """Measure a finished run again on its test set: a student perhaps with other steps or early exit, or a teacher.

    Returns:
        As ``distill.measure``; the teacher is left out where its files are gone. Of a teacher ``test_accuracy``.

    Raises:
        ConfigError: if the number of steps is below 1, the confidence outside 0..1, or either is asked of a teacher.
    """
    if confidence is not None:
        check_confidence(confidence)
    if (path / "recipe.json").exists() and Run(path).read("recipe").get("kind") == "teach":
        if timesteps is not None or confidence is not None:
            raise ConfigError(
                f"'{path}' holds a teacher, which has no time steps: leave timesteps and confidence away."
            )
        return _evaluate_teacher(path, data_dir)
    student, recipe = load_student(path)
    if timesteps is not None:
        student.set_timesteps(timesteps)
    data = recipe.data
    images = load_images(data.data, data_dir or data.data_dir, data.image_size)
    there = Path(recipe.who.teacher).exists() or recipe.who.published
    teacher = find_teacher(recipe.who, images)[0] if there else None
    return measure(student, teacher, images, recipe.training, confidence=confidence)


def _evaluate_teacher(path: Path, data_dir: str | None) -> dict[str, Any]:
    run = load_run(path)
    images = load_images(run.data.data, data_dir or run.data.data_dir, run.data.image_size)
    return measure_teacher(run.network, images, run.training)


def table(paths: Sequence[Path]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows that set finished runs side by side.

    Raises:
        RunError: if a directory holds no finished run.
    """
    found = [(run, run.read("recipe"), run.read("results")) for run in map(Run, paths)]
    most = max(len(results.get("accuracy_by_step", [])) for _, _, results in found)
    steps = [f"t={t + 1}" for t in range(most)]
    columns = ["run", "network", "weights", "method", "accuracy", *steps, "firing rate", "agreement"]
    try:
        return columns, [_row(run, recipe, results, most) for run, recipe, results in found]
    except (KeyError, TypeError) as error:
        named = ", ".join(str(path) for path in paths)
        raise RunError(f"A file of {named} lacks {error}: give directories of finished runs.") from error


def _row(run: Run, recipe: Mapping[str, Any], results: Mapping[str, Any], most: int) -> list[str]:
    if recipe["kind"] == "teach":
        network, weights, method = recipe["network"], "", "teacher (ANN)"
    else:
        conversion = run.read("conversion")
        network, method = f"{conversion['network']} T={conversion['timesteps']}", recipe["what"]["method"]
        weights = "inherited" if conversion["inherited"] else "fresh"
    steps = [f"{value:.2f}" for value in results.get("accuracy_by_step", [])]
    steps += [""] * (most - len(steps))
    rates = [f"{results[name]:.2f} %" if name in results else "" for name in ("firing_rate", "agreement")]
    return [run.path.name, network, weights, method, f"{results['test_accuracy']:.2f} %", *steps, *rates]
