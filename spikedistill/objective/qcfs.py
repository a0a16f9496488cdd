"""QCFS: an ANN with quantised activations is trained on labels, then run with neurons (Bu et al., arXiv 2303.04347)."""

from dataclasses import dataclass

from spikedistill.objective.direct import Direct


@dataclass(frozen=True)
class QCFS(Direct):
    """Cross-entropy of the quantised stand-in (``student/quantised.py``), whose thresholds are learned.

    As a baseline it is called a conversion, since nothing is trained on spikes. The stand-in and learned thresholds are
    choices of the student; a recipe with this method makes them.
    """
