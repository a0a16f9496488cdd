"""What two processes of torchrun do for ``tests/test_processes.py``, and one process does for comparison.

``python -m torch.distributed.run --standalone --nproc_per_node 2 two_processes.py FOLDER`` leaves of each case and
process ``CASE-RANK.safetensors``, the weights, and ``CASE-RANK.json``, the last line of metrics or the refusal.
"""

import atexit
import contextlib
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spikedistill.cli import main
from spikedistill.data.augment import Augment
from spikedistill.data.feed import MemoryFeed
from spikedistill.data.images import ImageSet
from spikedistill.errors import ConfigError, SpikeDistillError
from spikedistill.objective.kdsnn import KDSNN, KDSNNResponse
from spikedistill.objective.terms import Objective
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.student import Student
from spikedistill.teacher.load import Teacher
from spikedistill.train.loop import Trainer, fit
from spikedistill.train.processes import join
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
GRADIENTS = ("exact", "rate", "quantised")
BATCH = 16


class Cut(Exception):
    """Stands for whatever ends a process."""


class BrokenFor(MemoryFeed):
    """Batches that hold NaN in one process, in the second epoch."""

    def batches(self, epoch, done=0):
        for inputs in super().batches(epoch, done):
            if epoch == 2 and self.rank == self.processes - 1:
                inputs.student[0, 0, 0, 0] = torch.nan
            yield inputs


def blobs() -> ImageSet:
    """Three classes of 8 x 8 images, each bright in a channel of its own."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 3
        images = torch.randint(0, 60, (count, 3, 8, 8), generator=generator)
        images[torch.arange(count), labels] += 150
        return images.to(torch.uint8), labels

    return ImageSet("blobs", *draw(96), *draw(48), ("red", "green", "blue"))


def make_student(gradient: str = "exact", norm: str = "none", dropout: float = 0.0) -> Student:
    """A small student; its batch norm is ``none``, ``trained``, or ``frozen``: it stays in evaluation mode."""
    torch.manual_seed(1)
    norm, frozen = nn.Identity() if norm == "none" else nn.BatchNorm2d(6), norm == "frozen"
    layers = [nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU(), nn.Dropout(dropout), nn.AvgPool2d(4), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(24, 3)).eval()
    if isinstance(norm, nn.BatchNorm2d):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    images = blobs().train_images[:32].float() / 255
    student, _ = to_spiking(network, Conversion(timesteps=3), calibration_images=images, mean=MEAN, std=STD)
    for layer in student.neurons.values():
        layer.backend = "reference"
    student.gradient = gradient
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d) and frozen:
            module.eval().train = lambda mode=True, module=module: module
    return student


def train(
    student: Student, path: Path, feed: MemoryFeed | None = None, objective: Objective | None = None, **changes: object
):
    """Two epochs of five steps with augmentation and a teacher; in as many processes as there are."""
    torch.manual_seed(2)
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), MEAN, STD)
    usual = {"epochs": 2, "batch_size": BATCH, "lr": 0.02, "precision": "fp32", "device": "cpu", "momentum": 0.8}
    config = Training(**{**usual, **changes})
    feed = replace(feed or MemoryFeed(blobs(), BATCH, augment=Augment(crop=1, flip=True)), views=config.views)
    path.mkdir(exist_ok=True)
    return fit(student, objective or KDSNNResponse(), feed, config, Run(path), teacher=teacher)


def trained(student: Student, path: Path, **changes: object):
    """The weights after training, and the last line of metrics."""
    line = train(student, path, **changes)
    return student.state_dict(), line


def equal_cases() -> dict[str, dict]:
    """Trainings that do not depend on the number of processes."""
    cases = {f"{g}-{norm}": {"gradient": g, "norm": norm} for g in GRADIENTS for norm in ("none", "frozen")}
    cases["clip-ema"] = {"clip": 0.05, "ema": 0.8}
    cases["muon"] = {"optimizer": "muon", "lookahead": 3}
    cases["views"] = {"views": 1}
    cases["features"] = {"objective": KDSNN(pairs=(("1", "6"),), adapt=True, margin=True)}
    cases["adamw"] = {"optimizer": "adamw", "lr": 0.005}
    return cases


def train_case(name: str, folder: Path):
    """One of ``equal_cases``: the student's weights, and the last line of metrics."""
    changes = equal_cases()[name]
    student = make_student(changes.pop("gradient", "exact"), changes.pop("norm", "none"))
    return trained(student, folder / name, **changes)


def cut_after(steps: int, student: Student, path: Path, **changes: object) -> None:
    """Train until so many steps are done, with a checkpoint after each."""
    original, left = Trainer.step, [steps]

    def counted(*given: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        return original(*given)

    Trainer.step = counted
    try:
        train(student, path, checkpoint_minutes=0.0, **changes)
    except Cut:
        return
    finally:
        Trainer.step = original


def command(*arguments: object) -> dict[str, object]:
    """What a command ends with in this process, and says."""
    said = io.StringIO()
    sys.argv = ["spikedistill", *map(str, arguments)]
    with contextlib.redirect_stderr(said):
        try:
            main()
            code: object = 0
        except SystemExit as end:
            code = end.code
    return {"code": code, "said": said.getvalue()}


def refusal_of(work) -> dict[str, object]:
    """The message and the cause of what a piece of work refuses."""
    try:
        work()
    except SpikeDistillError as error:
        return {"kind": type(error).__name__, "message": str(error), "cause": type(error.__cause__).__name__}
    return {}


def alone_refuses(rank: int):
    """Work within ``main_process_first`` that one process refuses."""
    with join().main_process_first():
        if join().rank == rank:
            raise ConfigError(f"process {rank} refuses")


def threads_of_gloo() -> int:
    """How many threads of this process serve its connections, on Linux."""
    return sum("gloo" in task.read_text() for task in Path("/proc/self/task").glob("*/comm"))


def work(folder: Path) -> None:
    """All cases, in this process of several."""
    rank, commands = join().rank, json.loads((folder / "commands.json").read_text())

    def keep(name: str, weights: dict, facts: object) -> None:
        if weights:
            save_file(
                {key: value.contiguous() for key, value in weights.items()}, folder / f"{name}-{rank}.safetensors"
            )
        (folder / f"{name}-{rank}.json").write_text(json.dumps(facts))

    keep("serving", {}, threads_of_gloo())
    for name in equal_cases():
        keep(name, *train_case(name, folder))
    whole, again = make_student(dropout=0.5), make_student(dropout=0.5)
    keep("random-whole", *trained(whole, folder / "random-whole", checkpoint_minutes=0.0))
    cut_after(7, make_student(dropout=0.5), folder / "random-cut")
    keep("random-cut", *trained(again, folder / "random-cut", checkpoint_minutes=0.0))
    cut_after(7, make_student(), folder / "for-one")
    keep("from-one", *trained(make_student(), folder / "from-one"))
    keep("normed", *trained(make_student(norm="trained"), folder / "normed"))
    broken = BrokenFor(blobs(), BATCH)
    keep("broken", {}, refusal_of(lambda: train(make_student(), folder / "broken", broken)))
    uneven = MemoryFeed(blobs(), 15)
    keep("uneven", {}, refusal_of(lambda: train(make_student(), folder / "uneven", uneven)))
    keep("first-refuses", {}, refusal_of(lambda: alone_refuses(0)))
    keep("last-refuses", {}, refusal_of(lambda: alone_refuses(1)))
    counts = nn.Module()
    counts.register_buffer("counts", torch.full((2,), rank, dtype=torch.int16))
    join().broadcast(counts)
    keep("shared", {}, counts.counts.tolist())
    torch.manual_seed(3)
    join().reseed(5)
    keep("drawn", {}, torch.rand(3).tolist())
    for name, arguments in commands.items():
        keep(name, {}, command(*arguments))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    left = Path(f"ended-{os.environ['RANK']}.json")
    atexit.register(lambda: left.write_text(json.dumps(threads_of_gloo())))  # after what join() registers later
    work(Path(sys.argv[1]))
