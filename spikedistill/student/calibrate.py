"""Thresholds from the activations of the ANN.

Under a constant current x a neuron fires with a rate ``r(x / threshold)``. This function is a staircase. Its form
depends on the leak and the reset. It is measured on the neuron itself: the reference runs once over a fine grid of
currents. So the rules below hold for any neuron. The grid ends where more current changes nothing. A neuron that takes
the fraction g of its current fires at every step from 1 / g thresholds on.
"""

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx

from spikedistill.errors import ConversionError
from spikedistill.inputs import evaluating
from spikedistill.neuron.dynamics import Neuron, run
from spikedistill.neuron.layer import Spiking, by_reference
from spikedistill.student.graph import GraphInterpreter

Rule = Literal["least-squares", "max", "percentile"]

RESERVOIR = 200_000
"""The rules look at this many activations per layer; of more, evenly spaced ones are taken."""
CHANNEL_RESERVOIR = 1000
"""Activations per channel and batch, if each channel has its own threshold."""
FEW = 20
"""A channel with fewer positive activations takes the threshold of its layer."""
SMALLEST_SHARE = 0.1
"""The smallest threshold of a channel as a fraction of its layer's: a silent channel may become active in training."""
GRID = 2000
"""Points of a staircase over currents from 0 to ``REACH`` thresholds. A longer one has the same spacing."""
REACH = 4.0
"""Every staircase goes up to this current, in thresholds, and further until the neuron fires at every step."""
MARGIN = 1.001
"""A staircase ends, and activations are placed, this factor beyond that point, so rounding keeps the last stair."""
LONGEST = 10_000
"""The longest staircase, in thresholds. A neuron that takes too small a fraction of its current for it is refused."""
PIECE = 2**18
"""Points of a staircase that run at the same time."""
CANDIDATES = 100
"""Number of thresholds tried, evenly spaced up to the largest activation."""
NOT_FINITE = "The activations hold NaN or infinity: check the weights and the calibration images."


class _Recorder(GraphInterpreter):
    """Runs a traced network and keeps ``look(output)`` for each output of the given nodes."""

    def __init__(self, module: fx.GraphModule, nodes: set[str], look: Callable[[Tensor], Tensor]) -> None:
        super().__init__(module)
        self.nodes, self.look = nodes, look
        self.seen: dict[str, list[Tensor]] = {name: [] for name in nodes}
        self.finite = True

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.nodes:
            self.finite = self.finite and bool(torch.isfinite(value).all())
            self.seen[n.name].append(self.look(value.detach()).float().cpu())
        return value


@torch.no_grad()
def _look(
    module: fx.GraphModule, nodes: set[str], images: Tensor, batch_size: int, look: Callable[[Tensor], Tensor]
) -> dict[str, list[Tensor]]:
    recorder = _Recorder(module, nodes, look)
    with evaluating(module):
        for part in images.chunk(math.ceil(len(images) / batch_size)):
            recorder.run(part)
    if not recorder.finite:
        raise ConversionError(NOT_FINITE)
    return recorder.seen


def record(
    module: fx.GraphModule, nodes: set[str], images: Tensor, per_channel: bool = False, batch_size: int = 100
) -> dict[str, Tensor]:
    """A sample of the activations at each node, ``[n]`` or per channel ``[C, n]``, over images already normalised."""
    if per_channel:
        seen = _look(module, nodes, images, batch_size, _some_of_each_channel)
        return {name: torch.cat(parts, dim=1) for name, parts in seen.items()}
    seen = _look(module, nodes, images, batch_size, _every_so_many)
    return {name: _thin(torch.cat(parts)) for name, parts in seen.items()}


def _every_so_many(value: Tensor) -> Tensor:
    return value.flatten()[:: _stride(value.numel() // RESERVOIR, value[0, 0].numel())]


def _some_of_each_channel(value: Tensor) -> Tensor:
    """``[B, C, ...]`` to ``[C, n]``."""
    flat = value.transpose(0, 1).flatten(1)
    return flat[:, :: _stride(flat.shape[1] // CHANNEL_RESERVOIR, value[0, 0].numel())]


def _stride(wanted: int, places: int) -> int:
    """The stride, at least 1, or the next larger one that visits every place of an image."""
    stride = max(1, wanted)
    while math.gcd(stride, places) > 1:
        stride += 1
    return stride


def channel_means(module: fx.GraphModule, nodes: set[str], images: Tensor, batch_size: int = 100) -> dict[str, Tensor]:
    """The mean activation of every channel at each node, ``[C]`` each, over images already normalised."""
    seen = _look(module, nodes, images, batch_size, lambda value: by_channel(value)[None] * len(value))
    return {name: torch.cat(parts).sum(0) / len(images) for name, parts in seen.items()}


def by_channel(value: Tensor) -> Tensor:
    """The means ``[C]`` of ``[B, C, ...]``."""
    return value.float().transpose(0, 1).flatten(1).mean(1)


def _thin(values: Tensor) -> Tensor:
    if len(values) <= RESERVOIR:
        return values
    kept = random.Random(0).sample(range(len(values)), RESERVOIR)
    return values[torch.tensor(kept)]


@torch.no_grad()
def staircase(neuron: Neuron, timesteps: int) -> Tensor:
    """Firing rates ``[n]`` in spikes per step, under constant currents that begin at 0.

    Currents are ``REACH / (GRID - 1)`` thresholds apart. At the last one the neuron fires at every step, so more
    current changes nothing. ``n`` is ``GRID`` if this happens within ``REACH``, as for every neuron that takes its
    whole current.

    Raises:
        ConversionError: if the neuron takes so small a fraction of its current that it hardly ever fires.
    """
    everything = neuron.levels / neuron.gain
    if 1.0 / neuron.gain > LONGEST:
        raise ConversionError(
            f"A neuron with leak {neuron.leak} and decayed input takes {neuron.gain:.2g} of its current at each step."
            f" That is too little to calibrate a threshold: expected {1 / LONGEST} or more. Give a smaller leak, or"
            " decay_input=False."
        )
    points = GRID
    if everything > REACH:
        points += math.ceil((MARGIN * everything - REACH) / REACH * (GRID - 1))
    currents = torch.linspace(0, REACH * (points - 1) / (GRID - 1), points)[None]
    one = torch.ones(())
    parts = [run(part, None, neuron, one * neuron.leak, one, timesteps)[0] for part in currents.split(PIECE, dim=1)]
    return torch.cat([spikes.mean(0) for spikes in parts])


def response(activations: Tensor, threshold: float | Tensor, stairs: Tensor) -> Tensor:
    """The firing rate of a neuron, in spikes per step, with each activation as a constant current."""
    position = (activations.clamp_min(0) / threshold * ((GRID - 1) / REACH)).round().clamp_max(len(stairs) - 1)
    return stairs[position.long()]


def choose_threshold(
    activations: Tensor, stairs: Tensor, rule: Rule, percentile: float = 99.9, levels: int = 1
) -> float:
    """The threshold of one layer.

    A neuron that fires at every step only beyond ``REACH`` is silent with thresholds near the largest activation. For
    such a neuron the largest threshold tried is one at which that activation makes it fire.

    Args:
        activations: a flat sample of the ANN's activations.
        stairs: the neuron's ``staircase``.
        rule: ``least-squares`` minimises the squared difference between activation and ``threshold x rate`` (after
            Li et al., arXiv 2106.06984; here with the neuron's own staircase). ``max`` takes the largest activation.
            ``percentile`` takes that percentile of the positive activations (Rueckauer et al., 2017,
            doi 10.3389/fnins.2017.00682, section 2.2.2, take 99.9 over all activations). Both are for a neuron that
            takes its whole current; see ``thresholds`` for others.
        percentile: for the rule of that name, 0..100.
        levels: D, spikes within a step. The activation of the rules ``max`` and ``percentile`` is worth D spikes, and
            no threshold above the largest activation over D is tried: more only makes the stairs coarser.

    Raises:
        ConversionError: if the activations are not finite.
    """
    if not torch.isfinite(activations).all():
        raise ConversionError(NOT_FINITE)
    positive = activations[activations > 0]
    if not len(positive):
        return 1.0
    top = float(positive.max())
    if rule == "max":
        return top / levels
    if rule == "percentile":
        return float(torch.quantile(positive, percentile / 100)) / levels
    sample = positive[:: max(1, len(positive) // 20_000)]
    tried = (torch.arange(CANDIDATES) + 1) * (_largest_tried(top, stairs, levels) / CANDIDATES)
    errors = [(sample - value * response(sample, value, stairs)).square().mean() for value in tried.split(1)]
    return float(tried[int(torch.stack(errors).argmin())])


def _largest_tried(top: float, stairs: Tensor, levels: int) -> float:
    """The largest threshold worth trying for a layer whose largest activation is ``top``."""
    if len(stairs) <= GRID or levels > 1:
        return top / levels
    first = int(stairs.nonzero()[0]) + 1  # one point further, so that the neuron surely fires
    return top / (first * REACH / (GRID - 1))


def channel_thresholds(
    activations: Tensor, layer: float, stairs: Tensor, rule: Rule, percentile: float = 99.9, levels: int = 1
) -> Tensor:
    """The threshold of each channel.

    Args:
        activations: a sample ``[C, n]`` of the ANN's activations.
        layer: the threshold of the whole layer, for channels that were hardly active.
        stairs: the neuron's ``staircase``.
        rule: see ``choose_threshold``.
        percentile: for the rule of that name.
        levels: D, spikes within a step.

    Returns:
        ``[C]``, each at least ``SMALLEST_SHARE`` times the layer's threshold.
    """
    chosen = [
        choose_threshold(channel, stairs, rule, percentile, levels) if int((channel > 0).sum()) >= FEW else layer
        for channel in activations
    ]
    return torch.tensor(chosen).clamp_min(SMALLEST_SHARE * layer)


def thresholds(
    activations: Mapping[str, Tensor], neuron: Neuron, timesteps: int, rule: Rule, percentile: float
) -> dict[str, tuple[Tensor, float]]:
    """For each layer its threshold, or thresholds ``[C]``, and its expected firing rate in spikes per step.

    By the rules ``max`` and ``percentile`` the activation that they take makes the neuron fire at every step. If a
    neuron takes the fraction g of its current, its threshold is therefore g times that activation. With the activation
    itself as its threshold it would never fire. This is our choice: the paper has no such neuron.

    Args:
        activations: by layer, ``[n]`` for one threshold, or ``[C, n]`` for one per channel.
        neuron: the model.
        timesteps: T.
        rule: see ``choose_threshold``.
        percentile: for the rule of that name.
    """
    stairs = staircase(neuron, timesteps)
    taken = 1.0 if rule == "least-squares" or neuron.gain == 1 else neuron.gain / MARGIN
    result = {}
    for name, values in activations.items():
        how = (stairs, rule, percentile, neuron.levels)
        one = choose_threshold(_thin(values.flatten()), *how)
        chosen = torch.tensor(one) if values.ndim == 1 else channel_thresholds(values, one, *how)
        chosen = taken * chosen
        spread = chosen[:, None] if chosen.ndim else chosen
        result[name] = (chosen, float(response(values, spread, stairs).mean()))
    return result


@torch.no_grad()
def silent_layers(
    core: fx.GraphModule, neurons: Mapping[str, Spiking], inputs: Tensor, states: int, timesteps: int, batch_size: int
) -> set[str]:
    """The layers of neurons that never fire when the spiking network runs on the given images.

    A layer whose ANN activations promise spikes may still be silent, if the layers before it emit too few.

    Args:
        core: a student's graph. It sees the image itself at every step.
        neurons: its layers of neurons by name.
        inputs: the images, already normalised.
        states: the number of tensors in its state.
        timesteps: T.
        batch_size: images at a time. The search ends as soon as every layer has fired.
    """
    silent = set(neurons)

    def listen(name: str) -> Callable[..., None]:
        return lambda _, __, result: silent.discard(name) if result[0].any() else None

    handles = [layer.register_forward_hook(listen(name)) for name, layer in neurons.items()]
    with evaluating(core), by_reference(*neurons.values()):
        for part in inputs.split(batch_size):
            if silent:
                core(part, timesteps, timesteps, (None,) * states, False)
    for handle in handles:
        handle.remove()
    return silent
