"""The reference: one time step of a neuron, and T of them in a loop that can be read.

With current x and potential v in units of the threshold, leak l, and input gain g (1, or 1 - l where the input decays):

    charge       u = l v + g x
    fire         s = H(u - 1)
    reset        v' = u - s           subtract what the spike carried away
                 v' = u (1 - s)       or begin again at zero

IF has l = 1; LIF a fixed l < 1 (tau = 1 / (1 - l)); PLIF learns it (Fang et al., arXiv 2007.05785). The layer emits
``threshold * s``: the mean over time then stands where the activation of the ANN stood, and the constant folds into the
weights that follow. In one call the potential starts at ``initial`` thresholds; 1/2 makes the answer to a constant
current round instead of truncate (Bu et al., arXiv 2303.04347).

A current that is NaN or infinite makes spikes and potential NaN from its step on: a comparison would call it "no
spike", or "always", and what is broken would pass as an answer. This is our choice.
"""

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from spikedistill.errors import ConfigError
from spikedistill.neuron.surrogate import Surrogate, Triangle, spike
from spikedistill.shapes import Current, Spikes


class Reset(Enum):
    """What a spike does to the potential."""

    SUBTRACT = "subtract"
    ZERO = "zero"


@dataclass(frozen=True)
class Neuron:
    """A neuron model: leak x reset x surrogate.

    Args:
        leak: share of the potential that is left after a step, 0 < leak <= 1 (1: no leak).
        learn_leak: whether each layer trains its own leak, from this value (PLIF).
        decay_input: whether the current is multiplied by 1 - leak, as SpikingJelly's LIF does by default.
        reset: subtractive, or to zero.
        detach_reset: whether the gradient leaves out the reset. Through a subtractive reset it is the more exact one.
        threshold: where a layer without calibration starts, above 0.
        learn_threshold: whether each layer trains its own threshold.
        initial: potential at the first step in units of the threshold, 0 <= initial < 1.
        learn_initial: whether each layer trains its own initial potential, per channel where thresholds are. While
            learning it may leave 0..1; this project's choice.
        surrogate: the derivative of the spike.

    Raises:
        ConfigError: if a value is outside its range or of another kind, or a leak of 1 is to be learned or to decay
            the input.
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
        if isinstance(self.surrogate, type) or not isinstance(self.surrogate, Surrogate):
            raise ConfigError(f"surrogate (={self.surrogate!r}) must have gradient(u): give Triangle(), for instance.")

    @property
    def gain(self) -> float:
        """Share of the current that charges at each step: 1, or 1 - leak where the input decays."""
        return 1.0 - self.leak if self.decay_input else 1.0


IF = Neuron()
"""Integrate and fire: no leak, subtractive reset."""
LIF = Neuron(leak=0.5)
"""Leaky integrate and fire: half of the potential is left after each step (tau = 2)."""
PLIF = Neuron(leak=0.5, learn_leak=True, decay_input=True, reset=Reset.ZERO)
"""LIF with a leak trained per layer, decayed input and reset to zero, as its paper has it (there with arctan)."""

NEURONS: dict[str, Neuron] = {"if": IF, "lif": LIF, "plif": PLIF}


class _Step(torch.autograd.Function):
    """The step function forward, the surrogate backward."""

    @staticmethod
    def forward(ctx, u: Tensor, surrogate: Surrogate) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(u)
        ctx.surrogate = surrogate
        return spike(u)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (u,) = ctx.saved_tensors
        return grad * ctx.surrogate.gradient(u), None


def fire(u: Tensor, surrogate: Surrogate) -> Tensor:
    """Spikes of potentials above threshold: ``H(u)``, differentiated by the surrogate."""
    return _Step.apply(u, surrogate)


def step(current: Tensor, potential: Tensor, neuron: Neuron, leak: Tensor) -> tuple[Tensor, Tensor]:
    """One time step, everything in units of the threshold: ``(current, state) -> (spikes, state)``.

    >>> spikes, state = step(torch.tensor([0.7, 1.2]), torch.zeros(2), IF, torch.tensor(1.0))
    >>> spikes.tolist(), [round(v, 1) for v in state.tolist()]
    ([0.0, 1.0], [0.7, 0.2])
    """
    return discharge(charge(current, potential, neuron, leak), neuron)


def charge(current: Tensor, potential: Tensor, neuron: Neuron, leak: Tensor) -> Tensor:
    """The potential after the current of one step has come in, in units of the threshold."""
    return leak * potential + ((1.0 - leak) * current if neuron.decay_input else current)


def discharge(charged: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor]:
    """The spikes of one step, and the potential that they leave."""
    spikes = fire(charged - 1.0, neuron.surrogate)
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
        current: ``[T, ...]``, or ``[1, ...]`` for a current that is the same at every step.
        state: potential ``[...]``, or what spreads over it, in units of the threshold; fresh where None.
        neuron: the model.
        leak: scalar tensor.
        threshold: a scalar, or what spreads over the current; the spikes that leave have this height.
        timesteps: T.
        potentials: takes the potential ``[...]`` after the charge of every step, where given.

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
    """How a shift of the current, the same at every step, moves this step's spike and the potential after it.

    Forward-mode differentiation of ``step``: with d the tangent of a quantity, ``du = gain + leak dv``, ``ds =
    s'(u - 1) du``, and after the reset ``dv = du - ds`` (to zero: ``(1 - s) du - u ds``; detached: without ``ds``).

    Returns:
        ``ds`` and ``dv``.
    """
    moved = gain + leak * tangent
    spiked = neuron.surrogate.gradient(charged - 1.0) * moved
    felt = torch.zeros_like(spiked) if neuron.detach_reset else spiked
    after = moved - felt if neuron.reset is Reset.SUBTRACT else (1.0 - spikes) * moved - charged * felt
    return spiked, after


@torch.no_grad()
def run_with_slope(
    current: Current, state: Tensor | None, neuron: Neuron, leak: Tensor, threshold: Tensor, timesteps: int
) -> tuple[Spikes, Tensor, Tensor]:
    """T time steps from a state (fresh where None) without graph: spikes ``[T, ...]``, their mean, and its slope.

    The slope ``[...]`` is the derivative of the mean over time by a shift of the current that is equal at every step:
    what the rate-based gradient multiplies with (Yu et al., arXiv 2410.11488: their eligibility, but for a detached
    reset to zero).
    """
    exact = current.to(torch.promote_types(current.dtype, torch.float32)) / threshold
    potential = torch.full_like(exact[0], neuron.initial) if state is None else state
    tangent, slope = torch.zeros_like(exact[0]), torch.zeros_like(exact[0])
    gain = 1.0 - leak if neuron.decay_input else torch.ones_like(leak)
    trains = []
    for t in range(timesteps):
        charged = leak * potential + gain * exact[t if len(exact) > 1 else 0]
        spikes = spike(charged - 1.0)
        spiked, tangent = slope_step(charged, spikes, tangent, neuron, leak, gain)
        potential = charged - spikes if neuron.reset is Reset.SUBTRACT else charged * (1.0 - spikes)
        slope = slope + spiked / timesteps
        trains.append((threshold * spikes).to(current.dtype))
    stacked = torch.stack(trains)
    return stacked, stacked.to(exact.dtype).mean(0).to(current.dtype), slope.to(current.dtype)
