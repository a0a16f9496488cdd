"""Does a trained graded student count the same in binary sub-steps? Every spike count of every layer is compared.

    python benchmarks/substeps.py runs/student-t1d4 [--images N] [--part test] [--check]

The student runs as it was trained, in integers, and again in binary sub-steps, layer by layer
(``student/substeps.py``), with the same float32 weights and thresholds. With exact sums all counts are equal. Rounding
may move a potential that is very near a threshold to its other side, and every layer behind feels it. So both runs are
computed twice: with sums in float64, where at most one count in 100,000 may differ and no image may change its class,
and with sums in float32, which is told beside it. Ten thousand images of a ResNet-20 take an hour on one thread.
"""

import argparse
from pathlib import Path

import torch
from rivals import Figures, Row, finish
from torch import Tensor

from spikedistill.compute.place import choose_place
from spikedistill.data.augment import to_inputs
from spikedistill.data.images import evenly
from spikedistill.deliver.record import Record
from spikedistill.errors import ConfigError
from spikedistill.student.student import Student
from spikedistill.student.substeps import run_in_substeps

BATCH = 50
SUMS = {"float64": torch.float64, "float32": torch.float32}
MOST = 1.0
"""So many of 100,000 counts may differ."""


@torch.no_grad()
def compare(student: Student, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """By layer the numbers of counts that differ and of all counts, ``[2]``; and which images keep their class."""
    inputs, layers, timesteps = to_inputs(pixels).to(student.mean), student.layers(), student.timesteps
    graded = student.observe(inputs, spikes=layers)
    binary = run_in_substeps(student, inputs, spikes=tuple(layers))
    found = {}
    for path in layers:
        counts = binary.spikes[path].unflatten(0, (timesteps, -1)).sum(1)
        whole = graded.spikes[path].round()
        found[path] = torch.tensor([int((counts != whole).sum()), whole.numel()])
    same = graded.logits.mean(0).argmax(1) == binary.logits.mean(0).argmax(1)
    return found, same


def measure(path: Path, sums: str, count: int | None, part: str, data_dir: str | None, trust_code: bool) -> Row:
    """One run: T and D, how many counts differ, of how many, in which layer first, and how many images change class."""
    record = Record.read(path)
    student = record.network(trust_code)
    if not isinstance(student, Student):
        raise ConfigError(f"'{path}' holds a teacher: give runs of 'distill'.")
    choose_place("cpu", "fp32", convolutions="torch").prepare(student.eval())
    student.to(SUMS[sums])
    images = record.images(data_dir)
    pool = images.test_images if part == "test" else images.train_images
    pixels = pool[evenly(len(pool), len(pool) if count is None else count)]
    totals = {layer: torch.zeros(2, dtype=torch.int64) for layer in student.layers()}
    kept = 0
    for batch in pixels.split(BATCH):
        found, same = compare(student, batch)
        totals = {layer: total + found[layer] for layer, total in totals.items()}
        kept += int(same.sum())
    differ, counts = map(int, torch.stack([*totals.values()]).sum(0))
    first = next((layer for layer, total in totals.items() if total[0]), "")
    neuron = student.conversion.neuron_model
    row: Row = {"run": record.name, "timesteps": student.timesteps, "levels": neuron.levels, "sums": sums, "part": part}
    row |= {"images": len(pixels), "counts": counts, "differ": differ, "per_100000": 1e5 * differ / counts}
    return {**row, "first_in": first, "other_class": len(pixels) - kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, help="evenly spaced (default: all)")
    parser.add_argument("--part", choices=["test", "train"], default="test")
    parser.add_argument("--data-dir")
    parser.add_argument("--trust-code", action="store_true")
    parser.add_argument("--check", action="store_true", help="end with code 1 where a bound is missed")
    given = parser.parse_args()
    figures: Figures = {}
    rows = []
    for path in given.runs:
        own = [measure(path, sums, given.images, given.part, given.data_dir, given.trust_code) for sums in SUMS]
        rows += own
        name, exact = own[0]["run"], own[0]
        figures[f"{name}: counts of 100,000 that differ, sums in float64"] = (exact["per_100000"], "at most", MOST)
        figures[f"{name}: images of another class, sums in float64"] = (exact["other_class"], "at most", 0)
    finish("substeps", rows, figures, given.check)


if __name__ == "__main__":
    main()
