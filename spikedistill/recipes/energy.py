"""Spikes, synaptic operations and estimated energy of finished networks, side by side, with their quantised ANNs."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spikedistill.evaluate.accuracy import accuracy_by_step, answers
from spikedistill.evaluate.activity import FiringRates, firing_rates, operations
from spikedistill.evaluate.energy import MODELS, Cost, ann_energies, cost_of, energies, verdicts
from spikedistill.recipes.runs import load_runs, some
from spikedistill.shapes import Labels
from spikedistill.student.build import Student
from spikedistill.student.surgery import ACTIVATIONS
from spikedistill.train.device import choose_device, choose_precision


@dataclass(frozen=True)
class Bill:
    """What one network's answers take: nJ an image under each model, and where it does not win."""

    network: str
    accuracy: float
    cost: Cost
    energy: dict[str, dict[str, float]]
    warnings: list[str]


def measure_energy(paths: Sequence[Path], images: int | None = 1000, data_dir: str | None = None) -> list[Bill]:
    """Count what finished runs do on test images and what that costs.

    Args:
        paths: run directories of ``teach`` and ``distill`` on one data set.
        images: how many test images, evenly spaced; None for all.
        data_dir: another place of the data than the first run was trained with.

    Returns:
        One bill a run. ``energy`` is model -> ``student``, ``quantised`` and ``quantised-sparse`` (see
        ``evaluate.energy``), for an ANN model -> ``ann``.
    """
    runs, data = load_runs(paths, data_dir)
    pixels, labels = some(data, images)
    device = choose_device("auto")
    bills = []
    for run in runs:
        dtype = choose_precision(run.training, device).dtype
        network: nn.Module = run.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        bills.append(bill_of(run.name, network, pixels, labels, dtype))
    return bills


def bill_of(name: str, network: nn.Module, pixels: Tensor, labels: Labels, dtype: torch.dtype) -> Bill:
    """What a student or an ANN takes for these images (bytes)."""
    if isinstance(network, Student):
        with firing_rates(network) as rates, operations(network) as counted:
            logits = answers(network, pixels, dtype)
        spikes, chances = sum(rates.spikes.values()), float(sum(rates.chances.values()))
        cost = cost_of(counted, network.timesteps, spikes, chances)
        found = energies(cost)
        return Bill(name, accuracy_by_step(logits, labels)[-1], cost, found, verdicts(name, found))
    values = FiringRates()
    handles = [
        layer.register_forward_hook(lambda _, __, output, path=path: values.add(path, output))
        for path, layer in network.named_modules()
        if isinstance(layer, ACTIVATIONS)
    ]
    with operations(network) as counted:
        logits = answers(network, pixels, dtype)
    for handle in handles:
        handle.remove()
    cost = cost_of(counted, 1, 0.0, float(sum(values.chances.values())))
    energy = {model: {"ann": value} for model, value in ann_energies(cost).items()}
    return Bill(name, accuracy_by_step(logits, labels)[-1], cost, energy, [])


def table(bills: Sequence[Bill]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each network, and below each student the quantised ANN of equal information."""
    columns = ["network", "accuracy", "spikes", "ACs (M)", "MACs (M)", *(f"nJ, {model.name}" for model in MODELS)]
    rows = []
    for bill in bills:
        cost, ann = bill.cost, "ann" in next(iter(bill.energy.values()))
        counts = ["", "", f"{cost.dense / 1e6:.2f}"]
        if not ann:
            counts = [f"{cost.spikes:.0f}", f"{cost.acs / 1e6:.2f}", f"{cost.macs / 1e6:.2f}"]
        kinds = ["ann"] if ann else ["student", "quantised", "quantised-sparse"]
        for kind in kinds:
            nanojoules = [f"{bill.energy[model.name][kind]:.0f}" for model in MODELS]
            if kind in ("ann", "student"):
                rows.append([bill.network, f"{bill.accuracy:.2f} %", *counts, *nanojoules])
            else:
                macs = cost.dense if kind == "quantised" else cost.active
                zeros = "" if kind == "quantised" else ", zeros skipped"
                rows.append([f"  as an ANN of {cost.bits} bits{zeros}", "", "", "", f"{macs / 1e6:.2f}", *nanojoules])
    return columns, rows


def to_csv(bills: Sequence[Bill]) -> str:
    """``network, metric, value``, one a line; counts and nJ are of one image."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["network", "metric", "value"])
    for bill in bills:
        for metric in ("spikes", "acs", "macs", "updates", "dense", "active"):
            writer.writerow([bill.network, metric, getattr(bill.cost, metric)])
        for model, kinds in bill.energy.items():
            writer.writerows([bill.network, f"energy_{model}_{kind}", value] for kind, value in kinds.items())
    return file.getvalue()
