"""The contract of every objective: what it needs, what it is shown, and the named terms that it returns.

A method of distillation is a small frozen value. The loop asks it what it needs, shows it a ``Batch`` and takes the sum
of its terms; it knows no method by name.
"""

import math
from collections.abc import Mapping
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
"""(teacher path, student path) of modules whose outputs are compared."""

NO_TEACHER = (
    "This objective needs a teacher, and no teacher was given: pass teacher=..., or use Direct (on the command line"
    " --teacher, or --method direct)."
)
NO_SOURCE = (
    "This objective needs a second input stream, and the feed has none: use a PairFeed (on the command line --source)."
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What is known of one batch after both networks answered.

    Args:
        labels: class numbers ``[B]``.
        student: the student's answer.
        teacher: the teacher's, where the objective needs one. Its T is 1 unless the objective needs every step.
        source: the same student's answer to the second input stream, where the objective needs one.
        progress: how much of training lies behind, a scalar from 0 to 1.
    """

    labels: Labels
    student: Answer
    teacher: Answer | None = None
    source: Answer | None = None
    progress: Tensor = field(default_factory=lambda: torch.zeros(()))

    def asked_teacher(self) -> Answer:
        """The teacher's answer; a ``ConfigError`` where there is none."""
        if self.teacher is None:
            raise ConfigError(NO_TEACHER)
        return self.teacher

    def asked_source(self) -> Answer:
        """The student's answer to the second stream; a ``ConfigError`` where there is none."""
        if self.source is None:
            raise ConfigError(NO_SOURCE)
        return self.source


@dataclass(frozen=True)
class Needs:
    """What an objective must be shown; what it does not need is never computed.

    Args:
        teacher: the teacher's logits.
        pairs: features of both networks.
        student_spikes: paths of the student's layers whose counts of spikes are looked at.
        teacher_spikes: likewise of a spiking teacher.
        potentials: paths of the student's layers whose potentials are looked at.
        every_step: single time steps. Without it a teacher's answer is averaged over its own T.
        source: the student's answer to a second input stream.
    """

    teacher: bool = False
    pairs: Pairs = ()
    student_spikes: tuple[str, ...] = ()
    teacher_spikes: tuple[str, ...] = ()
    potentials: tuple[str, ...] = ()
    every_step: bool = False
    source: bool = False

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher is needed for anything."""
        return self.teacher or bool(self.pairs or self.teacher_spikes)

    def __or__(self, other: "Needs") -> "Needs":
        """What both need together."""
        return Needs(
            teacher=self.teacher or other.teacher,
            pairs=tuple(dict.fromkeys((*self.pairs, *other.pairs))),
            student_spikes=tuple(dict.fromkeys((*self.student_spikes, *other.student_spikes))),
            teacher_spikes=tuple(dict.fromkeys((*self.teacher_spikes, *other.teacher_spikes))),
            potentials=tuple(dict.fromkeys((*self.potentials, *other.potentials))),
            every_step=self.every_step or other.every_step,
            source=self.source or other.source,
        )


class Objective:
    """What a method is: a frozen dataclass that turns a batch into named terms.

    A field may be left open, for instance the pairs of features; ``settled`` closes it once the networks are known.
    """

    @property
    def needs(self) -> Needs:
        """What it must be shown; nothing but the student's logits unless a method says so."""
        return Needs()

    def settled(self, teacher: Learner | None, student: Learner, inherits: bool) -> "Objective":
        """The same objective with every open field closed; an objective that is closed already returns itself.

        Args:
            teacher: who teaches, if anybody.
            student: who learns.
            inherits: whether the student started from the teacher's weights.

        Raises:
            ConfigError: if a field cannot be closed.
        """
        return self

    def modules(self, probe: Batch, teacher: Learner | None) -> nn.ModuleDict:
        """The trainable helpers, for instance adapters, made from one probe batch; none unless a method says so."""
        return nn.ModuleDict()

    @property
    def has_modules(self) -> bool:
        """Whether a method says so; only then the networks are asked for a probe of logits alone."""
        return type(self).modules is not Objective.modules

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Named scalar terms of one batch."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Objective):
    """Objectives that are added up, each with a weight or a schedule over training.

    Terms of one name add up under that name.

    Args:
        parts: (weight, objective), at least one. A schedule is asked at every step.

    Raises:
        ConfigError: if there is no part, or a weight is below 0 or not finite.
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
        """What all parts need together."""
        joined = Needs()
        for _, part in self.parts:
            joined |= part.needs
        return joined

    def settled(self, teacher: Learner | None, student: Learner, inherits: bool) -> "Sum":
        """Every part settled."""
        return type(self)(tuple((weight, part.settled(teacher, student, inherits)) for weight, part in self.parts))

    @property
    def has_modules(self) -> bool:
        """Whether a part has some."""
        return any(part.has_modules for _, part in self.parts)

    def modules(self, probe: Batch, teacher: Learner | None) -> nn.ModuleDict:
        """The helpers of every part, under its number."""
        return nn.ModuleDict({str(i): part.modules(probe, teacher) for i, (_, part) in enumerate(self.parts)})

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """The terms of all parts, each times its weight."""
        terms: Terms = {}
        for (weight, part), own in zip(self.parts, modules.values(), strict=True):
            scale = weight(batch.progress) if isinstance(weight, Schedule) else weight
            for name, term in part(batch, own).items():  # type: ignore[arg-type]
                terms[name] = terms.get(name, 0.0) + scale * term
        return terms


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss: the sum of all terms."""
    return sum(terms.values(), start=next(iter(terms.values())).new_zeros(()))


RESERVED = ("epoch", "step", "lr", "loss", "train_accuracy", "firing_rate", "validation_accuracy")
"""What metrics.jsonl says beside the terms."""


def check_terms(terms: Terms) -> None:
    """Refuse, by a ``ConfigError``, no terms, and one that is no scalar tensor or has a name that metrics have."""
    wrong = [name for name, term in terms.items() if not isinstance(term, Tensor) or term.ndim or name in RESERVED]
    if wrong or not terms:
        raise ConfigError(
            f"The objective returned {', '.join(wrong) or 'no terms'}: expected one scalar tensor or more, under names"
            f" other than {', '.join(RESERVED)}."
        )


def check_fraction(name: str, value: float) -> None:
    """Check a number that mixes two terms.

    Raises:
        ConfigError: if it is not between 0 and 1.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} (={value}) mixes two terms: give a value from 0 to 1.")


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
