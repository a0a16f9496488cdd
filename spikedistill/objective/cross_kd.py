"""Cross KD: an image teacher teaches a student that sees events (Ye et al., ICME 2025, arXiv 2507.09269).

The student, with one set of weights, sees two streams: events, and the images of a second data set. Known to us from
the paper's abstract and figure:

- sliding replacement: more and more images of the second stream are replaced by events (``Needs.replacement``);
- semantic similarity: the potentials of both streams are brought together, measured by CKA;
- indirect phased distillation: the teacher speaks to the second stream only, with weight 1 in the first phase and a
  smooth switch to 0 before the second.

What the paper does not tell us follows its ancestor's code as far as it is known (He et al., AAAI 2024, arXiv
2303.13077): replacement with the third power of progress, linear CKA with a learned weight per time step, which the
cross-entropy of the events shares, and cross-entropy at every step of both streams. These are this project's choices:
one classifier for both streams, where that code has one each; no regulariser of logits beside the cross-entropy; that
the learned weights are relative to their mean and begin at 1/2; running statistics of batch norm that are those of the
events alone; to take the potentials of the last layer of neurons; the temperature, when the phases change, and all
other constants.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.answer import Learner
from spikedistill.objective.logits import cross_entropy_per_step, soft_target_divergence
from spikedistill.objective.schedule import Switch
from spikedistill.objective.terms import (
    Batch,
    Needs,
    Objective,
    Terms,
    check_fraction,
    check_positive,
    check_weight,
)
from spikedistill.shapes import Labels, Logits


@dataclass(frozen=True)
class CrossKD(Objective):
    """Cross-entropy of both streams, soft targets for the images in the first phase, and similar potentials."""

    temperature: float = 2.0
    """Temperature tau of the soft targets, above 0."""
    alpha: float = 1.0
    """Weight of the soft targets in the first phase, 0 or more; 0 switches them off."""
    switch: float = 0.5
    """Fraction of training at which the first phase ends, 0 to 1."""
    switch_width: float = 0.2
    """Fraction of training over which the weight of the soft targets falls to 0, 0 to 1."""
    similarity: float = 0.5
    """Weight of the similarity of potentials, 0 or more; 0 switches it off."""
    layer: str = ""
    """Layer of neurons whose potentials are compared (default: the last one)."""
    replacement: float = 3.0
    """Power of the progress of training with which images are replaced by events; 0 switches replacement off."""
    label_smoothing: float = 0.0
    """Share of probability of the labels spread over all classes, 0 to 1."""

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        for name in ("alpha", "similarity", "replacement"):
            check_weight(name, getattr(self, name))
        check_fraction("label_smoothing", self.label_smoothing)
        _ = self.phases  # checks its fields

    @property
    def phases(self) -> Switch:
        """The weight of the soft targets over training."""
        return Switch(at=self.switch, before=self.alpha, after=0.0, width=self.switch_width)

    @property
    def needs(self) -> Needs:
        """The teacher, the second stream, every time step, and the potentials of one layer."""
        return Needs(
            teacher=True,
            source=True,
            every_step=True,
            potentials=(self.layer,) if self.similarity and self.layer else (),
            replacement=self.replacement,
        )

    def settled(self, teacher: Learner | None, student: Learner, inherits: bool) -> "CrossKD":
        """The same objective with ``layer`` set."""
        return self if self.layer or not student.layers() else replace(self, layer=student.layers()[-1])

    def modules(self, probe: Batch, teacher: Learner | None) -> nn.ModuleDict:
        """A learned weight for each time step, if potentials are compared."""
        return nn.ModuleDict({"steps": StepWeights(len(probe.student.logits))} if self.similarity else {})

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """The terms ``events``, ``images`` and ``soft``, and with similarity ``dissimilarity``."""
        events, images, labels = batch.student.logits, batch.require_source(), batch.require_labels()
        teacher = batch.require_teacher().logits.mean(0)
        soft = soft_target_divergence(images.logits.mean(0), teacher, self.temperature)
        terms = {
            "images": cross_entropy_per_step(images.logits, labels, self.label_smoothing),
            "soft": self.phases(batch.progress) * soft,
        }
        if not self.similarity:
            return {"events": cross_entropy_per_step(events, labels, self.label_smoothing), **terms}
        weights: Tensor = modules["steps"]()
        each = cross_entropies(events, labels, self.label_smoothing)
        pairs = zip(batch.student.potentials[self.layer], images.potentials[self.layer], strict=True)
        alike = torch.stack([linear_cka(ours, theirs) for ours, theirs in pairs])
        return {
            "events": ((1 - weights) * each).mean(),
            **terms,
            "dissimilarity": self.similarity * (weights * (1 - alike.abs())).mean(),
        }


class StepWeights(nn.Module):
    """A learned weight between 0 and 1 for each time step, at first 1/2.

    The logits of the weights have the mean 0, which is this project's choice. Without it all weights go to 1, where the
    cross-entropy of the events has no weight left, and events are not learned (LOG.md).

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(timesteps))

    def forward(self) -> Tensor:
        """The weights ``[T]``."""
        return torch.sigmoid(self.logits - self.logits.mean())


def cross_entropies(logits: Logits, labels: Labels, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of every time step, ``[T]``."""
    steps = len(logits)
    each = F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(steps), reduction="none", label_smoothing=label_smoothing
    )
    return each.unflatten(0, (steps, -1)).mean(1)


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Linear centred kernel alignment of two representations of the same samples (Kornblith et al., arXiv 1905.00414).

    It is 1 if they are equal up to rotation, scale and shift, and 0 if uncorrelated.

    Args:
        first: ``[B, ...]``.
        second: ``[B, ...]``, of any other size.

    Returns:
        A scalar, 0 to 1.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> round(float(linear_cka(x, 2 * x.flip(1) + 1)), 4)
    1.0
    """
    grams = []
    with torch.autocast(first.device.type, enabled=False):  # in bfloat16 equal representations had 0.992
        for one in (first, second):
            rows = one.flatten(1).float()
            rows = rows - rows.mean(0)
            grams.append(rows @ rows.mT)
        product = (grams[0] * grams[1]).sum()
        return product / (grams[0].norm() * grams[1].norm()).clamp_min(1e-12)
