"""Event recordings: read, binned into frames, and corrupted as by faults of event cameras.

Frames hold counts as bytes, ``[N, T, 2, H, W]``: how many events of a polarity (0: darker, 1: brighter) a pixel sent in
a time step. The corruptions here need no more than these counts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from spikedistill.errors import ConfigError, DataError, one_of

LEAST = 1e-3
"""Part of a typical recording that frames of a given duration cover at least."""
MOST = 255
"""Largest count per pixel, polarity and time step. Further events are not counted."""


@dataclass(frozen=True, eq=False)
class Recording:
    """The events of one recording, in any order. Each array is ``[E]``.

    Args:
        t: times, in any unit; they may be fractions, for instance seconds.
        x: columns, whole numbers from 0.
        y: rows, whole numbers from 0.
        p: polarities, 0 and 1, or booleans, or -1 and 1.
    """

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray

    def of(self, events: np.ndarray) -> "Recording":
        """The same with these events only, in this order: their numbers, or a truth value for each event."""
        return Recording(self.t[events], self.x[events], self.y[events], self.p[events])

    def checked(self, where: str) -> "Recording":
        """The same with times as int64 or float64, and columns, rows and polarities (0 and 1) as int64.

        Args:
            where: what it is, for messages.

        Raises:
            DataError: if it is empty, arrays differ in length or hold anything but finite numbers, coordinates or
                polarities are fractions, a coordinate is negative, or a polarity is none of those above.
        """
        t, x, y, p = (np.asarray(values) for values in (self.t, self.x, self.y, self.p))
        lengths = ", ".join(str(len(values) if values.ndim == 1 else values.shape) for values in (t, x, y, p))
        if any(values.ndim != 1 or not len(values) or len(values) != len(t) for values in (t, x, y, p)):
            raise DataError(f"{lengths} values of t, x, y and p are in {where}: give one of each per event.")
        t = _numbers(t, where, "t")
        x, y, p = (_whole(_numbers(values, where, name), where, name) for name, values in zip("xyp", (x, y, p)))
        if p.min() == -1 and (np.abs(p) == 1).all():
            p = (p + 1) // 2
        if min(x.min(), y.min(), p.min()) < 0 or p.max() > 1:
            raise DataError(
                f"The events of {where} lie at x {x.min()}..{x.max()}, y {y.min()}..{y.max()} and have the polarities"
                f" {p.min()}..{p.max()}: expected x and y of 0 or more, and polarity 0 or 1, or -1 and 1. It is"
                " damaged, or in another format."
            )
        return Recording(t, x, y, p)

    def reduced(self, rows: int, columns: int, side: int) -> "Recording":
        """The same on a sensor of ``side`` rows and columns, in place of one of ``rows`` and ``columns``."""
        x, y = (np.asarray(values).astype(np.int64) for values in (self.x, self.y))  # small formats would overflow
        return Recording(self.t, x * side // columns, y * side // rows, self.p)


LARGEST = 16 * 2**30
"""Bytes of frames at most."""
OVERFLOW = 240
"""In files of N-MNIST's format, an entry with this row is not an event. It marks an overflow of the sensor's clock."""
ROUND = 2**13
"""Microseconds that an overflow adds to all later times, as in the data set's own readers."""
TICK = 1e-6
"""Fractional times that are multiples of this are treated as whole ticks: seconds with a resolution of 1 us."""


def read_nmnist(path: str | Path) -> Recording:
    """A recording in the format of N-MNIST and N-Caltech101 (Orchard et al. 2015): five bytes per event.

    The bytes are x, y, and 24 bits: first the polarity, then 23 bits of time in microseconds.

    Raises:
        DataError: if the file is missing, is not a whole number of events, or its times decrease.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error}.") from error
    if not content or len(content) % 5:
        raise DataError(f"'{path}' has {len(content)} bytes: expected five per event, and at least one event.")
    x, y, high, middle, low = np.frombuffer(content, np.uint8).reshape(-1, 5).astype(np.int64).T
    marks = y == OVERFLOW
    t = ((high & 127) << 16 | middle << 8 | low) + ROUND * np.cumsum(marks)
    t, x, y, p = (values[~marks] for values in (t, x, y, high >> 7))
    if not len(t) or (np.diff(t) < 0).any():
        fault = "its times decrease" if len(t) else "it holds no event"
        raise DataError(
            f"'{path}' is not a recording with five bytes per event ({fault}): it is broken, or in another format."
        )
    return Recording(t, x, y, p)


@dataclass(frozen=True)
class Binning:
    """Which events a frame holds.

    Args:
        by: ``time``: frames last equally long. ``number``: they hold equally many events, one more or less.
        duration: by time, how long a frame lasts, in the unit of the times. T frames from the first event on; later
            events are left out, and frames after the last event are empty. None: a T-th of the recording.

    Raises:
        ConfigError: if the duration is not above 0, or given for frames by number.
    """

    by: Literal["time", "number"] = "time"
    duration: float | None = None

    def __post_init__(self) -> None:
        one_of("binning", self.by, ("time", "number"))
        if self.duration is not None and (not self.duration > 0 or self.by == "number"):
            raise ConfigError(
                f"duration (={self.duration}) of a frame must be above 0, and is for frames by time (by={self.by})."
            )


def check_size(count: int, timesteps: int, height: int, width: int) -> None:
    """Refuse frames of no size, and of so many recordings that no memory holds them.

    Raises:
        ConfigError: if a size is below 1.
        DataError: if they need more than ``LARGEST`` bytes.
    """
    if min(timesteps, height, width) < 1:
        raise ConfigError(f"timesteps, height and width (={timesteps}, {height}, {width}) must be 1 or more.")
    if (needed := count * timesteps * 2 * height * width) > LARGEST:
        raise DataError(
            f"{timesteps} frames of {height} x {width} pixels of {count} recordings need {needed / 2**30:.0f} GiB, more"
            f" than {LARGEST / 2**30:.0f}: give fewer --event-frames, or --image-size."
        )


def to_frames(
    recordings: Sequence[Recording],
    timesteps: int,
    height: int,
    width: int,
    binning: Binning | None = None,
    names: Sequence[str] = (),
) -> Tensor:
    """Bin recordings into frames: by default T bins of equal duration from the first event to the last.

    Args:
        recordings: N recordings with at least one event each.
        timesteps: T, 1 or more.
        height: height of the sensor in pixels.
        width: width of the sensor in pixels.
        binning: which events a frame holds.
        names: how messages call each recording (default: recording 0, recording 1, ...).

    Returns:
        Counts as bytes ``[N, T, 2, H, W]``, at most 255 each. A student made with ``coding=FrameCoding()`` takes
        ``to_inputs(frames)``. ``immunity`` and ``predict`` take the frames themselves.

    Raises:
        ConfigError: if a size is below 1.
        DataError: if a recording is empty, its arrays differ in length or hold anything but finite numbers,
            coordinates or polarities are fractions or out of range, an event lies outside the sensor, times are too
            coarse for T frames, or the frames need more than ``LARGEST`` bytes.
    """
    check_size(len(recordings), timesteps, height, width)
    binning = binning or Binning()
    frames = torch.zeros(len(recordings), timesteps, 2, height, width, dtype=torch.uint8)
    for number, recording in enumerate(recordings):
        where = names[number] if names else f"recording {number}"
        checked = recording.checked(where)
        t, x, y, p = checked.t, checked.x, checked.y, checked.p
        if x.max() >= width or y.max() >= height:
            raise DataError(
                f"The events of {where} lie at x {x.min()}..{x.max()} and y {y.min()}..{y.max()}: expected x below"
                f" {width} and y below {height}."
            )
        if binning.by == "number":
            steps = _by_number(t, timesteps)
        elif binning.duration is not None:
            steps = _by_duration(t, binning.duration)
            t, x, y, p, steps = (values[steps < timesteps] for values in (t, x, y, p, steps))
        elif len(t) > 1 and _is_too_short(t, timesteps):
            raise DataError(
                f"The {len(t)} events of {where} have times from {t.min()} to {t.max()}, which cannot be"
                f" divided into {timesteps} frames: were seconds rounded to whole numbers? Give the times as they were"
                " recorded."
            )
        else:
            steps = _steps(t, timesteps)
        cells = np.ravel_multi_index((steps, p, y, x), tuple(frames.shape[1:]))
        counts = np.bincount(cells, minlength=frames[number].numel()).clip(max=MOST)
        frames[number] = torch.from_numpy(counts.astype(np.uint8)).view(frames.shape[1:])
    return frames


def _by_number(t: np.ndarray, timesteps: int) -> np.ndarray:
    """The frame of each event if all hold equally many, in order of time."""
    steps = np.empty(len(t), np.int64)
    steps[np.argsort(t, kind="stable")] = np.arange(len(t)) * timesteps // len(t)
    return steps


def _by_duration(t: np.ndarray, duration: float) -> np.ndarray:
    """The frame of each event if each lasts so long; it may be T or later."""
    since = (t - t.min()) / duration
    near = since.round()
    exact = np.abs(since - near) < 1e-9 * np.maximum(1.0, near)  # a border in seconds is rarely a float
    return np.where(exact, near, np.floor(since)).clip(max=2**31).astype(np.int64)


def _is_too_short(t: np.ndarray, timesteps: int) -> bool:
    """Whether several frames have one time only; or many events span fewer whole times than there are frames."""
    span = t.max() - t.min()
    return bool(timesteps > 1 and (span == 0 or (t.dtype.kind == "i" and len(t) > timesteps > span + 1)))


def _numbers(values: np.ndarray, where: str, name: str) -> np.ndarray:
    """Values as int64 if all are whole, else as float64.

    Raises:
        DataError: if they are not numbers, not finite, or not below 2**62.
    """
    if values.dtype.kind not in ("biuf" if name == "p" else "iuf"):
        raise DataError(f"{name} of {where} has the dtype {values.dtype}: give numbers.")
    if not np.isfinite(values).all():
        raise DataError(f"{name} of {where} holds NaN or infinity: remove these events.")
    if values.max() >= 2**62 or values.min() <= -(2**62):
        raise DataError(f"{name} of {where} goes up to {values.max()}: give numbers below 2**62.")
    whole = values.dtype.kind != "f" or (values == np.floor(values)).all()
    return values.astype(np.int64 if whole else np.float64)


def _whole(values: np.ndarray, where: str, name: str) -> np.ndarray:
    if values.dtype.kind == "f":
        some = ", ".join(f"{value:g}" for value in values[values != np.floor(values)][:3])
        meant = "0 and 1" if name == "p" else "pixels, for instance by np.floor, and remove events outside the sensor"
        raise DataError(f"{name} of {where} holds fractions ({some}): round to {meant}.")
    return values


def _steps(t: np.ndarray, timesteps: int) -> np.ndarray:
    """The frame of each event, 0 to T-1.

    Whole times are ticks, and the last frame ends one tick after the last event. Seconds in whole microseconds give the
    same frames as the microseconds. With finer fractions there is no tick: the last frame ends at the last event and
    includes it.
    """
    ticks = np.round((t - t.min()) / TICK) if t.dtype.kind == "f" else t - t.min()
    exact = t.dtype.kind == "i" or (np.abs((t - t.min()) / TICK - ticks) < 0.05).all()
    if exact and ticks.max() < 2**62 // timesteps:
        return ticks.astype(np.int64) * timesteps // (int(ticks.max()) + 1)
    since = (t - t.min()).astype(np.float64)
    return np.minimum(since / since.max() * timesteps, timesteps - 1).astype(np.int64)


class Binned:
    """The frames of some recordings, filled with one after the other.

    Args:
        path: where the recordings lie, for messages.
        count: their number.
        timesteps: T, the number of frames.
        sensor: rows and columns.
        size: side in pixels that frames are reduced to.
        binning: which events a frame holds.

    Raises:
        ConfigError: if a size is below 1.
        DataError: if the frames need more than ``LARGEST`` bytes.
    """

    def __init__(
        self, path: Path, count: int, timesteps: int, sensor: tuple[int, int], size: int | None, binning: Binning
    ) -> None:
        self.path, self.timesteps, self.sensor, self.size, self.binning = path, timesteps, sensor, size, binning
        self.side = sensor if size is None else (size, size)
        check_size(count, timesteps, *self.side)
        self.counts = torch.empty(count, timesteps, 2, *self.side, dtype=torch.uint8)
        self.done = 0
        self.lengths: list[float] = []
        self.counted: list[tuple[int, int, int]] = []

    def add(self, file: Path, recording: Recording) -> None:
        """Bin the next recording.

        Raises:
            DataError: if it has events outside the sensor, or ``to_frames`` refuses it.
        """
        (rows, columns), low, right = self.sensor, recording.y.max(), recording.x.max()
        if right >= columns or low >= rows:
            raise DataError(
                f"'{file}' has events at x up to {right} and y up to {low}, outside of a sensor of {rows} rows and"
                f" {columns} columns: give --sensor ROWS COLUMNS."
            )
        if self.binning.duration is not None:
            steps = _by_duration(recording.t, self.binning.duration)
            self.lengths.append(float(recording.t.max() - recording.t.min()))
            self.counted.append((len(steps), int((steps == 0).sum()), int((steps >= self.timesteps).sum())))
        shown = recording if self.size is None else recording.reduced(rows, columns, self.size)
        self.counts[self.done] = to_frames([shown], self.timesteps, *self.side, self.binning, [f"'{file}'"])[0]
        self.done += 1

    def checked(self, tally: Counter[str]) -> Tensor:
        """All frames, ``[N, T, 2, H, W]``.

        Args:
            tally: counts the events, and those behind the last frame, if frames have a duration of their own.

        Raises:
            DataError: if the duration is far from those of the recordings, so that it has another unit.
        """
        if self.binning.duration is None:
            return self.counts
        typical, (every, first, late) = float(np.median(self.lengths)), np.array(self.counted).T
        covered = self.timesteps * self.binning.duration
        if (self.timesteps > 1 and (every == first).all()) or covered < LEAST * typical:
            found = "less than a thousandth of a recording is in them"
            found = found if covered < typical else "all events of each recording are in the first frame"
            raise DataError(
                f"{self.timesteps} frames that last {self.binning.duration:g} each do not suit '{self.path}', where a"
                f" recording typically lasts {typical:g}: {found}. Give --event-duration in the unit of the times."
            )
        tally.update(events=int(every.sum()), late=int(late.sum()))
        return self.counts


def background_activity(frames: Tensor, rate: float, generator: Generator) -> Tensor:
    """Add spurious events: on average ``rate`` per pixel, polarity and time step (Poisson)."""
    return frames + torch.poisson(torch.full_like(frames, rate), generator=generator)


def dropped_events(frames: Tensor, share: float, generator: Generator) -> Tensor:
    """Lose each event with probability ``share``."""
    return torch.binomial(frames, torch.full_like(frames, 1 - share), generator=generator)


def hot_pixels(frames: Tensor, share: float, generator: Generator) -> Tensor:
    """Let a share of the pixels send on-events at every step, as many as the recording's largest count.

    The hot pixels are the same in all recordings. There is at least one.
    """
    pixels = frames.shape[-2] * frames.shape[-1]
    hot = torch.randperm(pixels, generator=generator)[: max(1, round(share * pixels))]
    result = frames.clone()
    result[:, :, 1].flatten(2)[:, :, hot] = frames.amax((1, 2, 3, 4)).view(-1, 1, 1)
    return result


def space_jitter(frames: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Move each event along both image axes by rounded Gaussian noise in pixels. Events off the sensor are lost."""
    return _moved(frames, (3, 4), deviation, generator)


def time_jitter(frames: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Move each event by rounded Gaussian noise in time steps. Events outside the recording are lost."""
    return _moved(frames, (1,), deviation, generator)


def _moved(frames: Tensor, axes: Sequence[int], deviation: float, generator: Generator) -> Tensor:
    """Move every event along each of these axes by rounded Gaussian noise; drop what leaves the frames."""
    filled = frames.nonzero()
    events = filled.repeat_interleave(frames[tuple(filled.T)].long(), 0)
    for axis in axes:
        events[:, axis] += (deviation * torch.randn(len(events), generator=generator)).round().long()
    sizes = torch.tensor(frames.shape)
    inside = events[((events >= 0) & (events < sizes)).all(1)]
    return torch.zeros_like(frames).index_put_(tuple(inside.T), torch.ones(()), accumulate=True)
