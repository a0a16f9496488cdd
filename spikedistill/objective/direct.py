"""Training on labels alone: on the mean over time, or at every time step."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.objective.terms import Batch, Objective, Terms, share
from spikedistill.shapes import Labels, Logits


def cross_entropy_of_mean(logits: Logits, labels: Labels, label_smoothing: float = 0.0) -> Tensor:
    """``CE(mean_t z_t, y)``: the class scores are averaged over time, then judged."""
    return F.cross_entropy(logits.mean(0), labels, label_smoothing=label_smoothing)


def cross_entropy_per_step(logits: Logits, labels: Labels, label_smoothing: float = 0.0) -> Tensor:
    """``mean_t CE(z_t, y)``: every time step is judged on its own (TET, arXiv 2202.11946)."""
    steps = logits.shape[0]
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(steps), label_smoothing=label_smoothing)


@dataclass(frozen=True)
class Direct(Objective):
    """Cross-entropy of the mean over time: the student without a teacher, and the teacher itself (T = 1).

    Args:
        label_smoothing: the share of probability spread over all classes, 0..1.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        share("label_smoothing", self.label_smoothing)

    def __call__(self, batch: Batch, adapters: nn.ModuleDict) -> Terms:
        """One term, ``labels``."""
        return {"labels": cross_entropy_of_mean(batch.logits, batch.labels, self.label_smoothing)}


@dataclass(frozen=True)
class TET(Objective):
    """Temporal efficient training (Deng et al., ICLR 2022, arXiv 2202.11946).

    ``(1 - lam) mean_t CE(z_t, y) + lam mean_t MSE(z_t, target)``; the second term keeps every logit near ``target``.

    Args:
        label_smoothing: the share of probability spread over all classes, 0..1.
        lam: weight of the regulariser, 0..1; the authors' code uses 1e-3 on static images.
        target: where the regulariser pulls the logits; the authors use the threshold, 1.
    """

    label_smoothing: float = 0.0
    lam: float = 1e-3
    target: float = 1.0

    def __post_init__(self) -> None:
        share("label_smoothing", self.label_smoothing)
        share("lam", self.lam)

    def __call__(self, batch: Batch, adapters: nn.ModuleDict) -> Terms:
        """Two terms, ``labels`` and ``spread``."""
        spread = (batch.logits - self.target).square().mean()
        judged = cross_entropy_per_step(batch.logits, batch.labels, self.label_smoothing)
        return {"labels": (1 - self.lam) * judged, "spread": self.lam * spread}
