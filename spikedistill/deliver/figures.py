"""Pictures of results, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikedistill.files import write_bytes

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Label -> points (x, y)."""


def curves(path: Path, panels: Mapping[str, Curves], xlabel: str, ylabel: str, doubling: bool = False) -> None:
    """One small picture of curves a panel, all with the same axes and one legend.

    Args:
        path: of the PNG file.
        panels: title -> curves.
        xlabel: what x is.
        ylabel: what y is.
        doubling: whether x doubles from tick to tick.
    """
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns)
    labels = dict.fromkeys(label for lines in panels.values() for label in lines)
    colours = {label: f"C{number}" for number, label in enumerate(labels)}
    for axis, (title, lines) in zip(axes, panels.items()):
        for label, points in lines.items():
            axis.plot(*zip(*points), marker=".", label=label, color=colours[label])
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        if doubling:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    _save(path, figure, axes[: len(panels)])


def bars(path: Path, groups: Mapping[str, Mapping[str, tuple[float, float]]], ylabel: str) -> None:
    """Bars from 0 side by side in groups, each with its deviation; points where bars would hide the differences.

    Args:
        path: of the PNG file.
        groups: name of the group -> label -> value and deviation.
        ylabel: what the height is.
    """
    figure, (axis, *_) = _figure(1, 1, width=max(6.0, 2.2 * len(groups)), height=4.0)
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    width = 0.8 / len(labels)
    values = [value for group in groups.values() for value, _ in group.values()]
    close = min(values) > 0 and max(values) < 2 * min(values)
    for number, label in enumerate(labels):
        found = [(place, group[label]) for place, group in enumerate(groups.values()) if label in group]
        places = [place + (number - (len(labels) - 1) / 2) * width for place, _ in found]
        heights, deviations = [value for _, (value, _) in found], [spread for _, (_, spread) in found]
        spread = deviations if any(deviations) else None
        if close:
            axis.errorbar(places, heights, spread, fmt="o", capsize=3, label=label)
        else:
            axis.bar(places, heights, width * 0.9, yerr=spread, capsize=2, label=label)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axis.set_xlim(-0.5, len(groups) - 0.5)
    axis.set_ylabel(ylabel)
    axis.grid(axis="y", alpha=0.3)
    _save(path, figure, [axis])


def _figure(rows: int, columns: int, width: float | None = None, height: float | None = None) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (width or max(5.0, 2.6 * columns), height or max(3.6, 2.1 * rows + 0.6))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    return figure, list(axes.flatten())


def _save(path: Path, figure: Any, axes: Sequence[Any]) -> None:
    drawn = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    handles, labels = list(drawn.values()), list(drawn)
    for columns in range(min(4, len(labels)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8)
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()
    write_bytes(path, lambda file: figure.savefig(file, format="png", dpi=130))
