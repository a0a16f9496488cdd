"""The demonstration on the embedded digits: a teacher, students by cross-entropy only, and one that is distilled."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.objective.terms import Objective
from spikedistill.recipes import digits
from spikedistill.recipes.choices import TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.teach import teach
from spikedistill.train.progress import Progress
from spikedistill.train.run import unless_done


def demo(out: Path) -> list[Path]:
    """Train into four directories below ``out``, each unless it is finished, and return these directories.

    ``teacher`` is the ANN; ``scratch`` a student with fresh weights, trained on labels; ``direct`` the same student
    with the teacher's weights, trained on labels; ``kdsnn`` that student, distilled. All students have the same epochs.
    """
    teacher, (scratch, direct, kdsnn) = out / "teacher", (out / name for name in ("scratch", "direct", "kdsnn"))
    unless_done(teacher, lambda resume: teach(digits.teacher(), teacher, resume, Progress.stderr("teacher")))
    for path, method, inherit in ((scratch, Direct(), False), (direct, Direct(), True), (kdsnn, KDSNN(), True)):
        unless_done(path, _work(_recipe(teacher, method, inherit), path))
    return [teacher, scratch, direct, kdsnn]


def _recipe(teacher: Path, method: Objective, inherit: bool) -> Distill:
    base = digits.student()
    return dataclasses.replace(
        base,
        teacher=TeacherChoice(str(teacher)),
        student=dataclasses.replace(base.student, inherit=inherit),
        method=method,
    )


def _work(recipe: Distill, path: Path) -> Callable[[bool], object]:
    return lambda resume: distill(recipe, path, resume, Progress.stderr(path.name))
