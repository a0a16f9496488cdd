"""How well a student agrees with its teacher, whether the teacher is right or wrong."""

import torch.nn.functional as F

from spikedistill.evaluate.accuracy import check_finite
from spikedistill.shapes import ClassLogits, Logits


def agreement(student: Logits, teacher: ClassLogits) -> float:
    """Percentage of samples for which student and teacher give the same class.

    Raises:
        ConfigError: if logits are not finite.

    >>> import torch
    >>> agreement(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    50.0
    """
    check_finite(student)
    check_finite(teacher)
    return 100.0 * float((student.mean(0).argmax(-1) == teacher.argmax(-1)).double().mean())


def divergence(student: Logits, teacher: ClassLogits) -> float:
    """Mean divergence ``KL(teacher || student)`` of the class probabilities, in nats.

    Raises:
        ConfigError: if logits are not finite.
    """
    check_finite(student)
    check_finite(teacher)
    target = F.log_softmax(teacher.double(), dim=-1)
    answer = F.log_softmax(student.double().mean(0), dim=-1)
    return float(F.kl_div(answer, target, reduction="batchmean", log_target=True))
