"""Several stages: a spiking teacher teaches an assistant, that a smaller one, and the last of them the student.

Kushawaha et al. (ICPR 2020, arXiv 2005.00288) distil spikes in this way. Every stage is a run of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spikedistill.errors import ConfigError
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.several import Makes, is_missing, silent


def in_stages(
    recipe: Distill, widths: Sequence[int], out: Path, progress: Makes = silent, trust_code: bool = False
) -> list[Path]:
    """Train assistants and a student, each taught by the one before.

    The same call goes on after an interruption: finished stages are kept, and an interrupted one continues from its
    last checkpoint.

    Args:
        recipe: that of the student. Assistants differ in their width and their teacher.
        widths: of the assistants, in the order in which they are trained.
        out: the folder; the runs are in ``OUT/assistant-wWIDTH`` and ``OUT/student``.
        progress: makes the progress display of a run from its label, as ``Progress.stderr`` does.
        trust_code: execute the Python code that the teacher's file may name as its network.

    Returns:
        The run directories in order, the student's last.

    Raises:
        ConfigError: if the student has no network with a width of its own, or two assistants have the same width.
        RunError: if a directory holds a run with another recipe.
        SpikeDistillError: other errors of ``distill``.
    """
    made = stages(recipe, widths, out)
    for number, (path, stage) in enumerate(made.items(), 1):
        shown = progress(path.name)
        if is_missing(path, stage, resume=False):
            shown.say(f"stage {number} of {len(made)}")
            distill(stage, path, (path / "recipe.json").exists(), shown, trust_code)
        else:
            shown.say(f"stage {number} of {len(made)} is finished and kept")
    return list(made)


def stages(recipe: Distill, widths: Sequence[int], out: Path) -> dict[Path, Distill]:
    """The recipe of every stage by its directory.

    Raises:
        ConfigError: if the student has no network with a width of its own, or two assistants have the same width.
    """
    if recipe.student.network == "same":
        raise ConfigError("Assistants have the student's network at other widths: name it by --student, not 'same'.")
    if len({*widths}) < len(widths) or min(widths) < 1:
        raise ConfigError(f"assistants (={' '.join(map(str, widths))}) must be different widths of 1 or more.")
    made: dict[Path, Distill] = {}
    for width in (*widths, None):
        path = out / ("student" if width is None else f"assistant-w{width}")
        stage = recipe if width is None else replace(recipe, student=replace(recipe.student, width=width))
        if made:
            stage = replace(stage, teacher=replace(recipe.teacher, source=str([*made][-1]), network=None, width=None))
        made[path] = stage
    return made
