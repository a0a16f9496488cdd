"""A run directory: what was asked, where it ran, what came out.

recipe.json             every choice, as given
environment.json        when and where it began: date, versions, processor, threads; and which run this is
conversion.json         of a student: what became of each activation
before.json             of a student: measurements on 1000 training images before training
metrics.jsonl           one line an epoch; the same numbers in an interrupted and resumed run
timing.jsonl            one line an epoch; seconds, which are never the same, device, number format and memory order
checkpoint.safetensors  all that the next step needs; the one before it in checkpoint.previous.safetensors
model.safetensors       the weights, when the run is done
results.json            the measurements on the test set, and the method with its open fields closed, when the run is
                        done
method.py               of an objective of the user's: a copy of its file
scores.jsonl            of 'immunity': one line a score
answers/                with views: the teacher's answers; may be deleted
lock                    locked while a process works in the directory

Files of JSON and of tensors carry a checksum and the name of the run (see ``files``), and so do lines of scores. The
lines of metrics.jsonl are in the checkpoint too, from where they are mended.
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout

from spikedistill.errors import RunError, SpikeDistillError
from spikedistill.files import (
    CHECKSUM,
    ENVIRONMENT,
    RUN,
    note,
    read_json,
    run_of,
    seal,
    unseal,
    without_seal,
    write_json,
    write_text,
)
from spikedistill.student.upgrade import upgrade
from spikedistill.train.checkpoint import previous

KINDS = ("distill", "immunity", "teach")
"""What recipes are of."""
NO_MATTER = ("checkpoint_minutes", "tensorboard")
"""Choices of a training that do not touch its bits."""
PLAIN = ("metrics", "timing")
"""Logs whose lines have no checksum, as they are for programs that draw them."""


@dataclass
class Run:
    """The files of one run; ``path`` is its directory."""

    path: Path
    lock: BaseFileLock | None = field(default=None, init=False, repr=False, compare=False)
    """From ``start`` on, for as long as this object lives."""
    here: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)
    """From ``start`` on, by what the directory is known again."""

    @property
    def checkpoint(self) -> Path:
        """All that the next step needs."""
        return self._file("checkpoint.safetensors")

    @property
    def finished(self) -> bool:
        """Whether the measurements on the test set lie there, which come last."""
        return (self.path / "results.json").exists()

    @property
    def model(self) -> Path:
        """The finished weights."""
        return self._file("model.safetensors")

    def _file(self, name: str) -> Path:
        """A file of the directory, which must still be the one in which the run was started.

        Raises:
            RunError: if it has vanished, or another took its place.
        """
        if self.here is not None and self.here != self._mark():
            raise RunError(
                f"The run directory '{self.path}' was removed or replaced while this run worked in it (its 'lock' is"
                " gone or another's): nothing more is written; put it back and go on with --resume, or begin anew."
            )
        return self.path / name

    def _mark(self) -> tuple[int, int] | None:
        """What tells this directory from another in its place: its lock, which stays open, else itself."""
        for file in (self.path / "lock", self.path):
            with contextlib.suppress(OSError):
                found = file.stat()
                return found.st_dev, found.st_ino
        return None

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
        if resume:
            self.read("recipe")
        self._check_place(recipe)
        if not resume:
            self._check_kind(recipe)
        self._take()
        before = previous(self.checkpoint)
        files = (self.checkpoint, before, self.model, self.path / "scores.jsonl")
        worth_keeping = self.finished or any(file.exists() for file in files)
        if worth_keeping and not resume:
            raise RunError(f"'{self.path}' already holds a run: go on with it by --resume, or choose another --out.")
        if not resume:
            machine = environment()
            write_json(self.path / ENVIRONMENT, machine, _name(recipe, machine))
            self.write("recipe", recipe)
            return
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
        if before.exists() and not self.checkpoint.exists():
            note(f"'{self.checkpoint}' is gone: going on from the one before it.")
            os.replace(before, self.checkpoint)

    def _check_place(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a directory that holds anything but a run, or that lies among the images of a folder."""
        data = recipe.get("data")
        source = Path(data["name"]) if isinstance(data, dict) and "name" in data else None
        if source is not None and source.is_dir() and self.path.resolve().is_relative_to(source.resolve()):
            raise RunError(f"'{self.path}' lies in the folder of the data, '{source}': choose another --out.")
        if (strange := self._strange()) and not self._is_ours():
            shown = ", ".join(strange[:4]) + (", ..." if len(strange) > 4 else "")
            raise RunError(
                f"'{self.path}' holds files ({shown}) and no run of spikedistill: choose an empty or a new directory by"
                " --out; nothing in it was touched."
            )

    def _check_kind(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a directory where another command has begun."""
        if self._strange() and (kind := self.read("recipe").get("kind")) != recipe.get("kind"):
            raise RunError(f"'{self.path}' already holds a run, of '{kind}': choose another --out.")

    def _strange(self) -> list[str]:
        """What lies here, but for hidden files and what a kill at the very beginning leaves."""
        left = ("lock", ENVIRONMENT, "recipe.json.part", f"{ENVIRONMENT}.part")
        found = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(x.name for x in found if x.name not in left and not (x.name.startswith(".") and x.is_file()))

    def _is_ours(self) -> bool:
        """Whether a run of ours lies here: its recipe has a checksum, or the kind and parts of one of before."""
        try:
            content = json.loads((self.path / "recipe.json").read_bytes())
        except (OSError, ValueError):
            return False
        if not isinstance(content, dict):
            return False
        before = content.get("kind") in KINDS and ("data" in content or "runs" in content)
        return before or CHECKSUM in content or RUN in content

    def _take(self) -> None:
        """Lock the directory, where the file system knows locks."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / "lock", timeout=0, thread_local=False, is_singleton=True)
            with contextlib.suppress(NotImplementedError):
                lock.acquire()
                self.lock = lock
            self.here = self._mark()
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
        write_json(self._file(f"{name}.json"), content)

    def read(self, name: str) -> dict[str, Any]:
        """Read one JSON file of the directory.

        Raises:
            RunError: if it is missing, broken, not as it was written, or another run's.
        """
        return read_json(self._file(f"{name}.json"))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read one ``.jsonl`` file; a line cut short by a kill is left out.

        Raises:
            RunError: if another line is broken or not as it was written, or another run's.
        """
        file, found = self._file(f"{name}.jsonl"), []
        for number, line in enumerate(_whole_lines(file), 1):
            try:
                found.append(self._opened(line))
            except ValueError as error:
                raise RunError(
                    f"Line {number} of '{file}' is damaged ({error}): delete that line, --resume makes it again."
                ) from error
        return found

    def _opened(self, line: bytes) -> dict[str, Any]:
        """A line of a log without its seal; a ``ValueError`` if it is damaged."""
        content = unseal(line.decode().removesuffix("\r") + "\n")  # git may have written lines as Windows does
        if content.get(RUN, home := run_of(self.path)) != home:
            raise ValueError(f"it was written by another run ({content[RUN]})")
        return without_seal(content)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add one line to a ``.jsonl`` file.

        Raises:
            RunError: if it cannot be written.
        """
        path = self._file(f"{name}.jsonl")
        content = json.dumps(line) + "\n" if name in PLAIN else seal(line, run_of(self.path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # a line that a kill or a full disk cut short
                file.write(content.encode())
        except OSError as error:
            raise RunError(
                f"'{path}' could not be written ({error}): free some disk space, then go on with --resume."
            ) from error

    def history(self, epoch: int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one for each of so many epochs.

        Raises:
            RunError: if one is damaged, or they are others.
        """
        return self._of_all_epochs(self.lines("metrics"), epoch)

    def _of_all_epochs(self, found: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
        epochs = [line.get("epoch") for line in found]
        if epochs != list(range(1, epoch + 1)):
            raise RunError(
                f"'{self.path / 'metrics.jsonl'}' holds epochs {epochs[:9]}, and {epoch} lie behind: go on with"
                " --resume, which mends it from the checkpoint; if an earlier version wrote that, put a copy back."
            )
        return found

    def rewind(self, epoch: int, known: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Bring the logs to where the checkpoint is: drop the lines of later epochs, mend what is missing before.

        Args:
            epoch: how many epochs lie behind.
            known: the lines of metrics.jsonl that the checkpoint holds; one of before holds none.

        Raises:
            RunError: if metrics.jsonl lacks an epoch, or is damaged, and the checkpoint holds no lines.
        """
        for name in PLAIN:
            file = self._file(f"{name}.jsonl")
            kept = [line for line in _readable(_whole_lines(file)) if line["epoch"] <= epoch]
            if name == "metrics" and known is None:
                self._of_all_epochs(kept, epoch)
            elif name == "metrics" and kept != (kept := [dict(line) for line in known or ()]):
                note(f"'{file}' was shorter than the checkpoint, or damaged, and is mended from it.")
            if kept or file.exists():
                write_text(file, "".join(json.dumps(line) + "\n" for line in kept))


def _whole_lines(file: Path) -> list[bytes]:
    """The lines of a file that end; none where it is missing."""
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def _readable(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """Those lines of epochs that are whole."""
    for line in lines:
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict) and isinstance(content.get("epoch"), int):
                yield content


def _name(recipe: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """The name of a run: the same for the same recipe on the same machine, whose bits are the same."""
    training = {name: value for name, value in recipe.get("training", {}).items() if name not in NO_MATTER}
    asked = [{**recipe, "training": training}, {name: value for name, value in machine.items() if name != "date"}]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


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
