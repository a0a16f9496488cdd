"""Event recordings: read, binned into frames, and disturbed as event cameras disturb them.

Frames hold counts, bytes ``[N, T, 2, H, W]``: how many events of a polarity (0: darker, 1: brighter) a pixel sent in a
time step. Counts keep all that the disturbances here need, so they act on frames as they would on the events.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from spikedistill.errors import ConfigError, DataError

MOST = 255
"""Events of one pixel, polarity and time step that a frame can hold; more are not counted."""


@dataclass(frozen=True, eq=False)
class Recording:
    """The events of one recording, each array ``[E]``, in any order: time (any unit), column, row, and polarity.

    Times may be fractions, for instance seconds. Columns and rows are whole numbers from 0. Polarities are 0 and 1, or
    booleans, or -1 and 1.
    """

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray


OVERFLOW = 240
"""The row of what is no event in files of N-MNIST's format but says that the sensor's clock has gone round."""
ROUND = 2**13
"""Microseconds that are then added to the times that follow, as the author's own readers do."""
TICK = 1e-6
"""Times that are fractions are taken as whole numbers of this where they are such, as seconds of event cameras are."""


def read_nmnist(path: str | Path) -> Recording:
    """A recording in the format of N-MNIST and N-Caltech101 (Orchard et al. 2015): five bytes an event.

    These are x, y, and 24 bits, the first of which is the polarity and the others the time in microseconds.

    Raises:
        DataError: if the file is missing, is not whole events, or its times fall.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error}.") from error
    if not content or len(content) % 5:
        raise DataError(f"'{path}' has {len(content)} bytes: expected five for each event, one event at least.")
    x, y, high, middle, low = np.frombuffer(content, np.uint8).reshape(-1, 5).astype(np.int64).T
    marks = y == OVERFLOW
    t = ((high & 127) << 16 | middle << 8 | low) + ROUND * np.cumsum(marks)
    t, x, y, p = (values[~marks] for values in (t, x, y, high >> 7))
    if not len(t) or (np.diff(t) < 0).any():
        fault = "its times fall" if len(t) else "it holds no event"
        raise DataError(
            f"'{path}' is no recording of five bytes an event ({fault}): it is broken, or of another format."
        )
    return Recording(t, x, y, p)


def to_frames(recordings: Sequence[Recording], timesteps: int, height: int, width: int) -> Tensor:
    """Recordings as frames: the span of each, from its first event to its last, in T parts of equal length.

    Args:
        recordings: at least one event each.
        timesteps: T, 1 or more.
        height: of the sensor, in pixels.
        width: of the sensor, in pixels.

    Returns:
        Bytes ``[N, T, 2, H, W]``, at most 255 a count. A student made with ``coding=Frames()`` takes them as
        ``to_inputs(frames)``; ``immunity`` and ``predict`` take them as they are.

    Raises:
        ConfigError: if a size is below 1.
        DataError: if a recording is empty, its arrays differ in length or hold anything but numbers, coordinates or
            polarities are fractions, an event lies outside of the sensor, or whole times are fewer than the
            frames.
    """
    if min(timesteps, height, width) < 1:
        raise ConfigError(f"timesteps, height and width (={timesteps}, {height}, {width}) must be 1 or more.")
    frames = torch.zeros(len(recordings), timesteps, 2, height, width, dtype=torch.uint8)
    for number, recording in enumerate(recordings):
        t, x, y, p = _events(recording, number)
        if min(x.min(), y.min(), p.min()) < 0 or x.max() >= width or y.max() >= height or p.max() > 1:
            raise DataError(
                f"Recording {number} has events at x {x.min()}..{x.max()}, y {y.min()}..{y.max()} of polarity"
                f" {p.min()}..{p.max()}: expected x below {width}, y below {height}, polarity 0 or 1."
            )
        if len(t) > 1 and _is_too_short(t, timesteps):
            raise DataError(
                f"The {len(t)} events of recording {number} have times from {t.min()} to {t.max()}, which cannot be"
                f" divided into {timesteps} frames: were seconds rounded to whole numbers? Give times as they were"
                " recorded."
            )
        cells = np.ravel_multi_index((_steps(t, timesteps), p, y, x), tuple(frames.shape[1:]))
        counts = np.bincount(cells, minlength=frames[number].numel()).clip(max=MOST)
        frames[number] = torch.from_numpy(counts.astype(np.uint8)).view(frames.shape[1:])
    return frames


def _is_too_short(t: np.ndarray, timesteps: int) -> bool:
    """Whether there is but one time for several frames; or fewer whole ones than frames, for many events."""
    span = t.max() - t.min()
    return bool(timesteps > 1 and (span == 0 or (t.dtype.kind == "i" and len(t) > timesteps > span + 1)))


def _events(recording: Recording, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times, whole or not; columns, rows and polarities as whole numbers, -1 and 1 as 0 and 1."""
    t, x, y, p = (np.asarray(values) for values in (recording.t, recording.x, recording.y, recording.p))
    lengths = ", ".join(str(len(values) if values.ndim == 1 else values.shape) for values in (t, x, y, p))
    if any(values.ndim != 1 or not len(values) or len(values) != len(t) for values in (t, x, y, p)):
        raise DataError(f"Recording {number} has {lengths} values of t, x, y and p: give one of each for every event.")
    t = _numbers(t, number, "t")
    x, y, p = (_whole(_numbers(values, number, name), number, name) for name, values in zip("xyp", (x, y, p)))
    if p.min() == -1 and (np.abs(p) == 1).all():
        p = (p + 1) // 2
    return t, x, y, p


def _numbers(values: np.ndarray, number: int, name: str) -> np.ndarray:
    """Values as int64 where all are whole, else as float64.

    Raises:
        DataError: if they are no numbers, not finite, or beyond 64 bits.
    """
    if values.dtype.kind not in ("biuf" if name == "p" else "iuf"):
        raise DataError(f"{name} of recording {number} is of the kind {values.dtype}: give numbers.")
    if not np.isfinite(values).all():
        raise DataError(f"{name} of recording {number} holds NaN or infinity: leave these events away.")
    if values.max() >= 2**62 or values.min() <= -(2**62):
        raise DataError(f"{name} of recording {number} goes up to {values.max()}: give numbers below 2**62.")
    whole = values.dtype.kind != "f" or (values == np.floor(values)).all()
    return values.astype(np.int64 if whole else np.float64)


def _whole(values: np.ndarray, number: int, name: str) -> np.ndarray:
    if values.dtype.kind == "f":
        some = ", ".join(f"{value:g}" for value in values[values != np.floor(values)][:3])
        meant = "0 and 1" if name == "p" else "pixels, for instance by np.floor, and drop events that leave the sensor"
        raise DataError(f"{name} of recording {number} holds fractions ({some}): round to {meant}.")
    return values


def _steps(t: np.ndarray, timesteps: int) -> np.ndarray:
    """The frame of each event, 0 to T-1.

    Whole times are ticks: the last frame ends one tick after the last event. Seconds so give the frames that their
    microseconds give. Finer fractions have no tick, and the last event belongs to the last frame.
    """
    ticks = np.round((t - t.min()) / TICK) if t.dtype.kind == "f" else t - t.min()
    exact = t.dtype.kind == "i" or (np.abs((t - t.min()) / TICK - ticks) < 0.05).all()
    if exact and ticks.max() < 2**62 // timesteps:
        return ticks.astype(np.int64) * timesteps // (int(ticks.max()) + 1)
    since = (t - t.min()).astype(np.float64)
    return np.minimum(since / since.max() * timesteps, timesteps - 1).astype(np.int64)


def background_activity(frames: Tensor, rate: float, generator: Generator) -> Tensor:
    """Events without a cause: on average ``rate`` more a pixel, polarity and time step (Poisson)."""
    return frames + torch.poisson(torch.full_like(frames, rate), generator=generator)


def dropped_events(frames: Tensor, share: float, generator: Generator) -> Tensor:
    """Each event lost with that probability."""
    return torch.binomial(frames, torch.full_like(frames, 1 - share), generator=generator)


def hot_pixels(frames: Tensor, share: float, generator: Generator) -> Tensor:
    """That share of the pixels, one at least, the same in all recordings, send on-events as fast as the busiest."""
    pixels = frames.shape[-2] * frames.shape[-1]
    hot = torch.randperm(pixels, generator=generator)[: max(1, round(share * pixels))]
    result = frames.clone()
    result[:, :, 1].flatten(2)[:, :, hot] = frames.amax((1, 2, 3, 4)).view(-1, 1, 1)
    return result


def space_jitter(frames: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Each event moved by a normal number of pixels along both axes, rounded; lost where it leaves the sensor."""
    return _moved(frames, (3, 4), deviation, generator)


def time_jitter(frames: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Each event moved by a normal number of time steps, rounded; lost where it leaves the recording."""
    return _moved(frames, (1,), deviation, generator)


def _moved(frames: Tensor, axes: Sequence[int], deviation: float, generator: Generator) -> Tensor:
    """Every event moved along these axes."""
    filled = frames.nonzero()
    events = filled.repeat_interleave(frames[tuple(filled.T)].long(), 0)
    for axis in axes:
        events[:, axis] += (deviation * torch.randn(len(events), generator=generator)).round().long()
    sizes = torch.tensor(frames.shape)
    inside = events[((events >= 0) & (events < sizes)).all(1)]
    return torch.zeros_like(frames).index_put_(tuple(inside.T), torch.ones(()), accumulate=True)
