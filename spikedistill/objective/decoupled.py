"""Temporal decoupling: every time step is taught by itself (Yu et al., ICML 2025, arXiv 2501.15925).

Labels and teacher judge every step of the student, not the mean over time. Each step is also brought near to the mean
of the steps that are correct, so the student teaches itself. The divergence is convex in the student's logits, so its
mean over steps is never below that of the mean logits.

The three terms are the paper's; known to us from notes on it and from the authors' code. Temperature and weights are
those of that code for CIFAR. Its student learns from its correct steps, that of the paper's equation from all of them
(``self_teachers``). The entropy is that of TSER (Yu et al., CVPR 2025, arXiv 2503.03144), whose weights we do not know.
An independent implementation has 0.001; here it is switched off, as in the first paper.

These are this project's choices: where no step is correct, the student learns nothing from itself (the authors' code
then takes equal probabilities); without labels all steps count as correct; a spiking teacher's logits are averaged over
its own T; label smoothing and mirror images.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.errors import ConfigError
from spikedistill.objective.logits import cross_entropy_per_step, entropy_per_step, soft_target_divergences
from spikedistill.objective.terms import (
    Batch,
    Needs,
    Objective,
    Terms,
    check_fraction,
    check_positive,
    check_weight,
)
from spikedistill.shapes import ClassLogits, Labels, Logits


@dataclass(frozen=True)
class TemporalDecoupling(Objective):
    """``mean_t [CE(z_t, y) + alpha KL(teacher || z_t) + self_teaching KL(own || z_t) - entropy H(z_t)]``.

    Both divergences have the factor tau^2.
    """

    temperature: float = 3.0
    """Temperature tau of all soft targets and of the entropy, above 0."""
    alpha: float = 0.2
    """Weight of the teacher's soft targets beside the labels, 0 or more; 0 needs no teacher."""
    self_teaching: float = 0.5
    """Weight of the student's own soft targets, 0 or more; 0 switches them off."""
    self_teachers: Literal["correct", "all"] = "correct"
    """Time steps whose mean logits are the student's own target: those that are correct, or all. Without labels all."""
    entropy: float = 0.0
    """Weight with which the entropy of every step is raised, 0 or more."""
    label_smoothing: float = 0.0
    """Share of probability of the labels spread over all classes, 0 to 1."""
    mirror: bool = False
    """Average the teacher's logits over each image and its mirror image. This doubles the teacher's work."""

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        for name in ("alpha", "self_teaching", "entropy"):
            check_weight(name, getattr(self, name))
        check_fraction("label_smoothing", self.label_smoothing)

    @property
    def needs(self) -> Needs:
        """Every time step, and the teacher's logits if alpha is above 0."""
        return Needs(teacher=self.alpha > 0, every_step=True, mirror=self.mirror)

    def without_labels(self) -> "TemporalDecoupling":
        """The same objective with all steps as its own teachers: the cross-entropy is left out.

        Raises:
            ConfigError: if label_smoothing was chosen for labels.
        """
        if self.label_smoothing:
            raise ConfigError(
                f"label_smoothing (={self.label_smoothing}) smooths labels, and the images have none: leave it out."
            )
        return replace(self, self_teachers="all")

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """The terms ``labels``, ``soft``, ``own`` and ``entropy``; no term for a weight of 0 or missing labels."""
        logits, labels, terms = batch.student.logits, batch.labels, {}
        if labels is not None:
            terms["labels"] = cross_entropy_per_step(logits, labels, self.label_smoothing)
        if self.alpha:
            teacher = batch.require_teacher().logits.mean(0)
            terms["soft"] = self.alpha * soft_target_divergences(logits, teacher, self.temperature).mean()
        if self.self_teaching:
            target, known = own_target(logits, labels if self.self_teachers == "correct" else None)
            distances = soft_target_divergences(logits, target, self.temperature)
            terms["own"] = self.self_teaching * (known * distances).mean()
        if self.entropy:
            terms["entropy"] = -self.entropy * entropy_per_step(logits, self.temperature)
        return terms


def own_target(logits: Logits, labels: Labels | None) -> tuple[ClassLogits, Tensor]:
    """What a student teaches itself: the mean logits over its correct steps, without gradient.

    Args:
        logits: those of the student at every step.
        labels: class numbers; None takes all steps.

    Returns:
        The mean logits ``[B, K]``, and which samples ``[B]`` have a correct step. The mean of the others is 0.

    >>> steps = torch.tensor([[[0.0, 2.0]], [[0.0, 4.0]], [[3.0, 0.0]]])
    >>> own_target(steps, torch.tensor([1]))
    (tensor([[0., 3.]]), tensor([True]))
    """
    answers = logits.detach()
    correct = torch.ones_like(answers[..., 0], dtype=torch.bool) if labels is None else answers.argmax(-1) == labels
    count = correct.sum(0)
    return (correct[..., None] * answers).sum(0) / count.clamp_min(1)[:, None], count > 0
