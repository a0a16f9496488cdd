"""What an answer costs in energy, under several published models side by side, and against a quantised ANN.

These are estimates from counted operations, not measurements of a chip. Every constant is of 45 nm at 0.9 V: Horowitz,
"Computing's energy problem", ISSCC 2014, figure 1.1.9 (float32: add 0.9 pJ, multiply 3.7 pJ; integers: 32-bit add 0.1
pJ, 8-bit multiply 0.2 pJ; 64 bits from an 8 KiB cache: 10 pJ).

The ANN of equal information is the student's own network, run once with activations of ``ceil(log2(T + 1))`` bits: T
steps tell T + 1 values apart (Yan et al., arXiv 2409.08290). This project's choices: a multiplication of fewer bits
costs in proportion to them, potentials have 16 bits, a neuron's own arithmetic (leak, comparison, reset) costs nothing.
How memory is used is its choice too, without any reuse: an accumulate reads its weight and reads and writes the
potential it adds to; each neuron's potential is read and written once more at every step; a multiply-accumulate reads
weight and activation and adds in a register; each activation is written once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spikedistill.evaluate.activity import Operations

WEIGHT_BITS = 8
POTENTIAL_BITS = 16
"""A sum of many 8-bit weights."""
INPUT_BITS = 8
"""Of images, and of an ANN that is not quantised further."""


@dataclass(frozen=True)
class EnergyModel:
    """Costs in pJ."""

    name: str
    what: str
    add: float
    multiply: float
    """Of an activation of 8 bits; in an integer model in proportion to the bits."""
    integers: bool
    bit: float
    """To read or write one bit of memory."""

    def accumulate(self) -> float:
        """One spike meets one weight."""
        return self.add + self.bit * (WEIGHT_BITS + 2 * POTENTIAL_BITS)

    def multiply_accumulate(self, bits: int) -> float:
        """One activation of so many bits meets one weight."""
        share = bits / 8 if self.integers else 1.0
        return self.multiply * share + self.add + self.bit * (WEIGHT_BITS + bits)

    def student(self, cost: "Cost") -> float:
        """An answer of a spiking network, in pJ."""
        neurons = cost.updates * 2 * POTENTIAL_BITS * self.bit
        return cost.acs * self.accumulate() + cost.macs * self.multiply_accumulate(INPUT_BITS) + neurons

    def ann(self, macs: float, activations: float, bits: int) -> float:
        """An answer of an ANN whose activations have so many bits, in pJ."""
        return macs * self.multiply_accumulate(bits) + activations * bits * self.bit


CACHE_BIT = 10.0 / 64
MODELS = (
    EnergyModel("float32", "operations alone, float32 (Horowitz 2014)", 0.9, 3.7, False, 0.0),
    EnergyModel("int8", "operations alone, 8-bit weights (Horowitz 2014)", 0.1, 0.2, True, 0.0),
    EnergyModel("memory", "8-bit weights, with memory traffic of an 8 KiB cache", 0.1, 0.2, True, CACHE_BIT),
)


@dataclass(frozen=True)
class Cost:
    """What one answer takes, all numbers a mean over images.

    Args:
        acs: accumulates, one for each spike and connection.
        macs: multiply-accumulates of inputs that are no spikes (the image, pooled spikes).
        spikes: spikes of all neurons over all steps.
        updates: neurons times steps; the activations of an ANN.
        dense: connections of the network, each used once.
        active: those whose input is not zero at some step.
        timesteps: T; 1 for an ANN.
    """

    acs: float
    macs: float
    spikes: float
    updates: float
    dense: float
    active: float
    timesteps: int

    @property
    def bits(self) -> int:
        """Of an activation of the ANN of equal information."""
        return math.ceil(math.log2(self.timesteps + 1))


def cost_of(operations: Operations, timesteps: int, spikes: float, updates: float) -> Cost:
    """The cost of one answer from counts over many; ``spikes`` and ``updates`` are sums over the same images.

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
    )


def energies(cost: Cost) -> dict[str, dict[str, float]]:
    """Energy of an answer, nJ: model -> ``student``; ``quantised`` and ``quantised-sparse``, ANNs of equal information.

    The sparse one skips activations that are zero, the other does not.
    """
    activations = cost.updates / cost.timesteps
    return {
        model.name: {
            "student": model.student(cost) / 1000,
            "quantised": model.ann(cost.dense, activations, cost.bits) / 1000,
            "quantised-sparse": model.ann(cost.active, activations, cost.bits) / 1000,
        }
        for model in MODELS
    }


def ann_energies(cost: Cost) -> dict[str, float]:
    """Energy of an ANN's answer in nJ, with 8-bit activations (float32 in the model of that name): model -> energy."""
    return {model.name: model.ann(cost.dense, cost.updates, INPUT_BITS) / 1000 for model in MODELS}


def verdicts(name: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One warning for every model under which a student does not win against its quantised ANN."""
    lines = []
    for model in MODELS:
        energy = found[model.name]
        for rival in ("quantised", "quantised-sparse"):
            if energy["student"] >= energy[rival]:
                kind = "with zeros skipped" if rival == "quantised-sparse" else "dense"
                lines.append(
                    f"{name} does not win under '{model.name}' ({model.what}): {energy['student']:.0f} nJ an image,"
                    f" its quantised ANN ({kind}) {energy[rival]:.0f} nJ."
                )
    return lines
