"""How much a student spikes, and how many synaptic operations a network takes."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spikedistill.neuron.layer import Spiking
from spikedistill.student.build import Student
from spikedistill.student.rules import ACTIVATIONS


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
def firing_rates(network: nn.Module) -> Iterator[FiringRates]:
    """Count the spikes of every call of a student, or an ANN's activations that are not zero, while it is open."""
    rates = FiringRates()

    def listen(name: str, layer: nn.Module) -> RemovableHandle:
        def count(_: nn.Module, __: Any, output: Any) -> None:
            rates.add(name, (output[0] if isinstance(layer, Spiking) else output).detach())

        return layer.register_forward_hook(count)

    if isinstance(network, Student):
        layers: dict[str, nn.Module] = {**network.neurons}
    else:
        layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, ACTIVATIONS)}
    with _removed([listen(name, layer) for name, layer in layers.items()]):
        yield rates


@contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    """Let hooks listen while the context is open."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Operations:
    """Synaptic operations, counted layer by layer and connection by connection.

    An operation is one non-zero input value meeting one non-zero weight: an accumulate (``acs``) where the inputs are
    spikes, that is zero or one height in every channel, else a multiply-accumulate (``macs``). ``dense`` counts
    all inputs, zeros too. Biases do not count. These are the rules of NeuroBench (arXiv 2304.04640), but that a spike
    there is 1 or -1, and that its dense operations count weights of zero too. Beside them, for a network that would run
    once: ``once``, all connections of a layer, and ``active``, those whose input is not zero at some time step; both
    summed over images.
    """

    acs: dict[str, float] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    once: dict[str, float] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    images: int = 0
    batch: int = 1

    def add(self, layer: str, inputs: Tensor, fan: Tensor) -> None:
        """Count what a layer did with its inputs; ``fan`` holds the connections of each input value."""
        ever = (inputs != 0).unflatten(0, (-1, self.batch)).any(0)
        self.once[layer] = self.once.get(layer, 0.0) + float(fan.sum()) * self.batch
        self.active[layer] = self.active.get(layer, 0.0) + float((ever.sum(0) * fan).sum())
        active = (inputs != 0).to(torch.float64)
        done = float((active.sum(0) * fan).sum())
        spikes = _are_spikes(inputs)
        for kind, count in ((self.acs, done if spikes else 0.0), (self.macs, 0.0 if spikes else done)):
            kind[layer] = kind.get(layer, 0.0) + count
        self.dense[layer] = self.dense.get(layer, 0.0) + float(fan.sum()) * len(inputs)

    def per_image(self) -> dict[str, float]:
        """``acs``, ``macs`` and ``dense`` of the whole network, for one image over all time steps."""
        kinds = {"acs": self.acs, "macs": self.macs, "dense": self.dense}
        return {name: sum(counts.values()) / max(1, self.images) for name, counts in kinds.items()}


def _are_spikes(inputs: Tensor) -> bool:
    """Whether values ``[N, C, ...]`` are zero or one height in every channel; a channel of one value proves nothing."""
    alone = inputs.numel() == inputs.shape[1]
    heights = inputs.amax() if alone else inputs.amax((0, *range(2, inputs.ndim)), keepdim=True)
    return bool(((inputs == 0) | (inputs == heights)).all())


@contextmanager
def operations(network: nn.Module) -> Iterator[Operations]:
    """Count the synaptic operations of every call of a student or an ANN while the context is open.

    Fan-out is exact: at borders, strides, groups and dilations a value is counted as often as it is used. What a
    student computes once for all time steps (the part before the first neuron) counts once.
    """
    counts = Operations()
    fans: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(layer: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
            inputs = given[0].detach()
            key = (name, tuple(inputs.shape[1:]))
            if key not in fans:
                fans[key] = fan_out(layer, inputs.shape[1:])
            counts.add(name, inputs, fans[key].to(inputs.device))

        return count

    def seen(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        frames = given[0].ndim == 5
        counts.batch = given[0].shape[1 if frames else 0]
        counts.images += counts.batch

    chosen = {name: layer for name, layer in network.named_modules() if isinstance(layer, LAYERS)}
    handles = [layer.register_forward_hook(listen(name)) for name, layer in chosen.items()]
    handles.append(network.register_forward_pre_hook(seen))
    with _removed(handles):
        yield counts


def fan_out(layer: nn.Module, shape: Sequence[int]) -> Tensor:
    """How many connections with a non-zero weight start at each value of an input of that shape ``[...]``, float64.

    >>> fan_out(nn.Conv2d(1, 2, 3, padding=1), (1, 2, 3))[0].int().tolist()
    [[8, 12, 8], [8, 12, 8]]
    """
    ones: Any = copy.deepcopy(layer).to("cpu", torch.float64)
    for parameter in ones.parameters():
        parameter.requires_grad_(False)
    ones.weight.copy_((ones.weight != 0).to(torch.float64))
    with torch.enable_grad():
        inputs = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
        (fan,) = torch.autograd.grad(ones.forward(inputs).sum(), inputs)  # hooks stay out
    return fan[0]
