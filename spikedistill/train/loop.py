"""The only training loop. It trains spiking students and, as networks of one time step, their teachers.

One step: take a batch, ask the teacher, ask the student, let the objective name its terms, walk down their sum.
Order and augmentation of step s in epoch e depend on (seed, e, s) alone, so a resumed run goes on with the same bits.
With ``views`` the epochs repeat in turn, and the teacher's answers come from disk (``teacher/cache.py``).
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spikedistill.data.augment import Augment, alternate
from spikedistill.data.images import ImageSet, split
from spikedistill.errors import ConfigError, ConversionError
from spikedistill.evaluate.accuracy import accuracy_by_step, answers
from spikedistill.evaluate.activity import firing_rates
from spikedistill.neuron.fused import works
from spikedistill.objective.terms import Batch, Objective, Terms, total
from spikedistill.shapes import Image, Labels, Logits
from spikedistill.student.build import Student
from spikedistill.student.fold import fold
from spikedistill.teacher.cache import Answer, Cache, fingerprint, fingerprint_of
from spikedistill.teacher.load import Teacher
from spikedistill.teacher.taps import taps
from spikedistill.train.checkpoint import load_checkpoint, save_checkpoint
from spikedistill.train.device import choose_device, choose_layout, choose_precision, settle
from spikedistill.train.progress import Events, Progress
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run


@runtime_checkable
class Learner(Protocol):
    """What can be trained: logits over time, and features by module path."""

    def observe(self, images: Image, paths: tuple[str, ...]) -> tuple[Logits, Mapping[str, Tensor]]:
        """Logits ``[T, B, K]`` and the features ``[T, B, ...]`` at the paths."""
        ...


class Lesson(nn.Module):
    """What is computed in one step with gradients: the student's answer and the objective's terms."""

    def __init__(self, student: nn.Module, objective: Objective, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.adapters = adapters

    def forward(
        self, images: Image, labels: Labels, teacher_logits: Tensor | None, teacher_features: Mapping[str, Tensor]
    ) -> tuple[Logits, Terms]:
        """One batch to logits ``[T, B, K]`` and named terms."""
        logits, features = observe(self.student, images, self.objective)
        batch = Batch(logits.float(), labels, features, teacher_logits, teacher_features)
        return logits.detach(), self.objective(batch, self.adapters)


def observe(student: Any, images: Image, objective: Objective) -> tuple[Logits, Mapping[str, Tensor]]:
    """The student's answer with the features that the objective compares."""
    return student.observe(images, tuple(path for _, path in objective.pairs))


@torch.no_grad()
def ask(teacher: Teacher | None, images: Image, objective: Objective) -> Answer:
    """The teacher's logits and the features that the objective compares, where it wants them."""
    if teacher is None:
        return None, {}
    with taps(teacher.network, tuple(path for path, _ in objective.pairs)) as seen:
        logits = teacher(images)
    return logits.float(), seen


def quick(teacher: Teacher | None, objective: Objective) -> Teacher | None:
    """The same teacher with fewer passes over memory, where it can be traced."""
    if teacher is None or not objective.teacher:
        return None
    try:
        return fold(teacher, keep=tuple(path for path, _ in objective.pairs))
    except ConversionError:
        return teacher


@dataclass
class Meters:
    """Sums over an epoch, from which its line in metrics.jsonl is made."""

    steps: int = 0
    samples: int = 0
    correct: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, terms: Mapping[str, float], correct: int, samples: int) -> None:
        """Count one step."""
        self.steps, self.samples, self.correct = self.steps + 1, self.samples + samples, self.correct + correct
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Mean terms, their sum, and accuracy in percent."""
        if not self.steps:
            return {}
        terms = {name: value / self.steps for name, value in self.sums.items()}
        return {"loss": sum(terms.values()), **terms, "train_accuracy": 100.0 * self.correct / self.samples}


def learning_rate(step: int, steps: int, config: Training) -> float:
    """The rate of step 0..steps-1: a straight rise over ``warmup``, then half a cosine or a straight line to 0.

    >>> config = Training(lr=1.0, warmup=0.5, schedule="one-cycle")
    >>> [round(learning_rate(step, 4, config), 2) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rise = config.warmup * steps
    if step < rise:
        return config.peak * min(1.0, (step + 1) / rise)
    gone = (step - rise) / max(1.0, steps - rise)
    return config.peak * (0.5 * (1 + math.cos(math.pi * gone)) if config.schedule == "cosine" else 1 - gone)


def make_optimiser(module: nn.Module, config: Training) -> torch.optim.Optimizer:
    """SGD or AdamW; matrices and kernels decay, vectors (biases, norms) and scalars (thresholds, leaks) do not."""
    chosen = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in chosen if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in chosen if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak)
    return torch.optim.SGD(groups, lr=config.peak, momentum=config.momentum, nesterov=config.momentum > 0)


def _mix(seed: int, number: int) -> int:
    """A seed of its own for every number, of a size that generators take."""
    return (seed * 1_000_003 + number) % 2**63


def epoch_order(indices: Tensor, seed: int, epoch: int, batch_size: int) -> list[Tensor]:
    """The batches of an epoch as index tensors; a last batch that is too small is left out."""
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    order = indices[torch.randperm(len(indices), generator=generator)]
    return [part for part in order.split(batch_size) if len(part) == batch_size]


def step_seed(seed: int, epoch: int, step: int) -> int:
    """A number of its own for the augmentation of every step."""
    return _mix(_mix(seed, epoch), step)


def view_of(epoch: int, views: int) -> int:
    """The epoch whose order and augmentation an epoch has: its own, or with ``views`` one of the first ones in turn.

    >>> [view_of(epoch, 2) for epoch in (1, 2, 3, 4, 5)]
    [1, 2, 1, 2, 1]
    """
    return (epoch - 1) % views + 1 if views else epoch


@torch.no_grad()
def probe(
    student: nn.Module, teacher: Teacher | None, objective: Objective, images: Image, labels: Labels
) -> nn.ModuleDict:
    """The objective's adapters, made from what both networks answer to one batch; the student is left as it was."""
    if not objective.pairs:
        return objective.adapters(Batch(torch.zeros(1, len(labels), 1), labels))
    training = student.training
    student.eval()
    teacher_logits, teacher_features = ask(teacher, images, objective)
    logits, features = observe(student, images, objective)
    student.train(training)
    return objective.adapters(Batch(logits, labels, features, teacher_logits, teacher_features))


RATE_EVERY = 20
"""Steps between two looks at the firing rate."""


class Watch:
    """The firing rate of a student, looked at now and then, since counting costs a pass over all spikes."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student if isinstance(student, Student) else None
        self.rate: float | None = None

    @contextlib.contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Count the spikes of one step, if it is one of those that are looked at."""
        if self.student is None or step % RATE_EVERY:
            yield
            return
        with firing_rates(self.student) as rates:
            yield
        if rates.chances:  # the quantised stand-in has none
            self.rate = 100.0 * rates.mean()

    def facts(self) -> dict[str, float]:
        """The last rate, in percent of all chances to spike."""
        return {} if self.rate is None else {"firing_rate": self.rate}


class Trainer:
    """What ``fit`` needs at every step, set up once: data, device, networks, optimiser, and where files go."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        images: ImageSet,
        config: Training,
        run: Run,
        augment: Augment,
        validation: float,
        teacher: Teacher | None,
        progress: Progress,
    ) -> None:
        torch.manual_seed(config.seed)
        self.objective, self.images, self.config, self.run = objective, images, config, run
        self.augment, self.teacher, self.progress = augment, quick(teacher, objective), progress
        self.device = choose_device(config.device)
        self.precision = choose_precision(config, self.device)
        self.layout = choose_layout(config, self.device, student)
        if config.channels_last and self.layout is not torch.channels_last:
            progress.say("channels last is left out: a strided 1 x 1 convolution of few channels would learn wrongly")
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self.share = config.batch_size // self.accelerator.num_processes
        self.indices, self.held = split(images.train_labels, validation, seed=0)
        self.steps = len(self.indices) // config.batch_size
        if self.steps < 1 or self.share < 1:
            raise ConfigError(
                f"batch_size (={config.batch_size}) must be at most the {len(self.indices)} training samples and at "
                f"least the {self.accelerator.num_processes} processes."
            )
        if self.teacher is not None:
            own = self.teacher is not teacher  # the caller's keeps its layers
            settle(self.teacher, self.device, self.layout, config if own else replace(config, convolutions="torch"))
        reason = settle(student, self.device, self.layout, config)
        if reason and config.convolutions == "winograd":
            raise ConfigError(f"convolutions (=winograd) cannot be had here ({reason}): give torch, or auto.")
        self.chosen = {
            "device": str(self.device),
            "dtype": str(self.precision.dtype).removeprefix("torch."),
            "layout": str(self.layout).removeprefix("torch."),
            "convolutions": "torch" if reason else "winograd",
        }
        progress.say(f"{', '.join(self.chosen.values())} convolutions: {self.precision.reason}")
        batch, labels = self.fetch(self.order(1)[0], 0, 1)
        with self.autocast():
            adapters = probe(student, self.teacher, objective, batch, labels)
            self.cache = self.open_cache(teacher, batch)
        self.lesson = Lesson(student, objective, adapters.to(self.device))
        self.optimiser = make_optimiser(self.lesson, config)
        self.averaged: AveragedModel | None = None
        if config.ema:
            self.averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self.watch = Watch(student)
        several = self.accelerator.num_processes > 1
        self.trained: Any = self.accelerator.prepare(self.lesson) if several else self.lesson
        if config.compile and works(self.device.type):
            self.trained = torch.compile(self.trained)
        self.saved = time.monotonic()

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.lesson.student

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the averaged one, if there is one."""
        return self.student if self.averaged is None else self.averaged.module

    def autocast(self) -> torch.autocast:
        """The number format of the large operations."""
        return torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.dtype != torch.float32)

    def open_cache(self, teacher: Teacher | None, images: Image) -> Cache | None:
        """Where the teacher's answers are kept, if it is asked and batches come again; ``images`` are an example."""
        config, processes = self.config, self.accelerator
        if teacher is None or self.teacher is None or not config.views:
            return None
        samples = {"images": self.images.train_images, "indices": self.indices}
        key = {
            "teacher": fingerprint_of(teacher),
            "data": self.images.name,
            "samples": fingerprint(samples),
            "augment": asdict(self.augment),
            "seed": config.seed,
            "batch_size": config.batch_size,
            "process": [processes.process_index, processes.num_processes],
            "computed": [self.device.type, str(self.precision.dtype), str(self.layout)],
        }
        folder = self.run.path / "answers" if config.cache_dir is None else Path(config.cache_dir).expanduser()
        cache = Cache(folder, key, ask(self.teacher, images, self.objective), config.views, self.steps)
        self.progress.say(str(cache))
        return cache

    def answer(self, batch: Image, chosen: Tensor, view: int, step: int) -> Answer:
        """The teacher's answer to a batch, asked now or kept from an earlier epoch."""
        if self.cache is None:
            return ask(self.teacher, batch, self.objective)
        return self.cache.answer(view, step, self.mine(chosen), lambda: ask(self.teacher, batch, self.objective))

    def order(self, epoch: int) -> list[Tensor]:
        """The batches of an epoch."""
        view = view_of(epoch, self.config.views)
        return epoch_order(self.indices, self.config.seed, view, self.config.batch_size)

    def mine(self, chosen: Tensor) -> Tensor:
        """This process's share of a batch."""
        return chosen[self.accelerator.process_index * self.share :][: self.share]

    def fetch(self, chosen: Tensor, seed: int, epoch: int) -> tuple[Image, Labels]:
        """This process's share of a batch, augmented, on the device."""
        mine = self.mine(chosen)
        turned = alternate(len(self.images.train_images), mine, epoch)
        batch = self.augment(self.images.train_images[mine], seed + self.accelerator.process_index, turned)
        labels = self.images.train_labels[mine].to(self.device)
        return batch.to(self.device, memory_format=self.layout, non_blocking=True), labels

    def rate(self, epoch: int, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate((epoch - 1) * self.steps + step, self.config.epochs * self.steps, self.config)

    def epoch(self, epoch: int, done: int, meters: Meters) -> dict[str, Any]:
        """Train from step ``done`` to the end of an epoch; return its line for metrics.jsonl."""
        self.progress.epoch(epoch, self.config.epochs, self.steps, done)
        self.trained.train()
        for step, chosen in enumerate(self.order(epoch)):
            if step < done:
                continue
            meters.add(*self.step(chosen, epoch, step, self.rate(epoch, step)))
            self.progress.step({**meters.means(), **self.watch.facts()})
            if time.monotonic() - self.saved > 60 * self.config.checkpoint_minutes:
                self.save(epoch - 1, step + 1, meters)
        line = {"epoch": epoch, "step": epoch * self.steps, "lr": self.rate(epoch, self.steps - 1)}
        line |= {**meters.means(), **self.watch.facts()}
        if len(self.held):
            logits = answers(self.judged, self.images.train_images[self.held], self.precision.dtype)
            line["validation_accuracy"] = accuracy_by_step(logits, self.images.train_labels[self.held])[-1]
        return line

    def step(self, chosen: Tensor, epoch: int, step: int, rate: float) -> tuple[dict[str, float], int, int]:
        """One step downhill; returns the terms, how many answers were right, and of how many."""
        view = view_of(epoch, self.config.views)
        batch, labels = self.fetch(chosen, step_seed(self.config.seed, view, step), view)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with self.autocast(), self.watch.at(step):
            logits, terms = self.trained(batch, labels, *self.answer(batch, chosen, view, step))
        loss = total(terms)
        values = {name: float(term.detach()) for name, term in terms.items()}
        if not math.isfinite(sum(values.values())):
            raise ConfigError(
                f"The loss became {values} in epoch {epoch}, step {step + 1}: lower --lr (={self.config.peak}), or set "
                "--clip 1, in another --out; the last checkpoint is untouched."
            )
        self.optimiser.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if self.config.clip:
            self.accelerator.clip_grad_norm_(self.lesson.parameters(), self.config.clip)
        self.optimiser.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.student)
        return values, int((logits.float().mean(0).argmax(-1) == labels).sum()), len(labels)

    def kept(self) -> dict[str, nn.Module]:
        """The modules whose tensors a checkpoint holds."""
        return {"lesson": self.lesson} | ({} if self.averaged is None else {"averaged": self.averaged})

    def save(self, epoch: int, step: int, meters: Meters) -> None:
        """Write a checkpoint: so many epochs and steps lie behind."""
        if self.cache is not None:
            self.cache.flush()
        if self.accelerator.is_main_process:
            facts = {"epoch": epoch, "step": step, "meters": asdict(meters), "rate": self.watch.rate}
            save_checkpoint(self.run.checkpoint, self.kept(), self.optimiser, facts)
        self.saved = time.monotonic()

    def restore(self) -> tuple[int, int, Meters]:
        """Go back to the checkpoint, if there is one: epochs and steps that lie behind, and the sums so far."""
        facts: dict[str, Any] = {"epoch": 0, "step": 0, "meters": {}, "rate": None}
        if self.run.checkpoint.exists():
            facts = load_checkpoint(self.run.checkpoint, self.kept(), self.optimiser)
            self.progress.say(f"going on after epoch {facts['epoch']}, step {facts['step']}")
        if self.accelerator.is_main_process:
            self.run.rewind(facts["epoch"])
        self.watch.rate = facts["rate"]
        return facts["epoch"], facts["step"], Meters(**facts["meters"])


def fit(
    student: nn.Module,
    objective: Objective,
    images: ImageSet,
    config: Training,
    run: Run,
    *,
    augment: Augment | None = None,
    validation: float = 0.1,
    teacher: Teacher | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a network in place; go on from the run's checkpoint where there is one.

    Args:
        student: a ``Learner``; moved to the device that the configuration names.
        objective: what it is taught.
        images: where training and validation samples come from; the test part is not touched.
        config: how it is trained.
        run: where metrics and checkpoints go.
        augment: random changes to training batches; none by default.
        validation: share of the training set held out.
        teacher: whom the objective asks.
        progress: what shows the work; silent by default.

    Returns:
        The last line of metrics.

    Raises:
        ConfigError: if the training set is smaller than one batch, the loss is no longer a number, or the disk is too
            small for the teacher's answers.
        RunError: if a checkpoint of another run lies in the directory, or the teacher's answers there are damaged.
    """
    progress, augment = progress or Progress.silent(), augment or Augment()
    trainer = Trainer(student, objective, images, config, run, augment, validation, teacher, progress)
    behind, done, meters = trainer.restore()
    events = Events(run.path) if config.tensorboard else None
    for epoch in range(behind + 1, config.epochs + 1):
        began = time.monotonic()
        line = trainer.epoch(epoch, done, meters)
        if trainer.accelerator.is_main_process:
            run.append("metrics", line)
            run.append("timing", {"epoch": epoch, "seconds": time.monotonic() - began, **trainer.chosen})
            if events is not None:
                events.add(line)
        done, meters = 0, Meters()
        trainer.save(epoch, done, meters)
        progress.epoch_done(line)
    if trainer.averaged is not None:
        student.load_state_dict(trainer.judged.state_dict())
    return run.lines("metrics")[-1]
