"""What is computed once from large folders and kept on disk: frames of recordings, pixels of images.

It lies in ``$XDG_CACHE_HOME/spikedistill`` (mostly ``~/.cache/spikedistill``), one folder for each set of files and way
of reading. A file that was changed, added or removed, or another number of frames, gives another folder. All of it may
be deleted.

Frames are ``.npy`` files, with ``facts.json`` for their checksums. They are read into memory. Pixels are one file, of
which the system reads what is needed, so they are not checked again. They are written in blocks, so that an interrupted
reading goes on.
"""

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from spikedistill.data.folders import files_below
from spikedistill.data.parts import Parts
from spikedistill.errors import DataError
from spikedistill.files import note, write_text

MANY, LARGE = 1000, 2**28
"""Frames are kept of so many files or more, and of files of so many bytes or more together."""
BLOCK = 1024
"""Images that are read before they are written to disk."""
MINUTE = 60.0
"""Seconds between two lines on progress."""
VERSION = 1
"""Of how files are read; a change makes everything that is kept anew."""
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def kept(path: Path, how: str, read: Callable[[], Parts]) -> Parts:
    """The frames of a folder: those kept on disk, or read now and, for many or large files, kept.

    Args:
        path: the folder of recordings.
        how: how they are read, in full.
        read: reads them.
    """
    files = sorted(files_below(path))
    if len(files) < MANY and sum(file.stat().st_size for file in files) < LARGE:
        return read()
    folder = _place(path, how, files)
    if folder.exists():
        try:
            return _load(folder)
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            note(f"the frames kept in '{folder}' are damaged ({error}), and are made again.")
            shutil.rmtree(folder, ignore_errors=True)
    parts = read()
    try:
        _write(folder, parts)
        note(f"frames of '{path}' are kept in '{folder}', which may be deleted.")
    except OSError as error:
        note(f"the frames of '{path}' could not be kept in '{folder}' ({error}): they are read anew each time.")
    return parts


def pixels_on_disk(
    path: Path,
    how: str,
    files: Sequence[Path],
    shape: tuple[int, ...],
    tally: Counter[str],
    read: Callable[[Sequence[Path], Counter[str]], NDArray[np.uint8]],
) -> Tensor:
    """Bytes of many images as a tensor that lies on disk and must not be written to: those kept, or read now.

    Args:
        path: the folder of images, for messages.
        how: how they are read, in full.
        files: the images.
        shape: that of one image.
        tally: gets what ``read`` counts.
        read: reads some of the images, ``[n, *shape]``, and counts.

    Raises:
        DataError: if the disk is too small, or cannot be written to.
    """
    folder, each = _place(path, how, files), math.prod(shape)
    pixels, facts = folder / "pixels.bin", folder / "facts.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # other processes wait until everything is there
            done, counts = _done(pixels, facts, each)
            needed, free = (len(files) - done) * each, shutil.disk_usage(folder).free
            if needed > free:
                raise OSError(f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free")
            if done < len(files):
                note(f"the pixels of '{path}' are kept in '{folder}', which may be deleted: {len(files):,} images.")
                with pixels.open("ab") as file:
                    file.truncate(done * each)
                    _append(file, facts, files, done, counts, read)
    except OSError as error:
        raise DataError(
            f"The pixels of '{path}' cannot be kept in '{folder}' ({error}): set XDG_CACHE_HOME to a folder on a larger"
            " disk, or give a smaller --image-size."
        ) from error
    tally.update(counts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(np.memmap(pixels, np.uint8, "r", shape=(len(files), *shape)))


def _done(pixels: Path, facts: Path, each: int) -> tuple[int, Counter[str]]:
    """How many images an earlier reading has written, and what it counted; none if anything is missing."""
    try:
        known = json.loads(facts.read_text(encoding="utf-8"))
        done, counts = int(known["images"]), Counter({str(name): int(count) for name, count in known["tally"].items()})
        return (done, counts) if pixels.stat().st_size >= done * each >= 0 else (0, Counter())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0, Counter()


def _append(
    file: BinaryIO,
    facts: Path,
    files: Sequence[Path],
    done: int,
    counts: Counter[str],
    read: Callable[[Sequence[Path], Counter[str]], NDArray[np.uint8]],
) -> None:
    """Read the images from number ``done`` on, and write them behind the others, block by block."""
    begun = said = time.monotonic()
    for first in range(done, len(files), BLOCK):
        file.write(read(files[first : first + BLOCK], counts).data)
        file.flush()
        os.fsync(file.fileno())  # before the facts say that they are there
        last = min(first + BLOCK, len(files))
        write_text(facts, json.dumps({"images": last, "tally": counts}))
        if time.monotonic() - said > MINUTE:
            said = time.monotonic()
            left = (said - begun) / (last - done) * (len(files) - last) / MINUTE
            note(f"read {last:,} of {len(files):,} images, {left:.0f} min left.")


def _place(path: Path, how: str, files: Iterable[Path]) -> Path:
    """The folder for these files as they are now."""
    digest = hashlib.sha256(f"{VERSION} {path.resolve()} {how}".encode())
    for file in files:
        state = file.stat()
        digest.update(os.fsencode(file.relative_to(path)) + f" {state.st_size} {state.st_mtime_ns}\n".encode())
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
