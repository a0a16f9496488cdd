"""Corrupted images and event frames, each with five severities: the inputs of the noise-immunity suite.

Natural corruptions and four of the noises follow CIFAR-10-C (Hendrycks and Dietterich, arXiv 1903.12261): they do what
its make_cifar_c.py does, with its levels, in our own code. ``benchmarks/corruptions.py`` shows them and compares their
distances from clean images with the source's. Three things differ:

- Frost draws random ice. The source cuts it from photographs.
- Glass blur exchanges pixels, as the source's code intends. Executed by NumPy that code copies pixels, which changes an
  image less.
- Values are rounded once, at the end. The source truncates them.

The levels are made for 32 x 32 pixels. Sizes in ``zoom-blur``, ``pixelate``, ``elastic``, ``fog`` and ``frost`` scale
with the image. The radii of blurs, streaks and flakes are in pixels: they are weaker on larger images and stronger on
smaller ones.

The other noises, the corruptions of events, and their levels are this project's choice.
"""

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Generator, Tensor

from spikedistill.data import events
from spikedistill.data.augment import to_unit
from spikedistill.data.filters import exchanged, filtered, moved, plasma, sampled, smoothed, zoomed
from spikedistill.errors import ConfigError, one_of
from spikedistill.shapes import Image

CHUNK = 1000
"""Number of images that share a seed. So a result does not depend on the batch size of evaluation."""
SEVERITIES = (1, 2, 3, 4, 5)

Change = Callable[[Tensor, Any, Generator], Tensor]


@dataclass(frozen=True)
class Corruption:
    """A change of pixels in 0..1, or of the counts of event frames, with its level at each of the five severities."""

    change: Change
    levels: tuple[Any, Any, Any, Any, Any]
    kind: Literal["noise", "natural", "event"]


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images or event frames. The same seed gives the same bits.

    Args:
        images: bytes ``[N, C, H, W]``; for a corruption of events ``[N, T, 2, H, W]`` (``data.events.to_frames``).
        name: one of ``CORRUPTIONS``.
        severity: 1..5.
        seed: seed of all random numbers.

    Returns:
        Bytes of the same shape.

    Raises:
        ConfigError: if there is no such corruption or severity, or it is not for this shape or number format.
    """
    one_of("corruption", name, CORRUPTIONS)
    check_severity(severity)
    corruption = CORRUPTIONS[name]
    counts = corruption.kind == "event"
    if images.ndim != (5 if counts else 4):
        expected = "event frames [N, T, 2, H, W]" if counts else "images [N, C, H, W]"
        raise ConfigError(f"The corruption '{name}' was given the shape {tuple(images.shape)}: expected {expected}.")
    if images.dtype != torch.uint8:
        raise ConfigError(
            f"The corruption '{name}' was given {images.dtype}: expected bytes 0..255 (torch.uint8); convert values in"
            " 0..1 by (255 * images).round().to(torch.uint8)."
        )
    if not images.numel():
        return images
    parts = []
    for number, part in enumerate(images.split(CHUNK)):
        generator = Generator().manual_seed(zlib.crc32(f"{seed} {name} {severity} {number}".encode()))
        given = part.float() if counts else to_unit(part)
        changed = corruption.change(given, corruption.levels[severity - 1], generator)
        pixels = changed.clamp(0, events.MOST) if counts else changed.clamp(0, 1) * 255
        parts.append(pixels.round().to(torch.uint8))
    return torch.cat(parts)


def check_severity(severity: int) -> None:
    """Refuse an unknown severity.

    Raises:
        ConfigError: if it is not 1..5.
    """
    if isinstance(severity, (bool, float)) or severity not in SEVERITIES:
        raise ConfigError(f"severity (={severity}) must be 1, 2, 3, 4 or 5.")


def _normal(x: Tensor, generator: Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator)


def _uniform(x: Tensor, generator: Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator)


def gaussian(x: Image, deviation: float, generator: Generator) -> Tensor:
    """Add Gaussian noise to every value."""
    return x + deviation * _normal(x, generator)


def uniform(x: Image, half: float, generator: Generator) -> Tensor:
    """Add uniform noise of -half..half to every value."""
    return x + half * (2 * _uniform(x, generator) - 1)


def salt_and_pepper(x: Image, share: float, generator: Generator) -> Tensor:
    """Make a share of the pixels black or white, all channels alike."""
    drawn = torch.rand(x[:, :1].shape, generator=generator)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, x))


def impulse(x: Image, share: float, generator: Generator) -> Tensor:
    """Set a share of the values to 0 or 1, each channel on its own."""
    drawn = _uniform(x, generator)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, x))


def shot(x: Image, photons: float, generator: Generator) -> Tensor:
    """Poisson noise of a sensor that counts ``photons`` at full brightness."""
    return torch.poisson(x * photons, generator=generator) / photons


def speckle(x: Image, deviation: float, generator: Generator) -> Tensor:
    """Gaussian noise in proportion to the value."""
    return x + x * deviation * _normal(x, generator)


def erasing(x: Image, share: float, generator: Generator) -> Tensor:
    """Cover a share of each image with one grey rectangle at a random place, with sides of 1:2 to 2:1."""
    batch, _, height, width = x.shape
    form = torch.exp((2 * torch.rand(batch, generator=generator) - 1) * math.log(2) / 2)
    tall = (height * math.sqrt(share) * form).round().clamp(1, height)
    wide = (width * math.sqrt(share) / form).round().clamp(1, width)
    top = (torch.rand(batch, generator=generator) * (height - tall + 1)).floor()
    left = (torch.rand(batch, generator=generator) * (width - wide + 1)).floor()
    row, column = torch.arange(height)[None, :, None], torch.arange(width)[None, None]
    top, left, tall, wide = (value[:, None, None] for value in (top, left, tall, wide))
    inside = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
    return torch.where(inside[:, None], 0.5, x)


def gaussian_blur(x: Image, deviation: float, generator: Generator) -> Tensor:
    """Convolution with a Gaussian, cut off at four deviations, borders repeated."""
    return smoothed(x, deviation, int(4 * deviation + 0.5), "nearest")


def glass_blur(x: Image, level: tuple[float, int, int], generator: Generator) -> Tensor:
    """Blur, then pixels exchanged with neighbours, then blur again: (deviation, reach, rounds)."""
    deviation, reach, rounds = level
    x = gaussian_blur(x, deviation, generator)
    for _ in range(rounds):
        x = exchanged(x, reach, generator)
    return gaussian_blur(x, deviation, generator)


def defocus_blur(x: Image, level: tuple[float, float], generator: Generator) -> Tensor:
    """Convolution with a softened disc, borders mirrored: (radius, softness)."""
    radius, softness = level
    reach = math.ceil(radius) + 1
    axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
    disc = ((axis[:, None] ** 2 + axis**2) <= radius**2).float()[None, None]
    soft = smoothed(disc, softness, 1, "mirror")[0, 0]
    return filtered(x, soft / soft.sum(), "mirror")


def motion_blur(x: Image, level: tuple[int, float], generator: Generator) -> Tensor:
    """Blur along a line at a random angle of -45..45 degrees: (radius, deviation)."""
    return _streaked(x, *level, 0.0, generator)


def _streaked(x: Tensor, radius: int, deviation: float, turn: float, generator: Generator) -> Tensor:
    """Blur each image along a line, at most 45 degrees from the angle ``turn`` (in radians, 0 is to the right).

    The weights are half of a Gaussian over ``2 radius + 1`` whole pixels in one direction. So does ImageMagick's motion
    blur, which the source uses.
    """
    steps = torch.arange(2 * radius + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (steps / deviation) ** 2)
    weights = weights / weights.sum()
    angle = turn + (torch.rand(len(x), generator=generator) - 0.5) * math.pi / 2
    blurred = torch.zeros_like(x)
    for step, weight in zip(steps.tolist(), weights.tolist()):
        if weight > 1e-6:
            down, right = ((step * part - 0.5).ceil().long() for part in (torch.sin(angle), torch.cos(angle)))
            blurred += weight * moved(x, down, right)
    return blurred


def zoom_blur(x: Image, enlargements: int, generator: Generator) -> Tensor:
    """The mean of the image and of enlarged copies, by factors of 1.00, 1.01, 1.02 and so on."""
    step = 1.01 - 1  # a hair above 0.01, as NumPy counts: 26 x 1.25 is then more than 32.5 pixels, which are 33
    return (x + sum(zoomed(x, 1 + step * number) for number in range(enlargements))) / (enlargements + 1)


def _clouds(x: Tensor, decay: float, generator: Generator) -> Tensor:
    """Clouds of the images' own height and width, cut from the next power of two."""
    side = 1 << (max(x.shape[-2:]) - 1).bit_length()
    return plasma(len(x), side, decay, generator)[..., : x.shape[-2], : x.shape[-1]]


def fog(x: Image, level: tuple[float, float], generator: Generator) -> Tensor:
    """Add clouds and keep the brightest value: (thickness, square root of the clouds' decay)."""
    thickness, decay = level
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + thickness * _clouds(x, decay**2, generator)) * most / (most + thickness)


ICE, ICE_DEVIATIONS, ICE_DECAY = (0.565, 0.65, 0.695), (0.151, 0.086), 0.8
"""Statistics of 3000 cuts of 32 x 32 pixels from the source's photographs. They are the mean colour, and the standard
deviations of the means and of the pixels within a cut. ``ICE_DECAY`` gives clouds of the same roughness."""


def frost(x: Image, level: tuple[float, float], generator: Generator) -> Tensor:
    """A weighted sum of the image and random ice, as bright and rough as in the source's photographs."""
    kept, ice = level
    rough = _clouds(x, ICE_DECAY, generator)
    rough = (rough - rough.mean((2, 3), keepdim=True)) / rough.std((2, 3), keepdim=True, correction=0).clamp_min(1e-6)
    between, within = ICE_DEVIATIONS
    drawn = 2 * torch.rand(len(x), 1, 1, 1, generator=generator) - 1
    colour = torch.tensor(ICE) if x.shape[1] == 3 else torch.full((x.shape[1],), sum(ICE) / 3)
    return kept * x + ice * (colour.view(-1, 1, 1) + math.sqrt(3) * between * drawn + within * rough)


def snow(x: Image, level: tuple[float, float, float, float, int, float, float], generator: Generator) -> Tensor:
    """Falling flakes over a whitened image: (mean, deviation, zoom, least value, radius, blur, image share)."""
    mean, deviation, size, least, radius, blur, kept = level
    flakes = mean + deviation * torch.randn(x[:, :1].shape, generator=generator)
    flakes = zoomed(flakes, size)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    flakes = _streaked(flakes, radius, blur, -math.pi / 2, generator)
    white = torch.maximum(x, _luminance(x) * 1.5 + 0.5)
    return kept * x + (1 - kept) * white + flakes + flakes.flip(2, 3)


def _luminance(x: Tensor) -> Tensor:
    """Grey values ``[B, 1, H, W]``. Without three colours, the mean of all channels."""
    weights = torch.tensor([0.299, 0.587, 0.114]) if x.shape[1] == 3 else torch.full((x.shape[1],), 1 / x.shape[1])
    return (x * weights.view(-1, 1, 1)).sum(1, keepdim=True)


def brightness(x: Image, more: float, generator: Generator) -> Tensor:
    """Raise the value of each pixel (its largest channel). Hue and saturation do not change."""
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1.0)
    return torch.where(value > 0, x * raised / value.clamp_min(1e-6), raised)


def contrast(x: Image, share: float, generator: Generator) -> Tensor:
    """Scale the distance of each pixel from the image's mean, per channel."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * share + mean


def saturate(x: Image, level: tuple[float, float], generator: Generator) -> Tensor:
    """Scale and raise the saturation. Hue and value do not change.

    The hue of grey is 0, as in the source: in an image of three channels, grey turns red if saturation is raised.
    """
    scale, more = level
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = value - least
    wanted = (spread / value.clamp_min(1e-6) * scale + more).clamp(0, 1)
    missing = torch.tensor([0.0, 1.0, 1.0]).view(-1, 1, 1) if x.shape[1] == 3 else torch.zeros(())
    missing = torch.where(spread > 0, (value - x) / spread.clamp_min(1e-6), missing)
    return value * (1 - missing * wanted)


def pixelate(x: Image, share: float, generator: Generator) -> Tensor:
    """Make the image smaller and then larger again, both times by Pillow's box filter."""
    width, height = (max(1, int(side * share)) for side in (x.shape[3], x.shape[2]))
    box = PIL.Image.Resampling.BOX
    return _through_pillow(x, lambda image: image.resize((width, height), box).resize(image.size, box))


def jpeg(x: Image, quality: int, generator: Generator) -> Tensor:
    """Write the image as a JPEG of this quality and read it again."""

    def again(image: PIL.Image.Image) -> PIL.Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return PIL.Image.open(file)

    return _through_pillow(x, again)


def _through_pillow(x: Tensor, change: Callable[[PIL.Image.Image], PIL.Image.Image]) -> Tensor:
    """Apply ``change`` to every image as bytes. Without three colours, each channel is a grey image."""
    if not ((x >= 0) & (x <= 1)).all():
        raise ConfigError("Pixels outside 0..1, or NaN, cannot become bytes: give images in 0..1.")
    pixels = (x * 255).round().to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1) if x.shape[1] == 3 else pixels.flatten(0, 1)
    changed = np.stack([np.asarray(change(PIL.Image.fromarray(image))) for image in pixels.numpy()])
    again = torch.from_numpy(changed)
    return to_unit(again.permute(0, 3, 1, 2) if x.shape[1] == 3 else again.view(x.shape))


def elastic(x: Image, level: tuple[float, float, float], generator: Generator) -> Tensor:
    """An affine move, then a smooth random bend: (strength, smoothness, move), as shares of the shorter side.

    The affine move shifts three corners of a square, two thirds of the side long, by up to ``move`` along each axis.
    """
    batch, _, height, width = x.shape
    side = min(height, width)
    strength, smoothness, move = (side * share for share in level)
    far = max(1, side // 3)
    corners = torch.tensor([[far, far], [far, -far], [-far, -far]]) + torch.tensor([width // 2, height // 2])
    before = torch.cat([corners, torch.ones(3, 1)], 1).double()
    after = before[:, :2] + move * (2 * torch.rand(batch, 3, 2, generator=generator) - 1)
    affine = torch.linalg.solve(before, after)  # of (x, y, 1) as a row
    points = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).double()
    found = (points - affine[:, None, None, 2]) @ affine[:, None, :2].inverse()
    x = sampled(x, found[..., 1], found[..., 0], "mirror")
    if not strength:
        return x
    field = 2 * torch.rand(batch, 2, height, width, generator=generator) - 1
    field = strength * smoothed(field, smoothness, int(3 * smoothness + 0.5), "reflect")
    return sampled(x, points[..., 1] + field[:, 1], points[..., 0] + field[:, 0], "reflect")


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian": Corruption(gaussian, (0.04, 0.06, 0.08, 0.09, 0.10), "noise"),
    "uniform": Corruption(uniform, (0.05, 0.10, 0.15, 0.20, 0.25), "noise"),
    "salt-and-pepper": Corruption(salt_and_pepper, (0.01, 0.02, 0.04, 0.06, 0.10), "noise"),
    "poisson": Corruption(shot, (500.0, 250.0, 100.0, 75.0, 50.0), "noise"),
    "speckle": Corruption(speckle, (0.06, 0.10, 0.12, 0.16, 0.20), "noise"),
    "impulse": Corruption(impulse, (0.01, 0.02, 0.03, 0.05, 0.07), "noise"),
    "erasing": Corruption(erasing, (0.02, 0.05, 0.10, 0.15, 0.25), "noise"),
    "gaussian-blur": Corruption(gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), "natural"),
    "glass-blur": Corruption(
        glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)), "natural"
    ),
    "defocus-blur": Corruption(defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)), "natural"),
    "motion-blur": Corruption(motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)), "natural"),
    "zoom-blur": Corruption(zoom_blur, (7, 12, 16, 21, 26), "natural"),
    "fog": Corruption(fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)), "natural"),
    "frost": Corruption(frost, ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)), "natural"),
    "snow": Corruption(
        snow,
        (
            (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
            (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
        ),
        "natural",
    ),
    "brightness": Corruption(brightness, (0.05, 0.10, 0.15, 0.20, 0.30), "natural"),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15), "natural"),
    "saturate": Corruption(saturate, ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)), "natural"),
    "pixelate": Corruption(pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), "natural"),
    "jpeg": Corruption(jpeg, (80, 65, 58, 50, 40), "natural"),
    "elastic": Corruption(
        elastic,
        ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        "natural",
    ),
    "background-activity": Corruption(events.background_activity, (0.01, 0.02, 0.05, 0.1, 0.2), "event"),
    "dropped-events": Corruption(events.dropped_events, (0.1, 0.25, 0.5, 0.75, 0.9), "event"),
    "hot-pixels": Corruption(events.hot_pixels, (0.001, 0.002, 0.005, 0.01, 0.02), "event"),
    "space-jitter": Corruption(events.space_jitter, (0.5, 1.0, 1.5, 2.0, 3.0), "event"),
    "time-jitter": Corruption(events.time_jitter, (0.25, 0.5, 1.0, 2.0, 4.0), "event"),
}
"""Name -> corruption: noises, natural corruptions, corruptions of events.

Corruptions of images have the levels of CIFAR-10-C, except uniform, salt-and-pepper and erasing.
"""
