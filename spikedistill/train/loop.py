"""The only training loop. It trains spiking students and, as networks of one time step, their teachers.

One step: take a batch, ask the teacher, ask the student, let the objective name its terms, walk down their sum.
Order and augmentation of step s in epoch e depend on (seed, e, s) alone, so a resumed run goes on with the same bits.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spikedistill.data.augment import Augment
from spikedistill.data.images import ImageSet, split
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import accuracy_by_step, answers
from spikedistill.evaluate.activity import firing_rates
from spikedistill.objective.terms import Batch, Objective, Terms, total
from spikedistill.shapes import Image, Labels, Logits
from spikedistill.student.build import Student
from spikedistill.teacher.load import Teacher
from spikedistill.teacher.taps import taps
from spikedistill.train.checkpoint import load_checkpoint, save_checkpoint
from spikedistill.train.device import choose_device, choose_precision
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run


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
def ask(teacher: Teacher | None, images: Image, objective: Objective) -> tuple[Tensor | None, Mapping[str, Tensor]]:
    """The teacher's logits and the features that the objective compares, where it wants them."""
    if not objective.teacher or teacher is None:
        return None, {}
    with taps(teacher.network, tuple(path for path, _ in objective.pairs)) as seen:
        logits = teacher(images)
    return logits.float(), seen


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
        return config.lr * min(1.0, (step + 1) / rise)
    gone = (step - rise) / max(1.0, steps - rise)
    return config.lr * (0.5 * (1 + math.cos(math.pi * gone)) if config.schedule == "cosine" else 1 - gone)


def make_optimiser(module: nn.Module, config: Training) -> torch.optim.Optimizer:
    """SGD or AdamW; matrices and kernels decay, vectors (biases, norms) and scalars (thresholds, leaks) do not."""
    chosen = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in chosen if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in chosen if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def epoch_order(indices: Tensor, seed: int, epoch: int, batch_size: int) -> list[Tensor]:
    """The batches of an epoch as index tensors; a last batch that is too small is left out."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = indices[torch.randperm(len(indices), generator=generator)]
    return [part for part in order.split(batch_size) if len(part) == batch_size]


def step_seed(seed: int, epoch: int, step: int) -> int:
    """A number of its own for the augmentation of every step."""
    return (seed * 1_000_003 + epoch) * 1_000_003 + step


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
        self.rate = 100.0 * rates.mean()

    def facts(self) -> dict[str, float]:
        """The last rate, in percent of all chances to spike."""
        return {} if self.rate is None else {"firing_rate": self.rate}


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
        ConfigError: if the training set is smaller than one batch, or the loss is no longer a number.
        RunError: if a checkpoint of another run lies in the directory.
    """
    progress, augment = progress or Progress.silent(), augment or Augment()
    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    precision = choose_precision(config, device)
    progress.say(f"{device}, {str(precision.dtype).removeprefix('torch.')}: {precision.reason}")
    accelerator = Accelerator(cpu=device.type == "cpu")
    share = config.batch_size // accelerator.num_processes
    indices, held = split(images.train_labels, validation, seed=0)
    steps = len(indices) // config.batch_size
    if steps < 1 or share < 1:
        raise ConfigError(
            f"batch_size (={config.batch_size}) must be at most the {len(indices)} training samples and at least the "
            f"{accelerator.num_processes} processes."
        )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    for network in (student, teacher):
        if network is not None:
            network.to(device=device, memory_format=layout)  # type: ignore[call-overload]

    def fetch(chosen: Tensor, seed: int) -> tuple[Image, Labels]:
        mine = chosen[accelerator.process_index * share :][:share]
        batch = augment(images.train_images[mine], seed + accelerator.process_index)
        return batch.to(device, memory_format=layout, non_blocking=True), images.train_labels[mine].to(device)

    autocast = torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32)
    with autocast:
        adapters = probe(
            student, teacher, objective, *fetch(epoch_order(indices, config.seed, 1, config.batch_size)[0], 0)
        )
    lesson = Lesson(student, objective, adapters.to(device))
    optimiser = make_optimiser(lesson, config)
    kept: dict[str, nn.Module] = {"lesson": lesson}
    if config.ema:
        kept["averaged"] = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    judged = kept["averaged"].module if config.ema else student
    state: dict[str, Any] = {"epoch": 0, "step": 0, "meters": {}}
    if run.checkpoint.exists():
        state = load_checkpoint(run.checkpoint, kept, optimiser)
        run.rewind(state["epoch"])
        progress.say(f"going on after epoch {state['epoch']}, step {state['step']}")
    trained = accelerator.prepare(lesson) if accelerator.num_processes > 1 else lesson
    watch, saved = Watch(student), time.monotonic()

    def save(epoch: int, step: int, meters: Meters) -> None:
        if accelerator.is_main_process:
            save_checkpoint(run.checkpoint, kept, optimiser, {"epoch": epoch, "step": step, "meters": asdict(meters)})

    line: dict[str, Any] = (run.lines("metrics") or [{}])[-1]
    for epoch in range(state["epoch"] + 1, config.epochs + 1):
        began = time.monotonic()
        meters, done = Meters(**state.pop("meters", {})), state.pop("step", 0)
        progress.epoch(epoch, config.epochs, steps, done)
        trained.train()
        for step, chosen in enumerate(epoch_order(indices, config.seed, epoch, config.batch_size)):
            if step < done:
                continue
            batch, labels = fetch(chosen, step_seed(config.seed, epoch, step))
            set_rate(optimiser, learning_rate((epoch - 1) * steps + step, config.epochs * steps, config))
            with autocast, watch.at(step):
                logits, terms = trained(batch, labels, *ask(teacher, batch, objective))
            loss = total(terms)
            values = {name: float(term.detach()) for name, term in terms.items()}
            if not math.isfinite(sum(values.values())):
                raise ConfigError(
                    f"The loss became {values} in epoch {epoch}, step {step + 1}: lower --lr (={config.lr}), or set"
                    " --clip 1; the last checkpoint is untouched."
                )
            optimiser.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            if config.clip:
                accelerator.clip_grad_norm_(lesson.parameters(), config.clip)
            optimiser.step()
            if config.ema:
                kept["averaged"].update_parameters(student)
            meters.add(values, int((logits.float().mean(0).argmax(-1) == labels).sum()), len(labels))
            progress.step({**meters.means(), **watch.facts()})
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                save(epoch - 1, step + 1, meters)
                saved = time.monotonic()
        line = {"epoch": epoch, "step": epoch * steps, "lr": config.lr, **meters.means(), **watch.facts()}
        if len(held):
            logits = answers(judged, images.train_images[held], precision.dtype)
            line["validation_accuracy"] = accuracy_by_step(logits, images.train_labels[held])[-1]
        if accelerator.is_main_process:
            run.append("metrics", line)
            run.append("timing", {"epoch": epoch, "seconds": time.monotonic() - began})
        save(epoch, 0, Meters())
        saved = time.monotonic()
        progress.epoch_done(line)
    if config.ema:
        student.load_state_dict(judged.state_dict())
    return line


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of parameters the same learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
