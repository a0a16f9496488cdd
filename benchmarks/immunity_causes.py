"""Why distilled students are or are not more immune to noise than direct ones: what the teacher passes on.

    python benchmarks/immunity_causes.py --data-dir DATA --jobs 2     # two cores: three hours; what is finished is kept

The homogeneous pair of ``spikedistill reproduce kdsnn-noise --budget small`` (CIFAR-10, ResNet-18 of width 8, T=4),
whose runs are shared, as studied and under three other conditions: the teacher learned with Gaussian noise (``--noise
0.1``, which both students inherit, and only one is taught); students see labels alone twice as long; or the students
learn with noise. If the teacher passes on what noise does to it, a distilled student must repeat its mistakes under
noise more often than a direct one does, and must win under noise where the teacher learned to stand it. If being the
more accurate network costs immunity, a direct student that is trained longer must lose it too.
"""

import argparse
import dataclasses
import statistics
from functools import partial
from pathlib import Path

from rivals import Figures, Row, finish

from spikedistill.data.noise import corrupt
from spikedistill.deliver.immunity import measure_immunity
from spikedistill.deliver.record import read_records, some_of
from spikedistill.evaluate.accuracy import predict
from spikedistill.evaluate.immunity import Score
from spikedistill.evaluate.paired import paired_differences, with_test
from spikedistill.recipes.teach import teach
from spikedistill.studies.kdsnn import kdsnn_pairs
from spikedistill.studies.reproduce import side_by_side
from spikedistill.studies.study import Cell
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run, unless_done

NOISE = 0.1
CONDITIONS = {
    "as studied": ("direct", "kdsnn"),
    "teacher with noise": ("direct", "kdsnn"),
    "twice as long": ("direct",),
    "students with noise": ("direct", "kdsnn"),
}
REPEATED = ("gaussian", 3)
"""The noise and severity under which mistakes are compared."""
COLUMNS = ("gaussian", "uniform", "salt-and-pepper", "poisson", "speckle", "impulse", "erasing", "noises")
"""Means over severities, under each noise and under all."""


def variant(condition: str, cell: Cell, noisy: Path) -> Cell:
    """A student of the study under another condition, as a run of its own."""
    recipe = cell.recipe
    if condition == "as studied":
        return cell
    if condition == "teacher with noise":
        recipe = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, source=str(noisy)))
    elif condition == "students with noise":
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, noise=NOISE))
    else:
        longer = dataclasses.replace(recipe.training, epochs=2 * recipe.training.epochs)
        recipe = dataclasses.replace(recipe, training=longer)
    path = cell.path.with_name(f"{cell.path.name}-{condition.replace(' ', '-')}")
    return dataclasses.replace(cell, recipe=recipe, path=path)


def repeats(cells: list[Cell], images: int, data_dir: str | None) -> dict[Path, float]:
    """Of a teacher's mistakes under noise the share, in percent, that each of its students makes too."""
    teachers = list(dict.fromkeys(Path(cell.recipe.teacher.source) for cell in cells))
    records, data = read_records([*teachers, *(cell.path for cell in cells)], data_dir)
    pixels, labels = some_of(data, images)
    changed = corrupt(pixels, *REPEATED, 0)
    given = [predict(record.network(), changed).mean(0).argmax(-1) for record in records]
    shares = {}
    for cell, answer in zip(cells, given[len(teachers) :]):
        theirs = given[teachers.index(Path(cell.recipe.teacher.source))]
        shares[cell.path] = 100.0 * float((answer == theirs)[theirs != labels].double().mean())
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=2000, help="test images of each measurement")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="students trained side by side")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    given = parser.parse_args()
    study = kdsnn_pairs("small", given.data_dir, given.runs)
    made, plain = study.teachers["resnet18"]
    noisy = plain.with_name(f"{plain.name}-noise")
    loud = dataclasses.replace(made, data=dataclasses.replace(made.data, noise=NOISE))
    for recipe, path in ((made, plain), (loud, noisy)):
        unless_done(path, partial(teach, recipe, path, progress=Progress.stderr(path.name)), partial(print, path.name))
    groups = {
        (condition, method): [
            variant(condition, cell, noisy)
            for cell in study.cells
            if cell.student == "resnet18" and cell.method == method and cell.seed < given.seeds
        ]
        for condition in given.conditions
        for method in CONDITIONS[condition]
    }
    cells = sorted((cell for group in groups.values() for cell in group), key=lambda cell: cell.seed)
    for cell, finish_it in side_by_side([cell for cell in cells if not Run(cell.path).finished], given.jobs):
        finish_it()
        print(cell.path.name, flush=True)
    measured = {"teachers": [plain, noisy]}
    for (condition, _), group in groups.items():
        measured.setdefault(condition, []).extend(cell.path for cell in group)
    scores: list[Score] = []
    for name, paths in measured.items():
        out = plain.with_name(f"immunity-causes-{name.replace(' ', '-')}-{given.images}-s{given.seeds}")
        measure_immunity(
            paths,
            out,
            kinds=("noise",),
            images=given.images,
            data_dir=given.data_dir,
            resume=(out / "recipe.json").exists(),
            progress=Progress.as_lines("immunity"),
        )
        scores += [Score(**line) for line in Run(out).lines("scores")]
    shares = repeats(cells, given.images, given.data_dir)
    rows: list[Row] = []
    for path in (plain, noisy):
        named: Row = {"condition": "", "network": path.name, "seed": ""}
        rows.append({**named, **means_of(scores, path.name), "repeated": ""})
    for (condition, method), group in groups.items():
        for cell in group:
            told: Row = {"condition": condition, "network": method, "seed": cell.seed}
            rows.append({**told, **means_of(scores, cell.path.name), "repeated": shares[cell.path]})
    for condition in given.conditions:
        for name in ("clean", *COLUMNS, "repeated"):
            ours, theirs = (by_seed(rows, condition, method, name) for method in ("kdsnn", "direct"))
            if ours:
                print(f"{condition}, {name}: KDSNN more than direct {with_test(paired_differences(ours, theirs))}")
    finish("immunity_causes", rows, gained(rows, given.conditions), check=False)


def means_of(scores: list[Score], network: str) -> Row:
    """What a network scores: clean, under each noise and under all of them."""
    found = [score for score in scores if score.network == network]
    noisy = [score for score in found if score.kind == "noise"]

    def mean(name: str) -> float:
        return statistics.fmean(score.accuracy for score in noisy if name in (score.name, "noises"))

    clean = next(score.accuracy for score in found if score.kind == "clean")
    return {"clean": clean, **{name: mean(name) for name in COLUMNS}}


def by_seed(rows: list[Row], condition: str, method: str, name: str) -> dict[int, float]:
    """A column of a method's students under a condition, by seed."""
    return {row["seed"]: row[name] for row in rows if (row["condition"], row["network"]) == (condition, method)}


def gained(rows: list[Row], conditions: list[str]) -> Figures:
    """Points that KDSNN gains under all noises, where it was trained."""
    figures: Figures = {}
    for condition in conditions:
        gains = paired_differences(
            by_seed(rows, condition, "kdsnn", "noises"), by_seed(rows, condition, "direct", "noises")
        )
        if gains:
            figures[f"{condition}: points that KDSNN gains under noises"] = (statistics.fmean(gains), "at least", 0.0)
    return figures


if __name__ == "__main__":
    main()
