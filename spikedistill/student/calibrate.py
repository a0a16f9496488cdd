"""Thresholds from the activations of the ANN.

A neuron answers to a constant current x with a rate ``r(x / threshold)``: a staircase for IF, another with a leak
or a reset to zero. The staircase is taken from the neuron itself, by running the reference once over a fine grid of
currents, so the rules below hold for any neuron. The grid ends where more current changes nothing: a neuron that takes
the share g of its current fires at every step from 1 / g thresholds on.
"""

import contextlib
import math
import operator
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from spikedistill.errors import ConversionError
from spikedistill.neuron.dynamics import Neuron, run
from spikedistill.neuron.layer import Spiking
from spikedistill.student.graph import Walk, repeat_time

Rule = Literal["least-squares", "max", "percentile"]

RESERVOIR = 200_000
"""Activations a layer that the rules look at; more are thinned evenly."""
CHANNEL_RESERVOIR = 1000
"""Activations per channel and batch, where each channel has a threshold of its own."""
FEW = 20
"""A channel with fewer positive activations takes its layer's threshold."""
SMALLEST_SHARE = 0.1
"""No channel's threshold is a smaller share of its layer's: training may wake the channel up."""
GRID = 2000
"""Points of a staircase over currents from 0 to ``REACH`` thresholds; one that goes further has them as close."""
REACH = 4.0
"""Thresholds up to which every staircase goes; further where the neuron fires at every step only beyond."""
MARGIN = 1.001
"""How far beyond that point a staircase ends, and activations are put: rounding must not leave the last stair out."""
LONGEST = 10_000
"""Thresholds beyond which no staircase goes: a neuron that takes a smaller share of its current is refused."""
PIECE = 2**18
"""Points of a staircase that are run at a time."""
CANDIDATES = 100
"""Thresholds tried, as even shares of the largest activation."""
NOT_FINITE = "The activations hold NaN or infinity: check the weights and the calibration images."


class _Recorder(Walk):
    """Runs a traced network and keeps what ``look`` makes of what chosen nodes return."""

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
    training = module.training
    module.eval()
    recorder = _Recorder(module, nodes, look)
    for part in images.chunk(math.ceil(len(images) / batch_size)):
        recorder.run(part)
    module.train(training)
    if not recorder.finite:
        raise ConversionError(NOT_FINITE)
    return recorder.seen


def record(
    module: fx.GraphModule, nodes: set[str], images: Tensor, per_channel: bool = False, batch_size: int = 100
) -> dict[str, Tensor]:
    """A sample of the activations at each node over the images (already normalised): ``[n]``, or ``[C, n]``."""
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
    """The stride of at least 1 that is wanted, or the next above it that comes by every place of an image."""
    stride = max(1, wanted)
    while math.gcd(stride, places) > 1:
        stride += 1
    return stride


def channel_means(module: fx.GraphModule, nodes: set[str], images: Tensor, batch_size: int = 100) -> dict[str, Tensor]:
    """The mean activation of every channel at each node over the images (already normalised), ``[C]`` each."""
    seen = _look(module, nodes, images, batch_size, lambda value: _by_channel(value)[None] * len(value))
    return {name: torch.cat(parts).sum(0) / len(images) for name, parts in seen.items()}


def _by_channel(value: Tensor) -> Tensor:
    """``[B, C, ...]`` to its means ``[C]``."""
    return value.float().transpose(0, 1).flatten(1).mean(1)


def _thin(values: Tensor) -> Tensor:
    if len(values) <= RESERVOIR:
        return values
    kept = random.Random(0).sample(range(len(values)), RESERVOIR)
    return values[torch.tensor(kept)]


@torch.no_grad()
def staircase(neuron: Neuron, timesteps: int) -> Tensor:
    """Rates ``[n]``, in spikes a step, under constant currents from 0 that are ``REACH / (GRID - 1)`` thresholds apart.

    The last is one at which the neuron fires at every step, so more current changes nothing: ``n`` is ``GRID`` for
    neurons that do so within ``REACH``, as all that take their whole current.

    Raises:
        ConversionError: if the neuron takes so small a share of its current that it hardly ever fires.
    """
    everything = 1.0 / neuron.gain
    if everything > LONGEST:
        raise ConversionError(
            f"A neuron with leak {neuron.leak} and decayed input takes {neuron.gain:.2g} of its current at each step,"
            f" too little to calibrate a threshold: expected {1 / LONGEST} or more. Give a smaller leak, or"
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
    """The rate with which a neuron answers to each activation as a constant current."""
    position = (activations.clamp_min(0) / threshold * ((GRID - 1) / REACH)).round().clamp_max(len(stairs) - 1)
    return stairs[position.long()]


def choose_threshold(activations: Tensor, stairs: Tensor, rule: Rule, percentile: float = 99.9) -> float:
    """The threshold of one layer.

    A neuron that fires at every step only beyond ``REACH`` is silent under thresholds near the largest activation; for
    it the thresholds tried end where that activation first makes it fire.

    Args:
        activations: a flat sample of what the ANN's activation returns.
        stairs: the neuron's ``staircase``.
        rule: ``least-squares`` minimises the squared difference of activation and ``threshold x rate`` (after
            Li et al., arXiv 2106.06984; here on the neuron's own staircase); ``max`` and
            ``percentile`` take the largest activation, or the value below which that share of the positive ones lies
            (Rueckauer et al., 2017, doi 10.3389/fnins.2017.00682, section 2.2.2, take 99.9 over all), for a neuron
            that takes its whole current; see ``thresholds`` for others.
        percentile: for the rule of that name, 0..100.

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
        return top
    if rule == "percentile":
        return float(torch.quantile(positive, percentile / 100))
    sample = positive[:: max(1, len(positive) // 20_000)]
    tried = (torch.arange(CANDIDATES) + 1) * (_largest_tried(top, stairs) / CANDIDATES)
    errors = [(sample - value * response(sample, value, stairs)).square().mean() for value in tried.split(1)]
    return float(tried[int(torch.stack(errors).argmin())])


def _largest_tried(top: float, stairs: Tensor) -> float:
    """The largest threshold worth trying for a layer whose largest activation is ``top``."""
    if len(stairs) <= GRID:
        return top
    first = int(stairs.nonzero()[0]) + 1  # a point further, so that it fires without a doubt
    return top / (first * REACH / (GRID - 1))


def channel_thresholds(
    activations: Tensor, layer: float, stairs: Tensor, rule: Rule, percentile: float = 99.9
) -> Tensor:
    """The threshold of each channel.

    Args:
        activations: a sample ``[C, n]`` of what the ANN's activation returns.
        layer: the threshold of the whole layer, taken where a channel was hardly active.
        stairs: the neuron's ``staircase``.
        rule: see ``choose_threshold``.
        percentile: for the rule of that name.

    Returns:
        ``[C]``, at least ``SMALLEST_SHARE`` of the layer's.
    """
    chosen = [
        choose_threshold(channel, stairs, rule, percentile) if int((channel > 0).sum()) >= FEW else layer
        for channel in activations
    ]
    return torch.tensor(chosen).clamp_min(SMALLEST_SHARE * layer)


def thresholds(
    activations: Mapping[str, Tensor], neuron: Neuron, timesteps: int, rule: Rule, percentile: float
) -> dict[str, tuple[Tensor, float]]:
    """For each layer its threshold, or thresholds ``[C]``, and the rate in spikes a step that it should fire with.

    The rules ``max`` and ``percentile`` mean that the activation they take makes the neuron fire at every step. Where
    a neuron takes the share g of its current, that is at g times the activation: at the activation itself it would
    never fire, however long the current lasts. This is our choice, the paper has no such neuron.

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
        one = choose_threshold(_thin(values.flatten()), stairs, rule, percentile)
        chosen = torch.tensor(one) if values.ndim == 1 else channel_thresholds(values, one, stairs, rule, percentile)
        chosen = taken * chosen
        spread = chosen[:, None] if chosen.ndim else chosen
        result[name] = (chosen, float(response(values, spread, stairs).mean()))
    return result


@torch.no_grad()
def silent_layers(
    core: fx.GraphModule, neurons: Mapping[str, Spiking], inputs: Tensor, states: int, timesteps: int, batch_size: int
) -> set[str]:
    """The layers of neurons that never fire when the network runs as it is, each layer on what the ones before it emit.

    A layer that should fire by its own activations may be silent all the same, where those before it emit too little.

    Args:
        core: a student's graph, on the images as they are at every step.
        neurons: its layers of neurons by name.
        inputs: the images, already normalised.
        states: how many tensors its state has.
        timesteps: T.
        batch_size: images at a time; as soon as every layer has fired, no more are shown.
    """
    training, backends = core.training, {layer: layer.backend for layer in neurons.values()}
    core.eval()
    silent = set(neurons)
    for layer in backends:
        layer.backend = "reference"  # nothing is compiled for a few images

    def listen(name: str) -> Callable[..., None]:
        return lambda _, __, result: silent.discard(name) if result[0].any() else None

    handles = [layer.register_forward_hook(listen(name)) for name, layer in neurons.items()]
    for part in inputs.split(batch_size):
        if silent:
            core(part, timesteps, timesteps, (None,) * states, False)
    for handle in handles:
        handle.remove()
    for layer, backend in backends.items():
        layer.backend = backend
    core.train(training)
    return silent


class _Stop(BaseException):
    """A layer has answered, and nobody waits for what comes after it; torch.fx would print an ``Exception``."""


@torch.no_grad()
def correct_biases(
    student: nn.Module,
    core: fx.GraphModule,
    neurons: Mapping[str, Spiking],
    wanted: Mapping[str, Tensor],
    images: Tensor,
    batch_size: int,
) -> None:
    """Shift the biases before every layer of neurons so that its channels answer as the ANN's do on average.

    The bias correction of Li et al. (ICML 2021, arXiv 2106.06984), layer after layer: what a layer still
    lacks after the ones before it are corrected is added to the batch norm, convolution or linear layer that feeds it.
    A layer fed by nothing that has a bias of its own stays as it is.

    Args:
        student: in place.
        core: its graph.
        neurons: its layers of neurons by name, in order of execution.
        wanted: the ANN's mean activation, by layer, ``[C]`` each.
        images: raw images in 0..1.
        batch_size: images at a time.
    """
    training = student.training
    student.eval()
    calls = {str(node.target): node for node in core.graph.nodes if node.op == "call_module"}
    device = next(student.parameters()).device
    for name, layer in neurons.items():
        before = preceding_layer(core, calls[f"{core.meta['neurons']}.{name}"].args[0])
        if before is None:
            continue
        sums: list[Tensor] = []

        def listen(_: nn.Module, given: Any, result: tuple[Tensor, Any], sums: list[Tensor] = sums) -> None:
            sums.append(_by_channel(result[0]))
            raise _Stop

        handle = layer.register_forward_hook(listen)
        parts = images.split(batch_size)
        for part in parts:
            with contextlib.suppress(_Stop):
                student(part.to(device))
        handle.remove()
        weights = torch.tensor([len(part) / len(images) for part in parts], device=device)
        lacking = wanted[name].to(device) - (torch.stack(sums) * weights[:, None]).sum(0)
        before.bias += lacking.to(before.bias)
    student.train(training)


SUMS = (operator.add, torch.add, "add")
PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def preceding_layer(core: fx.GraphModule, node: Any) -> Any:
    """The layer whose bias a node's value ends in and nothing else reads, if there is one; of a sum any one part's."""
    if not isinstance(node, fx.Node) or len(node.users) > 1:
        return None
    if node.op == "call_module":
        layer = core.get_submodule(str(node.target))
        if isinstance(layer, PASSING):
            return preceding_layer(core, node.args[0])
        calls = sum(other.op == "call_module" and other.target == node.target for other in core.graph.nodes)
        return layer if calls == 1 and getattr(layer, "bias", None) is not None else None
    if node.target in SUMS or node.target is repeat_time:
        found = (preceding_layer(core, part) for part in node.args)
        return next((layer for layer in found if layer is not None), None)
    return None
