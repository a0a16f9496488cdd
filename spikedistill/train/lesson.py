"""What is computed in one step: the teacher's answer, the student's, and the objective's terms."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.answer import Answer
from spikedistill.compute.place import Place
from spikedistill.data.feed import Feed, Inputs
from spikedistill.errors import ConfigError, ConversionError
from spikedistill.files import fingerprint_of
from spikedistill.objective.terms import NO_SOURCE, NO_TEACHER, Batch, Needs, Objective, Terms
from spikedistill.shapes import Labels, Logits
from spikedistill.student.build import Student
from spikedistill.student.fold import fold
from spikedistill.teacher.cache import Cache
from spikedistill.teacher.load import Normalised


class Lesson(nn.Module):
    """What is computed in one step with gradients: the student's answer and the terms of a settled objective."""

    def __init__(self, student: nn.Module, objective: Objective, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.adapters = adapters
        self.needs = objective.needs

    def forward(
        self, inputs: Tensor, labels: Labels, teacher: Answer | None, source: Tensor | None, progress: Tensor
    ) -> tuple[Logits, Terms]:
        """One batch to logits ``[T, B, K]``, in the student's number format, and named terms."""
        answer = observe(self.student, inputs, self.needs)
        batch = Batch(
            labels=labels,
            student=in_float32(answer),
            teacher=teacher,
            source=None if source is None else in_float32(observe(self.student, source, self.needs)),
            progress=progress,
        )
        return answer.logits.detach(), self.objective(batch, self.adapters)


def observe(student: Any, inputs: Tensor, needs: Needs) -> Answer:
    """The student's answer with what the objective looks at."""
    paths = tuple(path for _, path in needs.pairs)
    return student.observe(inputs, paths, spikes=needs.student_spikes, potentials=needs.potentials)


def in_float32(answer: Answer) -> Answer:
    """The same answer, its logits in float32, in which losses are computed."""
    return replace(answer, logits=answer.logits.float())


def is_finite(held: Any) -> bool:
    """Whether all numbers are finite in a tensor, an ``Answer``, or a mapping or list of such; None is."""
    if isinstance(held, Tensor):
        return not held.is_floating_point() or bool(torch.isfinite(held).all())
    if isinstance(held, Answer):
        return all(map(is_finite, (held.logits, held.features, held.spikes, held.potentials)))
    if isinstance(held, Mapping):
        return all(map(is_finite, held.values()))
    return all(map(is_finite, held)) if isinstance(held, list | tuple) else True


def settle_objective(objective: Objective, student: nn.Module, teacher: nn.Module | None, inherits: bool) -> Objective:
    """The objective with its open fields closed, fit for these networks.

    Raises:
        ConfigError: if a network is missing, has not what is looked at, or cannot give it by its gradient.
    """
    given: Any = teacher
    if objective.needs.asks_teacher and given is None:
        raise ConfigError(NO_TEACHER)
    objective = objective.settled(given, student, inherits)  # type: ignore[arg-type]
    needs = objective.needs
    if not set(needs.teacher_spikes) <= set(given.layers() if needs.teacher_spikes else ()):
        layers = ", ".join(given.layers()) or "none, it is an ANN"
        asked = f"Spikes of {', '.join(needs.teacher_spikes)} are looked at, the teacher's layers of neurons are: "
        raise ConfigError(f"{asked}{layers}. Take a spiking teacher, a run of 'distill', and paths of its layers.")
    looked_at = {"spikes": needs.student_spikes, "features": needs.pairs, "potentials": needs.potentials}
    flags = {name: bool(value) for name, value in looked_at.items()}
    refusal = student.refusal(every_step=needs.every_step, **flags) if isinstance(student, Student) else ""
    if refusal:
        raise ConfigError(refusal)
    return objective


@torch.no_grad()
def make_lesson(student: nn.Module, objective: Objective, tutor: "Tutor | None", inputs: Inputs) -> Lesson:
    """The lesson with the objective's helpers, made from one batch; the student is left as it was.

    Where an objective looks at logits alone and has no helpers, the networks are not asked.

    Raises:
        ConfigError: if a network has not what the objective looks at, or the feed has no second stream.
    """
    needs = objective.needs
    if needs.source and inputs.source is None:
        raise ConfigError(NO_SOURCE)
    inner = needs.pairs or needs.student_spikes or needs.teacher_spikes or needs.potentials or needs.source
    if not inner and not objective.has_modules:
        empty = Answer(torch.zeros(1, len(inputs.labels), 0))
        return Lesson(student, objective, objective.modules(Batch(labels=inputs.labels, student=empty), None))
    training = student.training
    student.eval()
    theirs = None if tutor is None else tutor.ask(inputs.shown_to_teacher)
    ours = observe(student, inputs.student, needs)
    source = observe(student, inputs.source, needs) if needs.source and inputs.source is not None else None
    student.train(training)
    probe = Batch(labels=inputs.labels, student=ours, teacher=theirs, source=source)
    return Lesson(student, objective, objective.modules(probe, None if tutor is None else tutor.teacher))


@dataclass
class Tutor:
    """The teacher in the loop: frozen, asked for what the objective needs, its answers perhaps kept on disk."""

    teacher: Any
    needs: Needs
    cache: Cache | None = None

    @torch.no_grad()
    def ask(self, inputs: Tensor) -> Answer:
        """The teacher's answer now; averaged over its time steps unless the objective looks at every step."""
        paths = tuple(path for path, _ in self.needs.pairs)
        answer = self.teacher.observe(inputs, paths, spikes=self.needs.teacher_spikes)
        answer = in_float32(answer)
        return answer if self.needs.every_step else answer.averaged()

    def answer(self, inputs: Inputs, view: int, step: int) -> Answer:
        """The teacher's answer to a batch, asked now or kept from an earlier epoch."""
        if self.cache is None:
            return self.ask(inputs.shown_to_teacher)
        return self.cache.answer(view, step, inputs.samples, lambda: self._ask_to_keep(inputs.shown_to_teacher))

    def _ask_to_keep(self, inputs: Tensor) -> Answer:
        answer = self.ask(inputs)
        if not is_finite(answer):
            raise ConfigError(
                "The teacher's answer holds NaN or infinity and is not kept: check its weights, its normalisation and"
                " the images."
            )
        return answer

    def keep_answers(self, folder: Path, feed: Feed, place: Place, teacher: nn.Module, inputs: Inputs) -> Cache:
        """Keep answers on disk from now on, in a folder of caches.

        They are those of ``teacher`` as it was given, before it was made faster; ``inputs`` are an example.
        """
        computed = [place.device.type, str(place.dtype), str(place.layout)]
        key = {"teacher": fingerprint_of(teacher), **feed.fingerprint(), "computed": computed}
        key["every_step"] = self.needs.every_step
        self.cache = Cache(folder, key, self.ask(inputs.shown_to_teacher), feed.views, feed.steps)
        return self.cache


def make_tutor(teacher: Any, needs: Needs, place: Place) -> Tutor | None:
    """The teacher made ready for the loop, if the objective asks it; the caller's is left as it is.

    An ANN gets its batch norms folded where it can be traced. A spiking teacher is a copy in evaluation mode, not
    folded, since folded weights round in another way and would tip spikes at their threshold.
    """
    if teacher is None or not needs.asks_teacher:
        return None
    try:
        keep = tuple(path for path, _ in needs.pairs)
        ready: nn.Module = fold(teacher, keep) if isinstance(teacher, Normalised) else copy.deepcopy(teacher).eval()
    except ConversionError:
        ready = copy.deepcopy(teacher).eval()
    place.prepare(ready)
    return Tutor(ready, needs)
