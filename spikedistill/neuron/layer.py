"""A layer of neurons as a module. It holds threshold and leak, and chooses the backend. It never holds state."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spikedistill.errors import ConfigError, ShapeError, one_of
from spikedistill.neuron import fused
from spikedistill.neuron.dynamics import Neuron, run, run_with_slope
from spikedistill.neuron.surrogate import Rectangle

Backend = Literal["auto", "fused", "reference"]

SMALLEST = 2**-13
"""Smallest learned threshold, exact in every number format."""


class Spiking(nn.Module):
    """A layer of neurons. Time is folded into the batch, ``[T*B, ...]``, as for layers without time.

    Args:
        neuron: the neuron model.
        threshold: firing threshold and height of the spikes, above 0: one number, or ``[C]`` per channel (default:
            ``neuron.threshold``).
        backend: ``fused`` (compiled), ``reference`` (a loop over time), or ``auto``: fused if a compiler works.

    Raises:
        ConfigError: if a threshold is not above 0 and finite, or their shape is neither one number nor ``[C]``.
    """

    threshold: Tensor
    initial: Tensor
    leak_logit: Tensor

    def __init__(self, neuron: Neuron, threshold: float | Tensor | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        self.neuron = neuron
        self.backend = backend
        self.set_threshold(neuron.threshold if threshold is None else threshold)
        if neuron.leak < 1:
            self._hold("leak_logit", torch.tensor(math.log(neuron.leak / (1 - neuron.leak))), neuron.learn_leak)

    def set_threshold(self, threshold: float | Tensor) -> None:
        """Set the threshold: one number, or ``[C]`` per channel.

        Raises:
            ConfigError: if a threshold is not above 0 and finite, or their shape is neither one number nor ``[C]``.
        """
        value = torch.as_tensor(threshold, dtype=torch.float32).detach().clone()
        if value.ndim > 1 or not value.numel():
            raise ConfigError(
                f"thresholds of shape {tuple(value.shape)} were given: give one number, or [C] per channel."
            )
        faulty = value[~((value > 0) & torch.isfinite(value))]
        if len(faulty):
            raise ConfigError(f"threshold (={float(faulty[0]):.4g}) must be above 0 and finite.")
        before = self._parameters.get("threshold", self._buffers.get("threshold"))
        self._hold("threshold", value if before is None else value.to(before), self.neuron.learn_threshold)
        if self.neuron.learn_initial and (before is None or before.shape != value.shape):
            self._hold("initial", torch.full_like(self.threshold.detach(), self.neuron.initial), True)

    def _hold(self, name: str, value: Tensor, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def leak(self) -> Tensor:
        """The share of the potential that is left after a step, a scalar tensor."""
        if self.neuron.leak < 1:
            return torch.sigmoid(self.leak_logit)
        return torch.ones((), device=self.threshold.device)

    def forward(
        self,
        current: Tensor,
        timesteps: int,
        repeats: int = 1,
        state: Tensor | None = None,
        keep: bool = False,
        potentials: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """T time steps.

        Args:
            current: ``[T*B, ...]``; or ``[B, ...]`` with ``repeats=timesteps``, for a constant current.
            timesteps: T.
            repeats: number of steps that use the same current, 1 or T.
            state: potential ``[B, ...]`` in units of the threshold, from an earlier call; None: the initial one.
            keep: whether to return the potential after the last step.
            potentials: a list to which the potentials ``[T*B, ...]`` after the charge are appended, in units of the
                threshold and with gradient. With it the reference runs, whatever the backend.

        Returns:
            Spikes ``[T*B, ...]`` of height ``threshold``, and the potential ``[B, ...]`` (None without ``keep``).

        Raises:
            ShapeError: if the rows are not a multiple of T, channels and thresholds differ in number, or the state has
                another shape.
        """
        flat, threshold, order, batch = self._rows(current, timesteps, repeats)
        kept = self._fresh(batch, order or current.ndim == 2)
        if state is not None and state.shape != (batch, *current.shape[1:]):
            raise ShapeError(
                f"The state has shape {tuple(state.shape)}, the current needs {(batch, *current.shape[1:])}: pass a"
                " state only between calls with the same batch."
            )
        if state is not None:
            kept = flatten_rows(state, 1, order).reshape(flat.shape[1:])
        charged: list[Tensor] | None = None if potentials is None else []
        if charged is None and self._compiles(flat):
            spikes, after = fused.fused_run(flat, kept, self.neuron, self.leak, threshold, timesteps, keep)
        else:
            spikes, after = run(flat, kept, self.neuron, self.leak, threshold, timesteps, charged)
        shape = (timesteps * batch, *current.shape[1:])
        if potentials is not None and charged:
            potentials.append(restore_rows(torch.stack(charged), shape, order))
        final = restore_rows(after, (batch, *shape[1:]), order) if keep and after is not None else None
        return restore_rows(spikes, shape, order), final

    def with_slope(self, current: Tensor, timesteps: int, repeats: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """T time steps from the initial potential, without a graph, for the rate-based gradient.

        Returns:
            Spikes ``[T*B, ...]``, their mean over time ``[B, ...]`` and its slope ``[B, ...]``
            (``dynamics.run_with_slope``).
        """
        flat, threshold, order, batch = self._rows(current, timesteps, repeats)
        run_all = fused.fused_run_with_slope if self._compiles(flat) else run_with_slope
        fresh = self._fresh(batch, order or current.ndim == 2)
        spikes, rate, slope = run_all(flat, fresh, self.neuron, self.leak, threshold, timesteps)
        shape = (batch, *current.shape[1:])
        trains = restore_rows(spikes, (timesteps * batch, *shape[1:]), order)
        return trains, restore_rows(rate, shape, order), restore_rows(slope, shape, order)

    def in_one_step(self, current: Tensor, timesteps: int) -> Tensor:
        """The mean over T time steps of D levels, computed as one time step of T D levels.

        Spikes are a T-th of the threshold high, as counts add within a step and are averaged over steps. For IF neurons
        that start at half a threshold and a current that is the same at every step, forward and gradient are those of
        the activation of QCFS (Bu et al., arXiv 2303.04347) with ``L = T D``: the mean is
        ``threshold / T * clip(floor(T x / threshold + 1/2), 0, L)``, and the gradient passes straight through.

        Args:
            current: ``[B, ...]``.
            timesteps: T.

        Returns:
            The mean output, ``[B, ...]``.
        """
        flat, threshold, last, _ = self._rows(current, 1, 1)
        whole = dataclasses.replace(self.neuron, levels=timesteps * self.neuron.levels, surrogate=Rectangle())
        given = (flat, None, whole, self.leak, threshold / timesteps, 1)
        spikes = fused.fused_run(*given, False)[0] if self._compiles(flat) else run(*given)[0]
        return restore_rows(spikes, current.shape, last)

    def effective_threshold(self, neurons: int) -> Tensor:
        """The thresholds that a layer of this many neurons uses. Learned ones stay above 0, with a scaled gradient."""
        if not self.neuron.learn_threshold:
            return self.threshold
        allowed = torch.where(self.threshold < SMALLEST, SMALLEST, self.threshold)  # clamp has no gradient at the limit
        return _damped(allowed, neurons // self.threshold.numel())

    def raise_threshold(self) -> None:
        """Raise learned thresholds that a step of training took below the smallest one (2^-13), in place.

        Below it they have no gradient, so they would stay there.
        """
        if self.neuron.learn_threshold:
            self.threshold.data.clamp_(min=SMALLEST)

    def heights(self, current: Tensor) -> Tensor:
        """``effective_threshold`` in a shape that broadcasts to a current ``[rows, C, ...]``."""
        used = self.effective_threshold(current[0].numel())
        return used if used.ndim == 0 else used.view(-1, *[1] * (current.ndim - 2))

    def potential(self, current: Tensor) -> Tensor:
        """The potential before the first step, in thresholds, for a current ``[rows, C, ...]``; at least float32."""
        fresh = self.initial if self.neuron.learn_initial else current.new_tensor(self.neuron.initial)
        shaped = fresh if fresh.ndim == 0 else fresh.view(-1, *[1] * (current.ndim - 2))
        return shaped.to(torch.promote_types(current.dtype, torch.float32)).expand_as(current)

    def _rows(self, current: Tensor, timesteps: int, repeats: int) -> tuple[Tensor, Tensor, bool, int]:
        """The current as ``[T or 1, N]``, its threshold, whether its memory is channels last, and the batch size.

        With thresholds per channel, the N neurons have two dimensions, so that the thresholds broadcast.
        """
        rows = timesteps // repeats
        if repeats not in (1, timesteps) or current.shape[0] % rows:
            raise ShapeError(
                f"A current of {current.shape[0]} rows cannot be {timesteps} time steps with {repeats} repeats:"
                " expected T x B rows with repeats=1, or B rows with repeats=T."
            )
        last, batch = is_channels_last(current), current.shape[0] // rows
        flat = flatten_rows(current, rows, last)
        threshold = self.effective_threshold(current[0].numel())
        if threshold.ndim == 0:
            return flat, threshold, last, batch
        channels = len(threshold)
        if current.shape[1:2] != (channels,):
            raise ShapeError(
                f"A current of shape {tuple(current.shape)} was given to a layer with {channels} thresholds, one per"
                f" channel: expected [rows, {channels}, ...]."
            )
        by_channel = last or current.ndim == 2
        shape = (rows, -1, channels) if by_channel else (rows, batch * channels, -1)
        return flat.view(shape), _spread(threshold, batch, by_channel), last, batch

    def _fresh(self, batch: int, by_channel: bool) -> Tensor | None:
        """The learned initial potential, in a shape that broadcasts to the neurons. None if it is not learned."""
        return _spread(self.initial, batch, by_channel) if self.neuron.learn_initial else None

    def _compiles(self, flat: Tensor) -> bool:
        """Whether a kernel of its own runs. torch.compile of a whole network compiles the reference with the rest."""
        if torch.compiler.is_compiling():
            return False
        one_of("backend", self.backend, get_args(Backend))
        exact = flat.dtype == torch.float64
        return self.backend == "fused" or (self.backend == "auto" and not exact and fused.works(flat.device.type))

    def extra_repr(self) -> str:
        """Threshold, leak and reset, and levels above 1, for printing."""
        values, leak = self.threshold.detach(), float(self.leak.detach())
        shown = f"{float(values.mean()):.4g}" + (f" (mean of {len(values)} channels)" if values.ndim else "")
        levels = f", levels={self.neuron.levels}" if self.neuron.levels > 1 else ""
        return f"threshold={shown}, leak={leak:.4g}, reset={self.neuron.reset.value}{levels}"


def is_channels_last(x: Tensor) -> bool:
    """Whether a tensor ``[N, C, H, W]`` has its channels last in memory."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def flatten_rows(x: Tensor, rows: int, last: bool) -> Tensor:
    """``[rows*B, ...]`` as ``[rows, N]``, channels last or first."""
    return (x.permute(0, 2, 3, 1) if last else x).reshape(rows, -1)


def restore_rows(flat: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    """The inverse of ``flatten_rows``, with the same memory order."""
    if not last:
        return flat.reshape(shape)
    rows, channels, height, width = shape
    return flat.reshape(rows, height, width, channels).permute(0, 3, 1, 2)


@contextlib.contextmanager
def by_reference(*layers: Spiking) -> Iterator[None]:
    """Run layers step by step for a while, so that nothing is compiled for a few images."""
    backends = [layer.backend for layer in layers]
    for layer in layers:
        layer.backend = "reference"
    try:
        yield
    finally:
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend


def _spread(values: Tensor, batch: int, by_channel: bool) -> Tensor:
    """One value, or ``[C]`` values, to broadcast to ``[N / C, C]``, or to ``[B*C, N / (B*C)]`` with channels first."""
    if values.ndim == 0:
        return values
    return values[None] if by_channel else values.repeat(batch)[:, None]


def _damped(threshold: Tensor, neurons: int) -> Tensor:
    """The threshold, with its gradient divided by the square root of the number of neurons that use it.

    After LSQ (arXiv 1902.08153, section 2.2), whose factor also contains the number of levels.
    """
    scale = 1.0 / math.sqrt(neurons)
    return threshold * scale + (threshold * (1.0 - scale)).detach()
