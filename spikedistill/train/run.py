"""A run directory: what was asked, where it ran, what came out.

recipe.json             every choice, as given
environment.json        when and where it began: date, versions, processor, threads
conversion.json         of a student: what became of each activation
before.json             of a student: measurements on 1000 training images before training
metrics.jsonl           one line an epoch; the same numbers in an interrupted and resumed run
timing.jsonl            one line an epoch; seconds, which are never the same, device, number format and memory order
checkpoint.safetensors  all that the next step needs
model.safetensors       the weights, when the run is done
results.json            the measurements on the test set, and the method with its open fields closed, when the run is
                        done
method.py               of an objective of the user's: a copy of its file
scores.jsonl            of 'immunity': one line a score
answers/                with views: the teacher's answers; may be deleted
lock                    locked while a process works in the directory
"""

import contextlib
import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout

from spikedistill.errors import RunError, SpikeDistillError
from spikedistill.files import write_text
from spikedistill.student.upgrade import upgrade


@dataclass
class Run:
    """The files of one run; ``path`` is its directory."""

    path: Path
    lock: BaseFileLock | None = field(default=None, init=False, repr=False, compare=False)
    """From ``start`` on, for as long as this object lives."""

    @property
    def checkpoint(self) -> Path:
        """All that the next step needs."""
        return self.path / "checkpoint.safetensors"

    @property
    def finished(self) -> bool:
        """Whether the measurements on the test set lie there, which come last."""
        return (self.path / "results.json").exists()

    @property
    def model(self) -> Path:
        """The finished weights."""
        return self.path / "model.safetensors"

    def start(self, recipe: Mapping[str, Any], resume: bool, defaults: Mapping[str, Any] | None = None) -> None:
        """Create the directory, or make sure that what lies there is the same run; keep other processes out of it.

        Args:
            recipe: all choices of the run.
            resume: whether a run should lie there.
            defaults: values of choices that an older version of this package did not write down yet.

        Raises:
            RunError: if a run lies there already and is not to be resumed, or has another recipe; or if another process
                works there, or nothing can be written.
        """
        if resume and not (self.path / "recipe.json").exists():
            raise RunError(f"There is no run in '{self.path}' to resume: check --out, or leave --resume away.")
        self._take()
        files = (self.checkpoint, self.model, self.path / "scores.jsonl")
        worth_keeping = self.finished or any(file.exists() for file in files)
        if worth_keeping and not resume:
            raise RunError(f"'{self.path}' already holds a run: go on with it by --resume, or choose another --out.")
        if resume:
            if self.read("recipe").get("format") != recipe.get("format") and not self.finished:
                raise RunError(
                    f"The run in '{self.path}' was begun, and not finished, by an older version of spikedistill: finish"
                    " it with that version, or begin anew in another --out."
                )
            if changed := self.changes(recipe, defaults):
                raise RunError(
                    f"'{self.path}' was begun with another recipe ({'; '.join(changed[:3])}): give the same, or another"
                    " --out."
                )
            return
        self.write("recipe", recipe)
        self.write("environment", environment())

    def _take(self) -> None:
        """Lock the directory, where the file system knows locks."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / "lock", timeout=0, thread_local=False, is_singleton=True)
            with contextlib.suppress(NotImplementedError):
                lock.acquire()
                self.lock = lock
        except Timeout:
            raise RunError(
                f"Another process works in '{self.path}': wait for it or end it, or choose another --out."
            ) from None
        except OSError as error:
            raise RunError(
                f"'{self.path}' could not be written ({error}): check the path, or choose another --out."
            ) from error

    def changes(self, recipe: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> list[str]:
        """In what the choices that lie here differ from others; see ``differences``."""
        now, usual = json.loads(json.dumps([recipe, defaults or {}]))
        return differences(self.recipe(), now, usual)

    def recipe(self) -> dict[str, Any]:
        """The choices that lie here, in today's format whoever wrote them.

        Raises:
            RunError: if they are missing or broken.
        """
        found = self.read("recipe")
        try:
            return upgrade(found) if found.get("kind") in ("teach", "distill") else found
        except SpikeDistillError as error:
            reason = str(error).rstrip(".")
            raise RunError(f"'{self.path}' holds no run that can be read ({reason}): give another.") from error

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file of the directory."""
        write_text(self.path / f"{name}.json", json.dumps(content, indent=2) + "\n")

    def read(self, name: str) -> dict[str, Any]:
        """Read one JSON file of the directory.

        Raises:
            RunError: if it is missing or broken.
        """
        file = self.path / f"{name}.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"it holds {type(content).__name__}, not names and values")
            return content
        except (OSError, ValueError) as error:
            raise RunError(f"'{file}' cannot be read ({error}): is '{self.path}' the directory of a run?") from error

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read one ``.jsonl`` file; a line cut short by a kill is left out."""
        file = self.path / f"{name}.jsonl"
        if not file.exists():
            return []
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add one line to a ``.jsonl`` file.

        Raises:
            RunError: if it cannot be written.
        """
        path = self.path / f"{name}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # a line that a kill or a full disk cut short
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise RunError(
                f"'{path}' could not be written ({error}): free some disk space, then go on with --resume."
            ) from error

    def rewind(self, epoch: int) -> None:
        """Drop the lines of epochs that the checkpoint does not know of yet."""
        for name in ("metrics", "timing"):
            if not (self.path / f"{name}.jsonl").exists():
                continue
            kept = [json.dumps(line) + "\n" for line in self.lines(name) if line["epoch"] <= epoch]
            write_text(self.path / f"{name}.jsonl", "".join(kept))


def unless_done(path: Path, work: Callable[[bool], object], say: Callable[[], object] = lambda: None) -> None:
    """Leave a finished run alone; begin any other, or go on with it.

    Args:
        path: its directory.
        work: told whether to resume.
        say: called before.
    """
    if not Run(path).finished:
        say()
        work((path / "recipe.json").exists())


def differences(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The fields in which two recipes differ, with both values.

    A field that the version which wrote ``before`` did not have yet counts as its value among ``defaults``.

    >>> differences({"training": {"lr": 0.1, "seed": 0}}, {"training": {"lr": 0.2, "seed": 0}}, {})
    ['lr was 0.1, now 0.2']
    """
    if before.get("kind") != now.get("kind"):
        return [f"kind was {before.get('kind')!r}, now {now.get('kind')!r}"]
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        usual = defaults.get(name)
        old, new = before.get(name, usual), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, usual if isinstance(usual, dict) else {})
        elif old != new:
            found.append(f"{name} was {old!r}, now {new!r}")
    return found


def environment() -> dict[str, Any]:
    """What a reader needs to know of the machine."""
    names = ("spikedistill", "torch", "torchvision", "accelerate", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
