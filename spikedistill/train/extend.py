"""Extending a run to more epochs: what is allowed, and which earlier results are kept.

From that point on, learning rate and schedules are those of a run with the new number of epochs. After a finished
cosine schedule the learning rate therefore rises again from 0. This is a warm restart. It is not the same as a run that
had more epochs from the beginning.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikedistill.errors import RunError
from spikedistill.files import note, read_facts
from spikedistill.train.checkpoint import read_checkpoint

EXTENDED = "extended"
"""The entry of recipe.json that lists extensions: for each the earlier number of epochs, and the epochs and steps that
were done."""


def trains(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe trains anything; a conversion that only sets thresholds has no method but its name."""
    method = recipe.get("method")
    return not (isinstance(method, Mapping) and len(method) == 1 and str(method.get("name")).startswith("conversion-"))


def epochs_of(recipe: Mapping[str, Any], usual: Mapping[str, Any] | None = None) -> int | None:
    """The number of epochs in a recipe, None if it trains nothing; if it is missing there, that of ``usual``."""
    if not trains(recipe):
        return None
    return recipe.get("training", {}).get("epochs") or (None if usual is None else epochs_of(usual))


def without_epochs(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without its number of epochs and its list of extensions."""
    training = {name: value for name, value in recipe.get("training", {}).items() if name != "epochs"}
    rest = {name: value for name, value in recipe.items() if name != EXTENDED}
    return {**rest, "training": training} if "training" in rest else rest


def check_extension(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], planned: int | None, finished: bool
) -> dict[str, int]:
    """Check that a run can be extended. Returns its number of epochs, and the epochs and steps that are done.

    Args:
        path: the run directory.
        before: its recipe, as it was written.
        now: the new recipe, with another number of epochs.
        planned: the run's number of epochs so far.
        finished: whether the run has its results.

    Raises:
        RunError: if the new recipe has fewer epochs, there is no checkpoint to go on from, or an earlier version wrote
            the run.
        WeightsError: if the checkpoint and the one before it are damaged.
    """
    asked, file = epochs_of(now), path / "checkpoint.safetensors"
    if asked is None or planned is None or asked < planned:
        raise RunError(
            f"The run in '{path}' has {planned} epochs, {read_facts(file).get('epoch', 0)} of them done, and --epochs"
            f" {asked} was given: a run can be extended but not shortened. Give --epochs {planned} or more, or another"
            " --out."
        )
    if before.get("format") != now.get("format"):
        raise RunError(
            f"The run in '{path}' was made by an earlier version of spikedistill and cannot be extended: start a new"
            " run by --start RUN."
        )
    if finished and not file.exists():
        raise RunError(
            f"The run in '{path}' holds no checkpoint to continue from, so it cannot be extended to {asked} epochs:"
            " start a new run by --start RUN."
        )
    facts = read_checkpoint(file)[1] if file.exists() else {}
    return {"epochs": planned, "done": facts.get("epoch", 0), "step": facts.get("step", 0)}


def extend(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], at: Mapping[str, int]) -> dict[str, Any]:
    """Rename results and weights of a finished run. Returns the recipe to write, which lists the extension."""
    for name in ("results.json", "model.safetensors"):
        file = path / name
        if file.exists():
            os.replace(file, path / f"{file.stem}-{at['epochs']}-epochs{file.suffix}")
    note(
        f"'{path}' is extended from {at['epochs']} to {epochs_of(now)} epochs, epochs done: {at['done']}. From here on,"
        f" learning rate and schedules are those of a run of {epochs_of(now)} epochs."
    )
    return {**now, EXTENDED: [*before.get(EXTENDED, []), at]}


def earlier_names(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The file names of earlier results, by number of epochs."""
    return {str(at["epochs"]): f"results-{at['epochs']}-epochs" for at in recipe.get(EXTENDED, [])}
