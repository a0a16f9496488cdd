"""What is computed in one training step: outputs of teacher and student, and the objective's terms."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.answer import Answer
from spikedistill.compute.place import Place
from spikedistill.compute.winograd import WinogradConv2d
from spikedistill.data.feed import Feed, Inputs
from spikedistill.errors import ConfigError, ConversionError
from spikedistill.files import fingerprint_of
from spikedistill.inputs import evaluating
from spikedistill.objective.terms import NO_LABELS, NO_SOURCE, NO_TEACHER, Batch, Needs, Objective, Terms, identity
from spikedistill.shapes import Labels, Logits
from spikedistill.student.fold import fold
from spikedistill.student.recompute import unmoved
from spikedistill.student.student import Student
from spikedistill.teacher.cache import Cache
from spikedistill.teacher.load import Normalised


class TrainingStep(nn.Module):
    """The part of a training step with gradients: the student's outputs and the objective's terms."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        adapters: nn.ModuleDict,
        mean_over_processes: Callable[[Tensor], Tensor] = identity,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.adapters = adapters
        self.needs = objective.needs
        self.mean_over_processes = mean_over_processes
        self.freeze_norm = False

    def train(self, mode: bool = True) -> "TrainingStep":
        """Switch to training; with ``freeze_norm`` batch norms keep their running statistics and use them."""
        super().train(mode)
        for module in self.student.modules() if self.freeze_norm else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(
        self, inputs: Tensor, labels: Labels | None, teacher: Answer | None, source: Tensor | None, progress: Tensor
    ) -> tuple[Logits, Terms]:
        """The logits ``[T, B, K]`` for a batch, in the student's number format, and the named terms of the loss.

        A second stream is normalised by its own batch, but running statistics are those of ``inputs`` alone, which the
        student will see.
        """
        answer, second = observe(self.student, inputs, self.needs), None
        if source is not None:
            with statistics_kept(self.student):
                second = in_float32(observe(self.student, source, self.needs))
        batch = Batch(
            labels=labels,
            student=in_float32(answer),
            teacher=teacher,
            source=second,
            progress=progress,
            mean_over_processes=self.mean_over_processes,
        )
        return answer.logits.detach(), self.objective(batch, self.adapters)


@contextlib.contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norms, and their counts of batches, as they are."""
    with contextlib.ExitStack() as kept:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                kept.enter_context(unmoved(module))
        yield


def observe(student: Any, inputs: Tensor, needs: Needs) -> Answer:
    """The student's logits, with the features, spikes and potentials that the objective needs."""
    paths = tuple(path for _, path in needs.pairs)
    more = {"operations": True} if needs.operations else {}
    return student.observe(inputs, paths, spikes=needs.student_spikes, potentials=needs.potentials, **more)


def in_float32(answer: Answer) -> Answer:
    """The same answer with logits in float32, since losses are computed in float32."""
    return replace(answer, logits=answer.logits.float())


def is_finite(held: Any) -> bool:
    """Whether all numbers in a tensor, an ``Answer``, or a mapping or list of these are finite; None is finite."""
    if isinstance(held, Tensor):
        return not held.is_floating_point() or bool(torch.isfinite(held).all())
    if isinstance(held, Answer):
        return all(map(is_finite, (held.logits, held.features, held.spikes, held.potentials, held.operations)))
    if isinstance(held, Mapping):
        return all(map(is_finite, held.values()))
    return all(map(is_finite, held)) if isinstance(held, list | tuple) else True


def settle_objective(objective: Objective, student: nn.Module, teacher: nn.Module | None, inherits: bool) -> Objective:
    """The objective with its open fields filled in, checked against these networks.

    Raises:
        ConfigError: if a network is missing, lacks a path that the objective needs, or its gradient cannot give what
            the objective needs.
    """
    given: Any = teacher
    if objective.needs.needs_teacher and given is None:
        raise ConfigError(NO_TEACHER)
    objective = objective.settled(given, student, inherits)  # type: ignore[arg-type]
    needs = objective.needs
    if not set(needs.teacher_spikes) <= set(given.layers() if needs.teacher_spikes else ()):
        layers = ", ".join(given.layers()) or "none, it is an ANN"
        asked = f"The method needs spikes of {', '.join(needs.teacher_spikes)}; the teacher's layers of neurons are: "
        raise ConfigError(f"{asked}{layers}. Use a spiking teacher, a run of 'distill', and paths of its layers.")
    looked_at = {"spikes": needs.student_spikes, "features": needs.pairs, "potentials": needs.potentials}
    flags = {name: bool(value) for name, value in looked_at.items()} | {"operations": needs.operations}
    refusal = student.refusal(every_step=needs.every_step, **flags) if isinstance(student, Student) else ""
    if refusal:
        raise ConfigError(refusal)
    return objective


@torch.no_grad()
def make_training_step(
    student: nn.Module,
    objective: Objective,
    runner: "TeacherRunner | None",
    inputs: Inputs,
    mean_over_processes: Callable[[Tensor], Tensor] = identity,
) -> TrainingStep:
    """The training step with the objective's adapters, which are made from one batch. The student is not changed.

    If an objective needs only logits and has no adapters, the networks are not run.

    Raises:
        ConfigError: if a network lacks what the objective needs, the feed has no second stream, or there are neither
            labels nor a teacher.
    """
    if inputs.labels is None:
        objective = objective.without_labels()
        if runner is None:
            raise ConfigError(NO_LABELS)
    needs = objective.needs
    if needs.source and inputs.source is None:
        raise ConfigError(NO_SOURCE)
    inner = needs.pairs or needs.student_spikes or needs.teacher_spikes or needs.potentials or needs.source
    inner = inner or needs.operations
    if not inner and not objective.has_modules:
        empty = Answer(torch.zeros(1, len(inputs.samples), 0))
        modules = objective.modules(Batch(labels=inputs.labels, student=empty), None)
        return TrainingStep(student, objective, modules, mean_over_processes)
    theirs = None if runner is None else runner.ask(inputs.shown_to_teacher)
    with evaluating(student):
        ours = observe(student, inputs.student, needs)
        source = observe(student, inputs.source, needs) if needs.source and inputs.source is not None else None
    probe = Batch(labels=inputs.labels, student=ours, teacher=theirs, source=source)
    modules = objective.modules(probe, None if runner is None else runner.teacher)
    return TrainingStep(student, objective, modules, mean_over_processes)


@dataclass
class TeacherRunner:
    """The frozen teacher in the loop. It computes what the objective needs; a cache may keep its outputs on disk."""

    teacher: Any
    needs: Needs
    cache: Cache | None = None

    @torch.no_grad()
    def ask(self, inputs: Tensor) -> Answer:
        """Run the teacher. Its outputs are means over its time steps unless the objective needs every step."""
        paths = tuple(path for path, _ in self.needs.pairs)
        answer = self.teacher.observe(inputs, paths, spikes=self.needs.teacher_spikes)
        answer = in_float32(answer)
        if self.needs.mirror:
            mirrored = in_float32(self.teacher.observe(inputs.flip(-1)))
            answer = replace(answer, logits=(answer.logits + mirrored.logits) / 2)
        return answer if self.needs.every_step else answer.averaged()

    def answer(self, inputs: Inputs, view: int, step: int) -> Answer:
        """The teacher's outputs for a batch, computed now or kept from an earlier epoch."""
        if self.cache is None:
            return self.ask(inputs.shown_to_teacher)
        return self.cache.answer(view, step, inputs.samples, lambda: self._ask_to_keep(inputs.shown_to_teacher))

    def _ask_to_keep(self, inputs: Tensor) -> Answer:
        answer = self.ask(inputs)
        if not is_finite(answer):
            raise ConfigError(
                "The teacher's logits or features hold NaN or infinity and are not kept: check its weights, its"
                " normalisation and the images."
            )
        return answer

    def keep_answers(self, folder: Path, feed: Feed, place: Place, teacher: nn.Module, inputs: Inputs) -> Cache:
        """Keep the teacher's outputs on disk from now on, in a folder of caches.

        The cache is identified by ``teacher`` as it was given, before folding; ``inputs`` are an example.
        """
        computed = [place.device.type, str(place.dtype), str(place.layout)]
        key = {"teacher": fingerprint_of(teacher), **feed.fingerprint(), "computed": computed}
        key["every_step"] = self.needs.every_step
        if self.needs.mirror:  # no entry otherwise, so that earlier caches stay valid
            key["mirror"] = True
        if any(isinstance(layer, WinogradConv2d) for layer in self.teacher.modules()):
            key["convolutions"] = "winograd"
        self.cache = Cache(folder, key, self.ask(inputs.shown_to_teacher), feed.views, feed.steps)
        return self.cache


def make_runner(teacher: Any, needs: Needs, place: Place) -> TeacherRunner | None:
    """The teacher prepared for the loop, if the objective needs one. The caller's network is not changed.

    The batch norms of an ANN are folded if it can be traced. A spiking teacher is copied in evaluation mode and not
    folded: folded weights round differently, which would change spikes near the threshold.
    """
    if teacher is None or not needs.needs_teacher:
        return None
    try:
        keep = tuple(path for path, _ in needs.pairs)
        ready: nn.Module = fold(teacher, keep) if isinstance(teacher, Normalised) else copy.deepcopy(teacher).eval()
    except ConversionError:
        ready = copy.deepcopy(teacher).eval()
    place.prepare(ready)
    return TeacherRunner(ready, needs)
