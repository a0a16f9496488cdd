"""Corrupted images and event frames, each with five severities: the inputs of the noise-immunity suite.

Natural corruptions and four of the noises are written anew after Hendrycks and Dietterich (arXiv 1903.12261) with the
levels of their make_cifar_c.py, and differ in detail: ice is drawn from fractal noise instead of photographs, clouds
are interpolated noise, glass blur copies neighbours instead of exchanging them, and grey stays grey under saturate. So
figures are not those of CIFAR-10-C's files. The other noises, what is done to events, and their levels are this
project's choice.
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
import torch.nn.functional as F
from torch import Generator, Tensor

from spikedistill.data import events
from spikedistill.data.augment import to_unit
from spikedistill.errors import ConfigError, one_of
from spikedistill.shapes import Image

CHUNK = 1000
"""Images that share one seed, so that the result does not depend on how the set is cut into batches."""
SEVERITIES = (1, 2, 3, 4, 5)

Change = Callable[[Tensor, Any, Generator], Tensor]


@dataclass(frozen=True)
class Corruption:
    """A change of pixels in 0..1, or of the counts of event frames, with what it takes at each of the severities."""

    change: Change
    levels: tuple[Any, Any, Any, Any, Any]
    kind: Literal["noise", "natural", "event"]


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Images or event frames as they look through a corruption; the same for the same seed.

    Args:
        images: bytes ``[N, C, H, W]``; for a corruption of events ``[N, T, 2, H, W]`` (``data.events.to_frames``).
        name: one of ``CORRUPTIONS``.
        severity: 1..5.
        seed: of the noise.

    Returns:
        Bytes of the same shape.

    Raises:
        ConfigError: if there is no such corruption or severity, or it is not made for what has this shape.
    """
    one_of("corruption", name, CORRUPTIONS)
    check_severity(severity)
    corruption = CORRUPTIONS[name]
    counts = corruption.kind == "event"
    if images.ndim != (5 if counts else 4):
        expected = "event frames [N, T, 2, H, W]" if counts else "images [N, C, H, W]"
        raise ConfigError(f"The corruption '{name}' was given the shape {tuple(images.shape)}: expected {expected}.")
    if not len(images):
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
    """Refuse a severity that is none.

    Raises:
        ConfigError: if it is not 1..5.
    """
    if severity not in SEVERITIES:
        raise ConfigError(f"severity (={severity}) must be 1, 2, 3, 4 or 5.")


def _normal(x: Tensor, generator: Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator)


def _uniform(x: Tensor, generator: Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator)


def gaussian(x: Image, deviation: float, generator: Generator) -> Tensor:
    """Normal noise added to every value."""
    return x + deviation * _normal(x, generator)


def uniform(x: Image, half: float, generator: Generator) -> Tensor:
    """Uniform noise of -half..half added to every value."""
    return x + half * (2 * _uniform(x, generator) - 1)


def salt_and_pepper(x: Image, share: float, generator: Generator) -> Tensor:
    """Whole pixels black or white."""
    drawn = torch.rand(x[:, :1].shape, generator=generator)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, x))


def impulse(x: Image, share: float, generator: Generator) -> Tensor:
    """Single values, channel by channel, at 0 or 1."""
    drawn = _uniform(x, generator)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, x))


def shot(x: Image, photons: float, generator: Generator) -> Tensor:
    """Poisson noise of so many photons at full brightness."""
    return torch.poisson(x * photons, generator=generator) / photons


def speckle(x: Image, deviation: float, generator: Generator) -> Tensor:
    """Normal noise in proportion to the value."""
    return x + x * deviation * _normal(x, generator)


def erasing(x: Image, share: float, generator: Generator) -> Tensor:
    """One grey rectangle of that share of the area, anywhere, of any form between 1:2 and 2:1."""
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


def _smooth(x: Tensor, reach: int, deviation: float) -> Tensor:
    """A Gaussian of so many pixels to either side."""
    from torchvision.transforms.v2.functional import gaussian_blur

    reach = min(reach, min(x.shape[-2:]) - 1)  # a border is mirrored at most once
    return gaussian_blur(x, [2 * reach + 1] * 2, [deviation] * 2)


def gaussian_blur(x: Image, deviation: float, generator: Generator) -> Tensor:
    """Convolution with a Gaussian."""
    return _smooth(x, max(1, math.ceil(4 * deviation)), deviation)


def glass_blur(x: Image, level: tuple[float, int, int], generator: Generator) -> Tensor:
    """Blur, then pixels exchanged with neighbours, then blur again."""
    deviation, reach, rounds = level
    x = gaussian_blur(x, deviation, generator)
    _, _, height, width = x.shape
    for _ in range(rounds):
        down = torch.randint(-reach, reach + 1, (len(x), 1, height, width), generator=generator)
        right = torch.randint(-reach, reach + 1, (len(x), 1, height, width), generator=generator)
        rows = (torch.arange(height)[:, None] + down).clamp(0, height - 1)
        columns = (torch.arange(width) + right).clamp(0, width - 1)
        chosen = (rows * width + columns).flatten(2).expand(-1, x.shape[1], -1)
        x = x.flatten(2).gather(2, chosen).view_as(x)
    return gaussian_blur(x, deviation, generator)


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel through one kernel ``[k, k]``, borders mirrored."""
    reach = kernel.shape[-1] // 2
    channels = x.shape[1]
    padded = F.pad(x, [reach] * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(channels, 1, *kernel.shape[-2:]), groups=channels)


def defocus_blur(x: Image, level: tuple[float, float], generator: Generator) -> Tensor:
    """Convolution with a softened disc: (radius, softness)."""
    radius, softness = level
    reach = math.ceil(radius) + 1
    axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
    disc = ((axis[:, None] ** 2 + axis**2) <= radius**2).float()[None, None]
    soft = _smooth(disc, 1, softness)[0, 0]
    return _filtered(x, soft / soft.sum())


def motion_blur(x: Image, level: tuple[int, float], generator: Generator) -> Tensor:
    """Blur along a line at a random angle of -45..45 degrees: (radius, deviation)."""
    return _streaked(x, *level, 0.0, generator)


def _streaked(x: Tensor, radius: int, deviation: float, turn: float, generator: Generator) -> Tensor:
    """Each image blurred along a line, at most 45 degrees from the angle ``turn`` (in radians, 0 is to the right)."""
    steps = torch.arange(2 * radius + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (steps / deviation) ** 2)
    weights = weights / weights.sum()
    angle = turn + (torch.rand(len(x), generator=generator) - 0.5) * math.pi / 2
    blurred = torch.zeros_like(x)
    for step, weight in zip(steps.tolist(), weights.tolist()):
        if weight > 1e-4:
            blurred += weight * _shifted(x, step * torch.cos(angle), step * torch.sin(angle))
    return blurred


def _shifted(x: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Each image moved by so many pixels, borders repeated, between pixels interpolated."""
    _, _, height, width = x.shape
    moves = torch.zeros(len(x), 2, 3)
    moves[:, 0, 0] = moves[:, 1, 1] = 1.0
    moves[:, 0, 2], moves[:, 1, 2] = 2 * right / width, 2 * down / height
    return _sampled(x, F.affine_grid(moves, list(x.shape), align_corners=False))


def _sampled(x: Tensor, grid: Tensor, padding: str = "border") -> Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def zoom_blur(x: Image, enlargements: int, generator: Generator) -> Tensor:
    """The mean of the image and so many enlargements of it, by 1.00, 1.01, 1.02 and so on."""
    total = x.clone()
    for step in range(enlargements):
        moves = torch.eye(2, 3).repeat(len(x), 1, 1) / (1 + 0.01 * step)
        total += _sampled(x, F.affine_grid(moves, list(x.shape), align_corners=False))
    return total / (enlargements + 1)


def _fractal(batch: int, size: int, decay: float, generator: Generator) -> Tensor:
    """Clouds ``[B, 1, size, size]`` in 0..1: noise of every scale, ``decay`` times weaker at each finer one."""
    total, weight, cells = torch.zeros(batch, 1, size, size), 1.0, 2
    while cells <= size:
        layer = torch.rand(batch, 1, cells, cells, generator=generator)
        total += weight * F.interpolate(layer, (size, size), mode="bicubic", align_corners=False)
        weight, cells = weight / decay, 2 * cells
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return (total - low) / (high - low).clamp_min(1e-6)


def _square(x: Tensor, decay: float, generator: Generator) -> Tensor:
    """Clouds of the images' own height and width."""
    side = 1 << (max(x.shape[-2:]) - 1).bit_length()
    return _fractal(len(x), side, decay, generator)[..., : x.shape[-2], : x.shape[-1]]


def fog(x: Image, level: tuple[float, float], generator: Generator) -> Tensor:
    """Fractal clouds over the image, its brightest value kept: (thickness, decay of the root of each finer scale)."""
    thickness, decay = level
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + thickness * _square(x, decay**2, generator)) * most / (most + thickness)


def frost(x: Image, level: tuple[float, float], generator: Generator) -> Tensor:
    """A weighted sum of the image and ice, drawn as ridges of fractal noise, not pasted from photographs."""
    kept, ice = level
    ridges = 1 - (2 * _square(x, 1.4, generator) - 1).abs()
    return kept * x + ice * ridges**3 * torch.rand(len(x), 1, 1, 1, generator=generator).add(0.5)


def snow(x: Image, level: tuple[float, float, float, float, int, float, float], generator: Generator) -> Tensor:
    """Falling flakes over a whitened image: (mean, deviation, size, least, radius, blur, share kept)."""
    mean, deviation, size, least, radius, blur, kept = level
    _, _, height, width = x.shape
    flakes = mean + deviation * torch.randn(len(x), 1, height, width, generator=generator)
    moves = torch.eye(2, 3).repeat(len(x), 1, 1) / size
    flakes = _sampled(flakes, F.affine_grid(moves, list(flakes.shape), align_corners=False))
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    flakes = _streaked(flakes, radius, blur, -math.pi / 2, generator)
    white = torch.maximum(x, _luminance(x) * 1.5 + 0.5)
    return kept * x + (1 - kept) * white + flakes + flakes.flip(2, 3)


def _luminance(x: Tensor) -> Tensor:
    """Colours as grey ``[B, 1, H, W]``; channels that are not colours as their mean."""
    weights = torch.tensor([0.299, 0.587, 0.114]) if x.shape[1] == 3 else torch.full((x.shape[1],), 1 / x.shape[1])
    return (x * weights.view(-1, 1, 1)).sum(1, keepdim=True)


def brightness(x: Image, more: float, generator: Generator) -> Tensor:
    """The value of each pixel (its largest channel) raised, hue and saturation kept."""
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1.0)
    return torch.where(value > 0, x * raised / value.clamp_min(1e-6), raised)


def contrast(x: Image, share: float, generator: Generator) -> Tensor:
    """The distance from the mean of the image, channel by channel, scaled."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * share + mean


def saturate(x: Image, level: tuple[float, float], generator: Generator) -> Tensor:
    """Saturation scaled and raised, hue and value kept; a grey image stays."""
    scale, more = level
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = value - least
    saturation = spread / value.clamp_min(1e-6)
    wanted = (saturation * scale + more).clamp(0, 1)
    return torch.where(spread > 0, value - (value - x) / spread.clamp_min(1e-6) * wanted * value, x)


def pixelate(x: Image, share: float, generator: Generator) -> Tensor:
    """Fewer pixels by averaging, enlarged again without smoothing."""
    height, width = (max(1, int(side * share)) for side in x.shape[-2:])
    small = F.interpolate(x, (height, width), mode="area")
    return F.interpolate(small, x.shape[-2:], mode="nearest")


def jpeg(x: Image, quality: int, generator: Generator) -> Tensor:
    """Written as JPEG of that quality and read again; channels that are not colours each as a grey image."""
    pixels = (x * 255).round().to(torch.uint8)
    pixels = pixels if x.shape[1] == 3 else pixels.flatten(0, 1)[:, None]
    again = np.stack([_through_jpeg(image, quality) for image in pixels.permute(0, 2, 3, 1).numpy()])
    return to_unit(torch.from_numpy(again).permute(0, 3, 1, 2)).reshape(x.shape)


def _through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """One image ``[H, W, C]`` of one or three channels."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "JPEG", quality=quality)
    return np.asarray(PIL.Image.open(file)).reshape(pixels.shape)


def elastic(x: Image, level: tuple[float, float, float], generator: Generator) -> Tensor:
    """Bent by a smooth field after an affine move: (strength, smoothness, move), in shares of the side.

    The affine move takes three corners of a square of two thirds of the side each up to ``move`` away, both ways.
    """
    strength, smoothness, move = level
    _, _, height, width = x.shape
    side = min(height, width)
    reach = 2 * max(1, side // 3) / side  # from the centre to the square's edges, where half the side is 1
    near, beside, far = 2 * move * (2 * torch.rand(3, len(x), 2, generator=generator) - 1)
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    theta[:, :, 0] += (beside - far) / (2 * reach)
    theta[:, :, 1] += (near - beside) / (2 * reach)
    theta[:, :, 2] += (near + far) / 2
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    if strength:
        field = 2 * torch.rand(len(x), 2, height, width, generator=generator) - 1
        deviation = max(0.3, smoothness * height)
        field = _smooth(field, max(1, math.ceil(3 * deviation)), deviation)
        grid = grid + 2 * strength * field.permute(0, 2, 3, 1)
    return _sampled(x, grid, "reflection")


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
"""Name -> corruption: noises, natural ones, those of events.

Those of images have the levels of CIFAR-10-C, but for uniform, salt-and-pepper and erasing.
"""
