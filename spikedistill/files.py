"""Files written whole or not at all: tensors as safetensors with facts as JSON in the header, JSON, and text.

A file is written beside its place and moved there whole, so that a kill at any moment leaves the old one or the new.
Nothing is ever pickled.

Files of tensors and of JSON are sealed. ``checksum`` is the SHA-256 of everything in the file but itself: the header,
names and shapes too. ``run`` is the run in whose directory the file was written, empty elsewhere. A file that has one
of the two must have both, so no single damaged bit makes a sealed file look like one of before, which has neither.
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
"""Says to which run a directory belongs."""
SEALED = re.compile(rb'"checksum":"([0-9a-f]{64})"')
"""The checksum in the header of a safetensors file; inside of facts its quotation marks would have backslashes."""
BLANK = "0" * 64
"""What stands in its place while it is computed."""


def note(text: str) -> None:
    """Say something that is no error; the command line prints it to standard error."""
    logging.getLogger("spikedistill").warning("note: %s", text)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], previous: Path | None = None
) -> None:
    """Write tensors and facts (anything JSON holds) to one safetensors file, sealed, atomically.

    Args:
        path: the file.
        tensors: by name.
        facts: what to know of them.
        previous: where to keep the file that was there before.
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
    _replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_csv(path: Path, columns: Iterable[str], lines: Iterable[Iterable[Any]]) -> None:
    """Write a table as comma-separated values, its columns named in the first line, atomically.

    Raises:
        RunError: if it cannot be written, or would replace anything but such a table.
    """
    columns = list(columns)
    check_replaceable(path, f"{columns[0]},")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    write_text(path, text.getvalue())


def check_replaceable(path: Path, mark: str) -> None:
    """Refuse to replace a file that we did not write.

    Raises:
        RunError: if it exists, and no line at its beginning starts with the mark.
    """
    if path.exists() and not has_mark(path, mark):
        raise RunError(f"'{path}' exists and is nothing that this command wrote: choose another --out.")


def has_mark(path: Path, mark: str) -> bool:
    """Whether one of the first lines of a file begins so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f"\n{mark}".encode() in b"\n" + file.read(4096)


def write_bytes(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` write a file of any other kind, atomically."""
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
            f"'{path}' could not be written ({error}); what was there before is untouched: free some disk space or"
            " choose another directory, then go on with --resume."
        ) from error


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name, so that at every moment it lies in its place too."""
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without links
        shutil.copyfile(path, previous)


def weights_file(path: str | Path) -> Path:
    """A weights file, or that of a run directory."""
    return Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone, unchecked; none where the file is missing, broken, or not this project's."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
            return facts if isinstance(facts, dict) else {}
    except (SafetensorError, OSError, ValueError):
        return {}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and facts; facts are empty in a file that this project did not write.

    A file that an earlier version wrote has no checksum, and is read with a note.

    Raises:
        WeightsError: if the file is missing, truncated, not safetensors, or not as it was written.
        RunError: if it was written by another run than the one in whose directory it lies.
    """
    if not path.is_file():
        raise WeightsError(f"The weights file '{path}' does not exist: check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            _check_file(path, entries)
            facts = json.loads(entries.get(FACTS, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"'{path}' cannot be read as safetensors ({error}): it is truncated or of another kind; copy it again."
        ) from error


def _check_file(path: Path, entries: Mapping[str, str]) -> None:
    """Check the seal of a safetensors file."""
    if CHECKSUM in entries or RUN in entries:
        if entries.get(CHECKSUM) != _checksum(path)[0]:
            raise WeightsError(
                f"'{path}' is damaged (its content has another SHA-256 than was written into it): put a copy of it"
                " back, or make it again."
            )
    elif FACTS in entries:
        note(f"'{path}' has no checksum, an earlier version wrote it: damage to it would not be noticed.")
    _check_run(path, entries.get(RUN, ""))


def _check_run(path: Path, run: str) -> None:
    """Refuse a file that another run wrote than that of its directory."""
    if run != (home := run_of(path.parent)) and home:
        whose = f"another run ({run})" if run else "no run, or by an earlier version,"
        raise RunError(
            f"'{path}' was written by {whose} and lies in the directory of the run {home}: put the file of that run"
            " back."
        )


def _checksum(path: Path) -> tuple[str, int]:
    """The SHA-256 of a safetensors file with its checksum left blank, and where that stands; -1 if there is none."""
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
    """The name of the run whose directory this is; empty where there is none, or it was begun by an earlier version.

    Raises:
        RunError: if the file that says so is damaged.
    """
    return str(_read_json(folder / ENVIRONMENT).get(RUN, "")) if (folder / ENVIRONMENT).exists() else ""


def write_json(path: Path, content: Mapping[str, Any], run: str | None = None) -> None:
    """Write names and values as JSON, sealed, atomically.

    Args:
        path: the file.
        content: what JSON holds, without an entry ``run`` or ``checksum``.
        run: which run writes; by default that of the directory.
    """
    write_text(path, seal(content, run_of(path.parent) if run is None else run, indent=2))


def read_json(path: Path) -> dict[str, Any]:
    """Read names and values; a file of before, without checksum, is read as it is.

    Raises:
        RunError: if the file is missing, broken, not as it was written, or another run's than its directory.
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
    """Names and values as lines of JSON, with the run that wrote them and their checksum.

    >>> seal({"loss": 0.5}, "mine")[:35]
    '{"loss": 0.5, "run": "mine", "check'
    """
    digest = hashlib.sha256(json.dumps([run, content]).encode()).hexdigest()
    return json.dumps({**content, RUN: run, CHECKSUM: digest}, indent=indent) + "\n"


def unseal(text: str, indent: int | None = None) -> dict[str, Any]:
    """Names and values from lines of JSON, with their seal if they have one.

    Raises:
        ValueError: if they are none, or not as they were sealed.
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
    """Names and values alone."""
    return {name: value for name, value in content.items() if name not in (RUN, CHECKSUM)}


def fingerprint(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A digest of names, shapes, number formats and bits; devices and orders of memory do not matter.

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
    """A digest of a network's modules, parameters and buffers, those too that no file of weights holds."""
    return fingerprint({**dict(network.named_parameters()), **dict(network.named_buffers())}, str(network))
