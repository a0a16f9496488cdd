"""Thresholds from the activations of the ANN.

A neuron answers to a constant current x with a rate ``r(x / threshold)``: a staircase for IF, another with a leak
or a reset to zero. The staircase is taken from the neuron itself, by running the reference once over a fine grid of
currents, so the rules below hold for any neuron.
"""

import random
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx

from spikedistill.errors import ConversionError
from spikedistill.neuron.dynamics import Neuron, run
from spikedistill.shapes import Image

Rule = Literal["least-squares", "max", "percentile"]

RESERVOIR = 200_000
"""Activations a layer that the rules look at; more are thinned evenly."""
GRID = 2000
"""Points of a staircase, over currents from 0 to ``REACH`` thresholds."""
REACH = 4.0
CANDIDATES = 100
"""Thresholds tried, as even shares of the largest activation."""


class _Recorder(fx.Interpreter):
    """Runs a traced network and keeps a thinned sample of what chosen nodes return."""

    def __init__(self, module: fx.GraphModule, nodes: set[str]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.seen: dict[str, list[Tensor]] = {name: [] for name in nodes}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.nodes:
            flat = value.detach().flatten()
            self.seen[n.name].append(flat[:: max(1, flat.numel() // RESERVOIR)].float().cpu())
        return value


@torch.no_grad()
def record(module: fx.GraphModule, nodes: set[str], images: Image, batch_size: int = 100) -> dict[str, Tensor]:
    """A sample of the activations at each node over the images (already normalised), one flat tensor each."""
    training = module.training
    module.eval()
    recorder = _Recorder(module, nodes)
    for part in images.split(batch_size):
        recorder.run(part)
    module.train(training)
    return {name: _thin(torch.cat(parts)) for name, parts in recorder.seen.items()}


def _thin(values: Tensor) -> Tensor:
    if len(values) <= RESERVOIR:
        return values
    kept = random.Random(0).sample(range(len(values)), RESERVOIR)
    return values[torch.tensor(kept)]


@torch.no_grad()
def staircase(neuron: Neuron, timesteps: int) -> Tensor:
    """Rates ``[GRID]``, in spikes a step, of a neuron under constant currents from 0 to ``REACH`` thresholds."""
    currents = torch.linspace(0, REACH, GRID)[None]
    one = torch.ones(())
    spikes, _ = run(currents, None, neuron, one * neuron.leak, one, timesteps)
    return spikes.mean(0)


def response(activations: Tensor, threshold: float, stairs: Tensor) -> Tensor:
    """The rate with which a neuron answers to each activation as a constant current."""
    position = (activations.clamp_min(0) / threshold * ((GRID - 1) / REACH)).round().long().clamp_max(GRID - 1)
    return stairs[position]


def choose_threshold(activations: Tensor, stairs: Tensor, rule: Rule, percentile: float = 99.9) -> float:
    """The threshold of one layer.

    Args:
        activations: a flat sample of what the ANN's activation returns.
        stairs: the neuron's ``staircase``.
        rule: ``least-squares`` minimises the squared difference of activation and ``threshold x rate``; ``max`` and
            ``percentile`` take the largest activation, or the value below which that share of the positive ones lies
            (Rueckauer et al., 2017, doi 10.3389/fnins.2017.00682, section 2.2.2, take 99.9 over all).
        percentile: for the rule of that name, 0..100.

    Raises:
        ConversionError: if the activations are not finite.
    """
    if not torch.isfinite(activations).all():
        raise ConversionError("The activations hold NaN or infinity: check the weights and the calibration images.")
    positive = activations[activations > 0]
    if not len(positive):
        return 1.0
    top = float(positive.max())
    if rule == "max":
        return top
    if rule == "percentile":
        return float(torch.quantile(positive, percentile / 100))
    sample = positive[:: max(1, len(positive) // 20_000)]
    shares = [top * (number + 1) / CANDIDATES for number in range(CANDIDATES)]
    errors = [float((sample - value * response(sample, value, stairs)).square().mean()) for value in shares]
    return shares[min(range(CANDIDATES), key=errors.__getitem__)]


def thresholds(
    activations: Mapping[str, Tensor], neuron: Neuron, timesteps: int, rule: Rule, percentile: float
) -> dict[str, tuple[float, float]]:
    """For each layer its threshold, and the rate in spikes a step that it should fire with."""
    stairs = staircase(neuron, timesteps)
    result = {}
    for name, values in activations.items():
        threshold = choose_threshold(values, stairs, rule, percentile)
        result[name] = (threshold, float(response(values, threshold, stairs).mean()))
    return result
