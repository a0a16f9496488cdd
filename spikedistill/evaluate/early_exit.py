"""Early exit by confidence: a sample leaves once its answer so far is sure, and the batch shrinks to those that stay.

The confidence of a sample after t steps is the largest softmax probability of its mean logits over steps 1..t, and it
leaves where that is above a threshold. This is SEENN-I (Li et al., NeurIPS 2023, arXiv 2304.01230); DT-SNN (Li et al.,
DAC 2023, arXiv 2305.17346) takes the entropy instead. The threshold is the user's choice: not to be made on test data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import in_batches
from spikedistill.shapes import ClassLogits, StepCounts
from spikedistill.student.build import Student


@dataclass(frozen=True)
class EarlyExit:
    """What every sample was answered when it left, and after how many steps that was."""

    logits: ClassLogits
    steps: StepCounts

    @property
    def mean_steps(self) -> float:
        """Steps a sample took, on average."""
        return float(self.steps.double().mean())


def check_confidence(confidence: float) -> None:
    """Refuse a confidence that is no probability.

    Raises:
        ConfigError: if it is outside 0..1.
    """
    if not 0 <= confidence <= 1:
        raise ConfigError(
            f"confidence (={confidence}) is the probability above which a sample leaves early: give 0 (all leave after"
            " the first step) to 1 (none leaves early)."
        )


@torch.no_grad()
def early_exit(student: Student, images: Tensor, confidence: float) -> EarlyExit:
    """The answers of a batch in at most T steps, each as sure as it is asked to be, or that of all T steps.

    A sample's answer is that of the whole run cut after its last step, whoever else is in the batch. The steps run one
    by one, so the layers before the first neurons run at each, not once as in a whole run.

    Args:
        student: in evaluation mode; its T is the most steps that a sample takes.
        images: as for the student: ``[B, C, H, W]`` in 0..1, or frames ``[T, B, C, H, W]``.
        confidence: the probability of the likeliest class above which a sample leaves, 0..1.

    Returns:
        Mean logits ``[B, K]`` over the steps that a sample took, and their number ``[B]``.

    Raises:
        ConfigError: if the confidence is outside 0..1, or the student is in training mode.
    """
    check_confidence(confidence)
    if student.training:
        raise ConfigError("The student is in training mode, where samples of a batch meet: call student.eval() first.")
    rows, repeats = student.coding.encode(images, student.timesteps)
    frames = rows.unflatten(0, (student.timesteps // repeats, -1))
    answer, state = student.step(frames[0])
    sums = answer.to(torch.promote_types(answer.dtype, torch.float32), copy=True)
    steps = torch.ones(len(sums), dtype=torch.int64, device=sums.device)
    staying = torch.arange(len(sums), device=sums.device)
    for t in range(1, student.timesteps):
        unsure = (sums[staying] / t).softmax(-1).amax(-1) <= confidence
        if not unsure.any():
            break
        if not unsure.all():
            staying, state = staying[unsure], tuple(part[unsure] for part in state)
        answer, state = student.step(frames[t % len(frames)][staying], state)
        sums[staying] += answer
        steps[staying] += 1
    return EarlyExit(sums / steps[:, None], steps)


def predict_early(
    student: Student,
    images: Tensor,
    confidence: float,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 250,
) -> EarlyExit:
    """``early_exit`` for a whole set of bytes ``[N, C, H, W]``, in evaluation mode; see ``accuracy.predict``."""

    def leave(batch: Tensor) -> tuple[Tensor, Tensor]:
        found = early_exit(student, batch, confidence)
        return found.logits.float().cpu(), found.steps.cpu()

    logits, steps = zip(*in_batches(student, leave, images, dtype, batch_size))
    return EarlyExit(torch.cat(logits), torch.cat(steps))
