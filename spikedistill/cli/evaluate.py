"""``spikedistill evaluate``: a finished run, measured again."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from spikedistill.cli.options import ask
from spikedistill.deliver.record import Record, evaluate
from spikedistill.deliver.teachers import NO_TEACHER
from spikedistill.evaluate.latency import latency_in_words
from spikedistill.shapes import steps_by_levels
from spikedistill.student.substeps import LAYERS
from spikedistill.train.progress import Progress

NAMES = {
    "test_accuracy": ("test accuracy", ".2f", " %"),
    "teacher_accuracy": ("teacher's test accuracy", ".2f", " %"),
    "agreement": ("agreement with teacher", ".2f", " %"),
    "divergence": ("divergence from teacher", ".4f", " nats"),
    "firing_rate": ("firing rate", ".2f", " % (spikes per neuron and sub-step)"),
    "early_exit_accuracy": ("early exit accuracy", ".2f", " %"),
    "early_exit_agreement": ("early exit agreement", ".2f", " %"),
    "early_exit_steps": ("early exit steps", ".2f", " (mean)"),
}
"""Measure -> what it is called, its format and its unit, in the order in which they are shown."""
PER_LINE = 8
"""Time steps whose accuracies stand in one line."""


def main(arguments: Sequence[str]) -> None:
    """Measure, print the lines, say where the teacher is left out."""
    results, asked = ask("evaluate", evaluate, arguments, {"progress": Progress.stderr("evaluate")})
    print("\n".join(lines(results)))
    alone = "firing_rate" in results and "agreement" not in results
    if alone and Record.read(asked["path"]).recipe["teacher"]["source"] != NO_TEACHER:
        reasons = "has moved, takes other inputs than the student, or is Python code (see --trust-code)"
        print(f"Agreement was not measured: the teacher {reasons}.", file=sys.stderr)


def lines(results: Mapping[str, Any]) -> list[str]:
    """What was measured, one line per measure: the accuracy first, firing rates of layers last."""
    rows = [(title, f"{results[name]:{form}}{unit}") for name, (title, form, unit) in NAMES.items() if name in results]
    what = "accuracy" if "accuracy_by_step" in results else "agreement"
    steps = results.get(f"{what}_by_step", [])
    for first in range(0, len(steps), PER_LINE):
        part = steps[first : first + PER_LINE]
        values = " ".join(f"{value:.2f}" for value in part)
        rows.insert(1 + first // PER_LINE, (f"{what} at t={first + 1}..{first + len(part)}, %", values))
    layers = [(f"  {name}", f"{rate:.2f} %") for name, rate in results.get("firing_rate_by_layer", {}).items()]
    rows += _steps(results) if "levels" in results else []
    return [*_aligned(rows), *(["firing rate by layer"] if layers else []), *_aligned(layers)]


def _steps(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """T x D, the schedule, its latency, and the buffers that it needs."""
    usual = results["levels"] == 1 and results["schedule"] == LAYERS
    shown = steps_by_levels(results["timesteps"], results["levels"])
    shown += "" if usual else f", {results['schedule'].replace('-', ' ')}"
    times = latency_in_words(results["latency"])
    paths = f"longest path: {results['longest_path']} layers of neurons"
    rows = [("T x D", shown), ("latency in sub-steps", f"{', '.join(times)} ({paths})")]
    if buffers := results["buffers"]:
        bits, most = sum(one["bits"] for one in buffers), max(buffers, key=lambda one: one["bits"])
        rows.append(
            (
                "spike buffers",
                f"{bits:,} bits in {len(buffers)} buffers, layer by layer; the largest, of {most['layer']} before"
                f" {most['before']}: {most['bits']:,} bits for {most['sub_steps']} sub-steps",
            )
        )
    return rows


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(title) for title, _ in rows), default=0)
    return [f"{title:<{width}}  {value}" for title, value in rows]
