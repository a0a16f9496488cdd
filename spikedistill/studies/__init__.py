"""Studies: comparisons over seeds that test published claims."""

from collections.abc import Callable
from pathlib import Path

from spikedistill.studies.kdsnn import KDSNN
from spikedistill.studies.siblings import SIBLINGS
from spikedistill.studies.study import Budget, Study

STUDIES: dict[str, Callable[[Budget, str | None, Path], Study]] = {**KDSNN, **SIBLINGS}
"""Every study by its name: a function of the budget, the folder of named data sets, and the folder of runs."""
