"""The demonstration: on the embedded digits a teacher, a student trained directly, and one distilled."""

import dataclasses
from pathlib import Path
from typing import Any

from spikedistill.recipes import digits
from spikedistill.recipes.distill import TeacherChoice, distill
from spikedistill.recipes.teach import teach
from spikedistill.train.progress import Progress

ROLES = ("teacher", "direct", "kdsnn")


def demo(out: Path) -> list[Path]:
    """Train all three into directories below ``out`` (finished ones are kept) and return these directories."""
    teacher = TeacherChoice(str(out / "teacher"))
    _unless_done(
        out / "teacher", lambda resume: teach(digits.teacher(), out / "teacher", resume, Progress.stderr("teacher"))
    )
    for method in ("direct", "kdsnn"):
        base = digits.student()
        what = dataclasses.replace(base.what, method=method)
        choice = dataclasses.replace(base.student, inherit=False)
        training = dataclasses.replace(base.training, lr=0.1)
        recipe = dataclasses.replace(base, who=teacher, what=what, student=choice, training=training)
        _unless_done(
            out / method,
            lambda resume, recipe=recipe, method=method: distill(recipe, out / method, resume, Progress.stderr(method)),
        )
    return [out / role for role in ROLES]


def _unless_done(path: Path, work: Any) -> None:
    if not (path / "results.json").exists():
        work((path / "recipe.json").exists())
