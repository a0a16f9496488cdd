"""Early exit by confidence: a sample leaves once its prediction is confident, and the batch shrinks.

The confidence of a sample after t steps is the largest softmax probability of its mean logits over steps 1..t. The
sample leaves once this is above a threshold. This is SEENN-I (Li et al., NeurIPS 2023, arXiv 2304.01230). DT-SNN (Li et
al., DAC 2023, arXiv 2305.17346) uses the entropy instead. The user chooses the threshold, but not on test data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import eval_batch_size, in_batches
from spikedistill.shapes import ClassLogits, StepCounts
from spikedistill.student.student import Student


@dataclass(frozen=True)
class EarlyExit:
    """The mean logits of every sample when it left ``[B, K]``, and the number of its steps ``[B]``."""

    logits: ClassLogits
    steps: StepCounts

    @property
    def mean_steps(self) -> float:
        """Mean number of steps per sample."""
        return float(self.steps.double().mean())


def check_confidence(confidence: float) -> None:
    """Refuse a confidence that is not a probability.

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
    """Run a batch step by step. A sample leaves once its confidence is above the given one, or after T steps.

    The logits of a sample equal those of a whole run cut after its last step. They do not depend on the rest of the
    batch. Steps run one by one, so the layers before the first neurons run at every step, not once as in a whole run.

    Args:
        student: in evaluation mode; its T is the largest number of steps.
        images: as for the student: ``[B, C, H, W]`` in 0..1, or frames ``[T, B, C, H, W]``.
        confidence: a sample leaves once its likeliest class has more than this probability, 0..1.

    Returns:
        Mean logits ``[B, K]`` over the steps of each sample, and the number of these steps ``[B]``.

    Raises:
        ConfigError: if the confidence is outside 0..1, or the student is in training mode.
    """
    check_confidence(confidence)
    if student.training:
        raise ConfigError("The student is in training mode, where samples of a batch interact: call student.eval().")
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
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda images: None,
) -> EarlyExit:
    """``early_exit`` for a whole set of bytes ``[N, C, H, W]``, in evaluation mode; see ``accuracy.predict``."""

    def leave(batch: Tensor) -> tuple[Tensor, Tensor]:
        found = early_exit(student, batch, confidence)
        return found.logits.float().cpu(), found.steps.cpu()

    size = eval_batch_size(student, images) if batch_size is None else batch_size
    logits, steps = zip(*in_batches(student, leave, images, dtype, size, on_batch))
    return EarlyExit(torch.cat(logits), torch.cat(steps))
