"""What an objective sees and what it returns: a ``Batch`` in, named terms out, their sum taken in one place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from spikedistill.errors import ConfigError
from spikedistill.shapes import ClassLogits, Labels, Logits

Terms = dict[str, Tensor]
"""Scalar losses by name, each already multiplied by its weight; logs use the same names."""


@dataclass(frozen=True)
class Batch:
    """What is known of one batch after both networks answered.

    Args:
        logits: the student's answer at each time step ``[T, B, K]``.
        labels: class numbers ``[B]``.
        features: the student's features by module path, ``[T, B, ...]`` each.
        teacher_logits: the teacher's answer ``[B, K]``, where the objective asked for it.
        teacher_features: the teacher's features by module path, ``[B, ...]`` each.
    """

    logits: Logits
    labels: Labels
    features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_logits: ClassLogits | None = None
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)


class Objective:
    """What a method is: a small frozen value that turns a batch into named terms.

    ``teacher`` says whether it needs the teacher's answer; ``pairs`` names (teacher path, student path) of the
    features that it compares; ``adapters`` makes the layers with weights of their own, from one probe batch.
    """

    teacher: bool = False
    pairs: tuple[tuple[str, str], ...] = ()

    def adapters(self, batch: Batch) -> nn.ModuleDict:
        """The trainable layers that bring student features to the teacher's shape; none unless a method says so."""
        return nn.ModuleDict()

    def __call__(self, batch: Batch, adapters: nn.ModuleDict) -> Terms:
        """Named scalar terms of one batch."""
        raise NotImplementedError


def total(terms: Terms) -> Tensor:
    """The loss: the sum of all terms."""
    return sum(terms.values(), start=next(iter(terms.values())).new_zeros(()))


def share(name: str, value: float) -> float:
    """Check a mixing weight.

    Raises:
        ConfigError: if it is not between 0 and 1.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} (={value}) mixes two terms: give a value from 0 to 1.")
    return value


def positive(name: str, value: float) -> float:
    """Check a scale.

    Raises:
        ConfigError: if it is not above 0.
    """
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} (={value}) must be above 0 and finite.")
    return value
