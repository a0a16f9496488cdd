"""The comparisons of the KDSNN paper (Xu et al., CVPR 2023, arXiv 2304.05627).

A study names its teachers and its cells: one cell per student, method and seed. ``full`` has networks of the paper's
size, for a GPU. ``small`` has one teacher, few epochs and an eighth of the width, for two cores.

The paper's text was not available to us. Its claims are quoted from readers' notes. Schedules, noises and some networks
(ResNet-18 as a teacher, VGG-9) are our choice.

In a homogeneous pair the student starts from the teacher's weights, with cross-entropy only too; so distillation gains
less than over training from scratch. In a heterogeneous pair it starts from fresh weights.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spikedistill.recipes import cifar10, mnist
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.methods import CONVERSIONS, METHODS
from spikedistill.recipes.teach import Teach
from spikedistill.studies.study import Budget, Cell, Measurement, Recipe, Study
from spikedistill.train.recipe import Data, Training

COMPARED = ("direct", "kdsnn-response", "kdsnn-feature", "kdsnn")
FOLLOWED = tuple(2**power for power in range(9))
"""Time steps at which conversions are measured: 1 to 256."""


@dataclass(frozen=True)
class Scale:
    """The widths of the networks in a budget, and how long they are trained."""

    widths: dict[str, int]
    teacher: Training
    homogeneous: Training
    heterogeneous: Training
    """For students with fresh weights."""


SCALES: dict[Budget, Scale] = {
    "full": Scale(
        {"resnet18": 64, "wrn28-4": 64, "pyramidnet18": 64, "wrn16-2": 32, "vgg9": 64},
        Training(epochs=200, batch_size=128, lr=0.1, ema=0.999),
        Training(epochs=100, batch_size=128, lr=0.02, weight_decay=1e-4, warmup=0.1),
        Training(epochs=200, batch_size=128, lr=0.1),
    ),
    "small": Scale(
        {"resnet18": 8, "wrn16-2": 8, "vgg9": 8},
        Training(epochs=20, batch_size=128, lr=0.15, warmup=0.15, ema=0.998, compile=True),
        Training(epochs=2, batch_size=128, lr=0.02, weight_decay=1e-4, warmup=0.1),
        Training(epochs=4, batch_size=128, lr=0.1, warmup=0.1),
    ),
}
PAIRS: dict[Budget, tuple[tuple[str, str], ...]] = {
    "full": tuple(
        (teacher, student)
        for teacher in ("resnet18", "wrn28-4", "pyramidnet18")
        for student in ("resnet18", "wrn16-2", "vgg9")
    ),
    "small": (("resnet18", "resnet18"), ("resnet18", "vgg9"), ("resnet18", "wrn16-2")),
}


def kdsnn_pairs(budget: Budget, data_dir: str | None, runs: Path) -> Study:
    """Homogeneous and heterogeneous pairs, CIFAR-10, T=4: direct, response, feature (the paper's table 1) and both."""
    base = _Base(budget, data_dir, runs)
    cells = [
        base.cell(teacher, student, method, seed)
        for teacher, student in PAIRS[budget]
        for method in COMPARED
        for seed in range(3)
    ]
    claim = "distilled students gain 0.73 to 1.76 points over direct training, feature-based more than response-based"
    return base.study("kdsnn-pairs", "Pairs of networks", claim, "pairs", cells, 3)


def kdsnn_timesteps(budget: Budget, data_dir: str | None, runs: Path) -> Study:
    """T = 1, 2, 4, 6, 8 of a distilled student against conversion of its teacher up to T = 256 (table 4)."""
    base = _Base(budget, data_dir, runs)
    steps = (1, 2, 4, 6, 8) if budget == "full" else (1, 2, 4, 8)
    cells = [base.cell("resnet18", "resnet18", "kdsnn", 0, timesteps=T) for T in steps]
    for method in ("conversion-max", "conversion-percentile"):
        cells += [base.cell("resnet18", "resnet18", method, 0, timesteps=T) for T in FOLLOWED]
    cells.append(base.cell("resnet18", "resnet18", "conversion-qcfs", 0))
    claim = "few time steps suffice where conversion needs hundreds"
    return base.study("kdsnn-timesteps", "Time steps against conversion", claim, "timesteps", cells, 1)


def kdsnn_mnist(budget: Budget, data_dir: str | None, runs: Path) -> Study:
    """MNIST, T=4 (table 4: 99.37 percent); small and full are the same."""
    base = _Base(budget, data_dir, runs, mnist.DATA)
    teach = dataclasses.replace(mnist.teacher(), data=base.data)
    path = base.runs / "mnist-teacher"
    base.teachers["vgg9"] = (teach, path)
    cells = [
        Cell(
            "vgg9",
            "vgg9",
            method,
            seed,
            dataclasses.replace(
                mnist.student(),
                teacher=TeacherChoice(str(path)),
                method=METHODS[method](),
                data=base.data,
                training=dataclasses.replace(mnist.student().training, seed=seed),
            ),
            base.runs / f"mnist-{method}-s{seed}",
        )
        for method in ("direct", "kdsnn")
        for seed in range(3)
    ]
    return base.study("kdsnn-mnist", "MNIST", "99.37 percent at T=4", "pairs", cells, 3)


def kdsnn_noise(budget: Budget, data_dir: str | None, runs: Path) -> Study:
    """Noise and natural corruptions: teacher, direct and distilled student (table 2)."""
    base = _Base(budget, data_dir, runs)
    cells = [base.cell("resnet18", "resnet18", method, seed) for seed in range(3) for method in ("direct", "kdsnn")]
    claim = "distilled students keep 1 to 1.5 points more than direct ones under noise"
    return base.study("kdsnn-noise", "Immunity to noise", claim, "noise", cells, 3)


def kdsnn_energy(budget: Budget, data_dir: str | None, runs: Path) -> Study:
    """Spikes, synaptic operations and estimated energy, beside a quantised ANN of equal information (table 3)."""
    base = _Base(budget, data_dir, runs)
    cells = [base.cell("resnet18", "resnet18", method, 0) for method in ("direct", "kdsnn")]
    teacher = "pyramidnet18" if budget == "full" else "resnet18"
    cells.append(base.cell(teacher, "wrn16-2", "kdsnn", 0))
    claim = "synaptic operations of the students are far below the operations of the teachers"
    return base.study("kdsnn-energy", "Spikes and energy", claim, "energy", cells, 1)


class _Base:
    """The common parts of a study's cells. Equal cells of different studies use the same run directory."""

    def __init__(self, budget: Budget, data_dir: str | None, runs: Path, data: Data = cifar10.DATA) -> None:
        self.budget, self.runs, self.scale = budget, runs / budget, SCALES[budget]
        self.data = dataclasses.replace(data, data_dir=data_dir)
        self.teachers: dict[str, tuple[Recipe, Path]] = {}

    def cell(self, teacher: str, student: str, method: str, seed: int, timesteps: int = 4) -> Cell:
        """The cell of a student; adds its teacher to the study if it is new."""
        widths, homogeneous = self.scale.widths, teacher == student
        path = self.runs / f"{teacher}-teacher"
        training = dataclasses.replace(self.scale.teacher, seed=0)
        self.teachers[teacher] = (Teach(teacher, widths[teacher], data=self.data, training=training), path)
        choice = StudentChoice(timesteps=timesteps)
        if not homogeneous:
            choice = dataclasses.replace(choice, network=student, width=widths[student])
        if method in CONVERSIONS:
            choice = dataclasses.replace(choice, rule=CONVERSIONS[method], correct="biases", calibration=256)
        recipe = Distill(
            TeacherChoice(str(path)),
            choice,
            None if method in CONVERSIONS else METHODS[method](),
            self.data,
            dataclasses.replace(self.scale.homogeneous if homogeneous else self.scale.heterogeneous, seed=seed),
        )
        name = f"{teacher}-{student}-{method}-t{timesteps}-s{seed}"
        return Cell(teacher, student, method, seed, recipe, self.runs / name)

    def study(self, name: str, title: str, claim: str, kind: Measurement, cells: list[Cell], seeds: int) -> Study:
        """The study of these cells."""
        return Study(name, title, claim, kind, self.budget, dict(self.teachers), tuple(cells), seeds)


KDSNN: dict[str, Callable[[Budget, str | None, Path], Study]] = {
    "kdsnn-pairs": kdsnn_pairs,
    "kdsnn-timesteps": kdsnn_timesteps,
    "kdsnn-mnist": kdsnn_mnist,
    "kdsnn-noise": kdsnn_noise,
    "kdsnn-energy": kdsnn_energy,
}
