"""Spikes, synaptic operations and estimated energy of finished networks, side by side, with their quantised ANNs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spikedistill.deliver.record import read_records, some_of
from spikedistill.evaluate.accuracy import accuracy_by_step, predict, standard_error
from spikedistill.evaluate.activity import firing_rates, operations
from spikedistill.evaluate.energy import MODELS, Cost, ann_energies, cost_of, energies, verdicts
from spikedistill.shapes import Labels
from spikedistill.student.build import Student


@dataclass(frozen=True)
class Bill:
    """What one network's answers take: nJ an image under each model, and where it does not win.

    Args:
        network: its name.
        accuracy: on these images, percent.
        cost: what an answer takes.
        energy: model -> kind -> nJ an image.
        images: how many test images were looked at.
        dtype: number format of the large operations.
    """

    network: str
    accuracy: float
    cost: Cost
    energy: dict[str, dict[str, float]]
    images: int
    dtype: torch.dtype

    @property
    def error(self) -> float:
        """The standard error of the accuracy in points."""
        return standard_error(self.accuracy, self.images)

    @property
    def format(self) -> str:
        """The number format as a word."""
        return str(self.dtype).removeprefix("torch.")

    def counts(self, kind: str) -> dict[str, float]:
        """Spikes and operations of an image: the figures of every table and file.

        An ANN that skips zeros multiplies its active connections, any other all.
        """
        if kind == "student":
            return {"spikes": self.cost.spikes, "acs": self.cost.acs, "macs": self.cost.macs}
        return {"macs": self.cost.active if kind == "quantised-sparse" else self.cost.dense}

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
        return Bill(name, accuracy, cost, energies(cost), len(labels), dtype)
    cost = cost_of(counted, 1, 0.0, updates)
    energy = {model: {"ann": value} for model, value in ann_energies(cost).items()}
    return Bill(name, accuracy, cost, energy, len(labels), dtype)


def table(bills: Sequence[Bill]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each network, and below each student the quantised ANN of equal information.

    The accuracy stands with its standard error, beside the images and the number format that it was measured with.
    """
    columns = ["network", "accuracy", "images", "format", "spikes", "ACs (M)", "MACs (M)"]
    rows = []
    for bill in bills:
        for kind in bill.kinds:
            measured = [bill.network, f"{bill.accuracy:.2f} ± {bill.error:.2f} %", str(bill.images), bill.format]
            if kind not in ("ann", "student"):
                zeros = "" if kind == "quantised" else ", zeros skipped"
                measured = [f"  as an ANN of {bill.cost.bits} bits{zeros}", "", "", ""]
            counts = bill.counts(kind)
            spikes = f"{counts['spikes']:.0f}" if "spikes" in counts else ""
            millions = [f"{counts[name] / 1e6:.2f}" if name in counts else "" for name in ("acs", "macs")]
            nanojoules = [f"{bill.energy[model.name][kind]:.0f}" for model in MODELS]
            rows.append([*measured, spikes, *millions, *nanojoules])
    return [*columns, *(f"nJ, {model.name}" for model in MODELS)], rows


def lines(bills: Sequence[Bill]) -> list[tuple[str, str, float]]:
    """Network, metric and value, for a file; counts and nJ are of one image, the same as in the table.

    What belongs to the quantised ANNs has their name at its end.
    """
    found: list[tuple[str, str, float]] = []
    for bill in bills:
        measured = {"accuracy": bill.accuracy, "accuracy_error": bill.error, "images": bill.images}
        measured["format_bits"] = 8 * bill.dtype.itemsize
        found += [(bill.network, metric, value) for metric, value in measured.items()]
        found += [(bill.network, "updates", bill.cost.updates), (bill.network, "timesteps", bill.cost.timesteps)]
        for kind in bill.kinds:
            end = f"_{kind}" if kind.startswith("quantised") else ""
            found += [(bill.network, metric + end, value) for metric, value in bill.counts(kind).items()]
            energy = {model: kinds[kind] for model, kinds in bill.energy.items()}
            found += [(bill.network, f"energy_{model}_{kind}", value) for model, value in energy.items()]
    return found
