"""The rate-based gradient: T spiking steps forward, one pass back on firing rates (Yu et al., arXiv 2410.11488).

Everything between neurons is linear, so the mean over time commutes with it: ``mean_t(W s_t) = W mean_t(s_t)``.

The first pass runs all T steps without gradients. For each layer of neurons it keeps the mean of its spikes and the
slope of that mean. For each batch norm it keeps the statistics over time and batch. The second pass runs the network
once, on the means, with gradients:

- Neurons return the means of the first pass; their gradient is the slope.
- Batch norms use the statistics of the first pass; the part of them that depends on the means is differentiated.
- Convolutions return the mean of their first output, so nothing is computed twice.

The authors' code differs: it divides the gradient of the loss by T, and has LIF neurons with a sigmoid as surrogate.
Here neurons, surrogate and learning rate are those of the exact gradient.

At T = 1 this is the exact gradient. Only the first pass grows with T.

Max pooling is not linear: the second pass pools the means, and the gradient goes to the largest mean. For max pooling
of the cumulative input that is exact. For a logical or it is an approximation. Learned leaks, thresholds and initial
potentials get no gradient.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from spikedistill.compute.winograd import WinogradConv2d, known_to_fit, winograd_backward
from spikedistill.errors import ConfigError
from spikedistill.neuron.layer import Spiking, flatten_rows, is_channels_last, restore_rows
from spikedistill.shapes import time_mean
from spikedistill.student.graph import GraphInterpreter
from spikedistill.student.pool import CumulativeMaxPool

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, WinogradConv2d)


class _Through(torch.autograd.Function):
    """Forward: the rate of the first pass. Backward: multiply by the slope."""

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

    The variance over time and batch is the variance of the means plus a term that does not depend on them. So the
    gradient is that of batch norm with this larger variance.
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
    """Forward: a known result. Backward: the convolution's own gradient."""

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
        if isinstance(layer, WinogradConv2d) and known_to_fit(x, weight):
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
    """Whether a layer is a convolution that we can differentiate: numeric zero padding, no parametrisation."""
    return type(layer) in CONVOLUTIONS and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def known_convolution(layer: Any, x: Tensor, result: Tensor) -> Tensor:
    """The known result of a plain convolution of ``x``, or its mean over time, with the convolution's gradients."""
    x, weight, bias = x.to(result.dtype), layer.weight, layer.bias
    if not (isinstance(layer, WinogradConv2d) and known_to_fit(x, weight)):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return _Convolution.apply(x, weight, bias, result, layer)


class _Steps(GraphInterpreter):
    """The first pass: all time steps, without gradients; ``left`` holds by node what the second pass needs."""

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
        """The mean over time of ``[T*B, ...]``; ``[B, ...]``, without time, as it is. The memory format stays."""
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


class _Means(GraphInterpreter):
    """The second pass: on means, one row per sample, with gradients. It frees what the first pass left as it goes."""

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
    """Logits ``[T*B, K]`` of all steps and means ``[B, ...]`` of nodes by name, both with the rate-based gradient.

    Args:
        core: a student's graph, in training mode.
        rows: the encoded input, ``[B, ...]`` used ``timesteps`` times or ``[T*B, ...]`` used once.
        timesteps: T.
        repeats: at how many steps each row is used, 1 or T.
        layers: the number of tensors in the state.
        keep: names of the nodes whose means are wanted.

    Raises:
        ConfigError: if the network has active dropout, which would differ between the two passes, or SyncBatchNorm.
    """
    for layer in core.modules():
        if isinstance(layer, nn.SyncBatchNorm) and layer.training:
            raise ConfigError(
                "The rate-based gradient uses each process's own statistics, and SyncBatchNorm needs those of all"
                " processes: use ordinary batch norm, or the exact gradient."
            )
        if isinstance(layer, _DropoutNd) and layer.training and layer.p > 0:
            raise ConfigError(
                f"The rate-based gradient runs the network twice, and dropout (p={layer.p}) would differ between the"
                " two passes: set p=0, or use the exact gradient."
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
