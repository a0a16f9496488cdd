"""Muon: momentum whose matrices are made orthogonal before they are added to the weights.

The algorithm is that of Jordan et al. (Muon, 2024, https://kellerjordan.github.io/posts/muon). PyTorch has it from
version 2.9 on, for matrices only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial a x + b x^3 + c x^5, which sends singular values in (0, 1] close to 1 when repeated."""
REPEATS = 3
"""Newton-Schulz steps, as in airbench; the paper's five make the singular values more equal."""
MOMENTUM = 0.6
"""Momentum of the kernels, as in airbench."""


class Muon(torch.optim.Optimizer):
    """Muon for the kernels of convolutions, SGD with Nesterov momentum for everything else.

    A kernel is taken as a matrix with a row per output channel. It moves by ``lr`` times the orthogonal matrix nearest
    to its momentum, in units of its own root mean square per row, and is then scaled back to the norm that it had. In
    front of a norm layer that is airbench's update, which scales kernels to one norm.

    Args:
        kernels: a group of parameters of three dimensions or more.
        others: groups of other parameters with their ``weight_decay``.
        lr: learning rate.
        momentum: of the others.
    """

    def __init__(
        self, kernels: Mapping[str, Any], others: Sequence[Mapping[str, Any]], lr: float, momentum: float
    ) -> None:
        groups = [{**group, "orthogonal": False, "momentum": momentum} for group in others]
        if kernels["params"]:
            groups.append({**kernels, "orthogonal": True, "momentum": MOMENTUM, "weight_decay": 0.0})
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay."""
        for group in self.param_groups:
            move = _move_orthogonally if group["orthogonal"] else _move
            for parameter in group["params"]:
                if parameter.grad is not None:
                    slope = parameter.grad.add(parameter, alpha=group["weight_decay"])
                    move(parameter, self._with_momentum(parameter, slope, group["momentum"]), group["lr"])

    def _with_momentum(self, parameter: Tensor, slope: Tensor, momentum: float) -> Tensor:
        """The direction of Nesterov momentum."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = state["momentum_buffer"].mul_(momentum).add_(slope)
        return slope.add(velocity, alpha=momentum)


def _move(parameter: Tensor, direction: Tensor, rate: float) -> None:
    parameter.add_(direction, alpha=-rate)


def _move_orthogonally(parameter: Tensor, direction: Tensor, rate: float) -> None:
    norm = parameter.norm()
    step = orthogonalise(direction.flatten(1)).view_as(direction)
    parameter.sub_(step * (rate * norm / len(parameter) ** 0.5))
    parameter.mul_(norm / parameter.norm().clamp_min(torch.finfo(parameter.dtype).tiny))


def orthogonalise(matrix: Tensor, repeats: int = REPEATS) -> Tensor:
    """Nearly the closest orthogonal matrix ``U V^T`` of ``matrix = U S V^T``, by the Newton-Schulz iteration.

    Args:
        matrix: ``[M, N]``.
        repeats: number of steps.

    Returns:
        ``[M, N]`` with the same singular vectors. Singular values that are not tiny come to lie between about 0.7 and
        1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
    for _ in range(repeats):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
