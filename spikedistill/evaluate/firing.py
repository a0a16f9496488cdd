"""Firing rates of a student, or the share of non-zero activations of an ANN."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spikedistill.evaluate.calls import Call, calls_of
from spikedistill.neuron.layer import Spiking
from spikedistill.student.student import Student

ACTIVATIONS = frozenset(
    (
        *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "elu_", "selu", "celu"),
        *("gelu", "silu", "mish", "hardswish", "hardtanh", "hardtanh_", "hardsigmoid", "sigmoid", "sigmoid_", "tanh"),
        *("tanh_", "softplus", "softsign", "logsigmoid", "threshold"),
    )
)
"""Functions whose results count as activations of an ANN. Results of ``CLAMPS`` count if they clamp at 0."""
CLAMPS = frozenset(("clamp", "clamp_", "clamp_min", "clamp_min_"))


@dataclass
class FiringRates:
    """Spikes, and possible spikes (neurons times steps times levels), counted for each layer."""

    spikes: dict[str, float] = field(default_factory=dict)
    possible_spikes: dict[str, int] = field(default_factory=dict)

    def add(self, layer: str, emitted: Tensor, height: Tensor | None = None, levels: int = 1) -> None:
        """Count the output of a layer.

        Args:
            layer: its name.
            emitted: values of any shape; those that are not zero are spikes.
            height: of graded spikes, of which a value holds several.
            levels: how many it may hold.
        """
        counts = torch.count_nonzero(emitted) if height is None else (emitted / height).round().sum(dtype=torch.float64)
        self.spikes[layer] = self.spikes.get(layer, 0.0) + float(counts)
        self.possible_spikes[layer] = self.possible_spikes.get(layer, 0) + emitted.numel() * levels

    def neurons(self, updates: int) -> dict[str, int]:
        """The number of neurons of each layer, if each was updated so often: images times steps times levels."""
        return {layer: possible_spikes // updates for layer, possible_spikes in self.possible_spikes.items()}

    def by_layer(self) -> dict[str, float]:
        """Spikes per neuron and sub-step, 0..1, for each layer in order."""
        return {layer: self.spikes[layer] / self.possible_spikes[layer] for layer in self.spikes}

    def mean(self) -> float:
        """Spikes per neuron and sub-step, 0..1, over all neurons."""
        return sum(self.spikes.values()) / max(1, sum(self.possible_spikes.values()))


@contextmanager
def firing_rates(network: nn.Module) -> Iterator[FiringRates]:
    """Count the spikes of a student, or the non-zero activations of an ANN, in every call while the context is open.

    A count of n within a step is n spikes of the D that its sub-steps could hold.

    An ANN's activations count whether they are modules, functions or methods.

    Raises:
        ConfigError: if the network is neither, or is a compiled ANN.
    """
    rates = FiringRates()
    if not isinstance(network, Student):

        def hear(call: Call) -> None:
            from_zero = call.name in CLAMPS and call.of(1, "min") == 0
            if (call.name in ACTIVATIONS or from_zero) and isinstance(call.result, Tensor):
                rates.add(call.where, call.result.detach())

        with calls_of(network, hear):
            yield rates
        return

    def listen(name: str, layer: Spiking) -> RemovableHandle:
        def heard(_: nn.Module, __: Any, result: tuple[Tensor, Any]) -> None:
            emitted = result[0].detach()
            graded = layer.neuron.levels > 1 and not isinstance(network.walk, partial)
            rates.add(name, emitted, *((layer.heights(emitted).detach(), layer.neuron.levels) if graded else ()))

        return layer.register_forward_hook(heard)

    handles = [listen(name, layer) for name, layer in network.neurons.items()]
    try:
        yield rates
    finally:
        for handle in handles:
            handle.remove()
