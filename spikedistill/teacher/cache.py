"""The teacher's answers to batches that come again: computed once, kept on disk, mapped into memory.

A batch is known by its view and step: they say which samples it holds and by which seed those were augmented. A cache
is a directory of plain files under the digest of its key, so that other choices never meet its answers:

key.json             what the answers depend on (teacher, data, augmentation, seed, ...), and how each file is laid out
samples.npy          [views, steps, B] the sample that each row belongs to; -1: its answer is not there yet
logits.npy           [views, steps, T, B, K] T = 1 unless an objective needs every step of a spiking teacher
features.PATH.npy    [views, steps, T, B, ...] axes in the network's order of memory; bfloat16 as int16 of the same bits
spikes.PATH.npy      likewise, of a spiking teacher
checksums.npy        [views, steps] one number for all that the other files hold of a batch; 0: not known

A batch is marked in samples.npy after its rows are on disk, so a kill at any moment costs answers and never falsifies
one. Whoever opens a cache that another process filled asks the teacher once more and compares, and checks the sum of
every batch when it first comes.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError, RunError
from spikedistill.files import note

SAMPLES, CHECKSUMS = "samples", "checksums"
KINDS = ("features", "spikes")
"""What an answer holds by path, beside its logits."""
FAR = 0.05
"""Relative distance from which a kept answer is another teacher's; rounding on other hardware stays far below."""


@dataclass(frozen=True)
class Layout:
    """How one tensor of an answer lies in its file.

    Args:
        shape: of one batch in the file, the slowest axis first.
        axes: the tensor's axis that each of them is.
        dtype: torch's name of the number format.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(tensor: Tensor) -> "Layout":
        """The layout that keeps a tensor's order of memory.

        >>> Layout.of(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)).shape
        (2, 4, 5, 3)
        """
        strides = tensor.stride()
        axes = tuple(sorted(range(tensor.ndim), key=lambda axis: -strides[axis]))
        shape = tuple(tensor.shape[axis] for axis in axes)
        return Layout(shape, axes, str(tensor.dtype).removeprefix("torch."))

    @property
    def stored(self) -> np.dtype[Any]:
        """The number format in the file; numpy has no bfloat16."""
        return np.dtype("int16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of one batch."""
        return math.prod(self.shape) * self.stored.itemsize

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has this shape and number format."""
        shape = tuple(size for _, size in sorted(zip(self.axes, self.shape)))
        return (tuple(tensor.shape), tensor.dtype) == (shape, getattr(torch, self.dtype))

    def pack(self, tensor: Tensor) -> NDArray[Any]:
        """A tensor as the file holds it."""
        dense = tensor.detach().cpu().permute(self.axes).contiguous()
        return (dense.view(torch.int16) if self.dtype == "bfloat16" else dense).numpy()

    def unpack(self, array: NDArray[Any]) -> Tensor:
        """What was packed: the same bits in the same order of memory, without a copy."""
        tensor = torch.from_numpy(array)
        tensor = tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor
        return tensor.permute([self.axes.index(axis) for axis in range(tensor.ndim)])


CHECKSUM = Layout((), (), "int64")
"""Of one batch."""


class Cache:
    """One teacher's answers to ``views`` times ``steps`` batches.

    Args:
        folder: where caches lie; this one gets, or finds, a directory of its own there.
        key: what the answers depend on, as JSON can hold it.
        example: an answer to any batch; it says what is kept and how large that is.
        views: how many times all samples are seen before batches come again.
        steps: batches a view.

    Raises:
        ConfigError: if the disk is too small for what is not there yet.
        RunError: if the cache that lies there is damaged, or the folder cannot be written.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], example: Answer, views: int, steps: int) -> None:
        tensors = _named(example)
        self.layouts = {name: Layout.of(tensor) for name, tensor in tensors.items()}
        self.device = example.logits.device
        self.layouts[SAMPLES] = Layout((example.logits.shape[1],), (0,), "int64")
        self.views, self.steps = views, steps
        files = {name: asdict(layout) for name, layout in self.layouts.items()}
        self.key = json.loads(json.dumps({**key, "views": views, "steps": steps, "files": files}))
        self.path = folder / hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.trusted = not self.path.exists()
        self.filled = 0 if self.trusted else self._check()
        self._check_room(folder)
        if self.trusted:
            self._create()
        self.starts = {name: _map(self._file(name)).offset for name in self.layouts}
        self.headers = b"".join(_header(self._file(name)) for name in (*self.layouts, CHECKSUMS))
        self.unmarked: dict[tuple[int, int], Tensor] = {}
        self.whole: set[tuple[int, int]] = set()

    def answer(self, view: int, step: int, samples: Int[Tensor, " B"], ask: Callable[[], Answer]) -> Answer:
        """The answer to a batch: from disk, or the first time from the teacher by way of the disk.

        Args:
            view: 1, 2, ... ``views``.
            step: 0, 1, ... ``steps`` - 1.
            samples: the indices of the batch in the training set, in order.
            ask: asks the teacher about this batch.

        Raises:
            RunError: if the cache cannot be written or read, is damaged, or its answers are not this teacher's.
            ConfigError: if the answer has another shape than the example.
        """
        if not self._knows(view, step, samples):
            self._fill(view, step, ask())
            self.unmarked[view, step] = samples
        elif not self.trusted:
            self._compare(view, step, ask())
        if (view, step) not in self.whole:
            self._check_batch(view, step, samples)
        kept = {name: self._read(name, view, step).to(self.device) for name in self.layouts if name != SAMPLES}
        logits, found = kept.pop("logits"), {kind: dict[str, Tensor]() for kind in KINDS}
        for name, tensor in kept.items():
            kind, _, path = name.partition(".")
            found[kind][unquote(path)] = tensor
        return Answer(logits, **found)

    def flush(self) -> None:
        """Mark what was filled since: the rows reach the disk first, then their marks.

        Raises:
            RunError: if they cannot be written.
        """
        if not self.unmarked:
            return
        for name in self.layouts:
            self._sync(name)
        self._write_checksums()
        for (view, step), samples in self.unmarked.items():
            self._write(SAMPLES, view, step, samples)
        self._sync(SAMPLES)
        self.unmarked = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all answers."""
        return self.views * self.steps * self._batch_bytes()

    def __str__(self) -> str:
        share = 100 * self.filled / (self.views * self.steps)
        return (
            f"teacher's answers to {self.views} views of {self.steps} steps: {_size(self.nbytes)} in '{self.path}', "
            f"{share:.0f} % of them there"
        )

    def _batch_bytes(self) -> int:
        return sum(layout.nbytes for layout in self.layouts.values())

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"

    # --- opening ------------------------------------------------------------------------------------------------------

    def _check(self) -> int:
        """Make sure that the files are whole and those of the key; return how many batches are filled."""
        try:
            if json.loads((self.path / "key.json").read_text(encoding="utf-8")) != self.key:
                raise ValueError("key.json belongs to other answers")
            if not self._file(CHECKSUMS).exists():
                note(f"'{self.path}' has no checksums, an earlier version made it: damage to it would not be noticed.")
                self._make(self._file(CHECKSUMS), CHECKSUM, 0)
            for name, layout in {**self.layouts, CHECKSUMS: CHECKSUM}.items():
                found, wanted = _map(self._file(name)), (self.views, self.steps, *layout.shape)
                if (found.shape, found.dtype) != (wanted, layout.stored):
                    raise ValueError(f"{name}.npy is {found.dtype}{list(found.shape)}, not {list(wanted)}")
                whole, size = found.offset + layout.nbytes * self.views * self.steps, self._file(name).stat().st_size
                if size != whole:
                    raise ValueError(f"{name}.npy has {size} bytes, not {whole}")
            return int((_map(self._file(SAMPLES)) >= 0).all(-1).sum())
        except Exception as error:  # damaged bytes raise anything in numpy
            raise self._unusable(str(error)) from error

    def _check_room(self, folder: Path) -> None:
        needed = (self.views * self.steps - self.filled) * self._batch_bytes()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise self._unwritten(error) from error
        if needed <= free:
            return
        features = sum(layout.nbytes for name, layout in self.layouts.items() if name.startswith("features."))
        lean = f"--method kdsnn-response (features take {100 * features / self._batch_bytes():.0f} % of it), "
        raise ConfigError(
            f"The teacher's answers to {self.views} views need {_size(needed)} in '{folder}', where {_size(free)} are"
            f" free: give fewer --views (each takes {_size(self.nbytes // self.views)}), {lean if features else ''}or"
            " another --cache-dir."
        )

    def _create(self) -> None:
        """Make the directory beside its place and move it there whole."""
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for name, layout in {**self.layouts, CHECKSUMS: CHECKSUM}.items():
                self._make(part / f"{name}.npy", layout, -1 if name == SAMPLES else 0)
            (part / "key.json").write_text(json.dumps(self.key, indent=2) + "\n", encoding="utf-8")
            os.rename(part, self.path)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            if not self.path.exists():  # else another run was quicker
                raise self._unwritten(error) from error
            self.trusted, self.filled = False, self._check()

    def _make(self, file: Path, layout: Layout, fill: int) -> None:
        made = np.lib.format.open_memmap(file, "w+", layout.stored, (self.views, self.steps, *layout.shape))
        if fill:
            made[:] = fill
            made.flush()

    # --- one batch ----------------------------------------------------------------------------------------------------

    def _place(self, name: str, view: int, step: int) -> int:
        return self.starts[name] + ((view - 1) * self.steps + step) * self.layouts[name].nbytes

    def _read(self, name: str, view: int, step: int) -> Tensor:
        """One batch of a file, mapped; what is done to the tensor does not reach the file."""
        file, layout, place = self._file(name), self.layouts[name], self._place(name, view, step)
        with self._guarded(), file.open("rb") as opened:
            if sys.platform == "linux":  # have the disk bring this batch and the next
                os.posix_fadvise(opened.fileno(), place, 2 * layout.nbytes, os.POSIX_FADV_WILLNEED)
            return layout.unpack(np.memmap(opened, layout.stored, "c", place, layout.shape))

    def _write(self, name: str, view: int, step: int, tensor: Tensor) -> None:
        with self._guarded(), self._file(name).open("rb+") as file:
            file.seek(self._place(name, view, step))
            file.write(self.layouts[name].pack(tensor).data)

    def _sync(self, name: str) -> None:
        with self._guarded(), self._file(name).open("rb+") as file:
            os.fsync(file.fileno())

    def _knows(self, view: int, step: int, samples: Tensor) -> bool:
        marks = self._read(SAMPLES, view, step)
        if not torch.equal(marks, samples) and (marks >= 0).all():
            raise self._unusable(f"step {step + 1} of view {view} holds other samples")
        return torch.equal(marks, samples)

    def _checksum(self, view: int, step: int, samples: Tensor) -> int:
        """Of a batch as it lies in the files, with its place, its samples and their headers; a number of 64 bits."""
        place = f"{self.path.name} {view} {step} {samples.tolist()}"
        digest = hashlib.blake2b(place.encode() + self.headers, digest_size=8)
        for name in self.layouts:
            if name != SAMPLES:
                digest.update(f" {name} ".encode() + self.layouts[name].pack(self._read(name, view, step)).tobytes())
        return int.from_bytes(digest.digest(), "little", signed=True)

    def _write_checksums(self) -> None:
        with self._guarded():
            kept = np.lib.format.open_memmap(self._file(CHECKSUMS), "r+")
            for (view, step), samples in self.unmarked.items():
                kept[view - 1, step] = self._checksum(view, step, samples)
            kept.flush()

    def _check_batch(self, view: int, step: int, samples: Tensor) -> None:
        """Look, once in a process, at whether a batch that another one kept is as it was written."""
        self.whole.add((view, step))
        if (view, step) in self.unmarked:
            return
        with self._guarded():
            kept = int(_map(self._file(CHECKSUMS))[view - 1, step])
        if kept not in (0, self._checksum(view, step, samples)):
            raise self._unusable(f"step {step + 1} of view {view} has another checksum than was written")

    def _fill(self, view: int, step: int, answer: Answer) -> None:
        tensors = _named(answer)
        for name, tensor in tensors.items():
            if not self.layouts[name].fits(tensor):
                raise ConfigError(
                    f"The teacher's {name} became {tensor.dtype}{list(tensor.shape)}, unlike in its first answer: only"
                    " answers of one shape can be kept; give --views 0."
                )
        for name, tensor in tensors.items():
            self._write(name, view, step, tensor)

    def _compare(self, view: int, step: int, answer: Answer) -> None:
        for name, fresh in _named(answer).items():
            kept, fresh = self._read(name, view, step).double(), fresh.detach().cpu().double()
            distance = float((kept - fresh).norm() / fresh.norm().clamp_min(1e-12))
            if not distance <= FAR:
                raise self._unusable(
                    f"the {name} of step {step + 1} of view {view} differ from the teacher's by {100 * distance:.0f} %"
                )
        self.trusted = True

    # --- refusals -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # numpy finds a file too short: ValueError
            raise self._unwritten(error) from error

    def _unusable(self, reason: str) -> RunError:
        return RunError(
            f"The teacher's answers in '{self.path}' cannot be used ({reason}): delete that directory, they are then"
            " computed again; or give another --cache-dir."
        )

    def _unwritten(self, error: Exception) -> RunError:
        return RunError(
            f"The teacher's answers in '{self.path}' could not be written or read ({error}): free some disk space, then"
            " go on with --resume; or give another --cache-dir."
        )


def _named(answer: Answer) -> dict[str, Tensor]:
    """The tensors of an answer by the names of their files."""
    known = {"logits": answer.logits}
    for kind in KINDS:
        for path, tensor in getattr(answer, kind).items():
            known[f"{kind}.{quote(path, safe='')}"] = tensor
    return known


def _map(file: Path) -> np.memmap[Any, np.dtype[Any]]:
    return np.lib.format.open_memmap(file, "r")


def _header(file: Path) -> bytes:
    """What stands before the numbers."""
    with file.open("rb") as opened:
        return opened.read(_map(file).offset)


def _size(count: int) -> str:
    """Bytes as people read them.

    >>> _size(1000), _size(1536), _size(5632 * 2**20)
    ('1000 bytes', '1.5 KiB', '5.5 GiB')
    """
    if count < 1024:
        return f"{count} bytes"
    power = min(3, (count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
