"""How much a student spikes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spikedistill.neuron.layer import Spiking
from spikedistill.student.build import Student


@dataclass
class FiringRates:
    """Spikes and chances to spike, counted layer by layer."""

    spikes: dict[str, float] = field(default_factory=dict)
    chances: dict[str, int] = field(default_factory=dict)

    def add(self, layer: str, emitted: Tensor) -> None:
        """Count what a layer emitted."""
        self.spikes[layer] = self.spikes.get(layer, 0.0) + float(torch.count_nonzero(emitted))
        self.chances[layer] = self.chances.get(layer, 0) + emitted.numel()

    def by_layer(self) -> dict[str, float]:
        """Spikes a neuron and step, 0..1, for each layer in order."""
        return {layer: self.spikes[layer] / self.chances[layer] for layer in self.spikes}

    def mean(self) -> float:
        """Spikes a neuron and step, 0..1, over all neurons."""
        return sum(self.spikes.values()) / max(1, sum(self.chances.values()))


@contextmanager
def firing_rates(student: Student) -> Iterator[FiringRates]:
    """Count the spikes of every call while the context is open."""
    rates = FiringRates()

    def listen(name: str, layer: Spiking) -> torch.utils.hooks.RemovableHandle:
        return layer.register_forward_hook(lambda _, __, output: rates.add(name, output[0].detach()))

    handles = [listen(name, layer) for name, layer in student.neurons.items()]
    try:
        yield rates
    finally:
        for handle in handles:
            handle.remove()
