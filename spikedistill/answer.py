"""What a network says to one batch, and who can say it: teacher and student alike.

An ANN is a network of one time step, so everything here has time first and T = 1 for an ANN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from spikedistill.shapes import Logits, over_time


@dataclass(frozen=True)
class Answer:
    """What a network said to one batch.

    Args:
        logits: class scores at each time step, ``[T, B, K]``; T = 1 for an ANN.
        features: outputs of modules by module path of the ANN, ``[T, B, ...]`` each.
        spikes: counts of spikes by path of the layer of neurons, ``[T, B, ...]`` each, with gradient. The count is the
            layer's output over its threshold, so a learned threshold gets no gradient through a spike's height.
        potentials: potentials after charging and before the reset, in thresholds, ``[T, B, ...]`` each.

    A mapping is empty unless it was asked for.
    """

    logits: Logits
    features: Mapping[str, Tensor] = field(default_factory=dict)
    spikes: Mapping[str, Tensor] = field(default_factory=dict)
    potentials: Mapping[str, Tensor] = field(default_factory=dict)

    def averaged(self) -> "Answer":
        """The same with every tensor averaged over time, T = 1; what has one time step already is not copied."""
        if len(self.logits) == 1:
            return self
        inner = (self.features, self.spikes, self.potentials)
        means = ({path: over_time(value)[None] for path, value in values.items()} for values in inner)
        return Answer(self.logits.mean(0, keepdim=True), *means)


@runtime_checkable
class Learner(Protocol):
    """A network that can be asked, trained, or both: a student, an ANN in training, a teacher."""

    def observe(
        self, inputs: Tensor, paths: Sequence[str] = (), *, spikes: Sequence[str] = (), potentials: Sequence[str] = ()
    ) -> Answer:
        """The answer to a batch, with the features, spikes and potentials at these paths.

        Raises:
            ConfigError: if there is nothing at a path, or the network has no such thing.
        """

    def paths(self) -> list[str]:
        """The module paths at which there is a feature."""

    def layers(self) -> list[str]:
        """The paths of the layers of neurons, in order of execution; none for an ANN."""
