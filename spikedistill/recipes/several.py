"""Several methods over several seeds: the same student, teacher and data, one run directory for each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from spikedistill.compute.place import Place
from spikedistill.data.feed import Inputs
from spikedistill.errors import ConfigError, RunError, SpikeDistillError
from spikedistill.objective.terms import Objective
from spikedistill.recipes.distill import Distill, Prepared, distill, prepare
from spikedistill.train.extend import epochs_of
from spikedistill.train.processes import join
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import check
from spikedistill.train.run import Run
from spikedistill.train.training_step import make_runner, make_training_step

Makes = Callable[[str], Progress]
"""A function that makes the progress display of a run from its label."""


def silent(label: str) -> Progress:
    """A display that shows nothing."""
    return Progress.silent()


def several(
    recipe: Distill,
    methods: Sequence[str],
    seeds: int,
    out: Path,
    resume: bool = False,
    progress: Makes = silent,
    trust_code: bool = False,
) -> list[Path]:
    """Train a student by each method with each seed, every run in a directory of its own below ``out``.

    The same call goes on after an interruption: finished runs are kept, and an interrupted run continues from its last
    checkpoint. More seeds or methods add runs. ``resume`` is needed only to extend runs to more epochs. Before the
    first run every method is checked and its student built, so that faults are found early.

    Args:
        recipe: the recipe of all runs. Its seed is the first; seeds differ in ``training.seed`` only.
        methods: names as for ``--method``. The recipe's own method keeps its fields, others have their defaults.
        seeds: number of seeds, from the recipe's own upwards.
        out: the folder; each run is in ``OUT/METHOD-tT-sSEED``.
        resume: allow another number of epochs than existing runs have; ``Run.start`` checks it.
        progress: makes the progress display of a run from its label, as ``Progress.stderr`` does.
        trust_code: execute the Python code that the teacher's file may name as its network.

    Returns:
        The run directories, method by method, each with its seeds in order; ``deliver.compare`` makes their table.

    Raises:
        ConfigError: if there is no method or seed, two methods have the same name, a recipe cannot work, or the loss of
            a run is no longer finite. The message names the run; finished runs stay.
        RunError: if a directory holds a run with another recipe, or ``out`` is itself a run.
        SpikeDistillError: other errors of ``distill``.
    """
    processes = join()
    progress = progress if processes.is_main_process else silent
    with processes.main_process_first():
        runs = {out / name: made for name, made in variants(recipe, methods, seeds).items()}
        if (out / "recipe.json").exists():
            raise RunError(f"'{out}' is the directory of a run: give another --out, below which each run gets its own.")
        missing = [path for path, made in runs.items() if is_missing(path, made, resume)]
        if len(missing) < len(runs):
            progress(out.name).say(f"{len(runs) - len(missing)} of {len(runs)} runs are finished and kept")
        _rehearse([runs[path] for path in missing], trust_code)
    for number, path in enumerate(missing, 1):
        shown = progress(path.name)
        shown.say(f"run {number} of {len(missing)}")
        try:
            distill(runs[path], path, (path / "recipe.json").exists(), shown, trust_code)
        except SpikeDistillError as error:
            error.args = (_failure(path, list(runs), str(error)),)
            raise
    return list(runs)


def variants(recipe: Distill, methods: Sequence[str], seeds: int) -> dict[str, Distill]:
    """The recipe of every run, by the name of its directory ``METHOD-tT-sSEED``, with ``tTdD`` for graded spikes.

    >>> list(variants(Distill(), ["direct", "kdsnn"], 2))
    ['direct-t4-s0', 'direct-t4-s1', 'kdsnn-t4-s0', 'kdsnn-t4-s1']

    Raises:
        ConfigError: if there is no method or seed, or two methods have the same name.
    """
    if seeds < 1:
        raise ConfigError(f"seeds (={seeds}) must be 1 or more.")
    if not methods:
        raise ConfigError("No method was given: name one or more.")
    found: dict[str, Distill] = {}
    for method in methods:
        made = recipe.with_method(method)
        kind = made.method_name.rpartition(":")[2]
        for seed in range(recipe.training.seed, recipe.training.seed + seeds):
            name = f"{kind}-{recipe.student.steps_name}-s{seed}"
            if name in found:
                remedy = "give each once" if methods.count(method) > 1 else "rename one"
                raise ConfigError(f"Two of the methods ({', '.join(methods)}) are called '{kind}': {remedy}.")
            found[name] = replace(made, training=replace(made.training, seed=seed))
    return found


def is_missing(path: Path, recipe: Distill, resume: bool) -> bool:
    """Whether a run still has to be trained or extended.

    Raises:
        RunError: if the directory holds a run with another recipe.
    """
    if not (path / "recipe.json").exists():
        return True
    changed = Run(path).changes(recipe.written(), Distill().written())
    had, asked = epochs_of(Run(path).recipe()) or 0, epochs_of(recipe.written()) or 0  # 0: nothing is trained
    longer = resume and asked > had
    ours = ("extended ", "epochs ") if longer or not asked else ("extended ",)  # 'extended' is what that wrote
    if refused := [line for line in changed if not line.startswith(ours)]:
        raise RunError(
            f"'{path}' holds a run with another recipe ({'; '.join(refused[:3])}): give the same, or another --out."
        )
    return longer or not Run(path).finished


def _rehearse(recipes: Sequence[Distill], trust_code: bool) -> None:
    """Do all checks that need no training, once for each method; they do not depend on the seed."""
    by_method = {made.method_name: made.settled() for made in recipes}
    for made in by_method.values():
        check(made, made.student, made.data, made.training)
    for made in by_method.values():
        prepared = prepare(made, trust_code, Progress.silent())
        feed = prepared.feed(made)
        if prepared.method is not None:
            try_objective(prepared.method, prepared, next(feed.batches(1)), made.training.place())


def try_objective(method: Objective, prepared: Prepared, example: Inputs, place: Place) -> None:
    """Try an objective with no open fields on one batch, with both networks."""
    place = place.for_training(prepared.student)
    place.prepare(prepared.student)
    runner = make_runner(prepared.teacher, method.needs, place)
    with place.autocast():
        make_training_step(prepared.student, method, runner, example.to(place.device, place.layout))


def _failure(path: Path, paths: Sequence[Path], reason: str) -> str:
    done = sum(Run(one).finished for one in paths)
    return (
        f"The run '{path}' cannot go on: {reason.rstrip('.')}. {done} of {len(paths)} runs are finished; the same"
        " command keeps them."
    )
