"""How many single damaged bits pass in what a run writes: checkpoint, models, the teacher's answers, JSON.

    python benchmarks/bit_flips.py [--flips 50]

A teacher and a student are trained on the embedded digits. Then one bit after the other is flipped in one of a run's
files, half of them in its first bytes, the header. The file is used as a user would: a run is resumed, a model loaded,
a table made. Counted is how often that was refused, how often the damaged part was computed again to the same bits, and
how often the file was taken for whole. The last must be 0; the exit code says so. Then what checking 100 MB costs.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from spikedistill.deliver.compare import compare
from spikedistill.errors import SpikeDistillError
from spikedistill.files import read_tensors, write_tensors
from spikedistill.recipes import digits
from spikedistill.recipes.choices import TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.teach import teach
from spikedistill.student.save import load_student
from spikedistill.teacher.load import load_teacher
from spikedistill.train.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        silent = 0
        print(f"{'file':40}{'refused':>9}{'again':>7}{'silent':>8}")
        for title, files, use in cases(folder):
            refused, again, through = damage(files, use, given.flips, random.Random(given.seed))
            print(f"{title:40}{refused:>9}{again:>7}{through:>8}", flush=True)
            silent += through
        cost(folder)
    print(f"{silent} damaged files were taken for whole")
    sys.exit(bool(silent))


def cases(folder: Path) -> list[tuple[str, list[Path], Callable[[], dict[str, torch.Tensor]]]]:
    """What is damaged, and how it is used: that gives tensors which must be the undamaged ones."""
    taught, made = folder / "teacher", folder / "student"
    recipe = digits.teacher()
    recipe = replace(recipe, training=replace(recipe.training, epochs=2, device="cpu"))
    teach(recipe, taught)
    student = digits.student()
    training = replace(student.training, epochs=2, batch_size=256, views=1, device="cpu", precision="fp32")
    choices = replace(student.student, timesteps=1, calibration=64)
    learner = replace(student, teacher=TeacherChoice(str(taught)), student=choices, training=training)
    distill(learner, made)
    (answers,) = (file for file in (made / "answers").iterdir())

    def resumed() -> dict[str, torch.Tensor]:
        (taught / "checkpoint.previous.safetensors").unlink(missing_ok=True)
        teach(recipe, taught, resume=True)
        return read_tensors(taught / "model.safetensors")[0]

    def table() -> dict[str, torch.Tensor]:
        return {text: torch.zeros(0) for text in compare([made]).rows[0]}

    json = [made / f"{name}.json" for name in ("recipe", "results", "conversion", "environment")]
    return [
        ("checkpoint, resumed", [taught / "checkpoint.safetensors"], resumed),
        ("checkpoint, read", [made / "checkpoint.safetensors"], lambda: read_tensors(Run(made).checkpoint)[0]),
        ("model of a student", [made / "model.safetensors"], lambda: dict(load_student(made).state_dict())),
        ("model of a teacher", [taught / "model.safetensors"], lambda: dict(load_teacher(taught)[0].state_dict())),
        ("JSON files, in a table", json, table),
        ("teacher's answers, learned from", sorted(answers.iterdir()), lambda: begun_again(learner, made)),
    ]


def begun_again(recipe: Distill, path: Path) -> dict[str, torch.Tensor]:
    """The weights of a run that is trained once more from its beginning, with the teacher's answers that lie there."""
    for file in ("checkpoint.safetensors", "checkpoint.previous.safetensors", "results.json"):
        (path / file).unlink(missing_ok=True)
    distill(recipe, path, resume=True)
    return read_tensors(path / "model.safetensors")[0]


def damage(
    files: list[Path], use: Callable[[], dict[str, torch.Tensor]], flips: int, draw: random.Random
) -> tuple[int, ...]:
    """Flip one bit after the other, use the file, and put it right: how many were refused, made good, and not seen."""
    wanted, whole, counts = use(), {file: file.read_bytes() for file in files}, [0, 0, 0]
    for number in range(flips):
        file = draw.choice(files)
        content = bytearray(whole[file])
        header = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else 128
        bit = draw.randrange(8 * (min(header, len(content)) if number % 2 else len(content)))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        try:
            found = use()
        except SpikeDistillError:
            counts[0] += 1
        else:
            same = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
            counts[1 if same and file.read_bytes() != content else 2] += 1
        file.write_bytes(whole[file])
    return tuple(counts)


def cost(folder: Path) -> None:
    """Print what the checksum of 100 MB costs."""
    path, tensors = folder / "large.safetensors", {"weight": torch.randn(25_000_000)}
    began = time.perf_counter()
    write_tensors(path, tensors, {})
    written = time.perf_counter()
    read_tensors(path)
    print(f"100 MB: written in {written - began:.2f} s, read in {time.perf_counter() - written:.2f} s")


if __name__ == "__main__":
    main()
