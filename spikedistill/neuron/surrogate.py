"""Surrogate gradients, which replace the derivative of the step function.

A spike is ``s = H(u)``, where ``u = v / threshold - 1`` is the potential above threshold in units of the threshold. The
forward pass is exactly the step, with ``H(0) = 1``. The backward pass multiplies by ``gradient(u)``, which is
non-negative and greatest at ``u = 0``. Its area is 1, except for rounding. At NaN it is NaN.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from spikedistill.errors import ConfigError


def spike(u: Tensor) -> Tensor:
    """``H(u)`` of potentials above threshold, in their dtype: 0 or 1, and NaN if u is not finite.

    >>> spike(torch.tensor([-0.5, 0.0, torch.nan, torch.inf])).tolist()
    [0.0, 1.0, nan, nan]
    """
    return (u >= 0).to(u.dtype) + 0.0 * u


def spikes_of(charged: Tensor, levels: int) -> Tensor:
    """``clip(floor(u), 0, D)`` of potentials ``u`` in units of the threshold, in their dtype; NaN if u is not finite.

    >>> spikes_of(torch.tensor([-0.5, 0.9, 1.0, 2.7, 9.0]), 3).tolist()
    [0.0, 0.0, 1.0, 2.0, 3.0]
    """
    if levels == 1:
        return spike(charged - 1.0)
    return charged.floor().clamp(0.0, float(levels)) + 0.0 * charged


def slope_of(charged: Tensor, levels: int, surrogate: "Surrogate") -> Tensor:
    """What replaces the derivative of ``spikes_of``: the surrogate, or with D > 1 the slope of ``clip(u - 1/2, 0, D)``.

    This ramp is the line through the middle of the stairs. Its slope is 1 where ``1/2 <= u <= D + 1/2``, else 0, and
    NaN where u is not finite. With D = 1 it would be a ``Rectangle`` of width 1.
    """
    if levels == 1:
        return surrogate.gradient(charged - 1.0)
    return torch.where((charged >= 0.5) & (charged <= levels + 0.5), 1.0, charged - charged)


@runtime_checkable
class Surrogate(Protocol):
    """Any object with ``gradient(u)``. It must be hashable, as a frozen dataclass is, so that kernels can be cached."""

    def gradient(self, u: Tensor) -> Tensor:
        """The surrogate for ``ds/du``, in the shape of ``u``."""
        ...


def _positive(surrogate: object, name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{type(surrogate).__name__}: {name} (={value}) must be above 0.")


@dataclass(frozen=True)
class Sigmoid:
    """``alpha sigma(alpha u) (1 - sigma(alpha u))``; SpikingJelly's default, alpha 4 (Fang et al., Sci. Adv. 2023).

    >>> float(Sigmoid(alpha=4.0).gradient(torch.tensor(0.0)))
    1.0
    """

    alpha: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "alpha", self.alpha)

    def gradient(self, u: Tensor) -> Tensor:
        """The derivative of the logistic function."""
        half = torch.sigmoid(self.alpha * u)
        return self.alpha * half * (1.0 - half)


@dataclass(frozen=True)
class ATan:
    """``alpha / (2 (1 + (pi/2 alpha u)^2))`` (Fang et al., arXiv 2007.05785), alpha 2 as in SpikingJelly.

    >>> float(ATan(alpha=2.0).gradient(torch.tensor(0.0)))
    1.0
    """

    alpha: float = 2.0

    def __post_init__(self) -> None:
        _positive(self, "alpha", self.alpha)

    def gradient(self, u: Tensor) -> Tensor:
        """The derivative of the arc tangent."""
        slope = (math.pi / 2 * self.alpha) * u
        return (self.alpha / 2) / (1.0 + slope * slope)


@dataclass(frozen=True)
class Triangle:
    """``max(0, width - |u|) / width^2`` (TET, arXiv 2202.11946, with width 1).

    Bellec et al. (arXiv 1803.09574) damp theirs by 0.3. Here the area stays 1.

    >>> Triangle(width=1.0).gradient(torch.tensor([-1.0, -0.5, 0.0, 0.5])).tolist()
    [0.0, 0.5, 1.0, 0.5]
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "width", self.width)

    def gradient(self, u: Tensor) -> Tensor:
        """A triangle with base 2 x width."""
        return (self.width - u.abs()).clamp_min(0.0) / self.width**2


@dataclass(frozen=True)
class Rectangle:
    """``1 / width`` where ``|u| < width / 2``, else 0 (STBP, Wu et al., arXiv 1706.02609, eq. 24).

    >>> Rectangle(width=1.0).gradient(torch.tensor([-0.6, -0.4, 0.0, 0.6])).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "width", self.width)

    def gradient(self, u: Tensor) -> Tensor:
        """A rectangle of this width."""
        return torch.where(u.abs() < self.width / 2, 1.0, u - u) / self.width


SURROGATES: dict[str, type[Sigmoid] | type[ATan] | type[Triangle] | type[Rectangle]] = {
    "atan": ATan,
    "rectangle": Rectangle,
    "sigmoid": Sigmoid,
    "triangle": Triangle,
}
