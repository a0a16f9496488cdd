"""``spikedistill immunity``: finished runs under noise."""

from collections.abc import Sequence

from spikedistill.cli.options import ask
from spikedistill.cli.show import show
from spikedistill.deliver.immunity import measure_immunity
from spikedistill.train.progress import Progress


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table, say where the files are."""
    shown, asked = ask("immunity", measure_immunity, arguments, {"progress": Progress.stderr("immunity")})
    show(*shown)
    print(f"scores, table and curves are in {asked['out']}")
