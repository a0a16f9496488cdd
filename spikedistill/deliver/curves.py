"""How fast runs learn: validation accuracy against minutes of training, as a picture."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from spikedistill.deliver.compare import Group, grouped
from spikedistill.deliver.figures import PROGRAM, curves
from spikedistill.deliver.results import Result, main_measure
from spikedistill.errors import ConfigError, RunError
from spikedistill.files import holds
from spikedistill.train.run import Run

Points = list[tuple[float, float]]
"""Minutes of training and validation accuracy in percent, after each epoch."""


def draw_training(path: Path, results: Sequence[Result]) -> None:
    """Draw validation accuracy against minutes of training, one curve for the runs that differ in the seed alone.

    Minutes are wall-clock time of the run's own machine. Validation after each epoch and checkpoints do not count.

    Args:
        path: the PNG file.
        results: finished runs; those without epochs or without a validation split are left out.

    Raises:
        ConfigError: if no run is left, or the file's name does not end in .png.
        RunError: if the file exists and is no picture of this package.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"curves (={path}) is written as PNG: give a name that ends in .png.")
    if path.exists() and not holds(path, b"Software\0" + PROGRAM.encode(), within=4096):
        raise RunError(f"'{path}' exists and is no picture of this command: name another file.")
    groups, _ = grouped(results)
    found = {group.name: (group, over_seeds([history(one) for one in group.results])) for group in groups}
    shown = {name: (group, points) for name, (group, points) in found.items() if points}
    if not shown:
        raise ConfigError(
            "None of these runs has a validation accuracy after each epoch: train with --validation above 0."
        )
    data = ", ".join(dict.fromkeys(group.first.record.data.name for group, _ in shown.values()))
    panels = {data: {_label(name, group): points for name, (group, points) in shown.items()}}
    measure = main_measure(results)
    title = f"{measure.capitalize()} over training time"
    curves(path, panels, "minutes of training", f"validation {measure} (%)", title=title)


def history(result: Result) -> Points:
    """Minutes of training and validation accuracy of one run; without labels the agreement with its teacher.

    Empty without a validation split.
    """
    run = Run(result.record.path)
    minutes = itertools.accumulate(line["seconds"] / 60 for line in run.lines("timing"))
    lines = zip(minutes, run.lines("metrics"))
    names = ("validation_accuracy", "validation_agreement")
    return [(spent, line[name]) for spent, line in lines for name in names if name in line]


def over_seeds(histories: Sequence[Points]) -> Points:
    """The mean of several seeds after each epoch that all of them have."""
    epochs = list(zip(*histories))
    return [(statistics.fmean(x for x, _ in epoch), statistics.fmean(y for _, y in epoch)) for epoch in epochs]


def _label(name: str, group: Group) -> str:
    count = len(group.results)
    return name if count == 1 else f"{name} (mean of {count} seeds)"
