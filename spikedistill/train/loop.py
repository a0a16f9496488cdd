"""The only training loop. It trains spiking students and, as networks of one time step, their teachers.

One step: take a batch from the feed, ask the teacher, ask the student, compute the loss terms and take a gradient step
on their sum. What is drawn depends on (seed, epoch, step) alone, so a resumed run goes on with the same bits.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikedistill.data.feed import Feed, Inputs
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import accuracy_by_step, predict
from spikedistill.neuron.fused import works
from spikedistill.objective.terms import Objective, check_terms, total
from spikedistill.student.build import Student
from spikedistill.train.checkpoint import load_checkpoint, save_checkpoint
from spikedistill.train.lesson import is_finite, make_lesson, make_tutor, settle_objective
from spikedistill.train.meters import FiringRateMeter, Meters
from spikedistill.train.optimise import learning_rate, make_averaged, make_optimiser, set_learning_rate
from spikedistill.train.processes import Processes
from spikedistill.train.progress import Events, Progress
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

CAUSES = {
    "weights": "an earlier step broke the weights, or their file holds them so: lower --lr, in another --out",
    "inputs": "mend the images, the normalisation or the augmentation that makes them",
    "teacher's answer": "check the teacher's weights and its normalisation; answers that are kept on disk must go too",
}
"""What to do where that is the first part that is not finite."""


def fit(
    student: nn.Module,
    objective: Objective,
    feed: Feed,
    config: Training,
    run: Run,
    *,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a network in place; go on from the run's checkpoint where there is one.

    Args:
        student: a ``Learner``; moved to the device that the configuration names.
        objective: what it is taught; open fields are closed.
        feed: where batches and the held-out samples come from.
        config: how it is trained; batch size, seed and views are the feed's.
        run: where metrics and checkpoints go.
        teacher: a ``Learner`` that the objective asks, an ANN or a student.
        progress: what shows the work; silent by default.

    Returns:
        The last line of metrics.

    Raises:
        ConfigError: if the objective needs what there is not, the loss, its gradient or the weights are no longer
            finite, or the disk is too small for the teacher's answers. What is not finite is never saved.
        RunError: if a checkpoint of another run lies in the directory, or the teacher's answers there are damaged.
    """
    course = Course(student, objective, feed, config, run, teacher, progress or Progress.silent())
    behind, done, meters = course.restore()
    events = Events(run.path) if config.tensorboard else None
    for epoch in range(behind + 1, config.epochs + 1):
        began = time.monotonic()
        course.progress.epoch(epoch, config.epochs, course.feed.steps, done)
        course.trained.train()
        for step, inputs in enumerate(course.feed.batches(epoch, done), done):
            meters.add(*course.step(inputs, epoch, step))
            course.progress.step({**meters.means(), **course.firing.facts()})
            if time.monotonic() - course.saved > 60 * config.checkpoint_minutes:
                course.save(epoch - 1, step + 1, meters)
        course.check_weights(epoch, course.feed.steps)
        line = course.line(epoch, meters)
        if course.processes.first:
            run.append("metrics", line)
            run.append("timing", {"epoch": epoch, "seconds": time.monotonic() - began, **course.computed})
            if events is not None:
                events.add(line)
        done, meters = 0, Meters()
        course.save(epoch, done, meters)
        course.progress.epoch_done(line)
    if course.averaged is not None:
        student.load_state_dict(course.averaged.module.state_dict())
    return run.lines("metrics")[-1]


class Course:
    """What ``fit`` needs at every step, set up once."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        feed: Feed,
        config: Training,
        run: Run,
        teacher: nn.Module | None,
        progress: Progress,
    ) -> None:
        torch.manual_seed(config.seed)
        self.student, self.config, self.run, self.progress = student, config, run, progress
        inherits = isinstance(student, Student) and student.conversion.inherit
        objective = settle_objective(objective, student, teacher, inherits)
        self.place = config.place().for_training(student)
        if config.channels_last and self.place.layout is not torch.channels_last:
            progress.say(
                "contiguous memory: with channels last 3D convolutions do not run, and oneDNN has a fault in narrow"
                " strided 1 x 1 convolutions"
            )
        self.processes = Processes(self.place.device)
        self.feed = feed.shared(self.processes.rank, self.processes.count)
        self.tutor = make_tutor(teacher, objective.needs, self.place)
        self.computed = self._prepare(student)
        example = self._moved(next(self.feed.batches(1)))
        with self.place.autocast():
            self.lesson = make_lesson(student, objective, self.tutor, example).to(self.place.device)
            if self.tutor is not None and teacher is not None and feed.views:
                folder = run.path / "answers" if config.cache_dir is None else Path(config.cache_dir).expanduser()
                progress.say(str(self.tutor.keep_answers(folder, self.feed, self.place, teacher, example)))
        self.optimiser = make_optimiser(self.lesson, config)
        self.averaged = make_averaged(student, config)
        self.firing = FiringRateMeter(student)
        self.trained: Any = self.processes.joined(self.lesson)
        if config.compile and works(self.place.device.type):
            self.trained = torch.compile(self.trained)
        self.saved = time.monotonic()

    def _prepare(self, student: nn.Module) -> dict[str, str]:
        """Move the student to its place; say, and return, where and how it computes."""
        reason = self.place.prepare(student)
        if reason and self.config.convolutions == "winograd":
            raise ConfigError(f"convolutions (=winograd) cannot be had here ({reason}): give torch, or auto.")
        computed = {
            "device": str(self.place.device),
            "dtype": str(self.place.dtype).removeprefix("torch."),
            "layout": str(self.place.layout).removeprefix("torch."),
            "convolutions": "torch" if reason else "winograd",
        }
        self.progress.say(f"{', '.join(computed.values())} convolutions: {self.place.reason}")
        return computed

    def _moved(self, inputs: Inputs) -> Inputs:
        return inputs.to(self.place.device, self.place.layout)

    def _rate(self, epoch: int, step: int) -> float:
        return learning_rate((epoch - 1) * self.feed.steps + step, self.config.epochs * self.feed.steps, self.config)

    def step(self, inputs: Inputs, epoch: int, step: int) -> tuple[dict[str, float], int, int]:
        """One gradient step; returns the terms, how many predictions were right, and of how many."""
        inputs = self._moved(inputs)
        gone = ((epoch - 1) * self.feed.steps + step) / (self.config.epochs * self.feed.steps)
        progress = torch.tensor(gone, device=self.place.device)
        set_learning_rate(self.optimiser, self._rate(epoch, step))
        with self.place.autocast(), self.firing.at(step):
            teacher = None if self.tutor is None else self.tutor.answer(inputs, self.feed.view(epoch), step)
            source = inputs.source if self.lesson.needs.source else None
            logits, terms = self.trained(inputs.student, inputs.labels, teacher, source, progress)
        check_terms(terms)
        values = {name: float(term.detach()) for name, term in terms.items()}
        given = [inputs.student, inputs.teacher, inputs.source]
        seen = {"inputs": given, "teacher's answer": teacher, "student's logits": logits}
        if not math.isfinite(sum(values.values())):
            raise self._broken(f"The loss became {values}", epoch, step, seen)
        self.optimiser.zero_grad(set_to_none=True)
        self.processes.backward(total(terms))
        norm = self.processes.clip(self.lesson.parameters(), self.config.clip)
        if not math.isfinite(norm):
            raise self._broken(f"The norm of the gradient became {norm} at the loss {values}", epoch, step, seen)
        self.optimiser.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.student)
        return values, int((logits.float().mean(0).argmax(-1) == inputs.labels).sum()), len(inputs.labels)

    def _broken(self, what: str, epoch: int, step: int, seen: Mapping[str, Any]) -> ConfigError:
        """The refusal of a step whose loss or gradient is not finite; nothing of it is saved."""
        whole = {"weights": dict(self.lesson.named_parameters()), **seen}
        broken = [name for name, held in whole.items() if not is_finite(held)]
        fine = [name for name in whole if name not in broken]
        lower = f"lower --lr (={self.config.peak}), or set --clip 1, in another --out"
        return ConfigError(
            f"{what} in epoch {epoch}, step {step + 1}: {CAUSES.get((broken or [''])[0], lower)}. Not finite:"
            f" {', '.join(broken) or 'that alone'}; finite: {', '.join(fine) or 'nothing'}. The last checkpoint is"
            " untouched."
        )

    def check_weights(self, epoch: int, step: int) -> None:
        """Refuse weights, statistics or an optimiser's state that are not finite, before they are saved or judged.

        Raises:
            ConfigError: if there are such.
        """
        held = {f"{role}.{n}": v for role, module in self._kept().items() for n, v in module.state_dict().items()}
        held["the optimiser's state"] = list(self.optimiser.state.values())
        broken = [name for name, value in held.items() if not is_finite(value)]
        if broken:
            raise ConfigError(
                f"After epoch {epoch}, step {step}, {len(broken)} of {len(held)} tensors hold NaN or infinity,"
                f" {broken[0]} first: lower --lr (={self.config.peak}), or set --clip 1, in another --out; the last"
                " checkpoint is untouched."
            )

    def line(self, epoch: int, meters: Meters) -> dict[str, Any]:
        """An epoch's line for metrics.jsonl, with the accuracy on the held-out samples."""
        line = {"epoch": epoch, "step": epoch * self.feed.steps, "lr": self._rate(epoch, self.feed.steps - 1)}
        line |= {**meters.means(), **self.firing.facts()}
        held, labels = self.feed.held()
        if len(held):
            judged: nn.Module = self.student if self.averaged is None else self.averaged.module
            line["validation_accuracy"] = accuracy_by_step(predict(judged, held, self.place.dtype), labels)[-1]
        return line

    def _kept(self) -> dict[str, nn.Module]:
        """The modules whose tensors a checkpoint holds."""
        return {"lesson": self.lesson} | ({} if self.averaged is None else {"averaged": self.averaged})

    def save(self, epoch: int, step: int, meters: Meters) -> None:
        """Write a checkpoint: so many epochs and steps lie behind.

        Raises:
            ConfigError: if what would be written is not finite.
        """
        self.check_weights(epoch, step)
        if self.tutor is not None and self.tutor.cache is not None:
            self.tutor.cache.flush()
        if self.processes.first:
            facts = {"epoch": epoch, "step": step, "meters": asdict(meters), "rate": self.firing.percent}
            facts["metrics"] = self.run.history(epoch)
            save_checkpoint(self.run.checkpoint, self._kept(), self.optimiser, facts)
        self.saved = time.monotonic()

    def restore(self) -> tuple[int, int, Meters]:
        """Go back to the checkpoint, if there is one: epochs and steps that lie behind, and the sums so far."""
        facts: dict[str, Any] = {"epoch": 0, "step": 0, "meters": {}, "rate": None}
        if self.run.checkpoint.exists():
            facts = load_checkpoint(self.run.checkpoint, self._kept(), self.optimiser)
            self.progress.say(f"going on after epoch {facts['epoch']}, step {facts['step']}")
        if self.processes.first:
            self.run.rewind(facts["epoch"], facts.get("metrics"))
        self.firing.percent = facts["rate"]
        return facts["epoch"], facts["step"], Meters(**facts["meters"])
