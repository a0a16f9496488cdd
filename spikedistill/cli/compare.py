"""``spikedistill compare``: finished runs side by side."""

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from spikedistill.cli.show import Files, check_files, output
from spikedistill.deliver.compare import table
from spikedistill.deliver.curves import draw_training
from spikedistill.deliver.record import RunDirectories
from spikedistill.deliver.results import lines, read_results
from spikedistill.deliver.tables import Table
from spikedistill.errors import ConfigError


def compare(
    runs: RunDirectories,
    baseline: str | None = None,
    csv: Annotated[Path | None, arg(metavar="FILE.csv")] = None,
    markdown: Annotated[Path | None, arg(metavar="FILE.md")] = None,
    latex: Annotated[Path | None, arg(metavar="FILE.tex")] = None,
    curves: Annotated[Path | None, arg(metavar="FILE.png")] = None,
) -> None:
    """Set finished runs side by side.

    Runs that differ in the seed alone are one row, with mean and deviation.

    Args:
        runs: run directories, or folders that hold several.
        baseline: the row, by its name or its method, that others are compared to seed by seed (default: direct,
            which is cross-entropy only, if there is such a row, else the first student).
        csv: a file to write, one line per run, with all digits; - is standard output, here and below.
        markdown: a file to write, the table as Markdown.
        latex: a file to write, the table as LaTeX, for a document with the packages booktabs and graphicx.
        curves: a picture to write, validation accuracy against minutes of training.
    """
    if not runs:
        raise ConfigError("No runs to compare were given: name one or more run directories.")
    files: Files = {"csv": csv, "markdown": markdown, "latex": latex}
    check_files(files, "run")
    results, unfinished = read_results(runs)
    if curves is not None:
        draw_training(curves, results)
        print(f"wrote {curves}", file=sys.stderr)
    output(table(results, baseline, unfinished), files, Table(*lines(results)))
