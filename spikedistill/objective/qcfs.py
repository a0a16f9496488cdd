"""QCFS: an ANN with quantised activations is trained, then run as an SNN (Bu et al., arXiv 2303.04347)."""

from dataclasses import dataclass

from spikedistill.objective.direct import Direct


@dataclass(frozen=True)
class QCFS(Direct):
    """Cross-entropy only, with all T steps trained as one (``gradient="quantised"``) and learned thresholds.

    No spikes are used in training, so as a baseline it counts as a conversion. The gradient and learned thresholds are
    options of the student. A recipe with this method sets them.

    This project's choices: a trained ReLU network is trained on, where the paper trains one from the beginning for some
    300 epochs; thresholds are per channel unless the student says otherwise, and their gradient is damped as in LSQ.
    """
