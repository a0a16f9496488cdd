"""``spikedistill check``: what conversion would do to a network, without training."""

from collections.abc import Sequence
from pathlib import Path

from spikedistill.cli.options import ask
from spikedistill.cli.show import show_table
from spikedistill.deliver.tables import Table
from spikedistill.recipes.preview import Preview, preview
from spikedistill.shapes import steps_and_levels
from spikedistill.student.report import ConversionReport


def main(arguments: Sequence[str]) -> None:
    """Convert, print what became of each activation and max pooling."""
    found, asked = ask("check", preview, arguments)
    show_table(Table(*table(found), notes=sentences(found, asked["network"])))


def table(found: Preview) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row for each activation and each max pooling."""
    columns = ["layer", "in the ANN", "neurons", "source"]
    columns += ["threshold", "firing rate"] if found.calibrated else []
    rows = []
    for site in found.report.sites:
        cells = [site.name, site.kind, f"{found.neurons[site.name]:,}", _short(site.source)]
        rate = "" if site.expected_rate is None else f"{site.expected_rate:.3f}"
        rows.append([*cells, f"{site.threshold:.4g}", rate] if found.calibrated else cells)
    rows += [
        [pool.name, pool.kind, "", _short(pool.source), *["", ""][: len(columns) - 4]] for pool in found.report.pools
    ]
    return columns, rows


def sentences(found: Preview, network: str) -> list[str]:
    """What is to be said of the whole, and of single layers."""
    report: ConversionReport = found.report
    alike: dict[str, list[str]] = {}
    for name, note in [(one.name, one.note) for one in report.sites] + [(one.name, one.note) for one in report.pools]:
        alike.setdefault(note, []).append(name)
    said = [f"{', '.join(names)}: {note}." for note, names in alike.items() if note]
    if silent := [site.name for site in report.sites if site.silent]:
        said.append(
            f"These layers never fire on the calibration images: {', '.join(silent)}. Give more time steps or"
            " levels, or a neuron with less leak."
        )
    if not found.calibrated:
        said.append("Thresholds are left out: they need trained weights (a run or a weights file) and --data.")
    steps = steps_and_levels(report.timesteps, report.levels)
    shape = " x ".join(map(str, found.shape))
    said.append(
        f"'{network}' can be converted: {len(report.sites)} spiking layers, {sum(found.neurons.values()):,} neurons for"
        f" an image of {shape}, {found.parameters:,} parameters, {steps}."
    )
    return said


def _short(source: str) -> str:
    """File and line without folders."""
    return Path(source).name
