"""The reference implementation of a neuron: one time step, and T steps in a plain loop.

Current x and potential v are in units of the threshold. With leak l and input gain g (1, or 1 - l with decayed input):

    charge       u = l v + g x
    fire         s = H(u - 1)
    reset        v' = u - s           subtract the threshold
                 v' = u (1 - s)       or reset to zero

A graded neuron fires up to D = ``levels`` spikes within a step. Its reset is subtractive:

    fire         n = clip(floor(u), 0, D)
    reset        v' = u - n

It is trained as one integer per step (integer LIF: Luo et al., ECCV 2024, arXiv 2407.20708) with a straight-through
gradient: ``dn/du = 1`` where ``1/2 <= u <= D + 1/2``, else 0. At T = 1 with an initial half, forward and gradient are
those of the activation of QCFS (arXiv 2303.04347). The range is this project's choice: the range ``0 <= u <= D + 1``,
which passes gradients to neurons below half a spike and above the last one, learned less (LOG.md). The neuron runs as D
binary sub-steps of a layer (``student/substeps.py``). D = 1 is the neuron above.

IF has l = 1. LIF has a fixed l < 1 (tau = 1 / (1 - l)). PLIF learns l (Fang et al., arXiv 2007.05785).

The layer emits ``threshold * s``. Its mean over time approximates the activation of the ANN. The factor can be folded
into the weights of the next layer.

The potential starts at ``initial`` thresholds. At 1/2, the mean over time for a constant current rounds instead of
truncating (Bu et al., arXiv 2303.04347).

A current that is NaN or infinite makes spikes and potential NaN from that step on. Without this, the comparison with
the threshold would give an ordinary spike or none, and hide the error. This is this project's choice.
"""

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from spikedistill.errors import ConfigError
from spikedistill.neuron.surrogate import Surrogate, Triangle, slope_of, spikes_of
from spikedistill.shapes import Current, Spikes


class Reset(Enum):
    """What a spike does to the potential: subtract the threshold, or set it to zero."""

    SUBTRACT = "subtract"
    ZERO = "zero"


@dataclass(frozen=True)
class Neuron:
    """A neuron model: leak x reset x levels x surrogate.

    Args:
        leak: share of the potential that is left after a step, 0 < leak <= 1 (1: no leak).
        learn_leak: whether each layer learns its own leak, from this value (PLIF).
        decay_input: whether the current is multiplied by 1 - leak, as SpikingJelly's LIF does by default.
        reset: subtract the threshold, or reset to zero.
        levels: D, the most spikes that a neuron fires within a step, 1 or more. Above 1 the reset is subtractive.
        detach_reset: whether the gradient leaves out the reset. For a subtractive reset, the gradient through it is the
            more exact one.
        threshold: initial threshold of a layer without calibration, above 0.
        learn_threshold: whether each layer learns its own threshold.
        initial: initial potential in units of the threshold, 0 <= initial < 1.
        learn_initial: whether each layer learns its own initial potential, per channel if its thresholds are. A learned
            value may leave 0..1; this is this project's choice.
        surrogate: the surrogate gradient. Graded spikes do not use it: theirs passes straight through.

    Raises:
        ConfigError: if a value is outside its range or of the wrong type, or ``learn_leak`` or ``decay_input`` is given
            for a leak of 1.
    """

    leak: float = 1.0
    learn_leak: bool = False
    decay_input: bool = False
    reset: Reset = Reset.SUBTRACT
    detach_reset: bool = False
    threshold: float = 1.0
    learn_threshold: bool = False
    initial: float = 0.0
    learn_initial: bool = False
    surrogate: Surrogate = field(default_factory=Triangle)
    levels: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.leak <= 1:
            raise ConfigError(f"leak (={self.leak}) is the share of the potential that is left: give 0 < leak <= 1.")
        if self.leak == 1 and (self.learn_leak or self.decay_input):
            raise ConfigError(
                "learn_leak and decay_input need a leak below 1 to start from: give for instance leak=0.5."
            )
        if not self.threshold > 0:
            raise ConfigError(f"threshold (={self.threshold}) must be above 0.")
        if not 0 <= self.initial < 1:
            raise ConfigError(f"initial (={self.initial}) is in units of the threshold: give 0 <= initial < 1.")
        if not isinstance(self.reset, Reset):
            raise ConfigError(f"reset (={self.reset!r}) must be Reset.SUBTRACT or Reset.ZERO.")
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 1:
            raise ConfigError(f"levels (={self.levels!r}) are spikes within a step: give a whole number, 1 or more.")
        if self.levels > 1 and self.reset is not Reset.SUBTRACT:
            raise ConfigError(
                f"levels (={self.levels}) above 1 need the subtractive reset, as each spike takes its own part away:"
                " give reset=Reset.SUBTRACT, or levels=1."
            )
        if isinstance(self.surrogate, type) or not isinstance(self.surrogate, Surrogate):
            raise ConfigError(f"surrogate (={self.surrogate!r}) must have gradient(u): give Triangle(), for instance.")

    @property
    def gain(self) -> float:
        """Share of the current that charges the potential at each step: 1, or 1 - leak with ``decay_input``."""
        return 1.0 - self.leak if self.decay_input else 1.0


IF = Neuron()
"""Integrate-and-fire: no leak, subtractive reset."""
LIF = Neuron(leak=0.5)
"""Leaky integrate-and-fire: half of the potential is left after each step (tau = 2)."""
PLIF = Neuron(leak=0.5, learn_leak=True, decay_input=True, reset=Reset.ZERO)
"""LIF with a learned leak per layer, decayed input and reset to zero, as in its paper (which uses ``ATan``)."""

NEURONS: dict[str, Neuron] = {"if": IF, "lif": LIF, "plif": PLIF}


class _Step(torch.autograd.Function):
    """Counts of spikes forward, the surrogate gradient backward."""

    @staticmethod
    def forward(ctx, charged: Tensor, neuron: Neuron) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(charged)
        ctx.neuron = neuron
        return spikes_of(charged, neuron.levels)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (charged,) = ctx.saved_tensors
        return grad * slope_of(charged, ctx.neuron.levels, ctx.neuron.surrogate), None


def fire(charged: Tensor, neuron: Neuron) -> Tensor:
    """Spikes of potentials in units of the threshold, 0 or 1, or up to D. The gradient is the surrogate's."""
    return _Step.apply(charged, neuron)


def step(current: Tensor, potential: Tensor, neuron: Neuron, leak: Tensor) -> tuple[Tensor, Tensor]:
    """One time step in units of the threshold: ``(current, potential) -> (spikes, potential)``.

    >>> spikes, state = step(torch.tensor([0.7, 1.2]), torch.zeros(2), IF, torch.tensor(1.0))
    >>> spikes.tolist(), [round(v, 1) for v in state.tolist()]
    ([0.0, 1.0], [0.7, 0.2])
    """
    return discharge(charge(current, potential, neuron, leak), neuron)


def charge(current: Tensor, potential: Tensor, neuron: Neuron, leak: Tensor) -> Tensor:
    """The potential after the current of one step is added, in units of the threshold."""
    return leak * potential + ((1.0 - leak) * current if neuron.decay_input else current)


def discharge(charged: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor]:
    """The spikes of one step, and the potential after the reset."""
    spikes = fire(charged, neuron)
    taken = spikes.detach() if neuron.detach_reset else spikes
    after = charged - taken if neuron.reset is Reset.SUBTRACT else charged * (1.0 - taken)
    return spikes, after


def run(
    current: Current,
    state: Tensor | None,
    neuron: Neuron,
    leak: Tensor,
    threshold: Tensor,
    timesteps: int,
    potentials: list[Tensor] | None = None,
) -> tuple[Spikes, Tensor]:
    """T time steps from a state.

    Args:
        current: ``[T, ...]``, or ``[1, ...]`` for a constant current.
        state: potential ``[...]`` in units of the threshold, or what broadcasts to it; None: ``neuron.initial``.
        neuron: the neuron model.
        leak: scalar tensor.
        threshold: a scalar, or a shape that broadcasts to the current. It is also the height of the spikes.
        timesteps: T.
        potentials: a list to which the potential ``[...]`` after the charge of each step is appended.

    Returns:
        Spikes ``[T, ...]`` in the dtype of the current, and the potential after the last step (at least float32).
    """
    exact = current.to(torch.promote_types(current.dtype, torch.float32)) / threshold
    potential = torch.full_like(exact[0], neuron.initial) if state is None else state
    trains = []
    for t in range(timesteps):
        charged = charge(exact[t if len(exact) > 1 else 0], potential, neuron, leak)
        spikes, potential = discharge(charged, neuron)
        if potentials is not None:
            potentials.append(charged)
        trains.append((threshold * spikes).to(current.dtype))
    return torch.stack(trains), potential


def slope_step(
    charged: Tensor, spikes: Tensor, tangent: Tensor, neuron: Neuron, leak: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward-mode derivative of one ``step`` by a shift of the current that is equal at every step.

    With d for derivatives by this shift: ``du = gain + leak dv``, ``ds = s'(u - 1) du`` (graded: straight through), and
    after the reset ``dv = du - ds`` (reset to zero: ``(1 - s) du - u ds``; ``detach_reset``: without ``ds``).

    Returns:
        ``ds`` and ``dv``.
    """
    moved = gain + leak * tangent
    spiked = slope_of(charged, neuron.levels, neuron.surrogate) * moved
    felt = torch.zeros_like(spiked) if neuron.detach_reset else spiked
    after = moved - felt if neuron.reset is Reset.SUBTRACT else (1.0 - spikes) * moved - charged * felt
    return spiked, after


@torch.no_grad()
def run_with_slope(
    current: Current, state: Tensor | None, neuron: Neuron, leak: Tensor, threshold: Tensor, timesteps: int
) -> tuple[Spikes, Tensor, Tensor]:
    """``run`` without a graph, and the slope of the mean output for the rate-based gradient.

    The slope is the derivative of the mean over time by a shift of the current that is equal at every step. The
    rate-based gradient multiplies by it (Yu et al., arXiv 2410.11488, who call it eligibility; a detached reset to zero
    differs from theirs).

    Returns:
        Spikes ``[T, ...]``, their mean over time ``[...]``, and its slope ``[...]``.
    """
    exact = current.to(torch.promote_types(current.dtype, torch.float32)) / threshold
    potential = torch.full_like(exact[0], neuron.initial) if state is None else state
    tangent, slope = torch.zeros_like(exact[0]), torch.zeros_like(exact[0])
    gain = 1.0 - leak if neuron.decay_input else torch.ones_like(leak)
    trains = []
    for t in range(timesteps):
        charged = leak * potential + gain * exact[t if len(exact) > 1 else 0]
        spikes = spikes_of(charged, neuron.levels)
        spiked, tangent = slope_step(charged, spikes, tangent, neuron, leak, gain)
        potential = charged - spikes if neuron.reset is Reset.SUBTRACT else charged * (1.0 - spikes)
        slope = slope + spiked / timesteps
        trains.append((threshold * spikes).to(current.dtype))
    stacked = torch.stack(trains)
    return stacked, stacked.to(exact.dtype).mean(0).to(current.dtype), slope.to(current.dtype)
