"""Spikes, synaptic operations and estimated energy of finished networks, side by side, with their quantised ANNs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spikedistill.compute.place import Precision
from spikedistill.data.parts import UNKNOWN
from spikedistill.deliver.record import RunDirectories, read_records, some_of
from spikedistill.evaluate.accuracy import accuracy_by_step, eval_batch_size, predict, standard_error
from spikedistill.evaluate.energy import MODELS, Cost, ann_energies, cost_of, energies, micro, verdicts
from spikedistill.evaluate.firing import firing_rates
from spikedistill.evaluate.operations import operations
from spikedistill.files import check_replaceable, write_csv
from spikedistill.shapes import Labels, steps_by_levels
from spikedistill.student.student import Student
from spikedistill.train.progress import Progress

COLUMNS = ("network", "metric", "value")
"""The first columns of the CSV file."""


@dataclass(frozen=True)
class EnergyEstimate:
    """The energy of one network per image under each model, and where an ANN takes less.

    Args:
        network: its name.
        accuracy: accuracy on these images, percent; NaN if they have no labels.
        cost: operations per image.
        energy: model -> kind -> µJ per image.
        images: number of test images.
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
        """The standard error of the accuracy, in points."""
        return standard_error(self.accuracy, self.images)

    @property
    def format(self) -> str:
        """The name of the number format."""
        return str(self.dtype).removeprefix("torch.")

    def counts(self, kind: str) -> dict[str, float]:
        """Spikes and operations per image, as in tables and files.

        An ANN that skips zeros counts its active connections, any other ANN counts all.
        """
        if kind == "student":
            return {"spikes": self.cost.spikes, "acs": self.cost.acs, "macs": self.cost.macs}
        return {"macs": self.cost.active if kind == "quantised-sparse" else self.cost.dense}

    def ratios(self, kind: str) -> str:
        """The student's energy divided by that of an ANN of this kind, model by model; empty for other kinds."""
        if not kind.startswith("quantised"):
            return ""
        return ", ".join(f"{kinds['student'] / kinds[kind]:.2f}" for kinds in self.energy.values())

    @property
    def kinds(self) -> list[str]:
        """The kinds of its energies: ``ann``, or ``student``, ``quantised`` and ``quantised-sparse``."""
        return list(next(iter(self.energy.values())))

    @property
    def warnings(self) -> list[str]:
        """Sentences on where a student takes at least as much energy as its quantised ANN."""
        return verdicts(self.network, self.energy) if "student" in self.kinds else []


def measure_energy(
    paths: RunDirectories,
    images: int | None = 1000,
    data_dir: str | None = None,
    progress: Progress | None = None,
    trust_code: bool = False,
    device: str | None = None,
    precision: Precision | None = None,
    out: Path | None = None,
) -> list[EnergyEstimate]:
    """Count spikes and synaptic operations, and estimate energy beside an ANN's.

    Args:
        paths: run directories of 'teach' and 'distill' on one data set.
        images: number of test images, evenly spaced; None for all.
        data_dir: folder of the data, if it is no longer the one of the first run.
        progress: shows the work; silent by default.
        trust_code: execute the Python code that a run may name as its network.
        device: cpu, cuda ...; auto takes a GPU if there is one (default: where each run was trained).
        precision: number format of the large operations; auto takes what suits the device (default: that of each run).
        out: a CSV file to write.

    Returns:
        One estimate per run. ``energy`` is model -> ``student``, ``quantised`` and ``quantised-sparse`` (see
        ``evaluate.energy``), for an ANN model -> ``ann``.

    Raises:
        RunError: if a run is not finished, or ``out`` is a file with other content.
        ConfigError: if there is no run or no image, or the device does not exist.
    """
    if out is not None:
        check_replaceable(out, f"{COLUMNS[0]},")
    progress = progress or Progress.silent()
    records, data = read_records(paths, data_dir)
    pixels, labels = some_of(data, images)
    estimates = []
    for number, record in enumerate(records, 1):
        network, place = record.network(trust_code), record.place(device, precision)
        place.prepare(network)
        with progress.part(f"{number} of {len(records)}, {record.name}, {len(pixels)} images", len(pixels)) as seen:
            estimates.append(estimate_energy(record.name, network, pixels, labels, place.dtype, seen))
    if out is not None:
        write_csv(out, COLUMNS, lines(estimates))
    return estimates


def estimate_energy(
    name: str,
    network: nn.Module,
    pixels: Tensor,
    labels: Labels,
    dtype: torch.dtype,
    on_batch: Callable[[int], None] = lambda images: None,
) -> EnergyEstimate:
    """The energy of a student or an ANN for these images (bytes)."""
    levels = network.conversion.neuron_model.levels if isinstance(network, Student) else 1
    size = max(1, eval_batch_size(network, pixels) // levels)  # sub-steps are rows too
    with firing_rates(network) as rates, operations(network) as counted:
        logits = predict(network, pixels, dtype, size, on_batch)
    accuracy = math.nan if int(labels[0]) == UNKNOWN else accuracy_by_step(logits, labels)[-1]
    updates = float(sum(rates.possible_spikes.values()))
    if isinstance(network, Student):
        cost = cost_of(counted, network.timesteps, sum(rates.spikes.values()), updates, levels)
        return EnergyEstimate(name, accuracy, cost, energies(cost), len(labels), dtype)
    cost = cost_of(counted, 1, 0.0, updates)
    energy = {model: {"ann": value} for model, value in ann_energies(cost).items()}
    return EnergyEstimate(name, accuracy, cost, energy, len(labels), dtype)


def table(estimates: Sequence[EnergyEstimate]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each network, and below each student the quantised ANN of equal information.

    The accuracy has its standard error, the number of images and the number format.
    """
    energies = [f"µJ, {model.name}" for model in MODELS]
    columns = [
        "network",
        "T x D",
        "accuracy",
        *energies,
        "student / ANN",
        "spikes",
        "ACs (M)",
        "MACs (M)",
        "images",
        "format",
    ]
    rows = []
    for estimate in estimates:
        for kind in estimate.kinds:
            name, seen = estimate.network, str(estimate.images)
            accuracy = f"{estimate.accuracy:.2f} ± {estimate.error:.2f} %"
            measured = kind in ("ann", "student")
            if not measured:
                zeros = "" if kind == "quantised" else ", zeros skipped"
                name = f"  as an ANN of {estimate.cost.bits} bits{zeros}"
            counts = estimate.counts(kind)
            spikes = f"{counts['spikes']:.0f}" if "spikes" in counts else ""
            millions = [f"{counts[name] / 1e6:.2f}" if name in counts else "" for name in ("acs", "macs")]
            energy = [micro(estimate.energy[model.name][kind]) for model in MODELS]
            end = [seen, estimate.format] if measured else ["", ""]
            steps = steps_by_levels(estimate.cost.timesteps, estimate.cost.levels) if kind == "student" else ""
            accuracy = ("no labels" if math.isnan(estimate.accuracy) else accuracy) if measured else ""
            rows.append([name, steps, accuracy, *energy, estimate.ratios(kind), spikes, *millions, *end])
    return columns, rows


def lines(estimates: Sequence[EnergyEstimate]) -> list[tuple[str, str, float]]:
    """Network, metric and value, for a file; counts and µJ are per image, the same as in the table.

    Metrics of the quantised ANNs end with their names.
    """
    found: list[tuple[str, str, float]] = []
    for estimate in estimates:
        measured = {"accuracy": estimate.accuracy, "accuracy_error": estimate.error, "images": estimate.images}
        if math.isnan(estimate.accuracy):
            measured = {"images": estimate.images}
        measured["format_bits"] = 8 * estimate.dtype.itemsize
        found += [(estimate.network, metric, value) for metric, value in measured.items()]
        found += [
            (estimate.network, "updates", estimate.cost.updates),
            (estimate.network, "timesteps", estimate.cost.timesteps),
        ]
        found.append((estimate.network, "levels", estimate.cost.levels))
        for kind in estimate.kinds:
            end = f"_{kind}" if kind.startswith("quantised") else ""
            found += [(estimate.network, metric + end, value) for metric, value in estimate.counts(kind).items()]
            energy = {model: kinds[kind] for model, kinds in estimate.energy.items()}
            found += [(estimate.network, f"energy_uJ_{model}_{kind}", value) for model, value in energy.items()]
    return found
