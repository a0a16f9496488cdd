"""What a network returns for one batch, the same for teacher and student.

Time comes first in every tensor. An ANN counts as a network of one time step, T = 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from spikedistill.shapes import Logits, over_time


@dataclass(frozen=True)
class Answer:
    """What a network returns for one batch.

    Args:
        logits: class scores at each time step, ``[T, B, K]``; T = 1 for an ANN.
        features: outputs of modules by module path of the ANN, ``[T, B, ...]`` each.
        spikes: counts of spikes by path of the layer of neurons, ``[T, B, ...]`` each, with gradient. A student's count
            is the layer's output divided by its threshold, so a learned threshold gets no gradient through a spike's
            height.
        potentials: membrane potentials by path of the layer, after charging and before the reset, ``[T, B, ...]`` each,
            in units of the threshold.
        operations: synaptic operations of a student for each image and step, ``[T, B]``, with gradient.

    A mapping is empty, and ``operations`` is None, unless it was asked for.
    """

    logits: Logits
    features: Mapping[str, Tensor] = field(default_factory=dict)
    spikes: Mapping[str, Tensor] = field(default_factory=dict)
    potentials: Mapping[str, Tensor] = field(default_factory=dict)
    operations: Tensor | None = None

    def averaged(self) -> "Answer":
        """The same with every tensor averaged over time, T = 1. With T = 1 already, it is returned as it is."""
        if len(self.logits) == 1:
            return self

        def means(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {path: over_time(value)[None] for path, value in values.items()}

        return Answer(
            self.logits.mean(0, keepdim=True),
            means(self.features),
            means(self.spikes),
            means(self.potentials),
            None if self.operations is None else self.operations.mean(0, keepdim=True),
        )


@runtime_checkable
class Learner(Protocol):
    """A network whose outputs can be observed: a student, an ANN in training, a teacher."""

    def observe(
        self, inputs: Tensor, paths: Sequence[str] = (), *, spikes: Sequence[str] = (), potentials: Sequence[str] = ()
    ) -> Answer:
        """Logits of a batch, and the features, spikes and potentials at these paths.

        Args:
            inputs: images ``[B, C, H, W]`` in 0..1, or frames ``[T, B, C, H, W]`` for a student that takes them.
            paths: module paths whose features are returned.
            spikes: paths of layers of neurons whose spike counts are returned.
            potentials: paths of layers of neurons whose membrane potentials are returned.

        Raises:
            ConfigError: if a path does not exist, or the network has no spikes or potentials.
        """

    def paths(self) -> list[str]:
        """The module paths that have a feature."""

    def layers(self) -> list[str]:
        """The paths of the layers of neurons, in order of execution. Empty for an ANN."""
