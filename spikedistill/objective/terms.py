"""The contract of objectives: what they need, the batch they get, and the named terms that they return.

A distillation method is a small frozen value. The training loop reads its ``needs``, calls it with a ``Batch``, and
adds up the returned terms. The loop knows no method by name.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spikedistill.answer import Answer, Learner
from spikedistill.errors import ConfigError
from spikedistill.objective.schedule import Schedule
from spikedistill.shapes import Labels

Terms = dict[str, Tensor]
"""Scalar losses by name, each already multiplied by its weight; logs use the same names."""
Pairs = tuple[tuple[str, str], ...]
"""Module paths (teacher, student) whose outputs are compared."""

NO_TEACHER = (
    "This objective needs a teacher, and no teacher was given: pass teacher=..., or use Direct (on the command line"
    " --teacher, or --method direct)."
)
NO_LABELS = (
    "This objective needs labels, and the images have none: take one that learns from the teacher (on the command line"
    " --method kdsnn, kdsnn-response or kdsnn-feature), or images with labels."
)
NO_SOURCE = (
    "This objective needs a second input stream, and the feed has none: use a PairFeed (on the command line --source)."
)


def identity(statistic: Tensor) -> Tensor:
    """What one process makes of a statistic of its batch, which is the whole batch."""
    return statistic


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The labels of one batch and the outputs of both networks for it.

    Args:
        labels: class numbers ``[B]``; None for images without labels.
        student: the student's outputs.
        teacher: the teacher's outputs, if the objective needs them. T is 1 unless the objective needs every step.
        source: the same student's outputs for the second input stream, if the objective needs them.
        progress: the fraction of training that is done, a scalar from 0 to 1.
        mean_over_processes: gives the mean over processes of a statistic of the batch, a tensor without gradient such
            as a mean square. Each process sees its share of the batch. With one process the statistic is returned
            itself.
    """

    labels: Labels | None
    student: Answer
    teacher: Answer | None = None
    source: Answer | None = None
    progress: Tensor = field(default_factory=lambda: torch.zeros(()))
    mean_over_processes: Callable[[Tensor], Tensor] = identity

    def require_teacher(self) -> Answer:
        """The teacher's outputs, or a ``ConfigError`` without a teacher."""
        if self.teacher is None:
            raise ConfigError(NO_TEACHER)
        return self.teacher

    def require_labels(self) -> Labels:
        """The labels, or a ``ConfigError`` without labels."""
        if self.labels is None:
            raise ConfigError(NO_LABELS)
        return self.labels

    def require_source(self) -> Answer:
        """The student's outputs for the second stream, or a ``ConfigError`` without one."""
        if self.source is None:
            raise ConfigError(NO_SOURCE)
        return self.source


@dataclass(frozen=True)
class Needs:
    """What an objective needs from the networks. Nothing else is computed.

    Args:
        teacher: the teacher's logits.
        pairs: features of both networks at these module paths.
        student_spikes: paths of the student's layers whose spike counts are needed.
        teacher_spikes: likewise for a spiking teacher.
        potentials: paths of the student's layers whose membrane potentials are needed.
        every_step: the teacher's single time steps. Otherwise its outputs are averaged over its own T.
        mirror: the teacher's logits as means over each image and its mirror image, left and right swapped.
        source: the student's outputs for a second input stream.
        operations: the student's synaptic operations.
        replacement: sliding replacement of the second stream by the first: the power of the progress of training that
            is the probability of each sample; 0 for none.
    """

    teacher: bool = False
    pairs: Pairs = ()
    student_spikes: tuple[str, ...] = ()
    teacher_spikes: tuple[str, ...] = ()
    potentials: tuple[str, ...] = ()
    every_step: bool = False
    mirror: bool = False
    source: bool = False
    operations: bool = False
    replacement: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is needed for anything."""
        return self.teacher or bool(self.pairs or self.teacher_spikes)

    def __or__(self, other: "Needs") -> "Needs":
        """The needs of both."""
        return Needs(
            teacher=self.teacher or other.teacher,
            pairs=tuple(dict.fromkeys((*self.pairs, *other.pairs))),
            student_spikes=tuple(dict.fromkeys((*self.student_spikes, *other.student_spikes))),
            teacher_spikes=tuple(dict.fromkeys((*self.teacher_spikes, *other.teacher_spikes))),
            potentials=tuple(dict.fromkeys((*self.potentials, *other.potentials))),
            every_step=self.every_step or other.every_step,
            mirror=self.mirror or other.mirror,
            source=self.source or other.source,
            operations=self.operations or other.operations,
            replacement=self.replacement or other.replacement,
        )


class Objective:
    """A distillation method: a frozen dataclass that maps a batch to named loss terms.

    A field may be open, for instance the pairs of features. ``settled`` sets it once the networks are known.
    """

    @property
    def needs(self) -> Needs:
        """What the method needs (default: the student's logits only)."""
        return Needs()

    def settled(self, teacher: Learner | None, student: Learner, inherits: bool) -> "Objective":
        """The same objective with every open field set. Without open fields, it returns itself.

        Args:
            teacher: the teacher, if there is one.
            student: the student.
            inherits: whether the student starts with the teacher's weights.

        Raises:
            ConfigError: if a field cannot be set.
        """
        return self

    def without_labels(self) -> "Objective":
        """The same objective for images without labels, which then leaves out every term that needs them.

        By default an objective needs labels. One that does not returns itself, or a copy with other weights.

        Raises:
            ConfigError: if it needs labels, or a field is the weight of a term that needs them.
        """
        raise ConfigError(NO_LABELS)

    def modules(self, probe: Batch, teacher: Learner | None) -> nn.ModuleDict:
        """Trainable helper modules, for instance adapters, made for the shapes of a probe batch (default: none)."""
        return nn.ModuleDict()

    @property
    def has_modules(self) -> bool:
        """Whether the method defines ``modules``. If so, it gets a probe batch even if it needs logits only."""
        return type(self).modules is not Objective.modules

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Named scalar terms of one batch, each already multiplied by its weight."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Objective):
    """A weighted sum of objectives. A weight may be a schedule over training.

    Terms with the same name are added.

    Args:
        parts: (weight, objective), at least one. A schedule is evaluated at every step.

    Raises:
        ConfigError: if there is no part, a part is not (weight, objective), or a weight is below 0 or not finite.
    """

    parts: tuple[tuple[float | Schedule, Objective], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("A Sum needs at least one part (weight, objective).")
        for weight, part in self.parts:
            if not isinstance(part, Objective) or not isinstance(weight, Schedule | int | float):
                raise ConfigError(f"A part of a Sum is ({weight!r}, {part!r}): expected (weight, objective).")
            for end in (0.0, 1.0):
                at = weight(torch.tensor(end)) if isinstance(weight, Schedule) else weight
                check_weight("the weight of a part", float(at))

    @property
    def needs(self) -> Needs:
        """The needs of all parts."""
        joined = Needs()
        for _, part in self.parts:
            joined |= part.needs
        return joined

    def settled(self, teacher: Learner | None, student: Learner, inherits: bool) -> "Sum":
        """The sum of the settled parts."""
        return type(self)(tuple((weight, part.settled(teacher, student, inherits)) for weight, part in self.parts))

    def without_labels(self) -> "Sum":
        """The sum of its parts without labels."""
        return type(self)(tuple((weight, part.without_labels()) for weight, part in self.parts))

    @property
    def has_modules(self) -> bool:
        """Whether a part defines ``modules``."""
        return any(part.has_modules for _, part in self.parts)

    def modules(self, probe: Batch, teacher: Learner | None) -> nn.ModuleDict:
        """The helper modules of every part, by the part's number as text."""
        return nn.ModuleDict({str(i): part.modules(probe, teacher) for i, (_, part) in enumerate(self.parts)})

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """The terms of all parts, each multiplied by its weight."""
        terms: Terms = {}
        for (weight, part), own in zip(self.parts, modules.values(), strict=True):
            scale = weight(batch.progress) if isinstance(weight, Schedule) else weight
            for name, term in part(batch, own).items():  # type: ignore[arg-type]
                terms[name] = terms.get(name, 0.0) + scale * term
        return terms


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss: the sum of all terms."""
    return sum(terms.values(), start=next(iter(terms.values())).new_zeros(()))


RESERVED = (
    *("epoch", "step", "lr", "loss", "firing_rate"),
    *("train_accuracy", "validation_accuracy", "train_agreement", "validation_agreement"),
)
"""The other entries of metrics.jsonl, which no term may be named after."""


def check_terms(terms: Terms) -> None:
    """Check the terms that an objective returned.

    Raises:
        ConfigError: if there is no term, one is not a scalar tensor, or its name is in ``RESERVED``.
    """
    wrong = [name for name, term in terms.items() if not isinstance(term, Tensor) or term.ndim or name in RESERVED]
    if wrong or not terms:
        raise ConfigError(
            f"The objective returned {', '.join(wrong) or 'no terms'}: expected one or more scalar tensors, with names"
            f" other than {', '.join(RESERVED)}."
        )


def check_fraction(name: str, value: float) -> None:
    """Check the weight of one term against another.

    Raises:
        ConfigError: if it is not between 0 and 1.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} (={value}) is a weight: give a value from 0 to 1.")


def check_positive(name: str, value: float) -> None:
    """Check a scale.

    Raises:
        ConfigError: if it is not above 0.
    """
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} (={value}) must be above 0 and finite.")


def check_weight(name: str, value: float) -> None:
    """Check the weight of a term.

    Raises:
        ConfigError: if it is below 0 or not finite.
    """
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} (={value}) must be 0 or more and finite.")
