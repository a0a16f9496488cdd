"""Spikes, synaptic operations and estimated energy of finished networks, side by side, with their quantised ANNs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spikedistill.deliver.record import read_records, some_of
from spikedistill.evaluate.accuracy import accuracy_by_step, predict
from spikedistill.evaluate.activity import firing_rates, operations
from spikedistill.evaluate.energy import MODELS, Cost, ann_energies, cost_of, energies, verdicts
from spikedistill.shapes import Labels
from spikedistill.student.build import Student


@dataclass(frozen=True)
class Bill:
    """What one network's answers take: nJ an image under each model, and where it does not win."""

    network: str
    accuracy: float
    cost: Cost
    energy: dict[str, dict[str, float]]

    @property
    def kinds(self) -> list[str]:
        """What its energies are of: ``ann``; or ``student``, ``quantised`` and ``quantised-sparse``."""
        return list(next(iter(self.energy.values())))

    @property
    def warnings(self) -> list[str]:
        """Where a student does not win."""
        return verdicts(self.network, self.energy) if "student" in self.kinds else []


def measure_energy(
    paths: Sequence[Path],
    images: int | None = 1000,
    data_dir: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    trust_code: bool = False,
) -> list[Bill]:
    """Count what finished runs do on test images and what that costs.

    Args:
        paths: run directories of ``teach`` and ``distill`` on one data set.
        images: how many test images, evenly spaced; None for all.
        data_dir: another place of the data than the first run was trained with.
        say: told what is measured.
        trust_code: execute the Python code that a run may name as its network.

    Returns:
        One bill a run. ``energy`` is model -> ``student``, ``quantised`` and ``quantised-sparse`` (see
        ``evaluate.energy``), for an ANN model -> ``ann``.
    """
    records, data = read_records(paths, data_dir)
    pixels, labels = some_of(data, images)
    bills = []
    for number, record in enumerate(records, 1):
        say(f"{number} of {len(records)}: {record.name}, {len(pixels)} images")
        network, place = record.network(trust_code), record.place()
        place.prepare(network)
        bills.append(bill_of(record.name, network, pixels, labels, place.dtype))
    return bills


def bill_of(name: str, network: nn.Module, pixels: Tensor, labels: Labels, dtype: torch.dtype) -> Bill:
    """What a student or an ANN takes for these images (bytes)."""
    with firing_rates(network) as rates, operations(network) as counted:
        logits = predict(network, pixels, dtype)
    accuracy, updates = accuracy_by_step(logits, labels)[-1], float(sum(rates.chances.values()))
    if isinstance(network, Student):
        cost = cost_of(counted, network.timesteps, sum(rates.spikes.values()), updates)
        return Bill(name, accuracy, cost, energies(cost))
    cost = cost_of(counted, 1, 0.0, updates)
    return Bill(name, accuracy, cost, {model: {"ann": value} for model, value in ann_energies(cost).items()})


def table(bills: Sequence[Bill]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each network, and below each student the quantised ANN of equal information."""
    columns = ["network", "accuracy", "spikes", "ACs (M)", "MACs (M)", *(f"nJ, {model.name}" for model in MODELS)]
    rows = []
    for bill in bills:
        cost = bill.cost
        counts = ["", "", f"{cost.dense / 1e6:.2f}"]
        if "student" in bill.kinds:
            counts = [f"{cost.spikes:.0f}", f"{cost.acs / 1e6:.2f}", f"{cost.macs / 1e6:.2f}"]
        for kind in bill.kinds:
            nanojoules = [f"{bill.energy[model.name][kind]:.0f}" for model in MODELS]
            if kind in ("ann", "student"):
                rows.append([bill.network, f"{bill.accuracy:.2f} %", *counts, *nanojoules])
            else:
                macs = cost.dense if kind == "quantised" else cost.active
                zeros = "" if kind == "quantised" else ", zeros skipped"
                rows.append([f"  as an ANN of {cost.bits} bits{zeros}", "", "", "", f"{macs / 1e6:.2f}", *nanojoules])
    return columns, rows


def lines(bills: Sequence[Bill]) -> list[tuple[str, str, float]]:
    """Network, metric and value, for a file; counts and nJ are of one image."""
    found = []
    for bill in bills:
        counts = ("spikes", "acs", "macs", "updates", "dense", "active")
        found += [(bill.network, metric, getattr(bill.cost, metric)) for metric in counts]
        for model, kinds in bill.energy.items():
            found += [(bill.network, f"energy_{model}_{kind}", value) for kind, value in kinds.items()]
    return found
