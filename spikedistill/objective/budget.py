"""Budgets: a penalty while a student takes more spikes, or more synaptic operations, than a target.

The penalty on a quantity q with the target b is ``weight * max(0, q / b - 1)``, with the mean of q over the batch. It
is this project's choice. Its gradient is that of single spikes (surrogate gradients), so neurons learn to fire less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spikedistill.answer import Learner
from spikedistill.errors import ConfigError
from spikedistill.objective.temperatures import HeterogeneousTemperatures
from spikedistill.objective.terms import Batch, Needs, Objective, Terms, check_weight


@dataclass(frozen=True)
class Penalty(Objective):
    """A penalty on spikes or synaptic operations; combine it with other objectives in a ``Sum``.

    Raises:
        ConfigError: if a target is negative.
    """

    spikes: float = 0.0
    """Target for spikes per image, of all neurons over all time steps; 0 for none."""
    operations: float = 0.0
    """Target for synaptic operations per image, as 'energy' counts them; 0 for none. An input that is no spike train,
    for instance behind batch norm, counts at every sub-step of graded spikes."""
    layers: tuple[str, ...] = ()
    """Layers of neurons whose spikes count (default: all)."""

    def __post_init__(self) -> None:
        check_weight("spikes", self.spikes)
        check_weight("operations", self.operations)

    @property
    def needs(self) -> Needs:
        """Spikes of the layers, or synaptic operations."""
        return Needs(student_spikes=self.layers if self.spikes else (), operations=self.operations > 0)

    def settled(self, teacher: Learner | None, student: Learner, inherits: bool) -> "Penalty":
        """The same penalty on named layers.

        Raises:
            ConfigError: if there is no target.
        """
        if not self.spikes and not self.operations:
            raise ConfigError("A budget needs a target per image: give --spikes, --operations or both.")
        return replace(self, layers=self.layers or tuple(student.layers()))

    def without_labels(self) -> "Penalty":
        """Itself: it needs no labels."""
        return self

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """A term ``spikes``, a term ``operations``, or both."""
        terms = {}
        if self.spikes:
            terms["spikes"] = excess(spikes_per_image(batch, self.layers), self.spikes, batch)
        if self.operations:
            terms["operations"] = excess(operations_per_image(batch), self.operations, batch)
        return terms


@dataclass(frozen=True)
class Budget(HeterogeneousTemperatures):
    """Distillation within a budget: ``(1 - alpha) CE + alpha soft targets + penalty * max(0, q / target - 1)``."""

    student_temperature: float = 4.0
    """Temperature tau_S of the student's logits, above 0; equal to the teacher's by default."""
    spikes: float = 0.0
    """Target for spikes per image, of all neurons over all time steps; 0 for none."""
    operations: float = 0.0
    """Target for synaptic operations per image, as 'energy' counts them; 0 for none. An input that is no spike train,
    for instance behind batch norm, counts at every sub-step of graded spikes."""
    penalty: float = 1.0
    """Weight of what goes beyond a target, relative to it, 0 or more."""
    layers: tuple[str, ...] = ()
    """Layers of neurons whose spikes count (default: all)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("penalty", self.penalty)
        _ = self.limit  # checks the targets

    @property
    def limit(self) -> Penalty:
        """The penalty with the same fields."""
        return Penalty(self.spikes, self.operations, self.layers)

    @property
    def needs(self) -> Needs:
        """The teacher's logits, and what the budget is about."""
        return super().needs | self.limit.needs

    def settled(self, teacher: Learner | None, student: Learner, inherits: bool) -> "Budget":
        """The same objective on named layers."""
        return replace(self, layers=self.limit.settled(teacher, student, inherits).layers)

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """The terms ``labels`` and ``soft``, and ``spikes``, ``operations`` or both."""
        over = {name: self.penalty * term for name, term in self.limit(batch, modules).items()}
        return {**super().__call__(batch, modules), **over}


def excess(found: Tensor, target: float, batch: Batch) -> Tensor:
    """``max(0, found / target - 1)``. Several processes decide together whether the target is met."""
    beyond = batch.mean_over_processes(found.detach()) > target
    return torch.where(beyond, found / target - 1, 0.0 * found)


def spikes_per_image(batch: Batch, layers: Sequence[str] = ()) -> Tensor:
    """The mean over images of the spikes of these layers over all time steps, a scalar; by default of all observed."""
    counts = [batch.student.spikes[path].float().sum() for path in layers or batch.student.spikes]
    return torch.stack(counts).sum() / batch.student.logits.shape[1]


def operations_per_image(batch: Batch) -> Tensor:
    """The mean over images of the synaptic operations over all time steps, a scalar.

    Raises:
        ConfigError: if they were not observed.
    """
    if batch.student.operations is None:
        raise ConfigError("No synaptic operations were observed: call observe(..., operations=True).")
    return batch.student.operations.sum(0).mean()
