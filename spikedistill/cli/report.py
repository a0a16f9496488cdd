"""``spikedistill report``: a page of what was built and what happened."""

from collections.abc import Sequence

from spikedistill.cli.options import ask
from spikedistill.deliver.report import report
from spikedistill.train.progress import Progress


def main(arguments: Sequence[str]) -> None:
    """Write the page, and say where it is."""
    file, _ = ask("report", report, arguments, {"progress": Progress.stderr("report")})
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB): open it in a browser")
