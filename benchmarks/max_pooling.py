"""What max pooling becomes in a student, and what each choice gives: ``python benchmarks/max_pooling.py --out DIR``.

A VGG-9 of width 16 learns the digits with a quarter of the training images held out. It is converted without training
at T = 4 to 256. Students of T = 4 are trained, inherited by KDSNN and fresh by cross-entropy only, by both gradients
and with three seeds. All accuracies are those of the held-out images, since the default follows from them. Finished
runs are read, so the script goes on where it was ended; half an hour on one thread.
"""

import argparse
import statistics
from pathlib import Path

from spikedistill.evaluate.accuracy import accuracy_by_step, predict
from spikedistill.files import write_csv
from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.teach import Teach, teach
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.pool import MaxPool
from spikedistill.student.student import Gradient
from spikedistill.teacher.load import Teacher, load_teacher
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run, unless_done

POOLS: tuple[MaxPool, ...] = ("cumulative", "or", "average")
DATA = Data(name="digits", validation=0.25, crop=1)
LENGTHS = (4, 16, 64, 256)
SEEDS = (0, 1, 2)


def trained(out: Path, teacher: Path, fresh: bool, gradient: Gradient, pool: MaxPool, seed: int) -> float:
    """The accuracy of one trained student on the images held out."""
    choice = StudentChoice(timesteps=4, inherit=not fresh, gradient=gradient, max_pool=pool)
    epochs, peak = (20, 0.1) if fresh else (8, None)
    training = Training(epochs=epochs, lr=peak, batch_size=64, weight_decay=1e-4, seed=seed)
    recipe = Distill(TeacherChoice(str(teacher)), choice, Direct() if fresh else KDSNN(), DATA, training)
    unless_done(out, lambda resume: distill(recipe, out, resume))
    return float(Run(out).lines("metrics")[-1]["validation_accuracy"])


def converted(ann: Teacher) -> dict[str, list[float]]:
    """For each way to pool the accuracy after 4 to 256 steps without training; and that of the ANN."""
    feed = DATA.feed(DATA.load(), Training(batch_size=64))
    held, labels = feed.held()
    found = {"ANN": [accuracy_by_step(predict(ann, held), labels)[-1]]}
    for pool in POOLS:
        for timesteps in LENGTHS:
            conversion = Conversion(timesteps=timesteps, max_pool=pool, rule="max")
            student, _ = to_spiking(ann, conversion, calibration_images=feed.calibration(500))
            found.setdefault(pool, []).append(accuracy_by_step(predict(student, held), labels)[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/max-pooling"))
    out = parser.parse_args().out
    teacher = out / "digits-t"
    recipe = Teach("vgg9", width=16, data=DATA, training=Training(epochs=20, batch_size=64))
    unless_done(teacher, lambda resume: teach(recipe, teacher, resume))
    lines: list[tuple[str, str, str, float]] = []
    for pool, accuracies in converted(load_teacher(teacher)[0]).items():
        print(f"{pool:10} without training, T = {LENGTHS}: {', '.join(f'{value:.2f}' for value in accuracies)}")
        lines += [("none", pool, f"T={steps}", value) for steps, value in zip(LENGTHS, accuracies)]
    gradients: tuple[Gradient, ...] = ("exact", "rate")
    for fresh in (False, True):
        for gradient in gradients:
            for pool in POOLS:
                kind = f"{'fresh' if fresh else 'inherit'}-{gradient}"
                runs = [out / f"digits-{kind}-{pool}-{seed}" for seed in SEEDS]
                found = [trained(run, teacher, fresh, gradient, pool, seed) for run, seed in zip(runs, SEEDS)]
                print(f"{pool:10} {kind}: {statistics.mean(found):.2f} +- {statistics.stdev(found):.2f}")
                lines += [(kind, pool, f"seed {seed}", value) for seed, value in zip(SEEDS, found)]
    write_csv(out / "max_pooling.csv", ("training", "pool", "of", "validation_accuracy"), lines)


if __name__ == "__main__":
    main()
