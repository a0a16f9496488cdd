"""Building blocks of corruptions, for image batches ``[B, C, H, W]``: blurs, moves, enlargements and clouds.

Borders have SciPy's names. ``nearest`` repeats the outermost pixel. ``mirror`` mirrors the image about the centre of
that pixel, ``reflect`` about its edge, so that the pixel appears twice. A border may be wider than the image.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Border = Literal["nearest", "mirror", "reflect"]


def inside(places: Tensor, length: int, border: Border) -> Tensor:
    """Which of the pixels 0..length-1 each place on a line shows, also before the first pixel and after the last.

    >>> inside(torch.arange(-2, 5), 3, "nearest").tolist(), inside(torch.arange(-2, 5), 3, "mirror").tolist()
    ([0, 0, 0, 1, 2, 2, 2], [2, 1, 0, 1, 2, 1, 0])
    >>> inside(torch.arange(-2, 5), 3, "reflect").tolist()
    [1, 0, 0, 1, 2, 2, 1]
    """
    if border == "nearest":
        return places.clamp(0, length - 1)
    twice = int(border == "reflect")
    period = max(1, 2 * length - 2 + 2 * twice)
    found = places.remainder(period)
    return torch.minimum(found, period - twice - found)


def filtered(x: Tensor, kernel: Tensor, border: Border) -> Tensor:
    """Filter every channel with one kernel ``[k, l]``. Both sides are odd."""
    channels, (tall, wide) = x.shape[1], kernel.shape
    rows, columns = (
        inside(torch.arange(-(size // 2), length + size // 2), length, border)
        for size, length in zip((tall, wide), x.shape[-2:])
    )
    return F.conv2d(x[..., rows[:, None], columns], kernel.expand(channels, 1, tall, wide), groups=channels)


def smoothed(x: Tensor, deviation: float, reach: int, border: Border) -> Tensor:
    """Convolution with a Gaussian that is cut off after ``reach`` pixels on either side."""
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / max(deviation, 1e-6)) ** 2)
    weights = weights / weights.sum()
    return filtered(filtered(x, weights[:, None], border), weights[None], border)


def moved(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift the window of each image by whole pixels ``[B]`` down and to the right. Border pixels are repeated."""
    height, width = x.shape[-2:]
    rows = inside(torch.arange(height) + down[:, None], height, "nearest")
    columns = inside(torch.arange(width) + right[:, None], width, "nearest")
    return _picked(x, rows[:, :, None] * width + columns[:, None])


def sampled(x: Tensor, rows: Tensor, columns: Tensor, border: Border) -> Tensor:
    """Each image at fractional rows and columns ``[B, H, W]``, by bilinear interpolation."""
    height, width = x.shape[-2:]
    above, left = rows.floor(), columns.floor()
    total = torch.zeros_like(x)
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - down - rows + above).abs() * (1 - right - columns + left).abs()
            row = inside((above + down).long(), height, border)
            column = inside((left + right).long(), width, border)
            total += weight[:, None].to(x) * _picked(x, row * width + column)
    return total


def _picked(x: Tensor, places: Tensor) -> Tensor:
    """Pixels by their numbers ``[B, H, W]``, counted row by row."""
    return x.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def exchanged(x: Tensor, reach: int, generator: Generator) -> Tensor:
    """Exchange each pixel, from the last to the first, with a random one at an offset of -reach to reach - 1 per axis.

    Pixels near the border take part only as the other pixel of an exchange.
    """
    batch, _, height, width = x.shape
    everyone, places = torch.arange(batch), torch.arange(height * width)[:, None].repeat(1, batch)
    for row in range(height - reach, reach, -1):
        drawn = torch.randint(-reach, reach, (2, width, batch), generator=generator)
        for column in range(width - reach, reach, -1):
            other = (row + drawn[0, column]) * width + column + drawn[1, column]
            there, here = places[other, everyone], places[row * width + column].clone()
            places[other, everyone] = here
            places[row * width + column] = there
    return _picked(x, places.T.reshape(batch, height, width))


def zoomed(x: Tensor, factor: float) -> Tensor:
    """Cut out the middle of the image and enlarge it to the image's size."""
    height, width = x.shape[-2:]
    return _enlarging(height, factor) @ x @ _enlarging(width, factor).T


def _enlarging(length: int, factor: float) -> Tensor:
    """The matrix ``[length, length]`` that cuts out the middle of a line of pixels and enlarges it.

    The cut has ``ceil(length / factor)`` whole pixels. Enlarged, its first and last pixels are the outermost ones. A
    line that is then too long is trimmed on both sides. If a margin is odd, the middle lies half a pixel off.
    """
    cut = math.ceil(length / factor)
    longer = round(cut * factor)
    places = (torch.arange(length) + (longer - length) // 2) * ((cut - 1) / max(1, longer - 1))
    pixels = torch.arange(length) - (length - cut) // 2
    return (1 - (places[:, None] - pixels).abs()).clamp_min(0)


def plasma(batch: int, side: int, decay: float, generator: Generator) -> Tensor:
    """Clouds ``[B, 1, side, side]`` in 0..1 by the diamond-square algorithm; ``side`` is a power of two.

    A point halfway between known points is their mean plus uniform noise. The noise is ``decay`` times weaker at each
    finer scale. Opposite borders fit together.
    """
    clouds, step, height = torch.zeros(batch, side, side), side, 1.0
    while step >= 2:
        half = step // 2
        known = clouds[:, ::step, ::step]
        below = known + known.roll(-1, 1)
        clouds[:, half::step, half::step] = middle = _halfway(below + below.roll(-1, 2), height, generator)
        beside = middle + middle.roll(1, 1) + known + known.roll(-1, 2)
        clouds[:, ::step, half::step] = _halfway(beside, height, generator)
        clouds[:, half::step, ::step] = _halfway(middle + middle.roll(1, 2) + below, height, generator)
        step, height = half, height / decay
    low, high = clouds.amin((1, 2), keepdim=True), clouds.amax((1, 2), keepdim=True)
    return ((clouds - low) / (high - low).clamp_min(1e-6))[:, None]


def _halfway(total: Tensor, height: float, generator: Generator) -> Tensor:
    return total / 4 + height * (2 * torch.rand(total.shape, generator=generator) - 1)
