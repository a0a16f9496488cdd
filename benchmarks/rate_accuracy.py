"""Accuracy that the rate-based gradient costs against the exact one, at equal epochs, over seeds.

    python benchmarks/rate_accuracy.py --data-dir DATA --jobs 2 [--check]   # hours; what is finished is kept

KDSNN students of ``spikedistill reproduce kdsnn-pairs --budget small`` (CIFAR-10, T=4), whose runs are shared, and the
same with ``gradient="rate"``: one with fresh weights (vgg9) and leaky neurons, which the gradient suits; the same with
neurons that forget nothing; and one that inherits its teacher's weights (resnet18), whose neurons must not forget. Test
accuracy after the last epoch. That this gradient is advised with leaky neurons was chosen on it.
"""

import argparse
import dataclasses
import statistics
from functools import partial
from pathlib import Path

from rivals import Figures, Row, finish

from spikedistill.evaluate.paired import paired_differences, with_deviation, with_test
from spikedistill.recipes.teach import teach
from spikedistill.student.student import Gradient
from spikedistill.studies.kdsnn import kdsnn_pairs
from spikedistill.studies.reproduce import side_by_side
from spikedistill.studies.study import Cell
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run, unless_done

GRADIENTS: tuple[Gradient, ...] = ("exact", "rate")
STUDENTS = {"vgg9-lif": ("vgg9", "lif"), "vgg9-if": ("vgg9", "if"), "resnet18-if": ("resnet18", "if")}


def variant(cell: Cell, neuron: str, gradient: Gradient) -> Cell:
    """A student of the study, with another neuron and gradient in a run of its own."""
    student = dataclasses.replace(cell.recipe.student, neuron=neuron, gradient=gradient)
    other = [name for name, usual in ((neuron, "if"), (gradient, "exact")) if name != usual]
    path = cell.path.with_name("-".join([cell.path.name, *other]))
    return dataclasses.replace(cell, recipe=dataclasses.replace(cell.recipe, student=student), path=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    parser.add_argument("--data-dir")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="students trained side by side")
    parser.add_argument("--check", action="store_true", help="end with code 1 where a bound is missed")
    given = parser.parse_args()
    study = kdsnn_pairs("small", given.data_dir, given.runs)
    made, path = study.teachers["resnet18"]
    unless_done(path, partial(teach, made, path, progress=Progress.stderr(path.name)), partial(print, path.name))
    groups = {
        (name, gradient): [
            variant(cell, STUDENTS[name][1], gradient)
            for cell in study.cells
            if (cell.student, cell.method) == (STUDENTS[name][0], "kdsnn") and cell.seed < given.seeds
        ]
        for name in given.students
        for gradient in GRADIENTS
    }
    missing = [cell for cells in groups.values() for cell in cells if not Run(cell.path).finished]
    for cell, finish_it in side_by_side(missing, given.jobs):
        finish_it()
        print(cell.path.name, flush=True)
    rows: list[Row] = []
    figures: Figures = {}
    for name in given.students:
        found: dict[str, dict[int, float]] = {gradient: {} for gradient in GRADIENTS}
        for gradient in GRADIENTS:
            for cell in groups[name, gradient]:
                found[gradient][cell.seed] = float(Run(cell.path).read("results")["test_accuracy"])
            told = {"student": name, "gradient": gradient}
            rows += [{**told, "seed": seed, "accuracy": value} for seed, value in found[gradient].items()]
            print(f"{name}, {gradient}: {with_deviation([*found[gradient].values()])}")
        lost = paired_differences(found["exact"], found["rate"])
        print(f"{name}: the rate-based gradient loses {with_test(lost)}")
        label = f"{name}: points that the rate-based gradient loses over {given.seeds} seeds"
        figures[label] = (statistics.mean(lost), "at most", 0.5)
    finish("rate_accuracy", rows, figures, given.check)


if __name__ == "__main__":
    main()
