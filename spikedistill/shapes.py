"""The axes of every tensor, the names that signatures use for their shapes, and the mean over the first axis, time.

T  time steps            B  samples in the batch     C  channels
H  rows                  W  columns                  K  classes

Outside a student, time comes first: ``[T, B, ...]``. Inside, time is folded into the batch: ``[T*B, ...]``.
Images are raw pixels between 0 and 1; each network owns its own normalisation.
"""

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Image = Float[Tensor, "B C H W"]
"""Still images, pixels in 0..1."""
Pixels = UInt8[Tensor, "B C H W"]
"""Still images as stored, bytes 0..255."""
Frames = Float[Tensor, "T B C H W"]
"""A sequence of frames, for instance binned events."""
Current = Float[Tensor, "_ *n"]
"""What flows into a layer of neurons, time first: T rows, or one row that is the same at every step."""
Spikes = Float[Tensor, "T *n"]
"""What a layer of neurons emits, time first: 0 or the layer's amplitude."""
Logits = Float[Tensor, "T B K"]
"""The student's answer at each time step."""
ClassLogits = Float[Tensor, "B K"]
"""An answer without time: the teacher's, or the student's mean over time."""
Labels = Int[Tensor, " B"]
"""Class numbers, 0..K-1."""
StepCounts = Int[Tensor, " B"]
"""How many time steps a sample took."""
Mask = Bool[Tensor, " B"]
"""One truth value a sample."""


@torch.no_grad()
def time_mean(rows: Tensor) -> Tensor:
    """The mean over time of ``[T, N]``: a product of matrix and vector, one pass over memory.

    ``mean(0)`` takes several times as long on a CPU. In bfloat16 a third, as a weight, would be 0.2 percent too large.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return torch.mv(rows.t(), rows.new_ones(len(rows))).div_(len(rows))


def over_time(feature: Tensor) -> Tensor:
    """The mean over time of ``[T, B, ...]`` in the order of memory that ``[B, ...]`` has.

    What is the same at every step (a view with stride 0) is not summed.
    """
    if feature.stride(0) == 0 or len(feature) == 1:
        return feature[0]
    return _Mean.apply(feature)


class _Mean(torch.autograd.Function):
    """``time_mean`` of any shape, with a gradient; what it is given and what comes out have one order of memory."""

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
