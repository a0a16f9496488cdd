"""Tensor shapes: the axes, the names that signatures and tables use for them, and the mean over time.

T  time steps            B  samples in the batch     C  channels
H  rows                  W  columns                  K  classes
D  levels: the most spikes of a neuron within a step, and its binary sub-steps

Outside a student, time comes first: ``[T, B, ...]``. Inside, time is folded into the batch: ``[T*B, ...]``.
Images are raw pixels between 0 and 1; each network owns its own normalisation.
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Image = Float[Tensor, "B C H W"]
"""Still images, pixels in 0..1."""
Pixels = UInt8[Tensor, "B C H W"]
"""Still images as stored, bytes 0..255."""
Frames = Float[Tensor, "T B C H W"]
"""A sequence of frames, for instance binned events."""
Current = Float[Tensor, "_ *n"]
"""Input current of a layer of neurons, time first: T rows, or one row for a constant current."""
Spikes = Float[Tensor, "T *n"]
"""Output of a layer of neurons, time first: 0 or the layer's threshold."""
Logits = Float[Tensor, "T B K"]
"""Class scores at each time step."""
ClassLogits = Float[Tensor, "B K"]
"""Class scores without time: an ANN's, or the student's mean over time."""
Labels = Int[Tensor, " B"]
"""Class numbers, 0..K-1."""
StepCounts = Int[Tensor, " B"]
"""Number of time steps per sample."""


def steps_by_levels(timesteps: int, levels: int) -> str:
    """T and D as tables have them, ``TxD``.

    >>> steps_by_levels(1, 4)
    '1x4'
    """
    return f"{timesteps}x{levels}"


def steps_and_levels(timesteps: int, levels: int) -> str:
    """T and D as sentences have them; D = 1 goes without saying.

    >>> steps_and_levels(4, 1), steps_and_levels(1, 4)
    ('T=4', 'T=1, D=4')
    """
    return f"T={timesteps}" + (f", D={levels}" if levels > 1 else "")


@torch.no_grad()
def time_mean(rows: Tensor) -> Tensor:
    """The mean over time of ``[T, N]``, as ``[N]``.

    A matrix-vector product is several times faster here than ``mean(0)`` on a CPU. The sum is divided at the end,
    because 1/3 rounds to 0.334 in bfloat16.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return torch.mv(rows.t(), rows.new_ones(len(rows))).div_(len(rows))


def over_time(feature: Tensor) -> Tensor:
    """The mean over time of ``[T, B, ...]``, in the memory order of one step ``[B, ...]``.

    With T = 1, or one step seen T times (a view with stride 0), it is that step, without a sum.
    """
    if feature.stride(0) == 0 or len(feature) == 1:
        return feature[0]
    return _Mean.apply(feature)


class _Mean(torch.autograd.Function):
    """``time_mean`` for any shape, with a gradient. The result has the memory order of one step."""

    @staticmethod
    def forward(ctx, feature: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        one = torch.empty_like(feature[0])
        ctx.shape, strides = feature.shape, (one.numel(), *one.stride())
        if feature.stride() != strides:
            feature = feature.new_empty_strided(feature.shape, strides).copy_(feature)
        rows = feature.as_strided((len(feature), one.numel()), (one.numel(), 1))
        return time_mean(rows).as_strided(one.shape, one.stride())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return (grad / ctx.shape[0]).expand(ctx.shape)
