"""The only training loop. It trains spiking students and, as networks of one time step, their teachers.

One step: take a batch from the feed, ask the teacher, ask the student, compute the loss terms and take a gradient step
on their sum. What is drawn depends on (seed, epoch, step) alone, so a resumed run goes on with the same bits.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikedistill.data.feed import Feed, Inputs
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import accuracy_by_step, predict
from spikedistill.neuron.fused import works
from spikedistill.objective.terms import Objective, Terms, check_terms, total
from spikedistill.student.build import Student
from spikedistill.train.checkpoint import load_checkpoint, save_checkpoint
from spikedistill.train.lesson import make_lesson, make_tutor, settle_objective
from spikedistill.train.meters import FiringRateMeter, Meters
from spikedistill.train.optimise import learning_rate, make_averaged, make_optimiser, set_learning_rate
from spikedistill.train.processes import Processes
from spikedistill.train.progress import Events, Progress
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run


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
        ConfigError: if the objective needs what there is not, the loss is no longer a number, or the disk is too small
            for the teacher's answers.
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
                "contiguous memory: oneDNN has a fault with channels last and narrow strided 1 x 1 convolutions"
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
        values = self._finite(terms, epoch, step)
        self.optimiser.zero_grad(set_to_none=True)
        self.processes.backward(total(terms))
        self.processes.clip(self.lesson.parameters(), self.config.clip)
        self.optimiser.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.student)
        return values, int((logits.float().mean(0).argmax(-1) == inputs.labels).sum()), len(inputs.labels)

    def _finite(self, terms: Terms, epoch: int, step: int) -> dict[str, float]:
        """The terms as numbers.

        Raises:
            ConfigError: if one is none, or they are no terms at all.
        """
        check_terms(terms)
        values = {name: float(term.detach()) for name, term in terms.items()}
        if not math.isfinite(sum(values.values())):
            raise ConfigError(
                f"The loss became {values} in epoch {epoch}, step {step + 1}: lower --lr (={self.config.peak}), or set "
                "--clip 1, in another --out; the last checkpoint is untouched."
            )
        return values

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
        """Write a checkpoint: so many epochs and steps lie behind."""
        if self.tutor is not None and self.tutor.cache is not None:
            self.tutor.cache.flush()
        if self.processes.first:
            facts = {"epoch": epoch, "step": step, "meters": asdict(meters), "rate": self.firing.percent}
            save_checkpoint(self.run.checkpoint, self._kept(), self.optimiser, facts)
        self.saved = time.monotonic()

    def restore(self) -> tuple[int, int, Meters]:
        """Go back to the checkpoint, if there is one: epochs and steps that lie behind, and the sums so far."""
        facts: dict[str, Any] = {"epoch": 0, "step": 0, "meters": {}, "rate": None}
        if self.run.checkpoint.exists():
            facts = load_checkpoint(self.run.checkpoint, self._kept(), self.optimiser)
            self.progress.say(f"going on after epoch {facts['epoch']}, step {facts['step']}")
        if self.processes.first:
            self.run.rewind(facts["epoch"])
        self.firing.percent = facts["rate"]
        return facts["epoch"], facts["step"], Meters(**facts["meters"])
