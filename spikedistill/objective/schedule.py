"""Weights that change over training: pure functions of progress, a scalar from 0 (start) to 1 (end)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spikedistill.errors import ConfigError


class Schedule:
    """A weight over training: progress ``[]`` in, weight ``[]`` out."""

    def __call__(self, progress: Tensor) -> Tensor:
        """The weight at this progress."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """The same weight throughout."""

    value: float = 1.0

    def __call__(self, progress: Tensor) -> Tensor:
        """``value``."""
        return torch.full_like(progress, self.value)


@dataclass(frozen=True)
class Ramp(Schedule):
    """``start + (end - start) progress^power``: a straight line for power 1, a later rise for a larger power.

    >>> [float(Ramp(power=3.0)(torch.tensor(p))) for p in (0.0, 0.5, 1.0)]
    [0.0, 0.125, 1.0]

    Raises:
        ConfigError: if the power is not above 0.
    """

    start: float = 0.0
    end: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ConfigError(f"power (={self.power}) of a ramp must be above 0 and finite.")

    def __call__(self, progress: Tensor) -> Tensor:
        """The weight at this progress."""
        return _between(self.start, self.end, progress**self.power)


@dataclass(frozen=True)
class Switch(Schedule):
    """The weight ``before`` until progress ``at``, then ``after``, with half a cosine in between.

    The change takes the fraction ``width`` of training, half of it before ``at``. A width of 0 is a step. The shape is
    this project's choice.

    >>> [round(float(Switch(at=0.5, width=0.2)(torch.tensor(p))), 3) for p in (0.4, 0.5, 0.6)]
    [1.0, 0.5, 0.0]

    Raises:
        ConfigError: if ``at`` or ``width`` lies outside 0..1.
    """

    at: float = 0.5
    before: float = 1.0
    after: float = 0.0
    width: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.at <= 1 or not 0 <= self.width <= 1:
            raise ConfigError(f"at (={self.at}) and width (={self.width}) are fractions of training: give 0 to 1.")

    def __call__(self, progress: Tensor) -> Tensor:
        """The weight at this progress."""
        if self.width == 0:
            gone = (progress >= self.at).to(progress.dtype)
        else:
            gone = ((progress - self.at) / self.width + 0.5).clamp(0, 1)
        return _between(self.before, self.after, 0.5 * (1 - torch.cos(math.pi * gone)))


def _between(first: float, last: float, share: Tensor) -> Tensor:
    """Linear interpolation, exact at shares of 0 and 1."""
    return torch.lerp(torch.full_like(share, first), torch.full_like(share, last), share)
