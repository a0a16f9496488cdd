"""What happens inside a student: spikes and potentials of every layer, and the answer as it builds up over time."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spikedistill.evaluate.accuracy import cumulative
from spikedistill.neuron.dynamics import Reset
from spikedistill.student.student import Student
from spikedistill.student.substeps import run_in_substeps


@dataclass(frozen=True)
class Activity:
    """What happens in a student for some samples, over S = T D binary sub-steps.

    Args:
        spikes: layer -> spikes ``[S, B, N]``, 0 or 1, of its N neurons.
        potentials: layer -> potentials ``[S, B, N]`` before the spike, in units of the threshold: a neuron fires at 1.
        probabilities: of the classes, from the mean logits up to each time step, ``[T, B, K]``.
        timesteps: T.
        levels: D.
    """

    spikes: Mapping[str, Tensor]
    potentials: Mapping[str, Tensor]
    probabilities: Tensor
    timesteps: int
    levels: int

    def rates(self) -> dict[str, list[float]]:
        """For each layer the share of its neurons that fire, at every sub-step, in percent, over all samples."""
        return {layer: (100 * trains.mean((1, 2))).tolist() for layer, trains in self.spikes.items()}


@torch.no_grad()
def record_activity(student: Student, inputs: Tensor) -> Activity:
    """Run some samples, and keep what every neuron does.

    Graded spikes are shown as the D sub-steps of a layer (``student/substeps.py``).

    Args:
        student: in evaluation mode.
        inputs: as for the student; a few samples, since everything is kept.

    Raises:
        ConfigError: if the student is in training with a gradient that computes no spikes.
    """
    layers, levels = student.layers(), student.conversion.neuron_model.levels
    found = student.observe(inputs, spikes=layers, potentials=layers)
    trains = {path: counts.round() for path, counts in found.spikes.items()}
    charged: dict[str, Tensor] = dict(found.potentials)
    if levels > 1 and student.conversion.neuron_model.reset is Reset.SUBTRACT:
        trains = dict(run_in_substeps(student, inputs, spikes=tuple(layers)).spikes)
        charged = {path: _within(charged[path], found.spikes[path], levels) for path in layers}
    return Activity(
        {path: train.flatten(2).float() for path, train in trains.items()},
        {path: value.flatten(2).float() for path, value in charged.items()},
        cumulative(found.logits.float()).softmax(-1),
        student.timesteps,
        levels,
    )


def _within(charged: Tensor, counts: Tensor, levels: int) -> Tensor:
    """The potential before each of the D sub-steps of every step, ``[T*D, B, ...]``: each spike takes 1 away."""
    taken = torch.arange(levels, device=charged.device).view(-1, *[1] * charged.ndim)
    return (charged - torch.minimum(taken, counts.round())).transpose(0, 1).flatten(0, 1)
