"""A run directory: every choice, machine, measurement and weight of one run.

recipe.json             every choice, as given
environment.json        when and where it began: date, versions, processor, threads, processes; and the run's name
conversion.json         for a student: what became of each activation
before.json             for a student: measurements on 1000 training images before training
metrics.jsonl           one line per epoch; an interrupted and resumed run writes the same numbers
timing.jsonl            one line per epoch: seconds, device, number format, memory format and number of processes
checkpoint.safetensors  everything that the next step needs; the previous one is checkpoint.previous.safetensors
model.safetensors       the final weights
results.json            the measurements on the test set, and the method with its open fields filled in
*-N-epochs.*            for an extended run: results and weights after its first N epochs
method.py               for a user's own objective: a copy of its file
scores.jsonl            for 'immunity': one line per score
answers/                with views: the teacher's logits and features; may be deleted
lock                    locked while a process works in the directory

JSON files, tensor files and lines of scores carry a checksum and the name of the run (see ``files``). The checkpoint
also holds the lines of metrics.jsonl, to repair that file.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from spikedistill.errors import RunError, SpikeDistillError
from spikedistill.files import (
    CHECKSUM,
    ENVIRONMENT,
    RUN,
    note,
    read_facts,
    read_json,
    run_of,
    seal,
    unseal,
    without_seal,
    write_json,
    write_text,
)
from spikedistill.student.upgrade import upgrade
from spikedistill.train.changes import (
    RESULT_NEUTRAL_FIELDS,
    differences,
    with_execution_fields_of,
    without_execution_fields,
)
from spikedistill.train.checkpoint import previous
from spikedistill.train.extend import check_extension, earlier_names, epochs_of, extend, without_epochs
from spikedistill.train.machine import environment

KINDS = ("distill", "immunity", "teach")
"""The kinds of recipes."""
PLAIN = ("metrics", "timing")
"""Logs whose lines have no checksum, so that other programs can read them."""


@dataclass
class Run:
    """The files of one run; ``path`` is its directory."""

    path: Path
    lock: BaseFileLock | None = field(default=None, init=False, repr=False, compare=False)
    """The lock of the directory, from ``start`` until this object is deleted."""
    here: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)
    """The identity of the directory, from ``start`` on."""

    @property
    def checkpoint(self) -> Path:
        """The path of the checkpoint."""
        return self._file("checkpoint.safetensors")

    @property
    def finished(self) -> bool:
        """Whether the measurements on the test set exist; they are written last."""
        return (self.path / "results.json").exists()

    @property
    def model(self) -> Path:
        """The path of the final weights."""
        return self._file("model.safetensors")

    def _file(self, name: str) -> Path:
        """The path of a file in the directory, which must still be the one in which the run was started.

        Raises:
            RunError: if the directory was removed or replaced.
        """
        if self.here is not None and self.here != self._mark():
            raise RunError(
                f"The run directory '{self.path}' was removed or replaced while this run worked in it (its file 'lock'"
                " is missing or another one). Nothing more is written: put it back and use --resume, or start again."
            )
        return self.path / name

    def _mark(self) -> tuple[int, int] | None:
        """The identity of this directory: that of its lock, which stays open, else its own."""
        for file in (self.path / "lock", self.path):
            with contextlib.suppress(OSError):
                found = file.stat()
                return found.st_dev, found.st_ino
        return None

    def start(
        self, recipe: Mapping[str, Any], resume: bool, defaults: Mapping[str, Any] | None = None, processes: int = 1
    ) -> None:
        """Create the directory, or check that it holds the same run, and lock it.

        With more epochs than before, the run is extended: see ``extend``.

        Args:
            recipe: all choices of the run.
            resume: whether to go on with the run in the directory.
            defaults: values of choices that older versions of this package did not write.
            processes: number of processes that train it together, written to environment.json.

        Raises:
            RunError: if the directory holds a run that is not to be resumed or has another recipe, another process
                works there, or nothing can be written.
        """
        self.check(recipe, resume)
        self._take()
        self._check_free(resume)
        if not resume:
            machine = {**environment(), "processes": processes}
            write_json(self.path / ENVIRONMENT, machine, _name(recipe, machine))
            self.write("recipe", recipe)
            return
        written = self.read("recipe")
        if written.get("format") != recipe.get("format") and not self.finished:
            raise RunError(
                f"The run in '{self.path}' was begun and not finished by an older version of spikedistill: finish it"
                " with that version, or start again in another --out."
            )
        kept, (now, usual) = self.recipe(), json.loads(json.dumps([recipe, defaults or {}]))
        if changed := self.changes(without_epochs(now), usual, without_epochs(kept)):
            raise RunError(
                f"'{self.path}' was begun with another recipe ({'; '.join(changed[:3])}): give the same, or another"
                " --out."
            )
        if (before := previous(self.checkpoint)).exists() and not self.checkpoint.exists():
            note(f"'{self.checkpoint}' is missing: continuing from the previous checkpoint.")
            os.replace(before, self.checkpoint)
        planned = epochs_of(kept, usual)
        at = None if planned == epochs_of(now) else check_extension(self.path, written, now, planned, self.finished)
        others = differences(without_epochs(kept), without_epochs(now), usual)
        if others and not self.finished:
            note(f"'{self.path}' continues with other settings than it was begun with ({'; '.join(others)}).")
            self.write("recipe", with_execution_fields_of(written, now))
        if at is not None:
            self.write("recipe", extend(self.path, written, now, at))

    def check(self, recipe: Mapping[str, Any], resume: bool) -> None:
        """Check that a run can begin or go on in this directory, as far as that can be said without locking it.

        Raises:
            RunError: if there is nothing to resume, something else lies here, or a run that is not to be resumed.
        """
        if resume and not (self.path / "recipe.json").exists():
            raise RunError(f"There is no run in '{self.path}' to resume: check --out, or omit --resume.")
        if resume:
            self.read("recipe")
        self._check_place(recipe)
        if not resume:
            self._check_kind(recipe)
        self._check_free(resume)

    def _check_free(self, resume: bool) -> None:
        """Refuse to begin a run where one lies that is worth keeping."""
        files = (self.checkpoint, previous(self.checkpoint), self.model, self.path / "scores.jsonl")
        if not resume and (self.finished or any(file.exists() for file in files)):
            raise RunError(
                f"'{self.path}' already holds a run: continue it with --resume (in Python resume=True), or"
                " choose another --out."
            )

    def _check_place(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a directory that holds other files than a run, or that is inside a folder of images."""
        data = recipe.get("data")
        source = Path(data["name"]) if isinstance(data, dict) and "name" in data else None
        if source is not None and source.is_dir() and self.path.resolve().is_relative_to(source.resolve()):
            raise RunError(f"'{self.path}' is inside the folder of the data, '{source}': choose another --out.")
        if (strange := self._strange()) and not self._is_ours():
            shown = ", ".join(strange[:4]) + (", ..." if len(strange) > 4 else "")
            raise RunError(
                f"'{self.path}' holds files ({shown}) but no run of spikedistill: choose an empty or a new directory by"
                " --out. Nothing in it was changed."
            )

    def _check_kind(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a directory with a run of another command."""
        if self._strange() and (kind := self.read("recipe").get("kind")) != recipe.get("kind"):
            raise RunError(f"'{self.path}' already holds a run, of '{kind}': choose another --out.")

    def _strange(self) -> list[str]:
        """The files here, without hidden files and those that a run killed at its very beginning leaves."""
        left = ("lock", ENVIRONMENT, "recipe.json.part", f"{ENVIRONMENT}.part")
        found = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(x.name for x in found if x.name not in left and not (x.name.startswith(".") and x.is_file()))

    def _is_ours(self) -> bool:
        """Whether this is a run of ours: its recipe has a checksum, or kind and parts as in earlier versions."""
        try:
            content = json.loads((self.path / "recipe.json").read_bytes())
        except (OSError, ValueError):
            return False
        if not isinstance(content, dict):
            return False
        before = content.get("kind") in KINDS and ("data" in content or "runs" in content)
        return before or CHECKSUM in content or RUN in content

    def _take(self) -> None:
        """Lock the directory, if the file system supports locks."""
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

    def changes(
        self,
        recipe: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        kept: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """The differences between the recipe in the directory, or ``kept``, and another one; see ``differences``.

        Where and how a run is computed (``EXECUTION_FIELDS``) does not count.
        """
        now, usual = json.loads(json.dumps([recipe, defaults or {}]))
        return differences(
            without_execution_fields(self.recipe() if kept is None else kept), without_execution_fields(now), usual
        )

    def unfinished(self) -> str:
        """The progress of an unfinished run, as text."""
        epochs = epochs_of(self.recipe())
        done = f" ({read_facts(self.checkpoint).get('epoch', 0)} of {epochs} epochs)" if epochs else ""
        return f"is not finished{done}"

    def earlier(self) -> dict[str, Any]:
        """For an extended run ``earlier``: its test results before, by the number of epochs; else empty."""
        names = earlier_names(self.recipe()).items()
        found = {epochs: self.read(name) for epochs, name in names if (self.path / f"{name}.json").exists()}
        kept = {epochs: {n: v for n, v in one.items() if n != "earlier"} for epochs, one in found.items()}
        return {"earlier": kept} if kept else {}

    def recipe(self) -> dict[str, Any]:
        """The recipe in the directory, upgraded to today's format.

        Raises:
            RunError: if it is missing or broken.
        """
        found = self.read("recipe")
        try:
            return upgrade(found) if found.get("kind") in ("teach", "distill") else found
        except SpikeDistillError as error:
            reason = str(error).rstrip(".")
            raise RunError(f"'{self.path}' holds no run that can be read ({reason}): give another run.") from error

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file of the directory."""
        write_json(self._file(f"{name}.json"), content)

    def read(self, name: str) -> dict[str, Any]:
        """Read one JSON file of the directory.

        Raises:
            RunError: if it is missing or from another run, or does not match its checksum.
        """
        return read_json(self._file(f"{name}.json"))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read one ``.jsonl`` file. A last line that was cut off is left out.

        Raises:
            RunError: if another line is from another run, or does not match its checksum.
        """
        file, found = self._file(f"{name}.jsonl"), []
        for number, line in enumerate(_whole_lines(file), 1):
            try:
                found.append(self._opened(line))
            except ValueError as error:
                raise RunError(
                    f"Line {number} of '{file}' is damaged ({error}): delete that line; --resume writes it again."
                ) from error
        return found

    def _opened(self, line: bytes) -> dict[str, Any]:
        """A line of a log without its checksum; raises ``ValueError`` if it is damaged."""
        content = unseal(line.decode().removesuffix("\r") + "\n")  # git on Windows may have changed line endings
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
                file.truncate(file.read().rfind(b"\n") + 1)  # a line that was cut off, as by a full disk
                file.write(content.encode())
        except OSError as error:
            raise RunError(
                f"'{path}' could not be written ({error}): free some disk space, then continue with --resume."
            ) from error

    def history(self, epoch: int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one for each of this number of epochs.

        Raises:
            RunError: if a line is damaged, or the epochs do not match.
        """
        return self._of_all_epochs(self.lines("metrics"), epoch)

    def _of_all_epochs(self, found: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
        epochs = [line.get("epoch") for line in found]
        if epochs != list(range(1, epoch + 1)):
            raise RunError(
                f"'{self.path / 'metrics.jsonl'}' holds epochs {epochs[:9]}, but {epoch} are done: go on with --resume,"
                " which repairs it from the checkpoint. If an earlier version wrote the checkpoint, restore a copy."
            )
        return found

    def rewind(self, epoch: int, known: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Bring the logs to the state of the checkpoint: drop lines of later epochs, restore missing earlier ones.

        Args:
            epoch: number of epochs that are done.
            known: the lines of metrics.jsonl in the checkpoint; checkpoints of earlier versions hold none.

        Raises:
            RunError: if metrics.jsonl lacks an epoch, or is damaged, and the checkpoint holds no lines.
        """
        for name in PLAIN:
            file = self._file(f"{name}.jsonl")
            kept = [line for line in _readable(_whole_lines(file)) if line["epoch"] <= epoch]
            if name == "metrics" and known is None:
                self._of_all_epochs(kept, epoch)
            elif name == "metrics" and kept != (kept := [dict(line) for line in known or ()]):
                note(f"'{file}' was shorter than the checkpoint, or damaged, and is repaired from it.")
            if kept or file.exists():
                write_text(file, "".join(json.dumps(line) + "\n" for line in kept))


def _whole_lines(file: Path) -> list[bytes]:
    """The complete lines of a file; none if it is missing."""
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def _readable(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """The lines of epochs that are not damaged."""
    for line in lines:
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict) and isinstance(content.get("epoch"), int):
                yield content


def _name(recipe: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """The name of a run: the same for the same recipe on the same machine, since results are the same too."""
    training = {name: value for name, value in recipe.get("training", {}).items() if name not in RESULT_NEUTRAL_FIELDS}
    asked = [{**recipe, "training": training}, {name: value for name, value in machine.items() if name != "date"}]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def unless_done(path: Path, work: Callable[[bool], object], say: Callable[[], object] = lambda: None) -> None:
    """Keep a finished run; begin any other, or go on with it.

    Args:
        path: its directory.
        work: trains the run; its argument says whether to resume.
        say: called before ``work``.
    """
    if not Run(path).finished:
        say()
        work((path / "recipe.json").exists())
