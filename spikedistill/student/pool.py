"""Max pooling over time: each step returns the growth of the largest cumulative input of its window.

Over spikes the maximum of a single step is a logical or. If the neurons of a window fire in turn, it passes on more
spikes than any one of them fired. This error does not shrink as T grows. Here a step returns
``s_t = max_i C_i(t) - max_i C_i(t - 1)`` with the cumulative input ``C_i(t) = x_i(1) + ... + x_i(t)``. The sum over
time is exactly the largest sum in the window. Over spikes of one height a step is 0 or that height.

Rueckauer et al. (2017, doi 10.3389/fnins.2017.00682, section 2.2.5) pass on the spikes of the neuron that fired most.
The difference of maxima is our choice: it loses nothing when another neuron of the window becomes the largest.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spikedistill.errors import ShapeError
from spikedistill.neuron.layer import is_channels_last

MaxPool = Literal["cumulative", "or", "average"]

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
"""Number format -> a wider one in which its sums are exact, so that the growth over spikes is exactly a spike."""


class CumulativeMaxPool(nn.Module):
    """Max pooling of the cumulative input. State is an argument and a result, as for ``Spiking``.

    Args:
        pool: the max pooling that it replaces, one of ``MAX_POOLS``.
    """

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = copy.copy(pool)
        self.pool.return_indices = True
        self.disjoint = isinstance(pool, nn.MaxPool2d) and pool.kernel_size == pool.stride and pool.dilation == 1

    def forward(
        self, x: Tensor, timesteps: int, repeats: int = 1, state: Tensor | None = None, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Run T time steps.

        Args:
            x: ``[T*B, C, ...]``; or ``[B, C, ...]`` with ``repeats=timesteps``, the same input at every step.
            timesteps: T.
            repeats: at how many steps each row is used; 1 or T.
            state: the cumulative input ``[B, C, ...]`` of earlier calls; None begins at zero.
            keep: whether to return the cumulative input after the last step.

        Returns:
            The output ``[T*B, C, ...]``, and the cumulative input (None unless ``keep``).

        Raises:
            ShapeError: if the state has another shape.
        """
        batch = x.shape[0] * repeats // timesteps
        if state is not None and state.shape != (batch, *x.shape[1:]):
            raise ShapeError(
                f"The state of a max pooling has shape {tuple(state.shape)}, but its input needs"
                f" {(batch, *x.shape[1:])}: carry a state only between calls of one batch."
            )
        if timesteps == 1 and state is None and not keep and self.disjoint:
            return self.of_means(x), None  # ordinary max pooling, with the same bits
        given = (x, state, self.pool, timesteps, repeats)
        grown, total = _grow(*given)[:2] if torch._C._get_tracing_state() else _Growth.apply(*given)
        return grown, total if keep else None

    def of_means(self, x: Tensor) -> Tensor:
        """The mean over time of the output, from the mean over time of the input, ``[B, C, ...]`` each."""
        pooled: Tensor = self.pool(x)[0]
        return pooled


def _grow(
    x: Tensor, before: Tensor | None, pool: Any, timesteps: int, repeats: int
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The growth, the final cumulative input, and the places of the maxima before the call and after each step."""
    wide = x.dtype if x.device.type == "mps" else WIDER.get(x.dtype, x.dtype)  # MPS has no float64
    steps = x.unflatten(0, (timesteps // repeats, -1))
    total = None if before is None else before.to(wide)
    largest, place = (0.0, None) if total is None else pool(total)  # before the first step all sums are zero
    places, grown = [place], []
    for t in range(timesteps):
        step = steps[t // repeats]
        total = step.to(wide, copy=True) if total is None else total + step
        now, place = pool(total)
        grown.append((now - largest).to(x.dtype))
        largest = now
        places.append(place)
    assert total is not None
    return torch.cat(grown), total, places


class _Growth(torch.autograd.Function):
    """The growth, step by step. Backward, each maximum passes its gradient to all steps so far of the largest input."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, before: Tensor | None, pool: Any, timesteps: int, repeats: int
    ) -> tuple[Tensor, Tensor]:
        grown, total, places = _grow(x, before, pool, timesteps, repeats)
        ctx.save_for_backward(*places)
        ctx.repeats, ctx.like = repeats, (total.shape, x.dtype, total.dtype, is_channels_last(x))
        ctx.before = None if before is None else before.dtype
        return grown, total

    @staticmethod
    def backward(ctx, to_grown: Tensor, to_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        first, *places = ctx.saved_tensors
        shape, dtype, wide, last = ctx.like
        gradients = to_grown.unflatten(0, (len(places), -1)).to(wide)
        led = to_total.flatten(2).clone()
        to_steps = []
        for t in reversed(range(len(places))):
            own = gradients[t] if t + 1 == len(places) else gradients[t] - gradients[t + 1]
            led.scatter_add_(2, places[t].flatten(2), own.flatten(2))
            to_steps.append(led.to(dtype, copy=True))
        if first is not None:
            led.scatter_add_(2, first.flatten(2), -gradients[0].flatten(2))
        to_before = None if first is None else led.unflatten(2, shape[2:]).to(ctx.before)
        to_x = torch.stack(to_steps).sum(0) if ctx.repeats > 1 else torch.cat(to_steps[::-1])
        to_x = to_x.unflatten(2, shape[2:])
        order = torch.channels_last if last else torch.contiguous_format
        return to_x.contiguous(memory_format=order), to_before, None, None, None
