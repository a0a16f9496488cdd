"""A layer of neurons as a module: it holds threshold and leak, chooses reference or fused, and never holds state."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.errors import ConfigError, ShapeError
from spikedistill.neuron import fused
from spikedistill.neuron.dynamics import Neuron, run

Backend = Literal["auto", "fused", "reference"]

SMALLEST = 1e-4
"""A learned threshold does not fall below this."""


class Spiking(nn.Module):
    """A layer of neurons that takes time folded into the batch, ``[T*B, ...]``, as layers without time do.

    Args:
        neuron: the model.
        threshold: where the layer fires, and the height of its spikes; ``neuron.threshold`` where not given.
        backend: ``fused`` (compiled), ``reference`` (a loop over time), or ``auto``: fused where a compiler works.

    Raises:
        ConfigError: if the threshold is not above 0.
    """

    threshold: Tensor
    leak_logit: Tensor

    def __init__(self, neuron: Neuron, threshold: float | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        value = neuron.threshold if threshold is None else threshold
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"threshold (={value}) must be above 0 and finite.")
        self.neuron = neuron
        self.backend = backend
        self._hold("threshold", torch.tensor(float(value)), neuron.learn_threshold)
        if neuron.leak < 1:
            self._hold("leak_logit", torch.tensor(math.log(neuron.leak / (1 - neuron.leak))), neuron.learn_leak)

    def _hold(self, name: str, value: Tensor, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def leak(self) -> Tensor:
        """The share of the potential that is left after a step, a scalar tensor."""
        return torch.sigmoid(self.leak_logit) if self.neuron.leak < 1 else torch.ones_like(self.threshold)

    def forward(
        self, current: Tensor, timesteps: int, repeats: int = 1, state: Tensor | None = None, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """T time steps.

        Args:
            current: ``[T*B, ...]``; or ``[B, ...]`` with ``repeats=timesteps``, the same current at every step.
            timesteps: T.
            repeats: how often the given current is used; 1 or T.
            state: potential ``[B, ...]`` in units of the threshold, from an earlier call; fresh where None.
            keep: whether to return the potential after the last step.

        Returns:
            Spikes ``[T*B, ...]`` of height ``threshold``, and the potential ``[B, ...]`` (None unless kept).

        Raises:
            ShapeError: if the rows are no multiple of T, or the state is of another shape.
        """
        rows = timesteps // repeats
        if rows * repeats != timesteps or current.shape[0] % rows:
            raise ShapeError(
                f"A current of {current.shape[0]} rows cannot be {timesteps} time steps with {repeats} repeats:"
                " expected time x batch rows."
            )
        batch = current.shape[0] // rows
        if state is not None and state.shape != (batch, *current.shape[1:]):
            raise ShapeError(
                f"The state has shape {tuple(state.shape)}, the current asks for {(batch, *current.shape[1:])}: carry a"
                " state only between calls of one batch."
            )
        flat, order = _flatten(current, rows)
        kept = None if state is None else _flatten(state, 1)[0][0]
        threshold = (
            _damped(self.threshold.clamp_min(SMALLEST), flat.shape[1])
            if self.neuron.learn_threshold
            else self.threshold
        )
        spikes, after = self._run(flat, kept, threshold, timesteps, keep)
        shape = (timesteps * batch, *current.shape[1:])
        return _restore(spikes, shape, order), None if after is None else _restore(after, (batch, *shape[1:]), order)

    def _run(
        self, flat: Tensor, state: Tensor | None, threshold: Tensor, timesteps: int, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        exact = flat.dtype == torch.float64
        compiled = self.backend == "fused" or (self.backend == "auto" and not exact and fused.works(flat.device.type))
        if compiled:
            return fused.fused_run(flat, state, self.neuron, self.leak, threshold, timesteps, keep)
        spikes, after = run(flat, state, self.neuron, self.leak, threshold, timesteps)
        return spikes, after if keep else None

    def extra_repr(self) -> str:
        """Threshold and leak, for printing."""
        return f"threshold={float(self.threshold):.4g}, leak={float(self.leak):.4g}, reset={self.neuron.reset.value}"


def _flatten(x: Tensor, rows: int) -> tuple[Tensor, bool]:
    """``[rows*B, ...]`` as ``[rows, N]`` in the order of memory, and whether that order is channels last."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return (x.permute(0, 2, 3, 1) if last else x).reshape(rows, -1), last


def _restore(flat: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    if not last:
        return flat.reshape(shape)
    rows, channels, height, width = shape
    return flat.reshape(rows, height, width, channels).permute(0, 3, 1, 2)


def _damped(threshold: Tensor, neurons: int) -> Tensor:
    """The threshold with its gradient over the root of the layer's size, as in LSQ (arXiv 1902.08153, section 2.2)."""
    scale = 1.0 / math.sqrt(neurons)
    return threshold * scale + (threshold * (1.0 - scale)).detach()
