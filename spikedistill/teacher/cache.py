"""The teacher's outputs for batches that repeat: computed once, kept on disk, mapped into memory.

View and step identify a batch: they determine its samples and the seed of their augmentation. A cache is a directory of
plain files. Its name is the digest of its key, so runs with other choices never read its outputs:

key.json             what the outputs depend on (teacher, data, augmentation, seed, ...), and the layout of each file
samples.npy          [views, steps, B] the sample that each row belongs to; -1: its output is not there yet
logits.npy           [views, steps, T, B, K] T = 1 unless an objective needs every step of a spiking teacher
features.PATH.npy    [views, steps, T, B, ...] axes in the network's memory order; bfloat16 as int16 of the same bits
spikes.PATH.npy      likewise, of a spiking teacher
checksums.npy        [views, steps] one checksum per batch, over all other files; 0: not known

A batch is marked in samples.npy after its rows are on disk. So a kill at any moment may lose outputs, but never leaves
a wrong one. A process that opens a cache filled by another asks the teacher for one batch again and compares. It also
checks the checksum of every batch at its first use.
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
"""The fields of an ``Answer`` that hold tensors by path."""
FAR = 0.05
"""Above this relative distance, stored outputs are another teacher's. Rounding on other hardware stays far below."""


@dataclass(frozen=True)
class Layout:
    """How one tensor of an ``Answer`` is laid out in its file.

    Args:
        shape: shape of one batch in the file, the slowest axis first.
        axes: for each axis in the file, the tensor's axis.
        dtype: torch's name of the number format.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(tensor: Tensor) -> "Layout":
        """The layout that keeps a tensor's memory order.

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
        """The tensor that was packed: the same bits in the same memory order, without a copy."""
        tensor = torch.from_numpy(array)
        tensor = tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor
        return tensor.permute([self.axes.index(axis) for axis in range(tensor.ndim)])


CHECKSUM = Layout((), (), "int64")
"""The layout of one batch's checksum."""


class Cache:
    """One teacher's outputs for ``views`` times ``steps`` batches.

    Args:
        folder: the folder of all caches. This one has its own directory in it.
        key: what the outputs depend on, as JSON values.
        example: the teacher's output for any batch. It determines the tensors to keep and their shapes.
        views: number of epochs before batches repeat.
        steps: batches per view.

    Raises:
        ConfigError: if the disk is too small for the outputs that are not there yet.
        RunError: if the cache in the folder is damaged, or the folder cannot be written.
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
        """The teacher's outputs for a batch: from disk, or at first use from the teacher through the disk.

        Args:
            view: 1, 2, ... ``views``.
            step: 0, 1, ... ``steps`` - 1.
            samples: numbers of the batch's samples in the training set, ``[B]``, in order.
            ask: computes the teacher's outputs for this batch.

        Raises:
            RunError: if the cache cannot be written or read, is damaged, or holds another teacher's outputs.
            ConfigError: if the outputs have other shapes than the example.
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
        return Answer(logits, found["features"], found["spikes"])

    def flush(self) -> None:
        """Mark the batches that were filled since the last call. Their rows reach the disk first, then the marks.

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
        """Bytes of all outputs."""
        return self.views * self.steps * self._batch_bytes()

    def __str__(self) -> str:
        share = 100 * self.filled / (self.views * self.steps)
        return (
            f"teacher's outputs for {self.views} views of {self.steps} steps: {_size(self.nbytes)} in '{self.path}', "
            f"{share:.0f} % already computed"
        )

    def _batch_bytes(self) -> int:
        return sum(layout.nbytes for layout in self.layouts.values())

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"

    # --- opening ------------------------------------------------------------------------------------------------------

    def _check(self) -> int:
        """Check that the files are complete and belong to the key; return the number of filled batches."""
        try:
            if json.loads((self.path / "key.json").read_text(encoding="utf-8")) != self.key:
                raise ValueError("key.json belongs to other outputs")
            if not self._file(CHECKSUMS).exists():
                note(f"'{self.path}' has no checksums, because an earlier version made it: damage cannot be noticed.")
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
        _, processes = self.key.get("process", (0, 1))  # each process keeps the outputs for its own rows
        needed = (self.views * self.steps - self.filled) * self._batch_bytes() * processes
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
            f"The teacher's outputs for {self.views} views need {_size(needed)} in '{folder}', where {_size(free)} are"
            f" free: give fewer --views (each takes {_size(self.nbytes // self.views)}), {lean if features else ''}or"
            " another --cache-dir."
        )

    def _create(self) -> None:
        """Make the directory under a temporary name, then move it to its place."""
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
        """One batch of a file, mapped into memory. Changes of the tensor do not reach the file."""
        file, layout, place = self._file(name), self.layouts[name], self._place(name, view, step)
        with self._guarded(), file.open("rb") as opened:
            if sys.platform == "linux":  # ask the disk for this batch and the next
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
        """A checksum of 64 bits: of a batch in the files, its place, its samples and the files' headers."""
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
        """Check, once per process, that a batch stored by another process is unchanged."""
        self.whole.add((view, step))
        if (view, step) in self.unmarked:
            return
        with self._guarded():
            kept = int(_map(self._file(CHECKSUMS))[view - 1, step])
        if kept not in (0, self._checksum(view, step, samples)):
            raise self._unusable(f"step {step + 1} of view {view} does not match its checksum")

    def _fill(self, view: int, step: int, answer: Answer) -> None:
        tensors = _named(answer)
        for name, tensor in tensors.items():
            if not self.layouts[name].fits(tensor):
                raise ConfigError(
                    f"The teacher's {name} became {tensor.dtype}{list(tensor.shape)}, unlike for its first batch: only"
                    " outputs of one shape can be kept; give --views 0."
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
        except (OSError, ValueError) as error:  # numpy raises ValueError for a file that is too short
            raise self._unwritten(error) from error

    def _unusable(self, reason: str) -> RunError:
        return RunError(
            f"The teacher's outputs in '{self.path}' cannot be used ({reason}): delete that directory, and they are"
            " computed again; or give another --cache-dir."
        )

    def _unwritten(self, error: Exception) -> RunError:
        return RunError(
            f"The teacher's outputs in '{self.path}' could not be written or read ({error}): free some disk space, then"
            " continue with --resume; or give another --cache-dir."
        )


def _named(answer: Answer) -> dict[str, Tensor]:
    """The tensors of an ``Answer`` by the names of their files."""
    known = {"logits": answer.logits}
    for kind in KINDS:
        for path, tensor in getattr(answer, kind).items():
            known[f"{kind}.{quote(path, safe='')}"] = tensor
    return known


def _map(file: Path) -> np.memmap[Any, np.dtype[Any]]:
    return np.lib.format.open_memmap(file, "r")


def _header(file: Path) -> bytes:
    """The header of a ``.npy`` file, before the numbers."""
    with file.open("rb") as opened:
        return opened.read(_map(file).offset)


def _size(count: int) -> str:
    """Bytes in readable units.

    >>> _size(1000), _size(1536), _size(5632 * 2**20)
    ('1000 bytes', '1.5 KiB', '5.5 GiB')
    """
    if count < 1024:
        return f"{count} bytes"
    power = min(3, (count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
