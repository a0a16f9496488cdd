"""Energy-efficient distillation: teacher and student have temperatures of their own (Lee et al., arXiv 2106.07172).

The paper's finding, known to us from its abstract: a student fires more if it is distilled from an ANN, and with two
temperatures less.

This project's reading, not measured: with equal temperatures the student's logits must grow as large as the teacher's,
and large logits take spikes; with a lower temperature of its own it reaches the same probabilities with smaller ones.
The temperatures here, which of them is lower, and the factor ``tau_T tau_S`` are our choice. With equal temperatures
the objective is that of response-based KDSNN.
"""

from dataclasses import dataclass

from torch import Tensor

from spikedistill.objective.kdsnn import KDSNNResponse
from spikedistill.objective.logits import soft_target_divergence
from spikedistill.objective.terms import check_positive
from spikedistill.shapes import ClassLogits


@dataclass(frozen=True)
class HeterogeneousTemperatures(KDSNNResponse):
    """``(1 - alpha) CE(mean_t z, y) + alpha tau_T tau_S KL(softmax(z_T / tau_T) || softmax(z_S / tau_S))``."""

    temperature: float = 4.0
    """Temperature tau_T of the teacher's logits, above 0."""
    student_temperature: float = 2.0
    """Temperature tau_S of the student's logits, above 0. Below the teacher's, the student needs smaller logits and
    fewer spikes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("student_temperature", self.student_temperature)

    def divergence(self, student: ClassLogits, teacher: ClassLogits) -> Tensor:
        """The distance from the soft targets, each network's with its own temperature."""
        return soft_target_divergence(student, teacher, self.temperature, self.student_temperature)
