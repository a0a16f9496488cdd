"""Batched, seeded augmentation: stored bytes in, images between 0 and 1 out."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedistill.errors import ConfigError, one_of
from spikedistill.shapes import Image, Pixels

POLICIES = ("none", "trivial", "autoaugment")
GROUPS = 8
"""A policy draws one operation for each of so many random groups of a batch (torchvision's draw one a call)."""


@dataclass(frozen=True)
class Augment:
    """Random changes to a training batch; all off by default.

    Args:
        crop: pixels of padding from which a window of the original size is cut (0: none).
        border: what the padding is, zeros or the image mirrored about its outermost pixels.
        flip: mirror half of the images left to right; where told whose turn it is, each every other time.
        cutout: side in pixels of a square set to zero (0: none; DeVries and Taylor, arXiv 1708.04552).
        policy: ``none``, ``trivial`` (TrivialAugment, arXiv 2103.10158) or ``autoaugment`` (arXiv 1805.09501).
        noise: largest standard deviation of Gaussian noise in units of the whole range, 0 to 1 (0: none).

    Raises:
        ConfigError: if a size is negative, the noise outside 0 to 1 or the policy unknown.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    policy: str = "none"
    border: Literal["zeros", "mirror"] = "zeros"
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 0 or self.cutout < 0:
            raise ConfigError(f"crop (={self.crop}) and cutout (={self.cutout}) are sizes in pixels: give 0 or more.")
        if not 0 <= self.noise <= 1:
            raise ConfigError(f"noise (={self.noise}) is a deviation of pixels in 0..1: give 0 to 1.")
        one_of("augmentation policy", self.policy, POLICIES)

    def __call__(self, pixels: Pixels, seed: int, turned: Tensor | None = None) -> Image:
        """Change a batch; the same pixels and seed give the same bits.

        Args:
            pixels: ``[B, C, H, W]``.
            seed: of all that is drawn.
            turned: ``[B]`` booleans, which images ``flip`` mirrors (see ``alternate``); drawn where None.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.policy != "none":
            pixels = apply_policy(pixels, self.policy, generator)
        if self.crop:
            pixels = random_crop(pixels, self.crop, generator, self.border == "mirror")
        images = to_unit(pixels)
        if self.flip:
            turned = torch.rand(len(images), generator=generator) < 0.5 if turned is None else turned
            images = torch.where(turned[:, None, None, None], images.flip(-1), images)
        if self.cutout:
            images = random_cutout(images, self.cutout, generator)
        if self.noise:
            images = random_noise(images, self.noise, generator)
        return images


def alternate(count: int, samples: Tensor, epoch: int) -> Tensor:
    """Which of some samples out of ``count`` are mirrored in an epoch: half of them in the first, and so in turn.

    In two epochs a network then sees every image both ways, not half of them twice the same (Jordan, arXiv 2404.00498).
    """
    return _turned_first(count)[samples] ^ bool(epoch % 2)


@functools.cache
def _turned_first(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5


def to_unit(pixels: Pixels) -> Image:
    """Bytes 0..255 to floats 0..1."""
    return pixels.float().div_(255.0)


def to_inputs(stored: Tensor) -> Tensor:
    """Samples as stored to what a network sees: the one place where time comes to the front.

    Args:
        stored: images, bytes ``[B, C, H, W]``; or event frames, counts ``[B, T, 2, H, W]``.

    Returns:
        Images ``[B, C, H, W]`` in 0..1; or frames ``[T, B, 2, H, W]``, the counts as floats.
    """
    return stored.transpose(0, 1).float() if stored.ndim == 5 else to_unit(stored)


def random_crop(pixels: Pixels, pad: int, generator: torch.Generator, mirror: bool = False) -> Pixels:
    """A window of the original size at a random place of each image, padded by zeros or by its mirror image."""
    count, _, height, width = pixels.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    if mirror:
        rows = _mirrored(top + torch.arange(height) - pad, height)
        columns = _mirrored(left + torch.arange(width) - pad, width)
    else:
        pixels = F.pad(pixels, (pad, pad, pad, pad))
        rows, columns = top + torch.arange(height), left + torch.arange(width)
    samples = torch.arange(count)[:, None, None, None]
    channels = torch.arange(pixels.shape[1])[None, :, None, None]
    return pixels[samples, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _mirrored(positions: Tensor, size: int) -> Tensor:
    """Positions outside 0..size-1 mirrored about the first and the last."""
    period = max(1, 2 * (size - 1))
    positions = positions % period
    return torch.minimum(positions, period - positions) if size > 1 else positions * 0


def random_cutout(images: Image, side: int, generator: torch.Generator) -> Image:
    """A square of zeros about a random pixel of each image, clipped at the border."""
    count, _, height, width = images.shape
    centre_row = torch.randint(0, height, (count, 1), generator=generator)
    centre_column = torch.randint(0, width, (count, 1), generator=generator)
    rows = _near(torch.arange(height), centre_row, side)
    columns = _near(torch.arange(width), centre_column, side)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def random_noise(images: Image, largest: float, generator: torch.Generator) -> Image:
    """Gaussian noise, of each image its own deviation drawn evenly from 0 to the largest, clipped to 0..1."""
    deviations = largest * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + deviations * torch.randn(images.shape, generator=generator)).clamp_(0.0, 1.0)


def _near(positions: Tensor, centre: Tensor, side: int) -> Tensor:
    start = centre - side // 2
    return (positions >= start) & (positions < start + side)


def apply_policy(pixels: Pixels, policy: str, generator: torch.Generator) -> Pixels:
    """A library's augmentation policy, one draw for each random group of the batch.

    Raises:
        ConfigError: if the images are neither grey nor of three colours.
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
