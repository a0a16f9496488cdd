"""Results of finished run directories, for tables. Unfinished runs are listed apart. No weights are read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikedistill.deliver.record import Record
from spikedistill.deliver.teachers import NO_TEACHER
from spikedistill.errors import RunError
from spikedistill.train.changes import without_execution_fields
from spikedistill.train.extend import trains
from spikedistill.train.run import Run

KINDS = ("distill", "teach")
"""Kinds of runs that can be compared."""


@dataclass(frozen=True)
class Result:
    """A finished run of ``teach`` or ``distill``.

    Args:
        record: its recipe and path.
        found: the content of results.json.
        network: the network that was trained.
        weights: ``inherited`` or ``fresh``; empty for a teacher.
        data: the content of data.json; empty for a run of an earlier version.
        epochs: number of epochs; 0 for a conversion.
        minutes: minutes of training from timing.jsonl; None if they are not recorded.
    """

    record: Record
    found: Mapping[str, Any]
    network: str
    weights: str
    data: Mapping[str, Any]
    epochs: int
    minutes: float | None

    @staticmethod
    def read(record: Record) -> "Result":
        """The results of a finished run.

        Raises:
            RunError: if one of its files is missing or broken.
        """
        run, found = Run(record.path), record.results()
        try:
            network, weights = record.recipe.get("network", ""), ""
            if record.is_student:
                made = run.read("conversion")
                network, weights = made["network"], "inherited" if made["inherited"] else "fresh"
                weights = "from a student" if made.get("start") else weights
            data = run.read("data")["data"] if (record.path / "data.json").exists() else {}
            seconds = [line["seconds"] for line in run.lines("timing")]
            epochs, minutes = len(run.lines("metrics")), sum(seconds) / 60 if seconds else None
            result = Result(record, found, network, weights, data, epochs, minutes)
            _ = result.accuracy, result.method, result.seed, result.steps, result.timesteps, result.levels
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"A file in '{record.path}' lacks {error}: give the directory of a finished run.") from error
        return result

    @property
    def measure(self) -> str:
        """What it was measured by: ``accuracy``; without test labels ``agreement`` with its teacher."""
        return "accuracy" if "test_accuracy" in self.found else "agreement"

    @property
    def accuracy(self) -> float:
        """Test accuracy in percent; without test labels the agreement with its teacher."""
        return float(self.found["test_accuracy" if self.measure == "accuracy" else "agreement"])

    @property
    def steps(self) -> list[float]:
        """Accuracy, or agreement without test labels, after each time step, percent; empty for a teacher."""
        return [float(value) for value in self.found.get(f"{self.measure}_by_step", [])]

    @property
    def method(self) -> str:
        """The method, or ``teacher (ANN)``."""
        return str(self.record.recipe["method"]["name"]) if self.record.is_student else "teacher (ANN)"

    @property
    def seed(self) -> int:
        """The seed of its training."""
        return int(self.record.recipe["training"]["seed"])

    @property
    def timesteps(self) -> int | None:
        """T of a student; None for a teacher."""
        return int(self.record.recipe["student"]["timesteps"]) if self.record.is_student else None

    @property
    def levels(self) -> int | None:
        """D of a student, the most spikes of a neuron within a step; None for a teacher."""
        return int(self.record.recipe["student"].get("levels", 1)) if self.record.is_student else None

    @property
    def teacher(self) -> tuple[str, str]:
        """Path of a student's teacher, and the network of its weights; empty for a teacher."""
        if not self.record.is_student:
            return "", ""
        choice = self.record.recipe["teacher"]
        source = str(choice["source"])
        return str(Path(source).resolve()) if Path(source).exists() else source, str(choice.get("network"))

    @property
    def has_teacher(self) -> bool:
        """Whether it was trained with a teacher."""
        return self.record.is_student and self.teacher[0] != NO_TEACHER

    @property
    def test_set(self) -> tuple[Any, ...]:
        """What identifies its test set."""
        data, name = self.record.data, Path(self.record.data.name)
        known = tuple(self.data.get(what) for what in ("test_images", "shape") if self.data)
        return str(name.resolve()) if name.exists() else str(name), data.image_size, str(known)

    @property
    def choices(self) -> dict[str, Any]:
        """Its recipe without the seed, and without where and how it was computed."""
        recipe = {
            name: part
            for name, part in without_execution_fields(self.record.recipe, "seed").items()
            if name != "format"
        }
        if self.record.is_student:
            recipe["teacher"] = {**recipe["teacher"], "source": self.teacher[0]}
        return recipe


def runs_in(paths: Sequence[Path]) -> list[Path]:
    """The run directories of these paths, each once: a path that is a run, or all runs inside a folder.

    Raises:
        RunError: if a path does not exist or is a file, or a folder holds no run.
    """
    found = dict.fromkeys(run for path in paths for run in _runs_at(path))
    return list({run.resolve(): run for run in reversed(found)}.values())[::-1]


def _runs_at(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise RunError(f"'{path}' {what}: give run directories, or folders that hold several.")
    if (path / "recipe.json").exists():
        yield path
        return
    inside = sorted((file.parent for file in path.glob("*/recipe.json")), key=_natural)
    runs = [run for run in inside if Run(run).read("recipe").get("kind") in KINDS]
    if not runs:
        raise RunError(f"'{path}' is not a run of 'teach' or 'distill' and holds none: give run directories.")
    yield from runs


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key that orders numbers in names by value: s9 before s10."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", path.name)]


def read_results(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """The results of the finished runs, and one sentence on the progress of each unfinished run.

    Args:
        paths: run directories, or folders of them.

    Raises:
        RunError: if one holds no run that can be read, or none is finished.
    """
    found, notes = [], []
    for record in map(Record.read, runs_in(paths)):
        if Run(record.path).finished:
            found.append(Result.read(record))
        else:
            notes.append(f"'{record.name}' is unfinished and left out: {_so_far(record)}.")
    if not found:
        raise RunError(" ".join(notes) + " Finish a run first: the command that began it continues it with --resume.")
    return found, notes


def _so_far(record: Record) -> str:
    if not trains(record.recipe):
        return "it is not measured yet"
    done, epochs = len(Run(record.path).lines("metrics")), record.training.epochs
    return f"epoch {done} of {epochs}" + (", and it is not measured yet" if done == epochs else "")


def lines(results: Sequence[Result]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a CSV file: one row per run, numbers with all digits, empty cells for missing values.

    Accuracies, agreement and firing rates are in percent. ``accuracy_t1`` is the accuracy after the first time step;
    without any test labels there is ``agreement_t1`` instead.
    """
    most = max(len(result.steps) for result in results)
    what = main_measure(results)
    measured = ["test_accuracy", "teacher_accuracy", "agreement", "divergence", "firing_rate"]
    columns = ["run", "path", "data", "teacher", "network", "timesteps", "levels", "weights", "method", "seed"]
    columns += [*measured, "epochs", "minutes", *(f"{what}_t{t + 1}" for t in range(most))]
    rows = []
    for one in results:
        who = [one.record.name, str(one.record.path), one.record.data.name, one.teacher[0], one.network]
        row: list[Any] = [*who, one.timesteps, one.levels, one.weights, one.method, one.seed]
        row += [one.found.get(name) for name in measured] + [one.epochs, one.minutes]
        steps = one.steps if one.measure == what else []
        rows.append([*row, *steps, *[None] * (most - len(steps))])
    return columns, rows


def main_measure(results: Sequence[Result]) -> str:
    """The measure of a table: ``accuracy``, or ``agreement`` if no run has test labels."""
    return "accuracy" if any(result.measure == "accuracy" for result in results) else "agreement"
