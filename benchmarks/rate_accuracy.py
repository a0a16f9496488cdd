"""Accuracy that the rate-based gradient costs against the exact one, at equal epochs, over seeds.

    python benchmarks/rate_accuracy.py --data-dir DATA [--check]       # two cores: hours; what is finished is kept

KDSNN students of ``spikedistill reproduce kdsnn-pairs --budget small`` (CIFAR-10, T=4), whose runs are shared, and the
same with ``gradient="rate"``: one that inherits its teacher's weights (resnet18) and one with fresh ones (vgg9). Test
accuracy after the last epoch; nothing is chosen on it.
"""

import argparse
import dataclasses
import statistics
from functools import partial
from pathlib import Path

from rivals import Figures, Row, finish

from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.runs import unless_done
from spikedistill.recipes.studies import Cell, kdsnn_pairs
from spikedistill.recipes.teach import teach
from spikedistill.student.build import Gradient
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run

GRADIENTS: tuple[Gradient, ...] = ("exact", "rate")


def variant(cell: Cell, gradient: Gradient) -> tuple[Distill, Path]:
    """A student of the study, with another gradient in a run of its own."""
    if gradient == "exact":
        return cell.recipe, cell.path
    student = dataclasses.replace(cell.recipe.student, gradient=gradient)
    return dataclasses.replace(cell.recipe, student=student), cell.path.with_name(f"{cell.path.name}-{gradient}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    parser.add_argument("--data-dir")
    parser.add_argument("--students", nargs="+", default=["resnet18", "vgg9"], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="end with code 1 where a bound is missed")
    given = parser.parse_args()
    study = kdsnn_pairs("small", given.data_dir, given.runs)
    made, path = study.teachers["resnet18"]
    unless_done(path, partial(teach, made, path, progress=Progress.stderr(path.name)), partial(print, path.name))
    rows: list[Row] = []
    figures: Figures = {}
    for name in given.students:
        cells = [c for c in study.cells if (c.student, c.method) == (name, "kdsnn") and c.seed < given.seeds]
        means = {}
        for gradient in GRADIENTS:
            found = []
            for cell in cells:
                recipe, path = variant(cell, gradient)
                job = partial(distill, recipe, path, progress=Progress.stderr(path.name))
                unless_done(path, job, partial(print, path.name))
                found.append(float(Run(path).read("results")["test_accuracy"]))
            means[gradient] = statistics.mean(found)
            deviation = statistics.stdev(found) if len(found) > 1 else 0.0
            rows.append({"student": name, "gradient": gradient, "accuracy": means[gradient], "deviation": deviation})
        lost = means["exact"] - means["rate"]
        figures[f"{name}: points that the rate-based gradient loses over {len(cells)} seeds"] = (lost, "at most", 0.5)
    finish("rate_accuracy", rows, figures, given.check)


if __name__ == "__main__":
    main()
