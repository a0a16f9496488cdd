"""Coding: what a student sees of an image at each of its T steps. Pixels are raw, between 0 and 1.

A pixel that is NaN or infinite is NaN at every step with every coding, so that the fault stays visible.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from spikedistill.errors import ShapeError


@runtime_checkable
class Coding(Protocol):
    """Turns an input into rows for the network, and says at how many steps each row is used."""

    def encode(self, images: Tensor, timesteps: int) -> tuple[Tensor, int]:
        """``[B, ...]`` rows used ``timesteps`` times, or ``[T*B, ...]`` rows used once."""
        ...

    def frame(self, images: Tensor, t: int, timesteps: int) -> Tensor:
        """What the network sees at step t (0 .. T-1) of a stream, ``[B, ...]``."""
        ...


@dataclass(frozen=True)
class DirectCoding:
    """The image itself at every step. The first layers run once; the first neurons turn their output into spikes."""

    def encode(self, images: Tensor, timesteps: int) -> tuple[Tensor, int]:
        """Images ``[B, ...]``, each used T times."""
        return images, timesteps

    def frame(self, images: Tensor, t: int, timesteps: int) -> Tensor:
        """The image."""
        return images


@dataclass(frozen=True)
class FrameCoding:
    """Input that has its own time axis, ``[T, B, ...]``, such as binned events."""

    def encode(self, images: Tensor, timesteps: int) -> tuple[Tensor, int]:
        """Frames ``[T, B, ...]`` to rows ``[T*B, ...]``.

        Raises:
            ShapeError: if the number of frames is not T.
        """
        if images.ndim < 3 or images.shape[0] != timesteps:
            raise ShapeError(
                f"Frames of shape {tuple(images.shape)} were given for timesteps={timesteps}: expected [T, B, ...]; bin"
                " the events into T frames, or call student.set_timesteps."
            )
        return images.flatten(0, 1), 1

    def frame(self, images: Tensor, t: int, timesteps: int) -> Tensor:
        """Frame t."""
        return images[t]


@dataclass(frozen=True)
class RateCoding:
    """Each pixel spikes at each step with a probability equal to its brightness (Bernoulli).

    Args:
        seed: makes the spikes of every call the same; without it torch's global generator draws them.
    """

    seed: int | None = None

    def encode(self, images: Tensor, timesteps: int) -> tuple[Tensor, int]:
        """Images ``[B, ...]`` to rows ``[T*B, ...]`` of zeros and ones."""
        return torch.cat([self.frame(images, t, timesteps) for t in range(timesteps)]), 1

    def frame(self, images: Tensor, t: int, timesteps: int) -> Tensor:
        """The spikes of step t."""
        generator = None if self.seed is None else torch.Generator(images.device).manual_seed(self.seed + t)
        probabilities = images.float().nan_to_num(0.0).clamp(0, 1)
        return torch.bernoulli(probabilities, generator=generator).to(images.dtype) + 0 * images


@dataclass(frozen=True)
class LatencyCoding:
    """Each pixel spikes once, brighter ones earlier: at step ``floor((1 - p) T)``. Black pixels never spike."""

    def encode(self, images: Tensor, timesteps: int) -> tuple[Tensor, int]:
        """Images ``[B, ...]`` to rows ``[T*B, ...]`` of zeros and ones."""
        return torch.cat([self.frame(images, t, timesteps) for t in range(timesteps)]), 1

    def frame(self, images: Tensor, t: int, timesteps: int) -> Tensor:
        """The spikes of step t."""
        when = ((1 - images.clamp(0, 1)) * timesteps).floor()
        return (when == t).to(images.dtype) + 0 * images


CODINGS: dict[str, type[DirectCoding] | type[RateCoding] | type[LatencyCoding] | type[FrameCoding]] = {
    "direct": DirectCoding,
    "frames": FrameCoding,
    "latency": LatencyCoding,
    "rate": RateCoding,
}
