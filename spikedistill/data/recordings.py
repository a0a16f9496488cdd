"""Readers of the formats in which event recordings are published. Each gives a ``Recording``.

| ending | format | data sets |
|---|---|---|
| ``.bin`` | five bytes per event (``events.read_nmnist``) | N-MNIST, N-Caltech101 |
| ``.aedat`` | AEDAT 2.0, addresses of a DVS128; AEDAT 3.1 | CIFAR10-DVS; DVS128 Gesture |
| ``.dat`` | eight bytes per event behind a header in % | N-Cars, Prophesee |
| ``.mat`` | arrays ``ts``, ``x``, ``y``, ``pol`` of MATLAB | ASL-DVS |
| ``.npz``, ``.npy`` | arrays ``t``, ``x``, ``y``, ``p``, or one array with these fields | frameworks' own copies |
| ``.h5``, ``.hdf5`` | the same arrays, at the top or in ``events``, a group or fields (needs h5py) | DSEC, 1 Mpx |

A file that is cut, damaged or in another format is refused as a whole: no reader returns a part of a recording.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spikedistill.data.events import Binned, Binning, Recording, read_nmnist
from spikedistill.data.folders import SampleKind, files_below
from spikedistill.data.pictures import SUFFIXES
from spikedistill.errors import DataError

SIDE = 128
"""Rows and columns of a DVS128."""
HEADER = 28
"""Bytes of the header of a packet in AEDAT 3.1."""
SENSORS = ((34, 34), (100, 120), (128, 128), (180, 240), (240, 304), (260, 346), (480, 640), (720, 1280))
"""Rows and columns of known sensors: N-MNIST, N-Cars, DVS128, DAVIS240, ATIS, DAVIS346, VGA, HD."""
AT_ONCE = 256
"""Recordings in memory at a time."""
LOOKED_AT = 1000
"""Files at which it is seen what a folder holds."""
POLARITY = 1
"""The number of polarity events among the types of AEDAT 3.1."""
CONTRAST = (0, 12)
"""The numbers of events that pixels send, among the types of ``.dat`` files: Event2d and EventCd."""
OLDER = 18
"""Bits that older ``.dat`` files use for x, y and polarity: 9, 8 and 1."""
NAMES = {
    "t": ("t", "ts", "time", "timestamp", "timestamps"),
    "x": ("x", "xs"),
    "y": ("y", "ys"),
    "p": ("p", "pol", "polarity", "polarities", "ps"),
}
"""The names under which files hold the four arrays."""


def read_recording(path: str | Path) -> Recording:
    """The events of one file, in a format that its ending and its first bytes tell.

    Raises:
        DataError: if the file is missing, its format is not known, or it is cut, damaged or empty.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise DataError(f"'{path}' is no recording of events: expected a file ending with {', '.join(READERS)}.")
    found = READERS[path.suffix.lower()](path)
    if not len(found.t):
        raise DataError(f"'{path}' holds no event: leave it out.")
    return found


def read_aedat(path: Path) -> Recording:
    """AEDAT 2.0 or 3.1, as its first line says. Times are microseconds.

    AEDAT 2.0 has pairs of an address and a time, big-endian. The address is read as that of a DVS128 in the orientation
    in which CIFAR10-DVS shows its images (Li et al., 2017, doi 10.3389/fnins.2017.00309): the row is in bits 1 to 7,
    the column in bits 8 to 14, both counted from the other side, and bit 0 is 1 for darker.

    Raises:
        DataError: see ``read_recording``.
    """
    content = _content(path)
    first = content[:40].upper()
    if first.startswith(b"#!AER-DAT3"):
        return _read_aedat_3(path, content)
    if not first.startswith(b"#!AER-DAT2"):
        raise DataError(f"'{path}' does not begin with #!AER-DAT2.0 or #!AER-DAT3.1: it is in another format.")
    _, body = _header(content, b"#")
    if len(body) % 8:
        raise _cut(path, len(body), "eight per event")
    address, t = np.frombuffer(body, ">u4").reshape(-1, 2).astype(np.int64).T
    if (address >> 15).any():
        raise DataError(
            f"'{path}' has addresses up to {address.max()}, beyond those of a DVS128 (below 32768): it is damaged, or"
            " of another camera."
        )
    x, y = SIDE - 1 - (address >> 8 & 127), SIDE - 1 - (address >> 1 & 127)
    return _in_order(Recording(_unwrapped(t), x, y, 1 - (address & 1)))


def _read_aedat_3(path: Path, content: bytes) -> Recording:
    """Packets behind a header; those of other types than polarity are passed over, and so are invalid events."""
    mark = content.find(b"#!END-HEADER")
    place = content.find(b"\n", mark) + 1
    if mark < 0 or not place:
        raise DataError(f"'{path}' has no line #!END-HEADER: its header is cut.")
    data, times = [], []
    while place < len(content):
        if len(content) - place < HEADER:
            raise _cut(path, len(content) - place, f"a packet's header of {HEADER}")
        kind, _ = np.frombuffer(content, "<u2", 2, place)
        size, _, overflow, _, number, _ = (int(value) for value in np.frombuffer(content, "<u4", 6, place + 4))
        place += HEADER
        if len(content) - place < size * number or (kind == POLARITY and size != 8):
            raise _cut(path, len(content) - place, f"{number} events of {size}")
        if kind == POLARITY:
            pairs = np.frombuffer(content, "<u4", 2 * number, place).reshape(-1, 2).astype(np.int64)
            data.append(pairs[:, 0])
            times.append(pairs[:, 1] + (overflow << 31))
        place += size * number
    if not data:
        raise DataError(f"'{path}' holds no packet of polarity events.")
    events, t = np.concatenate(data), np.concatenate(times)
    valid = events & 1 == 1
    events, t = events[valid], t[valid]
    return _in_order(Recording(t, events >> 17 & 0x7FFF, events >> 2 & 0x7FFF, events >> 1 & 1))


def read_dat(path: Path) -> Recording:
    """Prophesee's format for N-Cars (Sironi et al., CVPR 2018, arXiv 1803.07913): header lines, then events.

    Two bytes behind the header say the type and the size of an event. An event of a pixel has its time in microseconds,
    and 14 bits of x, 14 of y and one of polarity, little-endian (docs.prophesee.ai/stable/data/file_formats/dat.html).
    This is version 2. Older files have fewer bits, in several ways, and are refused. A file whose header names no
    version is read if its events use bits that older files leave free.

    Raises:
        DataError: see ``read_recording``; also if its events are not those of pixels, or its version is another.
    """
    header, body = _header(_content(path), b"%")
    if not header:
        raise DataError(f"'{path}' does not begin with a header in %: it is in another format.")
    if len(body) < 2 or (len(body) - 2) % 8:
        raise _cut(path, max(0, len(body) - 2), "eight per event")
    if body[0] not in CONTRAST or body[1] != 8:
        raise DataError(
            f"'{path}' holds events of type {body[0]} in {body[1]} bytes each: expected type 0 or 12, those of pixels,"
            " in 8 bytes. Type 14 is that of signals from outside: export the events of the pixels."
        )
    t, packed = np.frombuffer(body, "<u4", offset=2).reshape(-1, 2).astype(np.int64).T
    named = re.search(rb"^%[ \t]*Version[ \t]+(\S+)", header, re.MULTILINE)
    older = len(t) > 0 and not (packed >> OLDER).any()
    if named[1] != b"2" if named else older:
        said = f"version {named[1].decode('latin')}" if named else "no version"
        raise DataError(f"The header of '{path}' names {said} of the format: expected version 2. Export it again.")
    return _in_order(Recording(_unwrapped(t), packed & 0x3FFF, packed >> 14 & 0x3FFF, packed >> 28 & 1))


def read_mat(path: Path) -> Recording:
    """Arrays in a file of MATLAB up to version 7.

    Raises:
        DataError: see ``read_recording``; also if it is of version 7.3, or scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"'{path}' is a file of MATLAB, which needs scipy: pip install 'spikedistill[events]'."
        ) from error

    def load() -> Any:
        try:
            found = loadmat(path)
        except NotImplementedError as error:
            raise DataError(
                f"'{path}' is a file of MATLAB 7.3, which is HDF5 inside: save it in MATLAB with the option -v7."
            ) from error
        return {name: value for name, value in found.items() if not name.startswith("__")}  # MATLAB's own entries

    return _of_arrays(path, load)


def read_arrays(path: Path) -> Recording:
    """Arrays of numpy, in a ``.npz`` or as the fields of one array. Nothing in the file is unpickled.

    Raises:
        DataError: see ``read_recording``.
    """

    def load() -> Any:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return _fields(path, found) if isinstance(found, np.ndarray) else dict(found)

    return _of_arrays(path, load)


def read_hdf5(path: Path) -> Recording:
    """Arrays at the top of an HDF5 file or in its group ``events``, or the fields of its dataset ``events``.

    Raises:
        DataError: see ``read_recording``; also if h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"'{path}' is an HDF5 file, which needs h5py: pip install 'spikedistill[events]'.") from error

    def load() -> Any:
        with h5py.File(path, "r") as file:
            found = file.get("events", file)
            if isinstance(found, h5py.Dataset):
                return _fields(path, found[()])
            return {name: value[()] for name, value in found.items() if isinstance(value, h5py.Dataset)}

    return _of_arrays(path, load)


def _fields(path: Path, found: Any) -> dict[str, Any]:
    """The arrays of an array with named fields."""
    if found.dtype.names is None:
        raise DataError(
            f"'{path}' holds one array of {found.dtype} of shape {found.shape}: expected arrays of t, x, y and p, or an"
            " array with fields of these names."
        )
    return {name: found[name] for name in found.dtype.names}


def _of_arrays(path: Path, load: Callable[[], Mapping[str, Any]]) -> Recording:
    """A recording of arrays with known names."""
    try:
        found = {name.lower(): value for name, value in load().items()}
    except DataError:
        raise
    except Exception as error:  # readers raise what they like on damaged files
        raise DataError(f"'{path}' cannot be read ({error}): it is missing, cut or damaged.") from error
    arrays = []
    for name, known in NAMES.items():
        values = next((found[one] for one in known if one in found), None)
        if values is None:
            there = ", ".join(found) or "none"
            raise DataError(f"'{path}' has no array of {name}: it holds {there}, expected {' or '.join(known)}.")
        arrays.append(np.asarray(values).reshape(-1))
    made = Recording(*arrays)
    return _in_order(made.checked(f"'{path}'")) if any(map(len, arrays)) else made


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error}.") from error


def _header(content: bytes, mark: bytes) -> tuple[bytes, bytes]:
    """The lines at the beginning that start with a mark, and what follows them."""
    end = 0
    while content[end : end + 1] == mark:
        end = content.find(b"\n", end) + 1 or len(content)
    return content[:end], content[end:]


def _cut(path: Path, have: int, expected: str) -> DataError:
    return DataError(f"'{path}' is cut or damaged: {have} bytes are left, expected {expected}.")


def _unwrapped(t: np.ndarray) -> np.ndarray:
    """Times of 32 bits, which begin again at 0 after 71 minutes."""
    return t + (np.cumsum(np.diff(t, prepend=t[:1]) < -(2**31)) << 32)


def _in_order(found: Recording) -> Recording:
    """The recording in order of time: sensors send some events a little late."""
    late = (found.t[1:] < found.t[:-1]).any()
    return found.of(np.argsort(found.t, kind="stable")) if late else found


READERS: dict[str, Callable[[Path], Recording]] = {
    ".bin": read_nmnist,
    ".aedat": read_aedat,
    ".dat": read_dat,
    ".mat": read_mat,
    ".npy": read_arrays,
    ".npz": read_arrays,
    ".h5": read_hdf5,
    ".hdf5": read_hdf5,
}
"""Ending -> reader."""


@dataclass(frozen=True)
class Recordings:
    """How the recordings of a folder become frames.

    Args:
        timesteps: T, the number of frames.
        binning: which events a frame holds; see ``to_frames``.
        sensor: rows and columns; without it, those of the smallest known sensor that holds all events.
        size: side in pixels that frames are reduced to. Each pixel then counts the events of several.
    """

    timesteps: int
    binning: Binning = field(default_factory=Binning)
    sensor: tuple[int, int] | None = None
    size: int | None = None

    def kind(self) -> SampleKind:
        """Folders of recordings, for ``read_folder``."""
        return SampleKind("recordings", tuple(READERS), "recording.bin", self._read)

    def begun(self, path: Path, count: int, sensor: tuple[int, int]) -> Binned:
        """Frames of so many recordings below a folder, to be filled.

        Raises:
            DataError: if they need too much memory.
        """
        return Binned(path, count, self.timesteps, sensor, self.size, self.binning)

    def _read(self, path: Path, files: Sequence[Path], tally: Counter[str], extent: tuple[int, int] = (0, 0)) -> Tensor:
        for first in range(0, len(files), AT_ONCE):
            some = files[first : first + AT_ONCE]
            recordings = [read_recording(file) for file in some]
            extent = _extent(recordings, extent)
            sensor = self.sensor or _sensor_of(path, extent)
            if not first:
                frames = self.begun(path, len(files), sensor)
            elif sensor != frames.sensor:  # those read so far are too small
                return self._read(path, files, tally, extent)
            for file, one in zip(some, recordings):
                frames.add(file, one)
        return frames.checked(tally)


def _extent(recordings: Sequence[Recording], seen: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that events need, those seen before included."""
    rows, columns = (1 + max(int(getattr(one, axis).max()) for one in recordings) for axis in "yx")
    return max(rows, seen[0]), max(columns, seen[1])


def _sensor_of(path: Path, extent: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the smallest known sensor that holds all events."""
    rows, columns = extent
    known = [sensor for sensor in SENSORS if sensor[0] >= rows and sensor[1] >= columns]
    if not known:
        raise DataError(
            f"The recordings in '{path}' have {rows} rows and {columns} columns, more than any known sensor: give"
            " --sensor ROWS COLUMNS."
        )
    return known[0]


def holds_recordings(path: Path) -> bool:
    """Whether there are recordings of events below a folder, and no image among the first ``LOOKED_AT`` files."""
    endings = [file.suffix.lower() for file in itertools.islice(files_below(path), LOOKED_AT)]
    return not any(ending in SUFFIXES for ending in endings) and any(ending in READERS for ending in endings)
