"""The demo: what a spiking student gains by distillation in a short training on few images.

The data are 1,797 embedded digits: 1,000 test images and 797 training images for the teacher. Its students are
trained on 100 of the 797. All students begin with the teacher's weights and have two time steps.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikedistill.data.images import ImageSet, load_images, read_digits, split
from spikedistill.deliver.compare import table
from spikedistill.deliver.results import Result, read_results
from spikedistill.deliver.tables import Table
from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.paired import LEVEL, p_value, paired_differences
from spikedistill.files import write_bytes
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes import digits
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.several import several
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run, unless_done

TESTED, LEARNED = 1000, 100
"""Number of test images, and number of training images of a student."""
CONVERTED = "conversion-least-squares"
NAMES = {CONVERTED: "converted, not trained", "direct": "cross-entropy only", "kdsnn": "KDSNN"}
"""The methods, and their names in the table."""
COLUMNS = ("n", "accuracy (%)", "difference (points)", "s.e. (points)", "p", "positive in", "t=1 (%)")
"""The columns that the table takes from that of ``compare``."""


def demo(out: Path, seeds: int = 5) -> list[Path]:
    """Train a teacher, convert it, and train its student with and without distillation, once for each seed.

    The same call goes on with an interrupted demo, or adds seeds: finished runs are kept.

    Args:
        out: the folder for ``data`` (two .npz files), ``teacher`` and ``students`` (a directory for each run).
        seeds: number of seeds. A seed sets the order of the images and their crops, and nothing else.

    Returns:
        The run directories: the teacher's, the converted student's, and the trained students'.

    Raises:
        ConfigError: if ``seeds`` is below 1.
        RunError: if the folder holds other runs or other files.
    """
    if seeds < 1:
        raise ConfigError(f"seeds (={seeds}) must be 1 or more.")
    many, few = write_data(out / "data")
    _teach(teacher(many), out / "teacher")
    recipe, students = student(few, out / "teacher"), out / "students"
    once = several(recipe, [CONVERTED], 1, students, progress=Progress.stderr)
    return [out / "teacher", *once, *several(recipe, ["direct", "kdsnn"], seeds, students, progress=Progress.stderr)]


def _teach(recipe: Teach, path: Path) -> None:
    """Train the teacher unless it exists. One with another recipe is refused: it may have seen the test images."""
    run = Run(path)
    if run.finished and (changed := run.changes(recipe.written(), Teach().written())):
        raise RunError(
            f"'{path}' holds another teacher than the demo's ({'; '.join(changed[:3])}): choose another --out."
        )
    unless_done(path, lambda resume: teach(recipe, path, resume, Progress.stderr("teacher")))


def teacher(data: Path) -> Teach:
    """The recipe of the teacher: that of ``digits`` on the demo's data."""
    return dataclasses.replace(digits.teacher(), data=Data(name=str(data), validation=0.0, crop=1))


def student(data: Path, source: Path) -> Distill:
    """The recipe of its T=2 student by KDSNN. LOG.md (2026-11-26) says how these values were chosen."""
    return Distill(
        teacher=TeacherChoice(str(source)),
        student=StudentChoice(timesteps=2),
        method=KDSNN(temperature=4.0, alpha=0.9, weight=100.0),
        data=Data(name=str(data), validation=0.0, crop=1),
        training=Training(epochs=30, batch_size=50, weight_decay=1e-4),
    )


def write_data(folder: Path) -> tuple[Path, Path]:
    """Write the teacher's and the students' data as two files with the same test part.

    Raises:
        RunError: if a file exists with other images, or cannot be written.
    """
    whole = read_digits()
    images, labels = whole.train
    rest, test = split(labels, TESTED / len(labels), seed=0)
    few = rest[split(labels[rest], 1 - LEARNED / len(rest), seed=0)[0]]
    tested = images[test], labels[test]
    made = [ImageSet("digits", images[train], labels[train], *tested, whole.class_names) for train in (rest, few)]
    paths = [folder / f"digits-{len(one.train_images)}.npz" for one in made]
    for path, one in zip(paths, made):
        _write(path, one)
    return paths[0], paths[1]


def _write(path: Path, images: ImageSet) -> None:
    """Write one set as a .npz file. An existing file must hold the same images."""
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    if path.exists():
        there = load_images(str(path))
        if not all(torch.equal(getattr(there, part), getattr(images, part)) for part in parts):
            raise RunError(f"'{path}' holds other images than the demo's: choose another --out.")
        return
    arrays = {part: getattr(images, part).numpy() for part in parts}
    write_bytes(path, lambda file: _save(file, {**arrays, "class_names": np.array(images.class_names)}))


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


# --- its table --------------------------------------------------------------------------------------------------------


def shown(paths: Sequence[Path]) -> Table:
    """The table of the students. Its notes say what it shows and what it does not show.

    Args:
        paths: what ``demo`` returns.
    """
    results, _ = read_results(paths[1:])
    whole = table(results)
    kept = [place for place, column in enumerate(whole.columns) if column in COLUMNS]
    methods = dict.fromkeys(result.method for result in results)
    rows = [[NAMES[method], *(row[place] for place in kept)] for method, row in zip(methods, whole.rows)]
    columns = ["student", *(whole.columns[place] for place in kept)]
    return Table(columns, rows, notes=_sentences(results))


def figures(paths: Sequence[Path]) -> Table:
    """All measurements with all digits: a row for each method, seed and time step; accuracy in percent.

    Args:
        paths: what ``demo`` returns.
    """
    (ann,), students = read_results(paths[:1])[0], read_results(paths[1:])[0]
    rows: list[list[Any]] = [["teacher", ann.seed, "", ann.accuracy]]
    rows += [[one.method, one.seed, t, accuracy] for one in students for t, accuracy in enumerate(one.steps, 1)]
    return Table(("method", "seed", "t", "accuracy"), rows)


def _sentences(results: Sequence[Result]) -> list[str]:
    """The notes: the teacher's accuracy, what the table shows and what it does not show."""
    by_seed = {name: {one.seed: one.accuracy for one in results if one.method == name} for name in NAMES}
    gains = paired_differences(by_seed["kdsnn"], by_seed["direct"])
    p, mean = p_value(gains), statistics.fmean(gains)
    found = results[0].found["teacher_accuracy"]
    given = f"with {LEARNED} images, T={results[-1].timesteps} and {results[-1].epochs} epochs"
    says = f"{mean:+.2f} points for KDSNN over cross-entropy only, the same student otherwise, {given}"
    if p is None or p >= LEVEL:
        says += f"; {len(gains)} seed{'s do' if len(gains) > 1 else ' does'} not tell this from chance"
    return [
        f"The teacher, an ANN, has {found:.2f} % on the same {TESTED:,} test images. ± is"
        " the sample standard deviation over n seeds of the training.",
        f"What this shows: {says}.",
        "What it does not show: that as much is gained elsewhere. This is one small data set, one draw of images and"
        " one teacher, and KDSNN's settings were chosen for it. The T=4 student of 'distill digits', with all images,"
        " gained nothing that could be told from chance (LOG.md, 2026-11-26).",
    ]
