"""Pictures of results as PNG and SVG. They can be read by the colour-blind and in grey, and have titles and notes.

Colours are from Okabe and Ito ("Color Universal Design", 2008), without yellow, which is too pale on white. Every label
also has its own marker and line style, or its own hatch. Heat maps use ColorBrewer's PuOr, from purple over white at
zero to orange, with the numbers in the cells.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikedistill.errors import ConfigError
from spikedistill.files import write_bytes

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Label -> points (x, y)."""
Groups = Mapping[str, Mapping[str, tuple[float, float]]]
"""Name of the group -> label -> value and deviation."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
PROGRAM = "spikedistill"
"""The program that PNG files name."""
KINDS = ("png", "svg")
"""Kinds of files that pictures are written to."""
INK = ("#000000", "#262626", "#b0b0b0")
"""Colours of text, lines and grids, which in a page are those of its text."""
HATCHES = ("", "////", "....", "xxxx", "----")
"""Line styles, by number of the label. The counts of styles and markers have no common divisor: pairs repeat late."""
LEAST = 2.0
"""The smallest span of an axis, in points of accuracy: smaller differences are mostly noise."""


def curves(path: Path, panels: Mapping[str, Curves], xlabel: str, ylabel: str, **more: Any) -> None:
    """Write ``draw_curves`` to a file."""
    save(path, draw_curves(panels, xlabel, ylabel, **more))


def draw_curves(
    panels: Mapping[str, Curves],
    xlabel: str,
    ylabel: str,
    *,
    title: str = "",
    note: str = "",
    doubling: bool = False,
    percent: bool = True,
) -> Any:
    """Draw curves, one panel per title, all with the same axes and one legend.

    Args:
        panels: title -> curves.
        xlabel: label of x.
        ylabel: label of y, with its unit.
        title: title of the whole picture.
        note: text below the picture: numbers of seeds and images.
        doubling: whether x doubles from tick to tick.
        percent: whether y is in percent, and so spans at least 2.

    Returns:
        The matplotlib ``Figure``.
    """
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    figure, axes = canvas(rows, columns, shared=True)
    labels = dict.fromkeys(label for lines in panels.values() for label in lines)
    looks = {label: look_of(number) for number, label in enumerate(labels)}
    for axis, (name, lines) in zip(axes, panels.items()):
        for label, points in lines.items():
            axis.plot(*zip(*points), label=literal(label), markersize=4, **looks[label])
        axis.set_title(literal(name), fontsize=9)
        axis.grid(alpha=0.3)
        if all(float(x).is_integer() for points in lines.values() for x, _ in points):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if doubling:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
    if percent:
        _widen(axes[0])
    _finish(axes, len(panels), columns, xlabel)
    figure.supylabel(ylabel, fontsize=9)
    _legend(figure, axes[: len(panels)], title, note)
    return figure


def bars(path: Path, panels: Mapping[str, Groups], ylabel: str, *, title: str = "", note: str = "") -> None:
    """Draw groups of bars from 0, each with its deviation; or points, if bars would hide the differences.

    Args:
        path: the PNG file.
        panels: title -> groups; each panel has its own y axis.
        ylabel: label of y, with its unit; for points y spans at least 2.
        title: title of the whole picture.
        note: text below the picture: numbers of seeds and images.
    """
    most = max(len(groups) for groups in panels.values())
    figure, axes = canvas(len(panels), 1, width=max(6.0, 2.2 * most), height=1.2 + 2.8 * len(panels))
    labels = list(dict.fromkeys(label for groups in panels.values() for group in groups.values() for label in group))
    for axis, (name, groups) in zip(axes, panels.items()):
        axis.set_title(name, fontsize=9)
        _draw_groups(axis, groups, labels)
        axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
        axis.set_xlim(-0.5, len(groups) - 0.5)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    figure.supylabel(ylabel, fontsize=9)
    _legend(figure, axes, title, note)
    save(path, figure)


def heat_maps(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    columns: Sequence[str],
    xlabel: str,
    unit: str,
    *,
    title: str = "",
    note: str = "",
) -> None:
    """Draw positive and negative numbers as colours, one map per panel, all with the same colour scale.

    Args:
        path: the PNG file.
        panels: title -> row -> a number for each column; all panels have the same rows.
        columns: names of the columns.
        xlabel: label of the columns.
        unit: unit of the numbers.
        title: title of the whole picture.
        note: text below the picture: numbers of seeds and images.
    """
    rows = list(next(iter(panels.values())))
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    size = {"width": max(5.5, 1.2 + 0.55 * across * len(columns)), "height": 1.2 + down * (0.6 + 0.26 * len(rows))}
    figure, axes = canvas(down, across, shared=True, **size)
    most = max(1.0, *(abs(value) for maps in panels.values() for row in maps.values() for value in row))
    for axis, (name, maps) in zip(axes, panels.items()):
        drawn = axis.imshow(list(maps.values()), cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
        for place, row in enumerate(maps.values()):
            for number, value in enumerate(row):
                colour = "white" if abs(value) > 0.7 * most else "black"
                text = f"{round(value, 1) or 0:+.1f}"
                axis.text(number, place, text, ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(columns)), columns, fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
    _finish(axes, len(panels), across, xlabel)
    figure.colorbar(drawn, ax=axes[: len(panels)], label=unit, fraction=0.04)
    figure.suptitle("\n".join(filter(None, (title, note))), fontsize=9)
    save(path, figure)


def _draw_groups(axis: Any, groups: Groups, labels: Sequence[str]) -> None:
    values = [value for group in groups.values() for value, _ in group.values()]
    close = min(values) > 0 and max(values) < 2 * min(values)
    used = [label for label in labels if any(label in group for group in groups.values())]
    width = 0.8 / len(used)
    for label in used:
        look = look_of(labels.index(label))
        found = [(place, group[label]) for place, group in enumerate(groups.values()) if label in group]
        places = [place + (used.index(label) - (len(used) - 1) / 2) * width for place, _ in found]
        heights, deviations = [value for _, (value, _) in found], [spread for _, (_, spread) in found]
        spread = deviations if any(deviations) else None
        if close:
            points = {"fmt": look["marker"], "color": look["color"], "markersize": 5}
            axis.errorbar(places, heights, spread, capsize=3, label=label, **points)
        else:
            hatch = HATCHES[labels.index(label) % len(HATCHES)]
            filled = {"color": look["color"], "hatch": hatch, "edgecolor": "white"}
            drawn = axis.bar(places, heights, width * 0.9, yerr=spread, capsize=2, label=label, **filled)
            axis.bar_label(drawn, [f"{height:.3g}" for height in heights], fontsize=7)
    axis.margins(y=0.1)
    if close:
        _widen(axis)


def look_of(number: int) -> dict[str, Any]:
    """Colour, marker and line style of a label."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": STYLES[number % len(STYLES)],
    }


def _widen(axis: Any) -> None:
    """Let y, a percentage, span at least ``LEAST`` around the data, and end at 100 or little above."""
    low, high = axis.get_ylim()
    more = max(0.0, LEAST - (high - low)) / 2
    high = min(high + more, 100.0 + (high - low) / 20)
    axis.set_ylim(min(low - more, high - LEAST), high)


def _finish(axes: Sequence[Any], used: int, columns: int, xlabel: str) -> None:
    """Hide unused panels, and put the x label below the lowest panel of each column."""
    for place, axis in enumerate(axes):
        axis.set_visible(place < used)
        if place < used <= place + columns:
            axis.set_xlabel(xlabel, fontsize=9)
            axis.xaxis.set_tick_params(labelbottom=True)


def canvas(
    rows: int, columns: int, *, shared: bool = False, width: float | None = None, height: float | None = None
) -> tuple[Any, list[Any]]:
    """An empty figure with rows times columns of panels, and its panels in order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (width or max(6.0, 2.6 * columns), height or max(4.0, 2.1 * rows + 1.0))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)
    return figure, list(axes.flatten())


def _legend(figure: Any, axes: Sequence[Any], title: str, note: str) -> None:
    """Put the title above, and below the note and one legend of all labels in as many columns as fit."""
    figure.suptitle(title, fontsize=11)
    drawn = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    for columns in range(min(4, len(drawn)), 0, -1):
        style = {
            "ncols": columns,
            "fontsize": 8,
            "handlelength": 3.5,
            "frameon": False,
            "title": note,
            "title_fontsize": 8,
        }
        legend = figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", **style)
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()


def literal(text: str) -> str:
    """Text that matplotlib shows as it is: dollars do not begin formulas."""
    return text.replace("$", r"\$")


def save(path: str | Path, figure: Any) -> None:
    """Write a figure to a .png or .svg file, atomically.

    Raises:
        ConfigError: if the name of the file ends in something else.
        RunError: if it cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise ConfigError(f"'{path}' is a picture: give a name that ends in .{' or .'.join(KINDS)}.")
    metadata = {"Software": PROGRAM} if kind == "png" else None
    write_bytes(path, lambda file: figure.savefig(file, format=kind, dpi=130, metadata=metadata))


def inline_svg(figure: Any, name: str) -> str:
    """A figure as SVG for a page: text is text in the page's font, ink has the page's colour, nothing lies behind.

    Args:
        figure: a matplotlib ``Figure``.
        name: what the ids of its parts begin with, so that several pictures do not disturb each other.
    """
    import matplotlib

    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour in INK:
        text = text.replace(colour, "currentColor")
    text = re.sub(r"font: ([^;\"]*?)(\d+(?:\.\d+)?)px [^;\"]*", r"font: \1\2px sans-serif", text)
    return re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
