"""The claims of KDSNN's siblings: two temperatures, spikes that teach spikes, and images that teach events.

- ``heterogeneous-temperature``: Lee et al., arXiv 2106.07172, with budgets beside it;
- ``distilling-spikes``: Kushawaha et al., ICPR 2020, arXiv 2005.00288;
- ``cross-kd``: Ye et al., ICME 2025, arXiv 2507.09269.

The papers' texts were not available to us. Their claims are quoted from abstracts and readers' notes. Networks,
schedules, temperatures, targets and widths are our choice. ``small`` takes at most two hours per data set on two cores,
with graded spikes (T=1, D=4) on CIFAR-10.
"""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from spikedistill.data.images import load_images
from spikedistill.errors import DataError
from spikedistill.files import home
from spikedistill.objective.budget import Budget as WithinBudget
from spikedistill.objective.cross_kd import CrossKD
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNNResponse
from spikedistill.objective.spikes import DistillingSpikes
from spikedistill.objective.temperatures import HeterogeneousTemperatures
from spikedistill.objective.terms import Objective
from spikedistill.recipes import cifar10, mnist
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.studies.study import Budget, Cell, Measurement, Recipe, Study
from spikedistill.train.recipe import Data, Training

SEEDS = 3
MANY = 12
"""Seeds of direct training and of Cross KD on the small part of N-MNIST, where seeds differ much."""
TEMPERATURES = ((4.0, 4.0), (2.0, 2.0), (1.0, 1.0), (4.0, 2.0), (4.0, 1.0), (2.0, 4.0), (1.0, 4.0))
"""Of the teacher and of the student. The first are those of the usual distillation."""
TARGETS = {"mnist": (11000, 7500, 5000, 3500), "cifar10": (10000, 7000, 5000, 3500)}
"""Spikes per image that budgets ask for, from about half to a sixth of what the usual distillation takes."""
SHARE = {"train": 300, "test": 1000, "test of the test set": 100}
"""N-MNIST, small: recordings 1 to 300 train, 301 to 1000 test, and so do the first 100 of the test set. Recording n is
MNIST's training image n, so the images 301 to 1000 are left out where images teach."""
RATES = (0.05, 0.02)
"""Learning rates of training on events alone and of Cross KD, each the best on N-MNIST with 90 of the 300 training
recordings held out."""
SWITCHES = {
    "cross-kd": CrossKD(),
    "cross-kd-without-replacement": CrossKD(replacement=0.0),
    "cross-kd-without-similarity": CrossKD(similarity=0.0),
    "cross-kd-without-teacher": CrossKD(alpha=0.0),
}
"""Cross KD, and each of its three ideas switched off."""


class _Base:
    """The teachers and cells of one study on one named data set."""

    def __init__(self, data: str, budget: Budget, data_dir: str | None, runs: Path) -> None:
        self.name, self.budget, self.runs, self.full = data, budget, runs / budget, budget == "full"
        known = cifar10.fast().data if data == "cifar10" else mnist.DATA
        self.data = dataclasses.replace(known, name=data, data_dir=data_dir)
        self.teachers: dict[str, tuple[Recipe, Path]] = {}
        self.cells: list[Cell] = []

    def ann(self) -> Path:
        """Add the ANN that teaches; returns its run directory."""
        made, path = mnist.teacher(), self.runs / f"{self.name}-teacher"
        if self.name == "cifar10":
            made, path = dataclasses.replace(cifar10.fast(), network="airbench94"), self.runs / "cifar10-airbench94"
            if not self.full:
                made = dataclasses.replace(made, width=32, training=dataclasses.replace(made.training, epochs=12))
        self.teachers["ann"] = (dataclasses.replace(made, data=self.data), path)
        return path

    def inherited(self, teacher: Path, method: Objective, seed: int, steps: int = 1) -> Distill:
        """A student with the ANN's network and weights: four spikes at most, in one step (T=1, D=4) or in four."""
        student = StudentChoice(timesteps=steps, levels=4 // steps, correct="layers", learn_threshold=True)
        training = Training(4, 128, lr=0.02, weight_decay=1e-4, warmup=0.1, seed=seed, compile=steps == 1)
        if self.name == "cifar10":
            epochs, views = (20, 8) if self.full else (4, 4)
            training = dataclasses.replace(
                training, epochs=epochs, views=views, lr=0.05, weight_decay=5e-4, ema=0.998, cache_dir=self.cache
            )
        return Distill(TeacherChoice(str(teacher)), student, method, self.data, training)

    @property
    def cache(self) -> str:
        """Where students of one teacher share its logits."""
        return str(self.runs / "answers")

    def fresh(self, teacher: Path, method: Objective, seed: int, width: int) -> Distill:
        """A VGG-9 with fresh weights: T=1 and D=4 for CIFAR-10, else T=4."""
        steps, levels, epochs = (1, 4, 60 if self.full else 12) if self.name == "cifar10" else (4, 1, 6)
        student = StudentChoice("vgg9", width=width, timesteps=steps, levels=levels)
        training = Training(epochs, 128, lr=0.1, weight_decay=5e-4, warmup=0.1, seed=seed, compile=steps == 1)
        return Distill(TeacherChoice(str(teacher)), student, method, self.data, training)

    def add(self, teacher: str, method: str, recipe: Distill, setting: str = "") -> None:
        """Add the cell of a student."""
        name = "-".join(part for part in (self.name, method, setting.replace(" / ", "-")) if part)
        name += f"-w{recipe.student.width}" if recipe.student.width else ""
        seed, network = recipe.training.seed, recipe.student.network
        student = "airbench94" if network == "same" and self.name == "cifar10" else network.replace("same", "vgg9")
        self.cells.append(Cell(teacher, student, method, seed, recipe, self.runs / f"{name}-s{seed}", setting))

    def study(
        self, name: str, title: str, claim: str, kind: Measurement, prepare: Callable[[], None] | None = None
    ) -> Study:
        """The study of these cells."""
        seeds = 1 + max(cell.seed for cell in self.cells)
        return Study(name, title, claim, kind, self.budget, self.teachers, tuple(self.cells), seeds, prepare)


def heterogeneous_temperature(data: str, budget: Budget, data_dir: str | None, runs: Path) -> Study:
    """Spikes against accuracy: equal temperatures, unequal ones, and budgets of spikes."""
    base = _Base(data, budget, data_dir, runs)
    ann = base.ann()
    for seed in range(SEEDS):
        for theirs, ours in TEMPERATURES:
            method: Objective = HeterogeneousTemperatures(temperature=theirs, student_temperature=ours)
            name, setting = "heterogeneous", f"{theirs:g} / {ours:g}"
            if theirs == ours:
                name, setting = "homogeneous", f"{theirs:g}"
            base.add("ann", name, base.inherited(ann, method, seed), setting)
        for target in TARGETS[data]:
            base.add("ann", "budget", base.inherited(ann, WithinBudget(spikes=float(target)), seed), f"{target}")
    claim = "65 percent fewer spikes than the usual distillation, and 0.09 points more accuracy (MNIST)"
    return base.study(_named("heterogeneous-temperature", data), f"Fewer spikes, {data}", claim, "front")


def distilling_spikes(data: str, budget: Budget, data_dir: str | None, runs: Path) -> Study:
    """A small student taught by a large spiking network, directly or by an assistant, against direct training."""
    base = _Base(data, budget, data_dir, runs)
    ann, large, assistant = base.ann(), base.runs / f"{data}-snn", base.runs / f"{data}-assistant"
    usual, steps = HeterogeneousTemperatures(student_temperature=4.0), 1 if data == "cifar10" else 4
    base.teachers["snn"] = (base.inherited(ann, usual, 0, steps), large)
    big, small = (32, 8) if data == "cifar10" else (8, 2)
    base.teachers["assistant"] = (base.fresh(large, DistillingSpikes(), 0, big), assistant)
    methods: dict[str, Objective] = {
        "direct": Direct(),
        "kdsnn-response": KDSNNResponse(),
        "distilling-spikes": DistillingSpikes(),
    }
    if steps > 1:  # a train of one step has no windows
        methods["distilling-spikes-window"] = DistillingSpikes(window=2)
    for seed in range(SEEDS):
        for name, method in methods.items():
            base.add("snn", name, base.fresh(large, method, seed, small))
        base.add("snn", "distilling-spikes-stages", base.fresh(assistant, DistillingSpikes(), seed, small))
    claim = (
        "a small spiking network taught by a large one is better than one trained directly, with several stages more"
    )
    return base.study(_named("distilling-spikes", data), f"Spikes teach spikes, {data}", claim, "pairs")


def cross_kd(data: str, budget: Budget, data_dir: str | None, runs: Path) -> Study:
    """An event student taught by an image teacher, each idea switched off in turn, against events alone."""
    images = "cifar10" if data == "cifar10" else "mnist"
    base = _Base(images, budget, data_dir, runs)
    prepare = None
    events = Data(name="cifar10", data_dir=data_dir, events="simulated", validation=0.02, crop=2, flip=True)
    student = StudentChoice("vgg9", width=16, timesteps=3, levels=4, coding="frames")
    training = Training(60 if base.full else 4, 128, weight_decay=5e-4, warmup=0.1)
    if data == "nmnist":
        folder = home(data_dir or "data") / "NMNIST"
        if not base.full:
            images = str(base.runs / "mnist-others.npz")
            prepare = partial(take_parts, folder, data_dir, base.runs / "nmnist-300", Path(images))
            folder = base.runs / "nmnist-300"
            base.name, base.data = "mnist-others", dataclasses.replace(base.data, name=images)
        events = Data(name=str(folder), data_dir=data_dir, crop=2)
        student = dataclasses.replace(student, timesteps=6, levels=1)
        training = dataclasses.replace(training, epochs=10 if base.full else 60, batch_size=128 if base.full else 32)
    both = dataclasses.replace(events, source=images, paired=data == "cifar10")
    ann, base.name = base.ann(), data
    for seed in range(MANY if prepare else SEEDS):
        own, both_own = (dataclasses.replace(training, seed=seed, lr=rate) for rate in RATES)
        base.add("ann", "direct", Distill(TeacherChoice("none"), student, Direct(), events, own))
        if seed < SEEDS:
            base.add("ann", "tet", Distill(TeacherChoice("none"), student, TET(), events, own))
        for name, method in SWITCHES.items():
            if seed < SEEDS or name == "cross-kd":
                base.add("ann", name, Distill(TeacherChoice(str(ann)), student, method, both, both_own))
    claim = "an event student taught by an image teacher is better than one that sees events alone"
    name = "cross-kd" if data == "nmnist" else f"cross-kd-{data}"
    return base.study(name, f"Images teach events, {data}", claim, "samples", prepare)


def _named(study: str, data: str) -> str:
    """The name of a study on a data set; CIFAR-10 needs no mention."""
    return study if data == "cifar10" else f"{study}-{data}"


def take_share(recordings: Path, folder: Path) -> None:
    """Copy a small part of N-MNIST (``SHARE``) to a folder of its own, unless it is there.

    Args:
        recordings: N-MNIST as it is published, ``Train/DIGIT/NUMBER.bin`` and ``Test/DIGIT/NUMBER.bin``.
        folder: where ``train/DIGIT`` and ``test/DIGIT`` go.

    Raises:
        DataError: if the recordings are not there.
    """
    if folder.exists():
        return
    train, test = (sorted(recordings.glob(f"{part}/*/*.bin"), key=lambda file: file.stem) for part in ("Train", "Test"))
    last, many = SHARE["train"], SHARE["test"]
    if len(train) < many or len(test) < SHARE["test of the test set"]:
        raise DataError(
            f"'{recordings}' holds {len(train)} recordings below Train and {len(test)} below Test: expected N-MNIST as"
            " published, Train/DIGIT/NUMBER.bin and Test/DIGIT/NUMBER.bin."
        )
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    chosen = [("train", train[:last]), ("test", train[last:many]), ("test", test[: SHARE["test of the test set"]])]
    for name, files in chosen:
        for file in files:
            target = part / name / file.parent.name / f"{file.parent.parent.name}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    part.rename(folder)


def take_parts(recordings: Path, data_dir: str | None, share: Path, others: Path) -> None:
    """Copy a small part of N-MNIST, and write the images of MNIST that none of its test recordings shows.

    Args:
        recordings: see ``take_share``.
        data_dir: where MNIST is.
        share: the folder of recordings.
        others: the ``.npz`` file of images; left as it is if it is there.

    Raises:
        DataError: if recordings or images are not there.
    """
    take_share(recordings, share)
    if others.exists():
        return
    mnist = load_images("mnist", data_dir)
    kept = torch.ones(len(mnist.train_images), dtype=torch.bool)
    kept[SHARE["train"] : SHARE["test"]] = False
    part = others.with_name(f"part-{others.name}")
    np.savez_compressed(
        part,
        train_images=mnist.train_images[kept].numpy(),
        train_labels=mnist.train_labels[kept].numpy(),
        test_images=mnist.test_images.numpy(),
        test_labels=mnist.test_labels.numpy(),
        class_names=np.array(mnist.class_names),
    )
    part.rename(others)


SIBLINGS: dict[str, Callable[[Budget, str | None, Path], Study]] = {
    "heterogeneous-temperature": partial(heterogeneous_temperature, "cifar10"),
    "heterogeneous-temperature-mnist": partial(heterogeneous_temperature, "mnist"),
    "distilling-spikes": partial(distilling_spikes, "cifar10"),
    "distilling-spikes-mnist": partial(distilling_spikes, "mnist"),
    "distilling-spikes-fashion-mnist": partial(distilling_spikes, "fashion-mnist"),
    "cross-kd": partial(cross_kd, "nmnist"),
    "cross-kd-cifar10": partial(cross_kd, "cifar10"),
}
