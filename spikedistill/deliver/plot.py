"""Pictures of what a student does and of how it answers: ``spikedistill.plot``. Each function returns a figure.

    activity = spikedistill.record_activity(student, images)
    spikedistill.plot.save("raster.svg", spikedistill.plot.raster(activity))

Figures are matplotlib's, so they can be changed before they are saved, as PNG or SVG.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikedistill.deliver.figures import COLOURS, canvas, literal, look_of, save
from spikedistill.deliver.figures import draw_curves as curves
from spikedistill.errors import ConfigError
from spikedistill.evaluate.activity import Activity

__all__ = ["answer", "confusion", "curves", "membrane", "raster", "rates", "save"]

SHOWN = 16
"""Neurons of a layer in a raster."""
NUMBERED = 20
"""Up to this many classes or layers, cells have numbers."""


def raster(activity: Activity, sample: int = 0, *, layers: Sequence[str] = (), title: str = "") -> Any:
    """The spikes of one sample: a row for each neuron, a mark for each spike, layers below one another.

    Of every layer at most 16 neurons are shown, evenly chosen among those that fire.

    Args:
        activity: from ``record_activity``.
        sample: number of the sample.
        layers: which (default: all, up to 8 evenly chosen).
        title: above the picture.

    Raises:
        ConfigError: if there is no such sample or layer.
    """
    chosen = _layers(activity, sample, layers)
    figure, (axis,) = canvas(1, 1, height=1.4 + 0.42 * len(chosen), width=6.4)
    ticks, row = [], 0
    width = min(24.0, max(2.0, 120.0 / (activity.timesteps * activity.levels)))
    for number, layer in enumerate(chosen):
        trains = activity.spikes[layer][:, sample]
        shown = _evenly(trains.any(0).nonzero().flatten(), SHOWN)
        times = [(trains[:, neuron].nonzero().flatten() + 1).tolist() for neuron in shown.tolist()]
        rows = range(row, row + len(times))
        look = {"linelengths": 0.8, "linewidths": width, "colors": COLOURS[number % 3]}
        if times:
            axis.eventplot(times, lineoffsets=list(rows), **look)
        ticks.append(row + max(0, len(times) - 1) / 2)
        row += max(1, len(times)) + 2
    names = [f"{literal(layer)} ({int(activity.spikes[layer][:, sample].sum()):,})" for layer in chosen]
    axis.set_yticks(ticks, names, fontsize=7)
    axis.invert_yaxis()
    _time_axis(axis, activity)
    axis.set_title(title or "Spikes of one sample (in brackets: of the whole layer)", fontsize=9)
    return figure


def membrane(
    activity: Activity, sample: int = 0, *, layer: str = "", neurons: Sequence[int] = (), title: str = ""
) -> Any:
    """Membrane potentials of a few neurons of a layer over time, with their threshold and their spikes.

    Args:
        activity: from ``record_activity``.
        sample: number of the sample.
        layer: which (default: the one in the middle).
        neurons: their numbers in the layer (default: four that fire differently often).
        title: above the picture.

    Raises:
        ConfigError: if there is no such sample, layer or neuron.
    """
    names = list(activity.spikes)
    layer = layer or names[len(names) // 2]
    _layers(activity, sample, [layer])
    chosen = list(neurons) or _different(activity.spikes[layer][:, sample])
    potentials = activity.potentials[layer][:, sample].cpu().numpy()
    trains = activity.spikes[layer][:, sample].cpu().numpy()
    if wrong := [number for number in chosen if not 0 <= number < potentials.shape[1]]:
        raise ConfigError(f"neuron (={wrong[0]}) is not in '{layer}', which has {potentials.shape[1]}.")
    figure, (axis,) = canvas(1, 1, height=3.2, width=6.4)
    times = np.arange(1, len(potentials) + 1)
    for number, neuron in enumerate(chosen):
        look = look_of(number)
        axis.plot(times, potentials[:, neuron], label=f"neuron {neuron}", markersize=4, **look)
        fired = trains[:, neuron] > 0
        filled = {"s": 60, "facecolors": "none", "edgecolors": look["color"], "linewidths": 1.4}
        axis.scatter(times[fired], potentials[fired, neuron], **filled)
    axis.axhline(1.0, linestyle="--", linewidth=1, color="#000000")
    axis.set_ylabel("potential (thresholds)", fontsize=9)
    axis.grid(alpha=0.3)
    _time_axis(axis, activity)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axis.set_title(title or f"{layer}: potential before the reset; a ring is a spike, dashed the threshold", fontsize=9)
    return figure


def answer(activity: Activity, names: Sequence[str], sample: int = 0, *, label: str = "", title: str = "") -> Any:
    """How the answer to one sample builds up: the probabilities of its likeliest classes after each time step.

    Args:
        activity: from ``record_activity``.
        names: of the classes.
        sample: number of the sample.
        label: the name of its class, if it is known.
        title: above the picture.
    """
    _layers(activity, sample, [])
    over_time = activity.probabilities[:, sample].cpu().numpy()
    best = np.argsort(-over_time.max(0), kind="stable")[:4].tolist()
    figure, (axis,) = canvas(1, 1, height=2.6, width=6.4)
    steps = range(1, len(over_time) + 1)
    if len(over_time) == 1:
        labels = [f"{literal(names[place])}{' (true)' if names[place] == label else ''}" for place in best]
        drawn = axis.barh(labels, [100 * float(over_time[0, place]) for place in best], color=COLOURS[0])
        axis.bar_label(drawn, fmt="%.1f", fontsize=7, padding=2)
        axis.invert_yaxis()
        axis.set_xlim(0, 112)
        axis.set_xlabel("probability (%)", fontsize=9)
    else:
        for number, place in enumerate(best):
            shown = f"{literal(names[place])}{' (true)' if names[place] == label else ''}"
            axis.plot(steps, 100 * over_time[:, place], label=shown, markersize=4, **look_of(number))
        axis.set_ylim(-3, 103)
        axis.set_ylabel("probability (%)", fontsize=9)
        axis.set_xlabel("time step", fontsize=9)
        axis.set_xticks(list(steps))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axis.set_title(title or "The answer", fontsize=9)
    return figure


def rates(found: Mapping[str, Sequence[float]], *, levels: int = 1, title: str = "") -> Any:
    """Firing rates as a map: a row for each layer, a column for each sub-step.

    Args:
        found: layer -> percent of its neurons that fire at each of T D sub-steps, as ``Activity.rates`` gives.
        levels: D.
        title: above the picture.
    """
    rows = list(found.values())
    figure, (axis,) = canvas(1, 1, height=1.2 + 0.24 * len(rows), width=6.4)
    drawn = axis.imshow(rows, cmap="cividis", aspect="auto", vmin=0)
    most = max((max(row) for row in rows), default=1.0) or 1.0
    if len(rows[0]) <= NUMBERED:
        for place, row in enumerate(rows):
            for number, value in enumerate(row):
                colour = "#111111" if value > 0.55 * most else "#fefefe"
                axis.text(number, place, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_yticks(range(len(rows)), list(map(literal, found)), fontsize=7)
    count = len(rows[0])
    axis.set_xticks(range(count), [step_name(number, levels) for number in range(count)], fontsize=7)
    axis.set_xlabel("time step" if levels == 1 else "time step . sub-step", fontsize=9)
    figure.colorbar(drawn, ax=axis, label="% of neurons", fraction=0.04)
    axis.set_title(title or "Neurons that fire, by layer and step", fontsize=9)
    return figure


def confusion(matrix: Tensor, names: Sequence[str], *, title: str = "") -> Any:
    """What a class is taken for: a row for each true class, a column for each answer.

    Args:
        matrix: numbers of samples ``[K, K]``.
        names: of the classes.
        title: above the picture.

    Raises:
        ConfigError: if the matrix is not ``[K, K]``.
    """
    count = len(names)
    if tuple(matrix.shape) != (count, count):
        raise ConfigError(f"A matrix of shape {tuple(matrix.shape)} was given for {count} classes: expected [K, K].")
    shares = (100 * matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()
    side = 3.0 + min(4.5, 0.3 * count)
    figure, (axis,) = canvas(1, 1, height=side * 0.86, width=side)
    drawn = axis.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    if count <= NUMBERED:
        for true, row in enumerate(shares.tolist()):
            for said, value in enumerate(row):
                if value >= 0.5:
                    colour = "#111111" if value > 55 else "#fefefe"
                    axis.text(said, true, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        shown = list(map(literal, names))
        axis.set_xticks(range(count), shown, fontsize=7, rotation=45, ha="right")
        axis.set_yticks(range(count), shown, fontsize=7)
    axis.set_xlabel("answer", fontsize=9)
    axis.set_ylabel("true class", fontsize=9)
    figure.colorbar(drawn, ax=axis, label="% of the true class", fraction=0.04)
    axis.set_title(title or "Answers by true class", fontsize=9)
    return figure


def _layers(activity: Activity, sample: int, layers: Sequence[str]) -> list[str]:
    """The named layers, or up to 8 of all; refuses what is not there."""
    samples = activity.probabilities.shape[1]
    if not 0 <= sample < samples:
        raise ConfigError(f"sample (={sample}) is not among the {samples} that were run: give 0 to {samples - 1}.")
    if unknown := [layer for layer in layers if layer not in activity.spikes]:
        raise ConfigError(f"There is no layer '{unknown[0]}' of neurons. Known: {', '.join(activity.spikes)}.")
    names = list(activity.spikes)
    return list(layers) or [names[place] for place in _evenly(torch.arange(len(names)), 8).tolist()]


def _evenly(places: Tensor, count: int) -> Tensor:
    """At most this many of them, evenly chosen, the first and the last among them."""
    if len(places) <= count:
        return places
    return places[torch.linspace(0, len(places) - 1, count).round().long()]


def _different(trains: Tensor) -> list[int]:
    """Up to four neurons that fire differently often, the busiest first."""
    counts = trains.sum(0)
    firsts = [int((counts == count).nonzero()[0]) for count in counts.unique(sorted=True).flip(0)]
    chosen = [firsts[place] for place in _evenly(torch.arange(len(firsts)), 4).tolist()]
    return sorted(chosen, key=lambda neuron: -float(counts[neuron]))


def step_name(number: int, levels: int) -> str:
    """The name of a sub-step, from 0: its time step, and with D above 1 its place in it.

    >>> step_name(5, 1), step_name(5, 4)
    ('6', '2.2')
    """
    return f"{number // levels + 1}" if levels == 1 else f"{number // levels + 1}.{number % levels + 1}"


def _time_axis(axis: Any, activity: Activity) -> None:
    """Name time steps, and mark where a step of several sub-steps begins."""
    count = activity.timesteps * activity.levels
    axis.set_xlim(0.4, count + 0.6)
    if count <= 4 * NUMBERED // 2:
        axis.set_xticks(range(1, count + 1), [step_name(n, activity.levels) for n in range(count)], fontsize=7)
    axis.set_xlabel("time step" if activity.levels == 1 else "time step . sub-step", fontsize=9)
    for t in range(1, activity.timesteps if activity.levels > 1 else 1):
        axis.axvline(t * activity.levels + 0.5, linewidth=0.8, color="#b0b0b0")
