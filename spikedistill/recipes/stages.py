"""Several stages: a spiking teacher teaches an assistant, that a smaller one, and the last of them the student.

Kushawaha et al. (ICPR 2020, arXiv 2005.00288) distil spikes in this way. Every stage is a run of its own.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.measure import check_fits
from spikedistill.files import read_facts, weights_file
from spikedistill.recipes.choices import TeacherChoice
from spikedistill.recipes.distill import Distill, build_student, distill, prepare
from spikedistill.recipes.several import Makes, is_missing, silent, try_objective
from spikedistill.teacher.zoo import ZOO
from spikedistill.train.extend import epochs_of
from spikedistill.train.processes import join
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import check
from spikedistill.train.run import Run
from spikedistill.train.training_step import settle_objective


def in_stages(
    recipe: Distill, widths: Sequence[int], out: Path, progress: Makes = silent, trust_code: bool = False
) -> list[Path]:
    """Train assistants and a student, each taught by the one before.

    The same call goes on after an interruption: finished stages are kept, and an interrupted one continues from its
    last checkpoint. Before the first training all stages are checked and their networks built, so that faults are found
    early.

    Args:
        recipe: that of the student. Assistants differ in their width and their teacher.
        widths: of the assistants, in the order in which they are trained, from large to small.
        out: the folder; the runs are in ``OUT/assistant-wWIDTH`` and ``OUT/student``.
        progress: makes the progress display of a run from its label, as ``Progress.stderr`` does.
        trust_code: execute the Python code that the teacher's file may name as its network.

    Returns:
        The run directories in order, the student's last.

    Raises:
        ConfigError: if the student has no network with a width of its own, widths do not fall from the teacher's to the
            student's, or a stage cannot work.
        RunError: if a directory holds a run with another recipe or of other epochs.
        SpikeDistillError: other errors of ``distill``.
    """
    processes = join()
    progress = progress if processes.is_main_process else silent
    with processes.main_process_first():
        made = stages(recipe, widths, out)
        for path, stage in made.items():
            _refuse_extension(path, stage)
        missing = [path for path, stage in made.items() if is_missing(path, stage, resume=False)]
        if missing:
            _rehearse([*made.values()][[*made].index(missing[0]) :], trust_code)
    for number, (path, stage) in enumerate(made.items(), 1):
        shown = progress(path.name)
        if path in missing:
            shown.say(f"stage {number} of {len(made)}")
            distill(stage, path, (path / "recipe.json").exists(), shown, trust_code)
        else:
            shown.say(f"stage {number} of {len(made)} is finished and kept")
    return list(made)


def stages(recipe: Distill, widths: Sequence[int], out: Path) -> dict[Path, Distill]:
    """The recipe of every stage by its directory.

    Raises:
        ConfigError: if the student has no network with a width of its own, or widths do not fall from the teacher's to
            the student's.
    """
    network = recipe.student.network
    if network not in ZOO:
        raise ConfigError(
            f"Assistants have the student's network at other widths, and student (='{network}') is none of the zoo:"
            f" name it by --student ({', '.join(sorted(ZOO))})."
        )
    theirs, own = _teacher_width(recipe.teacher, network), _width(network, recipe.student.width)
    above = [] if theirs is None else [theirs]
    if any(after >= before for before, after in pairwise([*above, *widths, own])):
        raise ConfigError(
            f"assistants (={' '.join(map(str, widths))}) must be widths that fall from the teacher's"
            f"{''.join(f' {width}' for width in above)} to the student's {own}, each smaller than the one before: give"
            " such widths, or another --student-width."
        )
    made: dict[Path, Distill] = {}
    for width in (*widths, None):
        path = out / ("student" if width is None else f"assistant-w{width}")
        stage = recipe if width is None else replace(recipe, student=replace(recipe.student, width=width))
        if made:
            stage = replace(stage, teacher=replace(recipe.teacher, source=str([*made][-1]), network=None, width=None))
        made[path] = stage
    return made


def _width(network: str, width: int | None) -> int:
    """Channels of the first stage of a network of the zoo: as given, or its usual ones."""
    return inspect.signature(ZOO[network]).parameters["width"].default if width is None else width


def _teacher_width(choice: TeacherChoice, network: str) -> int | None:
    """The teacher's width if its network is this one of the zoo; widths of two networks do not compare."""
    if choice.network is not None:
        return _width(network, choice.width) if choice.network == network else None
    facts = read_facts(weights_file(choice.source))
    match facts.get("network", facts.get("architecture")):
        case {"name": name, "width": int() | None as width} if name == network:
            return _width(network, width)
    return None


def _refuse_extension(path: Path, stage: Distill) -> None:
    """Refuse other epochs than those of the run that lies there.

    Raises:
        RunError: if they differ.
    """
    if not (path / "recipe.json").exists():
        return
    had, asked = epochs_of(Run(path).recipe()), epochs_of(stage.written())
    if had != asked:
        raise RunError(
            f"'{path}' holds a run of {had} epochs, and --epochs {asked} was given: stages cannot be extended, as each"
            f" is taught by the one before. Give --epochs {had}, or another --out."
        )


def _rehearse(recipes: Sequence[Distill], trust_code: bool) -> None:
    """Do all checks that need no training. From the second stage on the teacher is the untrained network before."""
    settled = [one.settled() for one in recipes]
    for made in settled:
        check(made, made.student, made.data, made.training)
    prepared = prepare(settled[0], trust_code, Progress.silent())
    seen, place = prepared.source or prepared.images, settled[0].training.place()
    example = next(prepared.feed(settled[0]).batches(1))
    for number, made in enumerate(settled):
        if number:
            teacher = prepared.student
            student, report, _ = build_student(made, teacher, None, prepared.images)
            method = made.method and settle_objective(made.method, student, teacher, report.inherited)
            prepared = replace(prepared, teacher=teacher, student=student, method=method)
        if made is not settled[-1]:
            check_fits(prepared.student, seen, f"The assistant of width {made.student.width}")
        if prepared.method is not None:
            try_objective(prepared.method, prepared, example, place)
