"""Direct training against distillation at equal tuning: accuracy, paired tests, and curves over training time.

    python benchmarks/direct_or_distilled.py --data-dir DATA     # two hours; goes on with what is there

A narrow airbench94 (recipe cifar10-fast) is the teacher of students of one time step with four levels. Three ways to
train them differ in nothing else: cross-entropy only from fresh weights, cross-entropy only from the teacher's weights,
and KDSNN from the teacher's weights. Each has the same trials: the learning rates of RATES with seed 0, of which it
takes the one with the best accuracy on 5,000 training images held out. Then come the other seeds, with the test set.
"""

import argparse
import dataclasses
import statistics
from functools import partial
from pathlib import Path

from rivals import Figures, Row, finish

from spikedistill.deliver.curves import draw_training, history
from spikedistill.deliver.results import Result, read_results
from spikedistill.evaluate.paired import paired_differences, with_deviation, with_test
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes import cifar10
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.several import several
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Training
from spikedistill.train.run import unless_done

RATES = (0.02, 0.05, 0.1, 0.2)
WAYS = {"direct, fresh weights": ("direct", False), "direct": ("direct", True), "kdsnn": ("kdsnn", True)}
"""Way of training -> method, and whether the student starts from the teacher's weights."""


def teacher(width: int, epochs: int, data_dir: str | None) -> Teach:
    """The recipe of the fast teacher, narrower and shorter, with 5,000 images held out."""
    made = cifar10.fast()
    data = dataclasses.replace(made.data, validation=0.1, data_dir=data_dir)
    return dataclasses.replace(
        made, network="airbench94", width=width, data=data, training=dataclasses.replace(made.training, epochs=epochs)
    )


def student(source: Path, inherit: bool, rate: float, epochs: int, data_dir: str | None) -> Distill:
    """What all ways share."""
    data = dataclasses.replace(cifar10.DATA, validation=0.1, cutout=0, data_dir=data_dir)
    training = Training(epochs=epochs, batch_size=128, lr=rate, weight_decay=5e-4, ema=0.998, compile=True)
    choice = StudentChoice(inherit=inherit, timesteps=1, levels=4, learn_threshold=True)
    method = KDSNN(temperature=4.0, alpha=0.9)
    return Distill(TeacherChoice(str(source)), choice, method, data, training)


def train(given: argparse.Namespace, way: str, rate: float, seeds: int) -> list[Result]:
    """The students of one way and learning rate, seed by seed; finished ones are kept."""
    method, inherit = WAYS[way]
    recipe = student(given.runs / "teacher", inherit, rate, given.epochs, given.data_dir)
    out = given.runs / f"{'converted' if inherit else 'fresh'}-lr{rate}"
    return read_results(several(recipe, [method], seeds, out, progress=Progress.stderr))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/direct_or_distilled"))
    parser.add_argument("--data-dir")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--teacher-epochs", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="end with code 1 where a bound is missed")
    given = parser.parse_args()
    source = given.runs / "teacher"
    made = teacher(given.width, given.teacher_epochs, given.data_dir)
    unless_done(source, partial(teach, made, source, progress=Progress.stderr("teacher")), print)
    results: dict[str, list[Result]] = {}
    rows: list[Row] = []
    for way in WAYS:
        tried = {rate: history(train(given, way, rate, 1)[0])[-1][1] for rate in RATES}
        best = max(tried, key=lambda rate: tried[rate])
        print(f"{way}: validation accuracy by learning rate {tried}: {best} is taken", flush=True)
        results[way] = train(given, way, best, given.seeds)
        for seed, one in enumerate(results[way]):
            told = {"way": way, "lr": best, "seed": seed, "minutes": one.minutes}
            rows.append({**told, "accuracy": float(one.found["test_accuracy"])})
    draw_training(given.runs / "curves.png", [one for ones in results.values() for one in ones])
    found = {way: {row["seed"]: row["accuracy"] for row in rows if row["way"] == way} for way in WAYS}
    (taught,), _ = read_results([source])
    print(f"teacher: {taught.found['test_accuracy']:.2f} % in {taught.minutes:.1f} minutes")
    for way, values in found.items():
        print(f"{way}: {with_deviation([*values.values()])}")
    figures: Figures = {}
    for way in [*WAYS][:-1]:
        gained = paired_differences(found["kdsnn"], found[way])
        print(f"kdsnn against {way}: {with_test(gained)}")
        figures[f"points that KDSNN gains on '{way}'"] = (statistics.mean(gained), "at least", 0.0)
    finish("direct_or_distilled", rows, figures, given.check)


if __name__ == "__main__":
    main()
