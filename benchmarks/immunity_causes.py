"""Why distilled students are or are not more immune to noise than direct ones: what the teacher passes on.

    python benchmarks/immunity_causes.py --data-dir DATA       # two cores: two hours; what is finished is kept

The like pair of ``spikedistill reproduce kdsnn-noise --budget small`` (CIFAR-10, ResNet-18 of width 8, T=4, seed 0),
whose runs are shared, in three worlds: nobody learns with noise; the teacher alone does (``--noise 0.1``); the
students do. The noise is Gaussian, so its own figure stands apart from the mean over the other noises.
"""

import argparse
import dataclasses
import statistics
from functools import partial
from pathlib import Path

from spikedistill.evaluate.immunity import Score
from spikedistill.recipes.distill import distill
from spikedistill.recipes.immunity import measure_immunity
from spikedistill.recipes.runs import unless_done
from spikedistill.recipes.studies import kdsnn_pairs
from spikedistill.recipes.teach import teach
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run

NOISE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=2000, help="test images of each measurement")
    given = parser.parse_args()
    study = kdsnn_pairs("small", given.data_dir, given.runs)
    cells = {cell.method: cell for cell in study.cells if cell.teacher == cell.student == "resnet18" and cell.seed == 0}
    made, plain = study.teachers["resnet18"]
    loud = dataclasses.replace(made.data, noise=NOISE)
    noisy = plain.with_name("resnet18-teacher-noise")
    jobs = [(teach, made, plain), (teach, dataclasses.replace(made, data=loud), noisy)]
    for cell in cells.values():
        jobs.append((distill, cell.recipe, cell.path))
    for method in ("direct", "kdsnn"):
        recipe, path = cells[method].recipe, cells[method].path
        who = dataclasses.replace(recipe.who, teacher=str(noisy))
        jobs.append((distill, dataclasses.replace(recipe, who=who), path.with_name(f"teacher-noise-{method}")))
        jobs.append((distill, dataclasses.replace(recipe, data=loud), path.with_name(f"student-noise-{method}")))
    for job, recipe, path in jobs:
        unless_done(path, partial(job, recipe, path, progress=Progress.stderr(path.name)), partial(print, path.name))
    paths = [path for _, _, path in jobs]
    out = plain.with_name("immunity-causes")
    measure_immunity(
        paths,
        out,
        kinds=("noise", "natural"),
        images=given.images,
        baseline=cells["direct"].path.name,
        data_dir=given.data_dir,
        resume=(out / "recipe.json").exists(),
        say=print,
    )
    scores = [Score(**line) for line in Run(out).lines("scores")]
    print(f"{'network':42} {'clean':>7} {'gaussian':>9} {'other noises':>13} {'natural':>8}")
    for path in paths:
        own = [score for score in scores if score.network == path.name]
        groups = (
            [score.accuracy for score in own if score.kind == "clean"],
            [score.accuracy for score in own if score.name == "gaussian"],
            [score.accuracy for score in own if score.kind == "noise" and score.name != "gaussian"],
            [score.accuracy for score in own if score.kind == "natural"],
        )
        clean, gaussian, others, natural = map(statistics.fmean, groups)
        print(f"{path.name:42} {clean:7.2f} {gaussian:9.2f} {others:13.2f} {natural:8.2f}")


if __name__ == "__main__":
    main()
