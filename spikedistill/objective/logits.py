"""Mathematics on logits, time first: ``[T, B, K]``."""

import torch.nn.functional as F
from torch import Tensor

from spikedistill.shapes import ClassLogits, Labels, Logits


def cross_entropy_of_mean(logits: Logits, labels: Labels, label_smoothing: float = 0.0) -> Tensor:
    """``CE(mean_t z_t, y)``: the cross-entropy of the mean logits."""
    return F.cross_entropy(logits.mean(0), labels, label_smoothing=label_smoothing)


def cross_entropy_per_step(logits: Logits, labels: Labels, label_smoothing: float = 0.0) -> Tensor:
    """``mean_t CE(z_t, y)``: the mean of the cross-entropies of all time steps (TET, arXiv 2202.11946)."""
    steps = logits.shape[0]
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(steps), label_smoothing=label_smoothing)


def soft_target_divergence(
    student: ClassLogits, teacher: ClassLogits, temperature: float, student_temperature: float | None = None
) -> Tensor:
    """``tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau))``, averaged over the batch (Hinton et al., section 2).

    With a temperature of its own for the student it is ``tau_T tau_S KL(softmax(z_T / tau_T) || softmax(z_S /
    tau_S))``.

    >>> import torch
    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> float(soft_target_divergence(logits, logits, temperature=4.0))
    0.0
    """
    own = temperature if student_temperature is None else student_temperature
    target = F.log_softmax(teacher / temperature, dim=-1)
    predicted = F.log_softmax(student / own, dim=-1)
    return temperature * own * F.kl_div(predicted, target, reduction="batchmean", log_target=True)


def soft_target_divergences(student: Logits, teacher: ClassLogits, temperature: float) -> Tensor:
    """``tau^2 KL(softmax(z_T / tau) || softmax(z_t / tau))`` of every time step and sample, ``[T, B]``.

    >>> import torch
    >>> soft_target_divergences(torch.ones(2, 1, 3), torch.zeros(1, 3), temperature=4.0).tolist()
    [[0.0], [0.0]]
    """
    target = F.log_softmax(teacher / temperature, dim=-1)
    predicted = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * (target.exp() * (target - predicted)).sum(-1)


def entropy_per_step(logits: Logits, temperature: float) -> Tensor:
    """``mean_t H(softmax(z_t / tau))``: the mean of the entropies of all time steps and samples, in nats."""
    predicted = F.log_softmax(logits / temperature, dim=-1)
    return -(predicted.exp() * predicted).sum(-1).mean()
