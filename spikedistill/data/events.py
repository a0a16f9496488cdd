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
    """The events of one recording, each array ``[E]``: time (any unit), column, row, and polarity 0 or 1."""

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray


def read_nmnist(path: str | Path) -> Recording:
    """A recording in the format of N-MNIST and N-Caltech101 (Orchard et al. 2015): five bytes an event.

    These are x, y, and 24 bits, the first of which is the polarity and the others the time in microseconds.

    Raises:
        DataError: if the file is missing or is not whole events.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error}.") from error
    if not content or len(content) % 5:
        raise DataError(f"'{path}' has {len(content)} bytes: expected five for each event, one event at least.")
    x, y, high, middle, low = np.frombuffer(content, np.uint8).reshape(-1, 5).astype(np.int64).T
    return Recording((high & 127) << 16 | middle << 8 | low, x, y, high >> 7)


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
        DataError: if a recording is empty, its arrays differ in length, or an event lies outside of the sensor.
    """
    if min(timesteps, height, width) < 1:
        raise ConfigError(f"timesteps, height and width (={timesteps}, {height}, {width}) must be 1 or more.")
    frames = torch.zeros(len(recordings), timesteps, 2, height, width, dtype=torch.uint8)
    for number, recording in enumerate(recordings):
        t, x, y, p = (np.asarray(values, np.int64) for values in (recording.t, recording.x, recording.y, recording.p))
        if not len(t) or not len(t) == len(x) == len(y) == len(p):
            raise DataError(f"Recording {number} has {len(t)}, {len(x)}, {len(y)}, {len(p)} values of t, x, y and p.")
        if min(x.min(), y.min(), p.min()) < 0 or x.max() >= width or y.max() >= height or p.max() > 1:
            raise DataError(
                f"Recording {number} has events at x {x.min()}..{x.max()}, y {y.min()}..{y.max()} of polarity"
                f" {p.min()}..{p.max()}: expected x below {width}, y below {height}, polarity 0 or 1."
            )
        step = (t - t.min()) * timesteps // (t.max() - t.min() + 1)
        cells = np.ravel_multi_index((step, p, y, x), tuple(frames.shape[1:]))
        counts = np.bincount(cells, minlength=frames[number].numel()).clip(max=MOST)
        frames[number] = torch.from_numpy(counts.astype(np.uint8)).view(frames.shape[1:])
    return frames


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
