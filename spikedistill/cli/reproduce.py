"""``spikedistill reproduce``: a published comparison, measured here."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from spikedistill.errors import one_of
from spikedistill.studies import STUDIES
from spikedistill.studies.reproduce import reproduce as run_study
from spikedistill.train.progress import Progress


def reproduce(
    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")],
    budget: Literal["full", "small"] = "full",
    data_dir: str | None = None,
    runs: Path = Path("runs/studies"),
    out: Path = Path("docs/results"),
    seeds: int | None = None,
    jobs: int = 1,
) -> None:
    """Measure a published comparison here: table, figure and CSV.

    Args:
        study: kdsnn-pairs, kdsnn-timesteps, kdsnn-mnist, kdsnn-noise, kdsnn-energy; heterogeneous-temperature,
            distilling-spikes (both also with -mnist, the second with -fashion-mnist) or cross-kd (also with -cifar10).
        budget: of the paper's size, for a GPU (full), or for two cores and some hours (small). On MNIST both are the
            same.
        data_dir: folder of the named data sets (default: $SPIKEDISTILL_DATA, else ./data).
        runs: where run directories go; the same command goes on with what lies there.
        out: where STUDY.csv, STUDY.md and pictures go; a page of all studies is written beside it, as OUT.md.
        seeds: use only so many of the study's seeds (default: all).
        jobs: number of students that are trained side by side, each with its share of the cores; with small
            networks faster than one after another.
    """
    one_of("study", study, STUDIES)
    made = STUDIES[study](budget, data_dir, runs)
    print(run_study(made, out, seeds, Progress.stderr(study), jobs))
