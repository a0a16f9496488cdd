"""``spikedistill energy``: spikes, operations and energy of finished runs."""

from collections.abc import Sequence

from spikedistill.cli.options import ask
from spikedistill.cli.show import show_table
from spikedistill.deliver.energy import measure_energy, table
from spikedistill.deliver.tables import Table
from spikedistill.evaluate.energy import MODELS
from spikedistill.train.progress import Progress


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table and where a student does not win."""
    estimates, _ = ask("energy", measure_energy, arguments, {"progress": Progress.stderr("energy")})
    ratios = f"student / ANN: energy under {', '.join(model.name for model in MODELS)}; below 1 the student takes less"
    show_table(
        Table(*table(estimates), notes=[ratios, *(line for estimate in estimates for line in estimate.warnings)])
    )
