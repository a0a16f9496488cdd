"""``reproduce``: train the cells of a study, measure them, and write the results as CSV, Markdown and pictures."""

import datetime
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import astuple, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spikedistill.errors import ConfigError, RunError
from spikedistill.files import check_replaceable, has_mark, write_csv, write_text
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.teach import Teach, teach
from spikedistill.studies.measures import MEASURES, paths_of
from spikedistill.studies.reports import Row
from spikedistill.studies.study import Cell, Study, width_of
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run, unless_done

REPORT, PAGE = "`spikedistill reproduce", "Written by `spikedistill reproduce"
"""The beginning of a line in the report of a study, and in the page of all studies."""


def reproduce(
    study: Study, out: Path, seeds: int | None = None, progress: Progress | None = None, jobs: int = 1
) -> str:
    """Train the missing runs of a study, measure all, and write ``NAME.csv``, ``NAME.md`` and pictures to ``out``.

    If the loss of a student diverges, a comparison of pairs leaves it out and names it.

    Args:
        study: from ``STUDIES``.
        out: the output folder. The page of all studies, ``OUT.md``, is written next to it.
        seeds: use only this number of seeds, from the first.
        progress: shows the work.
        jobs: number of students trained at the same time, each in its own process with its part of the cores.

    Returns:
        The report in Markdown.

    Raises:
        ConfigError: if the study has fewer seeds, ``jobs`` is not positive, or a teacher or student cannot be trained.
        RunError: if a finished run has another recipe than the study's, or an output file exists that no study wrote.
    """
    if seeds is not None and not 1 <= seeds <= study.seeds:
        raise ConfigError(f"seeds (={seeds}) must be 1 or more, and at most the {study.seeds} of '{study.name}'.")
    if jobs < 1:
        raise ConfigError(f"jobs (={jobs}) must be 1 or more: it is the number of students trained at once.")
    progress, out = progress or Progress.silent(), out.resolve()
    files = {out / f"{study.name}.csv": "study,", out / f"{study.name}.md": REPORT, out.parent / f"{out.name}.md": PAGE}
    for file, mark in files.items():
        check_replaceable(file, mark)
    cells = [cell for cell in study.cells if cell.seed < (seeds or study.seeds)]
    if study.prepare is not None:
        study.prepare()
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
    """Train the missing runs. Returns which students of a comparison of methods could not be trained, and why."""
    for made, path in study.teachers.values():
        _check_recipe(path, made)
    for cell in cells:
        _check_recipe(cell.path, cell.recipe)
    for made, path in study.teachers.values():
        trained: Any = teach if isinstance(made, Teach) else distill
        job = partial(trained, made, path, progress=Progress.stderr(path.name))
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
            if study.kind not in ("pairs", "samples"):
                raise
            failed[cell.path.name] = str(error)
            progress.say(f"{cell.path.name} is left out: {error}")
    return failed


def side_by_side(missing: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, Callable[[], object]]]:
    """Each student with a function that returns when its training has ended, or raises its error.

    With one job the function trains the student. With several jobs students come in the order in which they end.

    Args:
        missing: students that are not finished.
        jobs: number of students trained at the same time, each in its own process with its part of the cores.
    """
    if jobs == 1:
        yield from ((cell, partial(_student, cell, Progress.stderr(cell.path.name))) for cell in missing)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _take_share, (jobs,)) as pool:
        waiting, running = list(missing), dict[Future[None], Cell]()
        while waiting or running:
            while waiting and len(running) < jobs:  # submit only what runs at once: the rest can still be cancelled
                cell = waiting.pop(0)
                running[pool.submit(_student, cell)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result


def _student(cell: Cell, progress: Progress | None = None) -> None:
    """Train a student, or go on with its training. Several at a time print lines, since progress bars would collide."""
    progress = progress or Progress.as_lines(cell.path.name)
    unless_done(cell.path, partial(distill, cell.recipe, cell.path, progress=progress))


def _take_share(jobs: int) -> None:
    """Use only this process's part of the cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _needed_again(teacher: Path, cells: Sequence[Cell]) -> bool:
    """Whether a finished teacher's weights are missing and students still have to be trained.

    So the small files of finished runs can be kept without weights, and the study can go on on another machine.
    """
    if not Run(teacher).finished or Run(teacher).model.exists():
        return False
    return any(cell.recipe.teacher.source == str(teacher) and not Run(cell.path).finished for cell in cells)


def _check_recipe(path: Path, recipe: Teach | Distill) -> None:
    """Refuse a finished run with another recipe.

    Raises:
        RunError: if the recipe differs.
    """
    if Run(path).finished:
        changes = Run(path).changes(recipe.written(), type(recipe)().written())
        if changes:
            raise RunError(
                f"'{path}' has another recipe than the study ({'; '.join(changes[:3])}): move it away, or give another"
                " --runs."
            )


def _report(study: Study, cells: Sequence[Cell], shown: str) -> str:
    """The report: title, command, machines, dates, seeds and epochs, then the measurements."""
    places = [Run(path).read("environment") for path in paths_of(study, cells)]
    machines = dict.fromkeys(map(_machine, places))
    began = sorted({place["date"] for place in places if "date" in place})  # older versions did not write it
    today = datetime.date.today().isoformat()
    dates = f"runs begun {' to '.join(dict.fromkeys((began[0], began[-1])))}, report of {today}" if began else today
    epochs = {
        f"{made.training.epochs} ({_sized(name, width_of(made))}, teacher)": None
        for name, (made, _) in study.teachers.items()
    }
    for cell in cells:
        if cell.recipe.method is not None:
            student = _sized(cell.student, cell.recipe.student.width)
            epochs[f"{cell.recipe.training.epochs} ({cell.teacher} -> {student})"] = None
    seeds = sorted({cell.seed for cell in cells})
    alone = " One seed, so no deviation and no test of significance." if len(seeds) == 1 else ""
    fewer = f" --seeds {len(seeds)}" if len(seeds) < study.seeds else ""
    return (
        f"## {study.title}\n\n"
        f"{REPORT} {study.name} --budget {study.budget}{fewer}`, {dates}, on {'; '.join(machines)}."
        f" Test set, last epoch. Seeds: {', '.join(map(str, seeds))}. Epochs: {', '.join(epochs)}.{alone}\n"
        f"The paper claims (known to us from notes, not from its text): {study.claim}.\n\n{shown}"
    )


def _machine(place: Mapping[str, Any]) -> str:
    """A processor or GPU, and the version of torch that ran on it."""
    hardware = place["cuda"] or f"{place['processor']}, {place['cores']} cores"
    return f"{hardware}, torch {place['versions']['torch']}"


def _sized(name: str, width: int | None) -> str:
    return name if width is None else f"{name} of width {width}"


def _page(out: Path) -> str:
    """The page that joins the reports of all studies in a folder."""
    parts = [file.read_text(encoding="utf-8") for file in sorted(out.glob("*.md")) if has_mark(file, REPORT)]
    joined = "\n".join(parts).replace("](", f"]({out.name}/")
    said = f"Accuracies, spikes and energies are in `{out.name}/*.csv`. This page is computed from these files."
    return f"# Results\n\n{PAGE} STUDY`. {said}\n\n{joined}"
