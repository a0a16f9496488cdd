"""Training with cross-entropy only: of the mean over time, or at every time step."""

from dataclasses import dataclass

from torch import nn

from spikedistill.objective.logits import cross_entropy_of_mean, cross_entropy_per_step
from spikedistill.objective.terms import Batch, Needs, Objective, Terms, check_fraction


@dataclass(frozen=True)
class Direct(Objective):
    """Cross-entropy of the mean over time, for a student without a teacher, or for an ANN (T = 1)."""

    label_smoothing: float = 0.0
    """Share of probability spread over all classes, 0 to 1."""

    def __post_init__(self) -> None:
        check_fraction("label_smoothing", self.label_smoothing)

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """One term, ``labels``."""
        return {"labels": cross_entropy_of_mean(batch.student.logits, batch.require_labels(), self.label_smoothing)}


@dataclass(frozen=True)
class TET(Objective):
    """Temporal efficient training (Deng et al., ICLR 2022, arXiv 2202.11946).

    ``(1 - lam) mean_t CE(z_t, y) + lam mean_t MSE(z_t, target)``. The second term keeps every logit near ``target``.
    """

    label_smoothing: float = 0.0
    """Share of probability spread over all classes, 0 to 1."""
    lam: float = 1e-3
    """Weight of the regulariser, 0 to 1. The authors' code uses 0.001 for static images."""
    target: float = 1.0
    """The value to which the regulariser pulls every logit. The authors use the threshold, 1."""

    def __post_init__(self) -> None:
        check_fraction("label_smoothing", self.label_smoothing)
        check_fraction("lam", self.lam)

    @property
    def needs(self) -> Needs:
        """Every time step."""
        return Needs(every_step=True)

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Two terms, ``labels`` and ``spread``."""
        spread = (batch.student.logits - self.target).square().mean()
        judged = cross_entropy_per_step(batch.student.logits, batch.require_labels(), self.label_smoothing)
        return {"labels": (1 - self.lam) * judged, "spread": self.lam * spread}
