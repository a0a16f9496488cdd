"""The only training loop. It trains spiking students and, as networks with one time step, their teachers.

One step: take a batch from the feed, run the teacher, run the student, compute the loss terms and take a gradient step
on their sum. All random numbers depend only on (seed, epoch, step), so on a CPU a resumed run continues with the
same bits.

With several processes each computes its rows of every batch. Gradients, loss terms, accuracy and firing rate are means
over all processes. Process 0 writes the files, and validates while the others wait. Buffers, such as the running
statistics of batch norm, are taken from process 0.
"""

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from spikedistill.data.feed import Feed, Inputs, step_seed
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import accuracy_by_step, predict
from spikedistill.files import home
from spikedistill.neuron.fused import this_processor, works
from spikedistill.neuron.layer import Spiking
from spikedistill.objective.terms import Objective, check_terms, total
from spikedistill.shapes import Labels
from spikedistill.student.student import Student
from spikedistill.train.checkpoint import load_checkpoint, save_checkpoint
from spikedistill.train.meters import FiringRateMeter, Meters
from spikedistill.train.optimise import (
    clip,
    learning_rate,
    make_averaged,
    make_lookahead,
    make_optimiser,
    set_learning_rate,
)
from spikedistill.train.processes import Processes, join
from spikedistill.train.progress import Events, Progress
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run
from spikedistill.train.training_step import is_finite, make_runner, make_training_step, settle_objective

CAUSES = {
    "weights": "an earlier step broke the weights, or their file holds such values: lower --lr, in another --out",
    "inputs": "check the images, their normalisation and their augmentation",
    "teacher's outputs": "check the teacher's weights and its normalisation; delete its outputs that are kept on disk",
}
"""The first part that is not finite -> what to do."""


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
    """Train a network in place; go on from the run's checkpoint if there is one.

    Args:
        student: a ``Learner``; moved to the device in the configuration.
        objective: the loss terms; open fields are filled in.
        feed: yields batches and the held-out samples.
        config: how it is trained; batch size, seed and views are the feed's.
        run: the directory of metrics and checkpoints. With several processes only process 0 writes there.
        teacher: a ``Learner`` that the objective may need, an ANN or a student.
        progress: shows the work; silent by default.

    Returns:
        The last line of metrics. With several processes all end with the same network.

    Raises:
        ConfigError: if the objective needs something that does not exist, the loss, its gradient or the weights are no
            longer finite, or the disk is too small for the teacher's outputs. Values that are not finite are never
            saved.
        RunError: if the directory holds a checkpoint of another run, the teacher's outputs there are damaged, or
            another process has ended.
    """
    processes = join()
    shown = progress if progress is not None and processes.is_main_process else Progress.silent()
    with processes.main_process_first():
        trainer = Trainer(student, objective, feed, config, run, teacher, shown, processes)
        behind, done, meters = trainer.restore()
        events = Events(run.path) if config.tensorboard and processes.is_main_process else None
    processes.check_devices(trainer.place.device)
    processes.broadcast(*trainer.kept().values())
    for epoch in range(behind + 1, config.epochs + 1):
        began = time.monotonic()
        trainer.progress.epoch(epoch, config.epochs, trainer.feed.steps, done)
        trainer.training_step.train()
        for step, inputs in enumerate(trainer.feed.batches(epoch, done), done):
            meters.add(*trainer.step(inputs, epoch, step))
            trainer.progress.step({**meters.means(trainer.measure), **trainer.firing.facts()})
            if trainer.due:
                trainer.save(epoch - 1, step + 1, meters)
        trainer.check_weights(epoch, trainer.feed.steps)
        line = trainer.line(epoch, meters)
        processes.on_main_process(functools.partial(trainer.write, line, time.monotonic() - began, events))
        done, meters = 0, Meters()
        trainer.save(epoch, done, meters)
        trainer.progress.epoch_done(line)
    if trainer.averaged is not None:
        student.load_state_dict(trainer.averaged.module.state_dict())
    processes.broadcast(student)
    return processes.on_main_process(lambda: run.lines("metrics")[-1])


class Trainer:
    """Everything that ``fit`` needs at each step, set up once."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        feed: Feed,
        config: Training,
        run: Run,
        teacher: nn.Module | None,
        progress: Progress,
        processes: Processes,
    ) -> None:
        torch.manual_seed(config.seed)
        self.student, self.config, self.run, self.progress = student, config, run, progress
        self.processes = processes
        inherits = isinstance(student, Student) and student.conversion.inherit
        objective = settle_objective(objective, student, teacher, inherits)
        self.place = config.place().for_training(student)
        if config.channels_last and self.place.layout is not torch.channels_last:
            progress.say(
                "tensors are contiguous: channels last does not suit this network's narrow strided or 3D convolutions"
            )
        self.feed = feed.shared(self.processes.rank, self.processes.world_size).on(self.place.device)
        self.runner = make_runner(teacher, objective.needs, self.place)
        self.computed = self._prepare(student)
        example = self._moved(next(self.feed.batches(1)))
        self.measure = "accuracy" if example.labels is not None else "agreement"
        with self.place.autocast():
            training_step = make_training_step(student, objective, self.runner, example, self.processes.all_reduce_mean)
            self.training_step = training_step.to(self.place.device)
            self.training_step.freeze_norm = config.freeze_norm
            if self.runner is not None and teacher is not None and feed.views:
                folder = run.path / "answers" if config.cache_dir is None else home(config.cache_dir)
                progress.say(str(self.runner.keep_answers(folder, self.feed, self.place, teacher, example)))
        self.optimiser = make_optimiser(self.training_step, config)
        self.averaged = make_averaged(student, config)
        self.lookahead = make_lookahead(student, config)
        self.firing = FiringRateMeter(student)
        self.neurons = [layer for layer in student.modules() if isinstance(layer, Spiking)]
        self.trained: Any = self.training_step
        if config.compile and works(self.place.device.type):
            self.trained = torch.compile(self.training_step, options=this_processor())
        self.saved, self.due = time.monotonic(), False
        self.taught: Labels | None = None

    def _prepare(self, student: nn.Module) -> dict[str, str]:
        """Move the student to its device. Print and return device, number format and memory format."""
        reason = self.place.prepare(student)
        if reason and self.config.convolutions == "winograd":
            raise ConfigError(f"convolutions (=winograd) are not available here ({reason}): give torch, or auto.")
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
        """One gradient step. Returns the terms, the number of correct predictions, and the number of samples."""
        inputs = self._moved(inputs)
        gone = ((epoch - 1) * self.feed.steps + step) / (self.config.epochs * self.feed.steps)
        progress = torch.full((), gone, device=self.place.device)  # needs no copy
        set_learning_rate(self.optimiser, self._rate(epoch, step))
        self.processes.reseed(step_seed(self.config.seed, epoch, step))
        with self.place.autocast(), self.firing.at(step):
            teacher = None if self.runner is None else self.runner.answer(inputs, self.feed.view(epoch), step)
            source = inputs.source if self.training_step.needs.source else None
            counts = self.firing.due(step)  # which would break a compiled graph
            trained = self.training_step if counts else self.trained
            logits, terms = trained(inputs.student, inputs.labels, teacher, source, progress)
        check_terms(terms)
        right = inputs.labels if teacher is None or inputs.labels is not None else teacher.logits.mean(0).argmax(-1)
        values, correct = self._counted(terms, (logits.float().mean(0).argmax(-1) == right).sum())
        given = [inputs.student, inputs.teacher, inputs.source]
        seen = {"inputs": given, "teacher's outputs": teacher, "student's logits": logits}
        if not math.isfinite(sum(values.values())):
            raise self._broken(f"The loss became {values}", epoch, step, seen)
        self.optimiser.zero_grad(set_to_none=True)
        total(terms).backward()
        self.processes.average_gradients(self.training_step.parameters())
        norm = clip(self.training_step.parameters(), self.config.clip)
        if not math.isfinite(norm):
            raise self._broken(f"The norm of the gradient became {norm} at the loss {values}", epoch, step, seen)
        self.optimiser.step()
        for layer in self.neurons:
            layer.raise_threshold()
        if self.averaged is not None:
            self.averaged.update_parameters(self.student)
        if self.lookahead is not None:
            done, steps = (epoch - 1) * self.feed.steps + step + 1, self.config.epochs * self.feed.steps
            self.lookahead.update(self.student, done, steps)
        return values, correct, len(inputs.samples) * self.processes.world_size

    def _counted(self, terms: Mapping[str, torch.Tensor], correct: torch.Tensor) -> tuple[dict[str, float], int]:
        """Mean terms and correct predictions over all processes; the firing rate, and whether process 0 would save."""
        own = torch.stack(
            [one.detach().float() for one in (*terms.values(), correct)]
        ).tolist()  # a GPU is waited for once
        due = self.processes.is_main_process and time.monotonic() - self.saved > 60 * self.config.checkpoint_minutes
        *sums, right, rate, late = self.processes.all_reduce_sum([*own, self.firing.percent or 0.0, float(due)])
        self.due = bool(late)
        count = self.processes.world_size
        self.firing.percent = None if self.firing.percent is None else rate / count
        return {name: value / count for name, value in zip(terms, sums, strict=True)}, int(right)

    def _broken(self, what: str, epoch: int, step: int, seen: Mapping[str, Any]) -> BaseException:
        """The error for a step whose loss or gradient is not finite; nothing of this step is saved."""
        whole = {"weights": dict(self.training_step.named_parameters()), **seen}
        found = self.processes.all_gather([name for name, held in whole.items() if not is_finite(held)])
        broken = [name for name in whole if any(name in one for one in found)]
        fine = [name for name in whole if name not in broken]
        lower = f"lower --lr (={self.config.peak}), or set --clip 1, in another --out"
        refusal = ConfigError(
            f"{what} in epoch {epoch}, step {step + 1}: {CAUSES.get((broken or [''])[0], lower)}. Not finite:"
            f" {', '.join(broken) or 'nothing else'}; finite: {', '.join(fine) or 'nothing'}. The last checkpoint is"
            " unchanged."
        )
        return self.processes.mark_reported(refusal)

    def check_weights(self, epoch: int, step: int) -> None:
        """Refuse weights, statistics or an optimiser's state that are not finite, before they are saved or validated.

        Raises:
            ConfigError: if any are not finite.
        """
        held = {f"{role}.{n}": v for role, module in self.kept().items() for n, v in module.state_dict().items()}
        held["the optimiser's state"] = list(self.optimiser.state.values())
        found = self.processes.all_gather([name for name, value in held.items() if not is_finite(value)])
        broken = max(found, key=len)
        if broken:
            refusal = ConfigError(
                f"After epoch {epoch}, step {step}, {len(broken)} of {len(held)} tensors hold NaN or infinity,"
                f" {broken[0]} first: lower --lr (={self.config.peak}), or set --clip 1, in another --out. The last"
                " checkpoint is unchanged."
            )
            raise self.processes.mark_reported(refusal)

    def line(self, epoch: int, meters: Meters) -> dict[str, Any]:
        """The line of an epoch in metrics.jsonl, with the accuracy or agreement on the held-out samples."""
        line = {"epoch": epoch, "step": epoch * self.feed.steps, "lr": self._rate(epoch, self.feed.steps - 1)}
        line |= {**meters.means(self.measure), **self.firing.facts()}
        held, labels = self.feed.held()
        if len(held):
            judged: nn.Module = self.student if self.averaged is None else self.averaged.module
            line[f"validation_{self.measure}"] = self.processes.on_main_process(
                lambda: accuracy_by_step(predict(judged, held, self.place.dtype), self._classes(held, labels))[-1]
            )
        return line

    def _classes(self, held: torch.Tensor, labels: Labels) -> Labels:
        """The labels of the held-out samples; without labels the classes that the teacher gives them."""
        if self.measure == "accuracy" or self.runner is None:
            return labels
        if self.taught is None:
            self.taught = predict(self.runner.teacher, held, self.place.dtype).mean(0).argmax(-1)
        return self.taught

    def write(self, line: dict[str, Any], seconds: float, events: Events | None) -> None:
        """Add an epoch's line to the logs."""
        self.run.append("metrics", line)
        timing = {"epoch": line["epoch"], "seconds": seconds, **self.computed, "processes": self.processes.world_size}
        self.run.append("timing", timing)
        if events is not None:
            events.add(line)

    def kept(self) -> dict[str, nn.Module]:
        """The modules whose tensors a checkpoint holds, by their names there."""
        found = {"lesson": self.training_step, "averaged": self.averaged, "lookahead": self.lookahead}
        return {role: module for role, module in found.items() if module is not None}

    def save(self, epoch: int, step: int, meters: Meters) -> None:
        """Write a checkpoint after this number of epochs and steps.

        Raises:
            ConfigError: if weights or the optimiser's state are not finite.
        """
        self.check_weights(epoch, step)
        if self.runner is not None and self.runner.cache is not None:
            self.runner.cache.flush()
        self.processes.on_main_process(lambda: self._save(epoch, step, meters))
        self.saved = time.monotonic()

    def _save(self, epoch: int, step: int, meters: Meters) -> None:
        facts = {"epoch": epoch, "step": step, "meters": asdict(meters), "rate": self.firing.percent}
        facts["metrics"] = self.run.history(epoch)
        save_checkpoint(self.run.checkpoint, self.kept(), self.optimiser, facts)

    def restore(self) -> tuple[int, int, Meters]:
        """Restore the checkpoint, if there is one. Returns the epochs and steps that are done, and the sums so far."""
        facts: dict[str, Any] = {"epoch": 0, "step": 0, "meters": {}, "rate": None}
        if self.run.checkpoint.exists():
            facts = load_checkpoint(self.run.checkpoint, self.kept(), self.optimiser)
            self.progress.say(f"continuing after epoch {facts['epoch']}, step {facts['step']}")
        if self.processes.is_main_process:
            self.run.rewind(facts["epoch"], facts.get("metrics"))
        self.firing.percent = facts["rate"]
        return facts["epoch"], facts["step"], Meters(**facts["meters"])
