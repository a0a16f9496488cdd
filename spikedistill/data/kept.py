"""Frames of large folders of recordings, kept on disk, so that they are computed once.

They lie in ``$XDG_CACHE_HOME/spikedistill`` (mostly ``~/.cache/spikedistill``), one folder for each set of files and
way of reading: the arrays as ``.npy``, and ``facts.json`` with their checksums. A file that was changed, added or
removed, or another number of frames, gives another folder. All of it may be deleted.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikedistill.data.parts import Parts
from spikedistill.files import note

MANY = 1000
"""Files from which on frames are kept."""
VERSION = 1
"""Of how recordings are read; a change makes all kept frames anew."""
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def kept(path: Path, how: str, read: Callable[[], Parts]) -> Parts:
    """The frames of a folder: those kept on disk, or read now and, for many files, kept.

    Args:
        path: the folder of recordings.
        how: how they are read, in full.
        read: reads them.
    """
    folder = _place(path, how)
    if folder is None:
        return read()
    if folder.exists():
        try:
            return _load(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            note(f"the frames kept in '{folder}' are damaged ({error}), and are made again.")
            shutil.rmtree(folder, ignore_errors=True)
    parts = read()
    try:
        _write(folder, parts)
        note(f"frames of '{path}' are kept in '{folder}', which may be deleted.")
    except OSError as error:
        note(f"the frames of '{path}' could not be kept in '{folder}' ({error}): they are read anew each time.")
    return parts


def _place(path: Path, how: str) -> Path | None:
    """The folder for these files as they are now; None if there are few."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if len(files) < MANY:
        return None
    digest = hashlib.sha256(f"{VERSION} {path.resolve()} {how}".encode())
    for file in files:
        state = file.stat()
        digest.update(f"{file.relative_to(path)} {state.st_size} {state.st_mtime_ns}\n".encode())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "spikedistill" / digest.hexdigest()[:24]


def _load(folder: Path) -> Parts:
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    arrays = {}
    for name, checksum in facts["arrays"].items():
        found = np.load(folder / f"{name}.npy", allow_pickle=False)
        if _checksum(found) != checksum:
            raise ValueError(f"{name}.npy does not match its checksum")
        arrays[name] = torch.from_numpy(found)
    test = (arrays["test_images"], arrays["test_labels"]) if "test_images" in arrays else None
    names, notes = tuple(map(str, facts["class_names"])), tuple(map(str, facts["notes"]))
    return Parts((arrays["train_images"], arrays["train_labels"]), test, names, notes)


def _write(folder: Path, parts: Parts) -> None:
    """Make the folder under a temporary name, then move it to its place."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    arrays = dict(zip(ARRAYS, (*parts.train, *(parts.test or ()))))
    try:
        part.mkdir(parents=True, exist_ok=True)
        for name, tensor in arrays.items():
            np.save(part / f"{name}.npy", tensor.numpy())
        checksums = {name: _checksum(tensor.numpy()) for name, tensor in arrays.items()}
        facts = {"arrays": checksums, "class_names": parts.class_names, "notes": parts.notes}
        (part / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _checksum(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()
