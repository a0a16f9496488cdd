"""Batched, seeded augmentation: stored bytes in, images in 0..1 out.

Random numbers are drawn for the whole batch. Of several processes, each changes its own rows only. So the result does
not depend on the number of processes, bit for bit. Policies are the exception: every process applies them to the whole
batch (see ``apply_policy``).

Batches may lie on any device. Random numbers are drawn on the CPU, so all devices get the same ones.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedistill.errors import ConfigError, one_of
from spikedistill.shapes import Image, Pixels

POLICIES = ("none", "trivial", "autoaugment")
GROUPS = 8
"""A policy draws one operation per random group of a batch, and a batch has this many groups (torchvision: one)."""
WHOLE = slice(None)
"""All rows of a batch."""


@dataclass(frozen=True)
class BatchShard:
    """Some rows of a batch.

    Args:
        count: rows of the whole batch. Random numbers are drawn for all of them.
        rows: the rows that are present.
    """

    count: int
    rows: slice = field(default_factory=lambda: WHOLE)


@dataclass(frozen=True)
class Augment:
    """Random changes to a training batch, all off by default.

    Args:
        crop: pixels of padding from which a window of the original size is cut (0: none).
        border: padding by zeros, or by the image mirrored about its outermost pixels.
        flip: mirror half of the images left to right; in training each image every other epoch (``alternate``).
        cutout: side in pixels of a square set to zero (0: none; DeVries and Taylor, arXiv 1708.04552).
        policy: ``none``, ``trivial`` (TrivialAugment, arXiv 2103.10158) or ``autoaugment`` (arXiv 1805.09501).
        noise: largest standard deviation of Gaussian noise in units of the whole range, 0 to 1 (0: none).
        zoom: smallest share of the area that a random resized crop keeps, above 0 to 1 (0: none; Szegedy et al., arXiv
            1409.4842).

    Raises:
        ConfigError: if a size is negative, noise or zoom outside 0 to 1 or the policy unknown.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    policy: str = "none"
    border: Literal["zeros", "mirror"] = "zeros"
    noise: float = 0.0
    zoom: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 0 or self.cutout < 0:
            raise ConfigError(f"crop (={self.crop}) and cutout (={self.cutout}) are sizes in pixels: give 0 or more.")
        if not 0 <= self.noise <= 1:
            raise ConfigError(f"noise (={self.noise}) is a deviation of pixels in 0..1: give 0 to 1.")
        if not 0 <= self.zoom <= 1:
            raise ConfigError(f"zoom (={self.zoom}) is a share of the area: give more than 0 to 1, or 0 for none.")
        one_of("augmentation policy", self.policy, POLICIES)

    def __call__(self, pixels: Pixels, seed: int, turned: Tensor | None = None, rows: slice = WHOLE) -> Tensor:
        """Change a batch; the same pixels and seed give the same bits.

        Args:
            pixels: ``[B, C, H, W]``.
            seed: seed of all random numbers.
            turned: ``[B]`` booleans, which images ``flip`` mirrors (see ``alternate``); random if None.
            rows: the rows to change and return. They have the same bits as when the whole batch is changed.

        Returns:
            Images ``[rows, C, H, W]`` in 0..1.
        """
        generator, share = torch.Generator().manual_seed(seed), BatchShard(len(pixels), rows)
        if self.policy != "none":
            pixels = apply_policy(pixels, self.policy, generator)
        pixels = pixels[rows]
        if self.crop:
            pixels = random_crop(pixels, self.crop, generator, self.border == "mirror", share)
        images = to_unit(pixels)
        if self.zoom:
            images = random_zoom(images, self.zoom, generator, share)
        if self.flip:
            turned = torch.rand(share.count, generator=generator) < 0.5 if turned is None else turned
            images = torch.where(_beside(images, turned[rows])[:, None, None, None], images.flip(-1), images)
        if self.cutout:
            images = random_cutout(images, self.cutout, generator, share)
        if self.noise:
            images = random_noise(images, self.noise, generator, share)
        return images

    @property
    def suits_events(self) -> bool:
        """Whether it moves and mirrors only, which event frames can do too."""
        return self == Augment(crop=self.crop, flip=self.flip, border=self.border)

    def frames(self, counts: Tensor, seed: int, turned: Tensor, rows: slice = WHOLE) -> Tensor:
        """Move and mirror event frames, all frames of a recording alike; the same counts and seed give the same bits.

        Args:
            counts: bytes ``[B, T, 2, H, W]``.
            seed: seed of all random numbers.
            turned: ``[B]`` booleans, which recordings ``flip`` mirrors.
            rows: the rows to change and return.

        Returns:
            Bytes ``[rows, T, 2, H, W]``.
        """
        changed = self.moved(counts[rows].flatten(1, 2), seed, turned[rows], BatchShard(len(counts), rows))
        return changed.view(-1, *counts.shape[1:])

    def moved(self, pixels: Pixels, seed: int, turned: Tensor, share: BatchShard) -> Pixels:
        """Move and mirror some rows of a batch. The same seed changes images and event frames alike.

        Args:
            pixels: the rows, bytes ``[rows, C, H, W]``.
            seed: seed of all random numbers.
            turned: ``[rows]`` booleans, which of them ``flip`` mirrors.
            share: the batch that they are rows of.
        """
        if self.crop:
            generator = torch.Generator().manual_seed(seed)
            pixels = random_crop(pixels, self.crop, generator, self.border == "mirror", share)
        if self.flip:
            pixels = torch.where(_beside(pixels, turned)[:, None, None, None], pixels.flip(-1), pixels)
        return pixels


def alternating_flip(count: int, samples: Tensor, epoch: int) -> Tensor:
    """Which samples are mirrored in an epoch: a fixed random half in one epoch, the other half in the next.

    So a network sees every image both ways within two epochs (Jordan, arXiv 2404.00498).

    Args:
        count: size of the training set.
        samples: numbers of the batch's samples ``[B]``, 0..count-1.
        epoch: 1, 2, ...

    Returns:
        Booleans ``[B]``.
    """
    return _turned_first(count)[samples] ^ bool(epoch % 2)


@functools.cache
def _turned_first(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5


def to_unit(pixels: Pixels) -> Image:
    """Bytes 0..255 to floats 0..1."""
    return pixels.float().div_(255.0)


def to_inputs(stored: Tensor) -> Tensor:
    """Stored samples as network inputs. Here, and nowhere else, time moves to the front.

    Args:
        stored: images, bytes ``[B, C, H, W]``; or event frames, counts ``[B, T, 2, H, W]``.

    Returns:
        Images ``[B, C, H, W]`` in 0..1; or frames ``[T, B, 2, H, W]``, the counts as floats.
    """
    return stored.transpose(0, 1).float() if stored.ndim == 5 else to_unit(stored)


def as_frames(images: Tensor, timesteps: int, height: int, width: int) -> Tensor:
    """Images ``[B, C, H, W]`` as frames ``[T, B, 2, h, w]``: grey, resized, equal in both polarities and all steps.

    He et al. (AAAI 2024, arXiv 2303.13077) repeat the brightness in this way. How to resize is this project's choice.
    """
    grey = F.interpolate(images.amax(1, keepdim=True), (height, width), mode="bilinear", antialias=True)
    return grey.clamp(0, 1).repeat(1, 2, 1, 1).expand(timesteps, -1, -1, -1, -1)


def random_crop(
    pixels: Pixels, pad: int, generator: torch.Generator, mirror: bool = False, share: BatchShard | None = None
) -> Pixels:
    """A window of the original size at a random place of each image, after padding by zeros or by mirroring."""
    count, _, height, width = pixels.shape
    share = share or BatchShard(count)
    top, left = torch.randint(0, 2 * pad + 1, (2, share.count, 1), generator=generator)[:, share.rows]
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if mirror:
        rows, columns = _mirrored(rows - pad, height), _mirrored(columns - pad, width)
    else:
        pixels = F.pad(pixels, (pad, pad, pad, pad))
    rows, columns = _beside(pixels, rows), _beside(pixels, columns)
    samples = torch.arange(count, device=pixels.device)[:, None, None, None]
    channels = torch.arange(pixels.shape[1], device=pixels.device)[None, :, None, None]
    return pixels[samples, channels, rows[:, None, :, None], columns[:, None, None, :]]


ASPECT = 4 / 3
"""The largest ratio of the sides of a random resized crop to those of the image, as in Szegedy et al."""


def random_zoom(images: Image, smallest: float, generator: torch.Generator, share: BatchShard | None = None) -> Image:
    """A random resized crop: a window of each image, enlarged to the size of the image by bilinear interpolation.

    Its share of the area is uniform from ``smallest`` to 1. The ratio of its sides, relative to the image's, is from
    3/4 to 4/3, uniform in the logarithm (Szegedy et al., arXiv 1409.4842). A side longer than the image's is cut to it;
    this is this project's choice.
    """
    share = share or BatchShard(len(images))
    area, ratio, down, right = torch.rand(4, share.count, generator=generator)[:, share.rows]
    area, ratio = smallest + (1 - smallest) * area, ASPECT ** (2 * ratio - 1)
    height, width = ((area * change).sqrt().clamp(max=1.0) for change in (1 / ratio, ratio))
    rows = _window(height, down, images.shape[-2])[:, :, None].expand(-1, -1, images.shape[-1])
    columns = _window(width, right, images.shape[-1])[:, None, :].expand(-1, images.shape[-2], -1)
    grid = _beside(images, torch.stack([columns, rows], -1))
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp_(0.0, 1.0)


def _window(size: Tensor, place: Tensor, pixels: int) -> Tensor:
    """The centres of pixels ``[B, pixels]`` of windows: sizes and places 0..1 ``[B]``; coordinates from -1 to 1."""
    centres = (2 * torch.arange(pixels) + 1) / pixels - 1
    return size[:, None] * centres + ((1 - size) * (2 * place - 1))[:, None]


def _mirrored(positions: Tensor, size: int) -> Tensor:
    """Positions on a line, mirrored about 0 and size-1 into 0..size-1."""
    period = max(1, 2 * (size - 1))
    positions = positions % period
    return torch.minimum(positions, period - positions) if size > 1 else positions * 0


def random_cutout(images: Image, side: int, generator: torch.Generator, share: BatchShard | None = None) -> Image:
    """Set a square around a random pixel of each image to zero, clipped at the border."""
    count, _, height, width = images.shape
    share = share or BatchShard(count)
    centre_row = torch.randint(0, height, (share.count, 1), generator=generator)[share.rows]
    centre_column = torch.randint(0, width, (share.count, 1), generator=generator)[share.rows]
    rows, columns = _near(torch.arange(height), centre_row, side), _near(torch.arange(width), centre_column, side)
    rows, columns = _beside(images, rows), _beside(images, columns)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def random_noise(images: Image, largest: float, generator: torch.Generator, share: BatchShard | None = None) -> Image:
    """Add Gaussian noise, clipped to 0..1. Each image has its own deviation, drawn uniformly from 0 to the largest."""
    share = share or BatchShard(len(images))
    deviations = largest * torch.rand(share.count, 1, 1, 1, generator=generator)[share.rows]
    noise = torch.randn((share.count, *images.shape[1:]), generator=generator)[share.rows]
    return (images + _beside(images, deviations * noise)).clamp_(0.0, 1.0)


def _beside(images: Tensor, drawn: Tensor) -> Tensor:
    """What was drawn on the CPU, on the device of the images. The host does not wait for a GPU."""
    return drawn.to(images.device, non_blocking=True)


def _near(positions: Tensor, centre: Tensor, side: int) -> Tensor:
    start = centre - side // 2
    return (positions >= start) & (positions < start + side)


def apply_policy(pixels: Pixels, policy: str, generator: torch.Generator) -> Pixels:
    """Apply torchvision's augmentation policy, with one draw per random group of the batch.

    Give the whole batch, even if some rows are used only: torchvision's mean of an image may round differently in a
    group of fewer images.

    Raises:
        ConfigError: if the images do not have 1 or 3 channels.
    """
    if pixels.shape[1] not in (1, 3):
        raise ConfigError(
            f"policy (={policy}) is for images of 1 or 3 channels, these have {pixels.shape[1]}: give none."
        )
    transform = _transform(policy)
    order = torch.randperm(len(pixels), generator=generator)
    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    changed = torch.empty_like(pixels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for group in order.chunk(GROUPS):
            changed[group] = transform(pixels[group])
    return changed


@functools.cache
def _transform(policy: str) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    return v2.TrivialAugmentWide() if policy == "trivial" else v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
