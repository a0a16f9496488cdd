"""Files written whole or not at all: tensors as safetensors with facts as JSON in the header, JSON, and text.

Each file is written under a temporary name and then moved to its place. A kill at any moment leaves the old file or the
new one, never a part. Nothing is pickled.

Files of tensors and of JSON are sealed by two entries:

checksum   the SHA-256 of everything else in the file, including the header, names and shapes
run        the run in whose directory the file was written; empty elsewhere

A file with one of these entries must have both. So a single damaged bit cannot make a sealed file look like one from an
earlier version, which has neither.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spikedistill.errors import RunError, WeightsError

FACTS = "spikedistill"
CHECKSUM, RUN = "checksum", "run"
"""The entries that seal a file."""
ENVIRONMENT = "environment.json"
"""The file that says which run a directory belongs to."""
SEALED = re.compile(rb'"checksum":"([0-9a-f]{64})"')
"""Finds the checksum in the header of a safetensors file. Quotation marks inside the facts have backslashes."""
PRETRAINED_DIR = Path(__file__).parent / "pretrained"
"""The folder of the trained students that come with the package."""
BLANK = "0" * 64
"""The placeholder for the checksum while it is computed."""


def note(text: str) -> None:
    """Log a note, which is not an error. The command line prints it to standard error."""
    logging.getLogger("spikedistill").warning("note: %s", text)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], previous: Path | None = None
) -> None:
    """Write tensors and facts (anything JSON holds) to one safetensors file, sealed, atomically.

    Args:
        path: the file.
        tensors: by name.
        facts: what a reader has to know of the tensors.
        previous: where to keep the file that was there before.

    Raises:
        RunError: if it cannot be written.
    """
    dense = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {FACTS: json.dumps(facts), "format": "pt", RUN: run_of(path.parent), CHECKSUM: BLANK}

    def write(part: Path) -> None:
        save_file(dense, part, metadata=header)
        digest, place = _checksum(part)
        with part.open("rb+") as file:
            file.seek(place)
            file.write(digest.encode())

    _replace(path, write, previous)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    _replace(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_csv(path: Path, columns: Iterable[str], lines: Iterable[Iterable[Any]]) -> None:
    """Write a table as comma-separated values, atomically. The first line names the columns.

    Raises:
        RunError: if it cannot be written, or would replace a file that is not such a table.
    """
    columns = list(columns)
    check_replaceable(path, f"{columns[0]},")
    write_text(path, csv_text(columns, lines))


def csv_text(columns: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    """A table as comma-separated values. The first line names the columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return text.getvalue()


def check_replaceable(path: Path, mark: str) -> None:
    """Refuse to replace a file that we did not write.

    Raises:
        RunError: if it exists and ``has_mark`` does not find the mark.
    """
    if path.exists() and not has_mark(path, mark):
        raise RunError(f"'{path}' exists and was not written by this command: name another file.")


def has_mark(path: Path, mark: str) -> bool:
    """Whether a line in the first 4096 bytes of a file starts with the mark."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f"\n{mark}".encode() in b"\n" + file.read(4096)


def holds(path: Path, *marks: bytes, within: int = -1) -> bool:
    """Whether a file of any kind holds one of these marks, within its first bytes or anywhere."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        content = file.read(within)
    return any(mark in content for mark in marks)


def write_bytes(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file of any other kind, atomically: ``write`` gets the path to write to."""
    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise RunError(
            f"'{path}' could not be written ({error}); the file that was there before is untouched: free some disk"
            " space or choose another place; a training continues with --resume."
        ) from error


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name. It stays in its place at every moment."""
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without links
        shutil.copyfile(path, previous)


def home(name: str | Path) -> Path:
    """A path in which ``~`` stands for the home folder. That of a user who is not known stays as it is."""
    return Path(os.path.expanduser(name))


def weights_file(path: str | Path) -> Path:
    """The path of a weights file; for a run directory, of its ``model.safetensors``.

    The name of a student that comes with the package means its file, unless there is a file or folder of that name.
    """
    path = shipped(path)
    return path / "model.safetensors" if path.is_dir() else path


def shipped(path: str | Path) -> Path:
    """A path; for the name of a student that comes with the package, the path of its file."""
    file = PRETRAINED_DIR / f"{path}.safetensors"
    return file if file.parent == PRETRAINED_DIR and file.is_file() and not Path(path).exists() else Path(path)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone, unchecked. Empty if the file is missing, broken, or not written by this project."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
            return facts if isinstance(facts, dict) else {}
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and facts of a safetensors file. Facts are empty if this project did not write it.

    A file from an earlier version has no checksum. It is read with a note.

    Raises:
        WeightsError: if the file is missing, truncated, not safetensors, or changed since it was written.
        RunError: if it lies in a run directory and another run wrote it.
    """
    if not path.is_file():
        raise WeightsError(f"The weights file '{path}' does not exist: check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            _check_file(path, entries)
            facts = json.loads(entries.get(FACTS, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"'{path}' cannot be read as safetensors ({error}): it is truncated or of another kind; copy it again."
        ) from error


def _check_file(path: Path, entries: Mapping[str, str]) -> None:
    """Check the seal of a safetensors file."""
    if CHECKSUM in entries or RUN in entries:
        if entries.get(CHECKSUM) != _checksum(path)[0]:
            raise WeightsError(
                f"'{path}' is damaged (its SHA-256 is not the checksum written into it): put a copy of it back, or"
                " make it again."
            )
    elif FACTS in entries:
        note(f"'{path}' has no checksum, because an earlier version wrote it: damage cannot be noticed.")
    _check_run(path, entries.get(RUN, ""))


def _check_run(path: Path, run: str) -> None:
    """Refuse a file in a run directory that another run wrote."""
    if run != (home := run_of(path.parent)) and home:
        whose = f"another run ({run})" if run else "no run, or by an earlier version,"
        raise RunError(
            f"'{path}' was written by {whose} and lies in the directory of the run {home}: put the file of that run"
            " back."
        )


def _checksum(path: Path) -> tuple[str, int]:
    """The SHA-256 of a safetensors file with a blank checksum, and the checksum's position in bytes (-1: none)."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        found = SEALED.search(header)
        digest = hashlib.sha256(size)
        digest.update(header if found is None else header[: found.start(1)] + BLANK.encode() + header[found.end(1) :])
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest(), -1 if found is None else 8 + found.start(1)


def run_of(folder: Path) -> str:
    """The name of the run that a directory belongs to. Empty if there is none, or an earlier version began the run.

    Raises:
        RunError: if ``environment.json`` is damaged.
    """
    return str(_read_json(folder / ENVIRONMENT).get(RUN, "")) if (folder / ENVIRONMENT).exists() else ""


def write_json(path: Path, content: Mapping[str, Any], run: str | None = None) -> None:
    """Write names and values as JSON, sealed, atomically.

    Args:
        path: the file.
        content: any JSON values, without an entry ``run`` or ``checksum``.
        run: the run that writes (default: the run of the directory).

    Raises:
        RunError: if it cannot be written.
    """
    write_text(path, seal(content, run_of(path.parent) if run is None else run, indent=2))


def read_json(path: Path) -> dict[str, Any]:
    """Read names and values from JSON. A file from an earlier version has no checksum and is read as it is.

    Raises:
        RunError: if the file is missing, broken, changed since it was written, or lies in another run's directory.
    """
    content = _read_json(path)
    if RUN in content:
        _check_run(path, content[RUN])
    return without_seal(content)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return unseal(path.read_text(encoding="utf-8"), indent=2)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"'{path}' cannot be read ({error}): is '{path.parent}' the directory of a run? If so, put a copy of the"
            " file back."
        ) from error


def seal(content: Mapping[str, Any], run: str, indent: int | None = None) -> str:
    """Names and values as JSON text, with the run that wrote them and their checksum.

    >>> seal({"loss": 0.5}, "mine")[:35]
    '{"loss": 0.5, "run": "mine", "check'
    """
    digest = hashlib.sha256(json.dumps([run, content]).encode()).hexdigest()
    return json.dumps({**content, RUN: run, CHECKSUM: digest}, indent=indent) + "\n"


def unseal(text: str, indent: int | None = None) -> dict[str, Any]:
    """Names and values from JSON text, with their seal if they have one.

    Raises:
        ValueError: if the text is not a JSON object, or was changed since it was sealed.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not names and values")
    bare = without_seal(content)
    if len(bare) < len(content) and text != seal(bare, content.get(RUN, ""), indent):
        raise ValueError(
            f"it was changed after it was written; if you did so on purpose, remove its entries {RUN} and {CHECKSUM}"
        )
    return content


def without_seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values without the seal."""
    return {name: value for name, value in content.items() if name not in (RUN, CHECKSUM)}


def fingerprint(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A digest of names, shapes, number formats and bits. Device and memory order do not matter.

    >>> ones = torch.ones(2, 3)
    >>> fingerprint({"a": ones}) == fingerprint({"a": ones.T.contiguous().T}) != fingerprint({"a": -ones})
    True
    """
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_of(network: nn.Module) -> str:
    """A digest of a network's modules, parameters and buffers, including buffers that weights files leave out."""
    return fingerprint({**dict(network.named_parameters()), **dict(network.named_buffers())}, str(network))
