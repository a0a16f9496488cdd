"""The rate-based gradient: T spiking steps forward without graph, one pass back on rates (Yu et al., arXiv 2410.11488).

Between neurons everything is linear, so the mean over time passes through it alone: ``mean_t(W s_t) = W mean_t(s_t)``.
The first pass runs all T steps and keeps of each layer of neurons the mean of its spikes and the slope of that mean,
and of each batch norm the statistics over time and batch. The second pass runs the network once, on the means: neurons
return the means of the first pass and hand gradients back through the slopes; batch norms use the statistics of the
first pass, whose share that comes from the means is differentiated; convolutions return the mean of what they gave in
the first pass, so they compute nothing twice. At T = 1 this is the exact gradient. Only the first pass grows with T.

Max pooling is the one part that is not linear: the second pass pools the means and takes the gradient to their largest.
For pooling of the cumulative input that is exact. For a logical or it is an approximation.
Gradients do not reach learned leaks, thresholds and initial potentials.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from spikedistill.compute.winograd import WinogradConv2d, applies, winograd_backward
from spikedistill.errors import ConfigError
from spikedistill.neuron.layer import Spiking, flatten_rows, is_channels_last, restore_rows
from spikedistill.shapes import time_mean
from spikedistill.student.graph import Walk
from spikedistill.student.pool import CumulativeMaxPool

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, WinogradConv2d)


class _Through(torch.autograd.Function):
    """Forward the rate of the first pass; backward the slope."""

    @staticmethod
    def forward(ctx, current: Tensor, rate: Tensor, slope: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slope)
        return rate.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


class _Norm(torch.autograd.Function):
    """Batch norm of means with the statistics of all time steps.

    The variance over time and batch is that of the means plus a rest that the means do not move, so the gradient is the
    usual one with the wider variance in place of the batch's own.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        return F.batch_norm(x, mean, inverse.pow(-2) - eps, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight, mean, inverse = ctx.saved_tensors
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        grad = grad.contiguous(memory_format=layout)
        to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, [True, weight is not None, weight is not None]
        )
        return to_x, to_weight, to_bias, None, None, None


class _Convolution(torch.autograd.Function):
    """Forward a result that is known; backward the convolution's own."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor, layer: Any) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.bias = layer, bias is not None
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        layer = ctx.layer
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias)
        if isinstance(layer, WinogradConv2d) and applies(x, weight):
            return *winograd_backward(x, weight, grad, needed), None, None
        to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [layer.out_channels],
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0] * len(layer.stride),
            layer.groups,
            needed,
        )
        return to_x, to_weight, to_bias, None, None


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a convolution whose backward pass is known: zero padding by numbers, no parametrisation."""
    return type(layer) in CONVOLUTIONS and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def known_convolution(layer: Any, x: Tensor, result: Tensor) -> Tensor:
    """What a plain convolution made of ``x``, or the mean of that over time, with the convolution's gradients."""
    bias = None if layer.bias is None else layer.bias.to(result.dtype)
    return _Convolution.apply(x.to(result.dtype), layer.weight.to(result.dtype), bias, result, layer)


class _Steps(Walk):
    """The first pass: all time steps, without graph; ``left`` holds, by node, what it leaves for the second."""

    def __init__(self, core: fx.GraphModule, timesteps: int, batch: int) -> None:
        super().__init__(core)
        self.timesteps, self.batch = timesteps, batch
        self.left: dict[str, tuple[Tensor, ...]] = {}

    def fire(self, layer: Spiking, current: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        spikes, rate, slope = layer.with_slope(current, timesteps, repeats)
        self.left[self.current.name] = (rate, slope)
        for hook in layer._forward_hooks.values():
            hook(layer, (current, timesteps, repeats, state, keep), (spikes, None))
        return spikes, None

    def apply(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        if isinstance(layer, NORMS) and layer.training:
            return self._norm(layer, args[0])
        result = super().apply(layer, args, kwargs)
        if is_plain(layer):
            self.left[self.current.name] = (self._mean(result),)
        return result

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over time of ``[T*B, ...]``, or what does not depend on time as it is; the memory order stays."""
        if x.shape[0] == self.batch:
            return x
        last = is_channels_last(x)
        return restore_rows(time_mean(flatten_rows(x, self.timesteps, last)), (self.batch, *x.shape[1:]), last)

    def _norm(self, layer: Any, x: Tensor) -> Tensor:
        momentum = layer.momentum
        if layer.track_running_stats and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            momentum = 1.0 / float(layer.num_batches_tracked) if momentum is None else momentum
        y, mean, inverse = torch.native_batch_norm(
            x, layer.weight, layer.bias, layer.running_mean, layer.running_var, True, momentum or 0.0, layer.eps
        )
        self.left[self.current.name] = (mean, inverse)
        return y


class _Means(Walk):
    """The second pass: one row a sample, on means, with graph; what the first pass left is let go as it is used."""

    def __init__(self, core: fx.GraphModule, left: dict[str, tuple[Tensor, ...]], keep: Collection[str]) -> None:
        super().__init__(core, keep)
        self.left = left

    def fire(self, layer: Spiking, current: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        return _Through.apply(current, *self.left.pop(self.current.name)), None

    def apply(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        if isinstance(layer, NORMS) and layer.training:
            mean, inverse = self.left.pop(self.current.name)
            return _Norm.apply(args[0], layer.weight, layer.bias, mean, inverse, layer.eps)
        if is_plain(layer):
            (mean,) = self.left.pop(self.current.name)
            return known_convolution(layer, args[0], mean)
        return super().apply(layer, args, kwargs)

    def pool(self, layer: CumulativeMaxPool, x: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        return layer.of_means(x), None

    def spread(self, x: Tensor, repeats: int) -> Tensor:
        return x


def rate_run(
    core: fx.GraphModule, rows: Tensor, timesteps: int, repeats: int, layers: int, keep: Collection[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits ``[T*B, K]`` of all steps, and the means ``[B, ...]`` of nodes, both with the rate-based gradient.

    Args:
        core: a student's graph, in training mode.
        rows: the encoded input, ``[B, ...]`` used ``timesteps`` times or ``[T*B, ...]`` used once.
        timesteps: T.
        repeats: how often each row is used, 1 or T.
        layers: how many layers of neurons there are.
        keep: names of the nodes whose means are wanted.

    Raises:
        ConfigError: if the network drops out at random, which two passes cannot share, or takes its batch norms'
            statistics over several processes.
    """
    for layer in core.modules():
        if isinstance(layer, nn.SyncBatchNorm) and layer.training:
            raise ConfigError(
                "The rate-based gradient takes each process's own statistics, and SyncBatchNorm asks for those of all:"
                " leave batch norms as they are, or use the exact gradient."
            )
        if isinstance(layer, _DropoutNd) and layer.training and layer.p > 0:
            raise ConfigError(
                f"The rate-based gradient runs the network twice, and dropout (p={layer.p}) would differ: set p=0 or"
                " use the exact gradient."
            )
    states = (None,) * layers
    batch = rows.shape[0] * repeats // timesteps
    with torch.no_grad():
        first = _Steps(core, timesteps, batch)
        logits, _ = first.run(rows, timesteps, repeats, states, False)
        means = rows if repeats > 1 or timesteps == 1 else rows.unflatten(0, (timesteps, -1)).mean(0)
    second = _Means(core, first.left, keep)
    mean, _ = second.run(means, 1, 1, states, False)
    carried = (mean - mean.detach()).repeat(logits.shape[0] // batch, 1)
    return logits + carried, second.kept
