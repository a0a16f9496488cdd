"""Least squares for the weights of one layer: sampled rows of its input, and a ridge regression of chosen strength."""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRENGTHS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Strengths of the ridge that are tried, in parts of each input's own sum of squares."""
HELD = 4
"""Every fourth image judges the strengths; the others are fitted."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Places = tuple[Tensor, ...]
"""Sampled places of a tensor ``[B, C, ...]``: the numbers of images ``[N]``, then coordinates ``[N]`` of each axis."""


def sample(shape: torch.Size, count: int, generator: torch.Generator) -> Places:
    """About ``count`` places of a tensor ``[B, C, ...]``, equally many of each image, at least one."""
    batch, axes = shape[0], shape[2:]
    positions = math.prod(axes)
    each = min(positions, max(1, math.ceil(count / batch)))
    chosen = torch.cat([torch.randperm(positions, generator=generator)[:each] for _ in range(batch)])
    coordinates = torch.unravel_index(chosen, axes) if axes else ()
    return torch.arange(batch).repeat_interleave(each), *coordinates


def at(x: Tensor, places: Places) -> Tensor:
    """The values ``[N, C]`` of ``[B, C, ...]`` at these places."""
    index: Any = places[0], slice(None), *places[1:]
    return x[index]


def inputs_at(layer: Any, x: Tensor, places: Places) -> Tensor:
    """What a convolution or linear layer sees at places of its output: ``[N, G, P]``, G groups of P inputs."""
    if isinstance(layer, nn.Linear):
        return x[places[0]][:, None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    pixels = padded.movedim(1, -1).contiguous()  # all channels of a pixel side by side: read much faster
    taps = []
    for tap in itertools.product(*map(range, layer.kernel_size)):
        axes = zip(places[1:], layer.stride, tap, layer.dilation)
        taps.append(pixels[(places[0], *(place * stride + i * step for place, stride, i, step in axes))])
    return torch.stack(taps, -1).unflatten(1, (layer.groups, -1)).flatten(2)


def rows_of(layer: Any) -> Tensor:
    """The weights of a layer as ``[G, P, O]``, so that ``inputs_at @ rows_of`` is its output without the bias."""
    groups = getattr(layer, "groups", 1)
    return layer.weight.unflatten(0, (groups, -1)).flatten(2).mT


def ridge(x: Tensor, wanted: Tensor, images: Tensor, shifts: bool = True) -> Tensor:
    """Weights with which ``x`` best explains ``wanted`` on images that were not fitted.

    ``min |wanted - x w - b|^2 + s sum_p |x_p|^2 w_p^2`` in closed form, for every strength s of ``STRENGTHS``, fitted
    on three of four images. The strength with the least error on the others is taken, and all images are fitted by it.
    Where none is better than the shift b alone, the weights are zero.

    Args:
        x: ``[N, G, P]``.
        wanted: ``[N, G, O]``.
        images: the image ``[N]`` that each row comes from, as numbers from 0.
        shifts: whether there is a shift b.

    Returns:
        Weights ``[G, P, O]``.
    """
    x, wanted = x.transpose(0, 1), wanted.transpose(0, 1)
    held = images % HELD == HELD - 1
    none = torch.zeros(x.shape[0], x.shape[2], wanted.shape[2]).to(x)
    if not held.any() or held.all():
        return none
    fitted = _Normal(x[:, ~held], wanted[:, ~held], shifts)
    tried = [none, *map(fitted.weights, STRENGTHS)]
    judges = x[:, held], wanted[:, held]
    errors = [fitted.error(weights, *judges) for weights in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    return _Normal(x, wanted, shifts).weights(STRENGTHS[best - 1]) if best else none


class _Normal:
    """The normal equations of a regression of ``[G, N, O]`` on ``[G, N, P]``."""

    def __init__(self, x: Tensor, wanted: Tensor, shifts: bool) -> None:
        self.x = x.mean(1, keepdim=True) * float(shifts)
        self.wanted = wanted.mean(1, keepdim=True) * float(shifts)
        x = x - self.x
        self.gram, self.moments = (x.mT @ x).double(), (x.mT @ (wanted - self.wanted)).double()
        squares = self.gram.diagonal(dim1=-2, dim2=-1)
        self.squares = squares + 1e-6 * squares.mean(-1, keepdim=True) + 1e-12  # inputs that are always silent

    def weights(self, strength: float) -> Tensor:
        """The solution ``[G, P, O]``."""
        factor = torch.linalg.cholesky(self.gram + strength * torch.diag_embed(self.squares))
        return torch.cholesky_solve(self.moments, factor).to(self.x)

    def error(self, weights: Tensor, x: Tensor, wanted: Tensor) -> float:
        """The squared error on other rows, with the shift that fits these."""
        return float((wanted - self.wanted - (x - self.x) @ weights).square().sum())
