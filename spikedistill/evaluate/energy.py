"""Estimated energy per image, under several published cost models, and against a quantised ANN.

These are estimates from counted operations, not measurements of a chip. All constants are for 45 nm at 0.9 V, from
Horowitz, "Computing's energy problem", ISSCC 2014, figure 1.1.9: float32 add 0.9 pJ, float32 multiply 3.7 pJ, 32-bit
integer add 0.1 pJ, 8-bit integer multiply 0.2 pJ, 64 bits from an 8 KiB cache 10 pJ.

The ANN of equal information is the student's own network, run once with activations of ``ceil(log2(T D + 1))``
bits, since T steps of D levels distinguish T D + 1 values (Yan et al., arXiv 2409.08290, for D = 1). Every sub-step
counts: a count of n spikes is n accumulates at each of its connections, and a neuron is updated T D times.

The following is our choice. A multiplication with fewer bits costs in proportion to the bits. Potentials have 16 bits.
A neuron's own arithmetic (leak, comparison, reset) costs nothing. Memory is used without any reuse: an accumulate reads
its weight, and reads and writes the potential that it adds to; each neuron's potential is read and written once more at
every sub-step; a multiply-accumulate reads weight and activation and adds in a register; an activation is written once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spikedistill.evaluate.operations import Operations

WEIGHT_BITS = 8
POTENTIAL_BITS = 16
"""Bits of a potential, which is a sum of many 8-bit weights."""
INPUT_BITS = 8
"""Bits of an image's values, and of the activations of an ANN that is not quantised further."""


@dataclass(frozen=True)
class EnergyModel:
    """Costs in pJ."""

    name: str
    what: str
    add: float
    multiply: float
    """For an activation of 8 bits; with integers in proportion to the bits."""
    integers: bool
    bit: float
    """To read or write one bit of memory."""

    def accumulate(self) -> float:
        """One spike times one weight, in pJ."""
        return self.add + self.bit * (WEIGHT_BITS + 2 * POTENTIAL_BITS)

    def multiply_accumulate(self, bits: int) -> float:
        """One activation with this number of bits times one weight, in pJ."""
        share = bits / 8 if self.integers else 1.0
        return self.multiply * share + self.add + self.bit * (WEIGHT_BITS + bits)

    def student(self, cost: "Cost") -> float:
        """Energy of a spiking network per image, in pJ."""
        neurons = cost.updates * 2 * POTENTIAL_BITS * self.bit
        return cost.acs * self.accumulate() + cost.macs * self.multiply_accumulate(INPUT_BITS) + neurons

    def ann(self, macs: float, activations: float, bits: int) -> float:
        """Energy of an ANN per image, in pJ; its activations have this number of bits."""
        return macs * self.multiply_accumulate(bits) + activations * bits * self.bit


CACHE_BIT = 10.0 / 64
MODELS = (
    EnergyModel("float32", "operations only, float32 (Horowitz 2014)", 0.9, 3.7, False, 0.0),
    EnergyModel("int8", "operations only, 8-bit weights (Horowitz 2014)", 0.1, 0.2, True, 0.0),
    EnergyModel("memory", "8-bit weights, with memory traffic of an 8 KiB cache", 0.1, 0.2, True, CACHE_BIT),
)


QUANTISED_ANNS = {
    "quantised": "that of its quantised ANN",
    "quantised-sparse": "that of its quantised ANN with zeros skipped",
}
"""The ANNs that a student is compared with, and their names in messages."""


@dataclass(frozen=True)
class Cost:
    """Operations per image, all numbers means over images.

    Args:
        acs: accumulates, one for each spike and connection.
        macs: multiply-accumulates, for inputs that are not spikes (the image, average-pooled spikes).
        spikes: spikes of all neurons over all sub-steps.
        updates: neurons times steps times levels; for an ANN the number of its activations.
        dense: connections of the network, each used once.
        active: connections whose input is not zero at some step.
        timesteps: T; 1 for an ANN.
        levels: D; 1 for an ANN.
    """

    acs: float
    macs: float
    spikes: float
    updates: float
    dense: float
    active: float
    timesteps: int
    levels: int = 1

    @property
    def bits(self) -> int:
        """Bits of an activation in the ANN of equal information."""
        return math.ceil(math.log2(self.timesteps * self.levels + 1))


def cost_of(operations: Operations, timesteps: int, spikes: float, updates: float, levels: int = 1) -> Cost:
    """The mean cost per image from counts over many images; ``spikes`` and ``updates`` are sums over the same images.

    Raises:
        ConfigError: if no image was counted.
    """
    images, per_image = operations.images, operations.per_image()
    return Cost(
        acs=per_image["acs"],
        macs=per_image["macs"],
        spikes=spikes / images,
        updates=updates / images,
        dense=sum(operations.once.values()) / images,
        active=sum(operations.active.values()) / images,
        timesteps=timesteps,
        levels=levels,
    )


def energies(cost: Cost) -> dict[str, dict[str, float]]:
    """Energy per image in µJ: model -> ``student``, ``quantised`` or ``quantised-sparse`` -> energy.

    The last two are ANNs of equal information. The sparse one skips activations that are zero.
    """
    activations = cost.updates / (cost.timesteps * cost.levels)
    return {
        model.name: {
            "student": model.student(cost) / 1e6,
            "quantised": model.ann(cost.dense, activations, cost.bits) / 1e6,
            "quantised-sparse": model.ann(cost.active, activations, cost.bits) / 1e6,
        }
        for model in MODELS
    }


def ann_energies(cost: Cost) -> dict[str, float]:
    """Energy of an ANN per image in µJ, with 8-bit activations (float32 in the model of that name): model -> energy."""
    return {model.name: model.ann(cost.dense, cost.updates, INPUT_BITS) / 1e6 for model in MODELS}


def verdicts(name: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One sentence for every model under which a student takes at least as much energy as its quantised ANN."""
    lines = []
    for model in MODELS:
        energy = found[model.name]
        told = [
            f"{energy['student'] / energy[rival]:.2f} times {whose} ({micro(energy[rival])} µJ)"
            for rival, whose in QUANTISED_ANNS.items()
            if energy["student"] >= energy[rival]
        ]
        if told:
            takes = f"{name} takes {micro(energy['student'])} µJ per image under '{model.name}' ({model.what})"
            lines.append(f"{takes}: {', '.join(told)}.")
    return lines


def micro(energy: float) -> str:
    """An energy in µJ as text, with two decimals or at least three digits.

    >>> micro(35.4897), micro(0.61306), micro(0.000412)
    ('35.49', '0.613', '0.000412')
    """
    return f"{energy:.2f}" if energy >= 1 else f"{energy:.3g}"
