"""Corruptions against slow, literal forms of their source: SciPy, colorsys, Pillow and loops over pixels.

Each form takes an image ``[H, W, C]`` of floats in 0..1, and what was drawn for it, in the order of the code it tests.
"""

import colorsys
import io
import math

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage as nd
import torch
from sklearn.datasets import load_sample_images
from torch import Generator

from spikedistill.data.noise import CORRUPTIONS, SEVERITIES, corrupt
from spikedistill.evaluate.attacks import ATTACKS
from spikedistill.evaluate.immunity import FAULTS

PUBLISHED = {
    "gaussian": (0.04, 0.06, 0.08, 0.09, 0.10),
    "poisson": (500, 250, 100, 75, 50),
    "impulse": (0.01, 0.02, 0.03, 0.05, 0.07),
    "speckle": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian-blur": (0.4, 0.6, 0.7, 0.8, 1),
    "glass-blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "defocus-blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "motion-blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom-blur": tuple(len(np.arange(1, last, 0.01)) for last in (1.06, 1.11, 1.16, 1.21, 1.26)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg": (80, 65, 58, 50, 40),
    "elastic": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
}
"""make_cifar_c.py of github.com/hendrycks/robustness; zoom-blur by the number of its factors."""
OWN = {
    "uniform": (0.05, 0.10, 0.15, 0.20, 0.25),
    "salt-and-pepper": (0.01, 0.02, 0.04, 0.06, 0.10),
    "erasing": (0.02, 0.05, 0.10, 0.15, 0.25),
    "background-activity": (0.01, 0.02, 0.05, 0.1, 0.2),
    "dropped-events": (0.1, 0.25, 0.5, 0.75, 0.9),
    "hot-pixels": (0.001, 0.002, 0.005, 0.01, 0.02),
    "space-jitter": (0.5, 1.0, 1.5, 2.0, 3.0),
    "time-jitter": (0.25, 0.5, 1.0, 2.0, 4.0),
    "weight-noise": (0.05, 0.10, 0.15, 0.20, 0.30),
    "threshold-mismatch": (0.05, 0.10, 0.15, 0.20, 0.30),
    "dropped-spikes": (0.01, 0.02, 0.05, 0.10, 0.20),
    "stuck-neurons": (0.001, 0.002, 0.005, 0.01, 0.02),
    "membrane-noise": (0.02, 0.05, 0.10, 0.15, 0.20),
    "fgsm": (0.5, 1.0, 2.0, 4.0, 8.0),
    "pgd": (0.5, 1.0, 2.0, 4.0, 8.0),
}


def test_the_tables_of_levels_are_the_published_ones_and_ours():
    found = {name: corruption.levels for name, corruption in CORRUPTIONS.items()}
    found |= {name: levels for name, (_, levels) in (*FAULTS.items(), *ATTACKS.items())}
    assert found == PUBLISHED | OWN
    assert {name: steps for name, (steps, _) in ATTACKS.items()} == {"fgsm": 1, "pgd": 10}


# What is drawn, then the literal forms: level, image, and a function that gives what was drawn for this image.


def gaussian_blur(image, deviation, _=None):
    return nd.gaussian_filter(image, (deviation, deviation, 0), mode="nearest", truncate=4.0)


def glass_drawn(generator, shape, level):
    _, reach, rounds = level
    count, _, height, width = shape
    rows = len(range(height - reach, reach, -1))
    draws = [torch.randint(-reach, reach, (2, width, count), generator=generator) for _ in range(rounds * rows)]
    return [[draw[..., n] for draw in draws] for n in range(count)]


def glass_blur(image, level, drawn):
    deviation, reach, rounds = level
    image, draws = gaussian_blur(image, deviation), iter(drawn)
    height, width, _ = image.shape
    for _ in range(rounds):
        for row in range(height - reach, reach, -1):
            moves = next(draws)
            for column in range(width - reach, reach, -1):
                down, right = moves[:, column].tolist()
                one, other = image[row, column].copy(), image[row + down, column + right].copy()
                image[row, column], image[row + down, column + right] = other, one
    return gaussian_blur(image, deviation)


def defocus_blur(image, level, _):
    radius, softness = level
    y, x = np.mgrid[-8:9, -8:9]
    disc = (x**2 + y**2 <= radius**2).astype(float)
    one = np.exp(-0.5 * (np.array([-1, 0, 1]) / softness) ** 2)
    kernel = nd.correlate(disc / disc.sum(), np.outer(one, one) / one.sum() ** 2, mode="constant")
    return np.stack([nd.correlate(image[..., c], kernel, mode="mirror") for c in range(image.shape[2])], -1)


def angles(generator, shape, level):
    return ((torch.rand(shape[0], generator=generator) - 0.5) * math.pi / 2).tolist()


def motion_blur(image, level, angle):
    """MotionBlurImage of ImageMagick: whole pixels along half of a Gaussian, the outermost pixel repeated."""
    radius, deviation = level
    height, width, _ = image.shape
    weights = [math.exp(-step * step / (2 * deviation**2)) for step in range(2 * radius + 1)]
    blurred = np.zeros_like(image)
    for step, weight in enumerate(weights):
        down, right = (math.ceil(step * part - 0.5) for part in (math.sin(angle), math.cos(angle)))
        for row in range(height):
            for column in range(width):
                there = min(max(row + down, 0), height - 1), min(max(column + right, 0), width - 1)
                blurred[row, column] += weight / sum(weights) * image[there]
    return blurred


def zoomed(image, factor):
    cuts = [slice((side - math.ceil(side / factor)) // 2, None) for side in image.shape[:2]]
    cuts = [slice(cut.start, cut.start + math.ceil(side / factor)) for cut, side in zip(cuts, image.shape[:2])]
    large = nd.zoom(image[tuple(cuts)], (factor, factor, 1), order=1)
    top, left = ((large.shape[axis] - image.shape[axis]) // 2 for axis in (0, 1))
    return large[top : top + image.shape[0], left : left + image.shape[1]]


def zoom_blur(image, enlargements, _):
    factors = np.arange(1, 1 + 0.01 * enlargements - 0.005, 0.01)
    assert len(factors) == enlargements
    return (image + sum(zoomed(image, factor) for factor in factors)) / (enlargements + 1)


def plasma_drawn(generator, shape, level):
    side = 2 ** math.ceil(math.log2(max(shape[2:])))
    draws, step = [], side
    while step >= 2:
        draws.append([2 * torch.rand(shape[0], side // step, side // step, generator=generator) - 1 for _ in range(3)])
        step //= 2
    return [(side, [[draw[n] for draw in scale] for scale in draws]) for n in range(shape[0])]


def plasma(drawn, wibble_decay):
    """plasma_fractal of the source, point by point: noise is ``wibble`` squared, which decays."""
    side, draws = drawn
    points, step, wibble = {(0, 0): 0.0}, side, 100.0
    for square, beside, below in draws:
        half = step // 2
        kinds = (
            (square, half, half, ((-half, -half), (-half, half), (half, -half), (half, half))),
            (beside, 0, half, ((-half, 0), (half, 0), (0, -half), (0, half))),
            (below, half, 0, ((-half, 0), (half, 0), (0, -half), (0, half))),
        )
        for noise, down, right, around in kinds:
            for i in range(side // step):
                for j in range(side // step):
                    y, x = i * step + down, j * step + right
                    mean = sum(points[(y + dy) % side, (x + dx) % side] for dy, dx in around) / 4
                    points[y, x] = mean + wibble * wibble * float(noise[i, j])
        step, wibble = half, wibble / wibble_decay
    clouds = np.array([[points[y, x] for x in range(side)] for y in range(side)])
    return (clouds - clouds.min()) / (clouds.max() - clouds.min())


def fog(image, level, drawn):
    thickness, decay = level
    clouds = plasma(drawn, decay)[: image.shape[0], : image.shape[1], None]
    return (image + thickness * clouds) * image.max() / (image.max() + thickness)


def snow_drawn(generator, shape, level):
    flakes = torch.randn(shape[0], 1, *shape[2:], generator=generator)[:, 0].double().numpy()
    return list(zip(flakes, angles(generator, shape, level)))


def snow(image, level, drawn):
    mean, deviation, size, least, radius, blur, kept = level
    flakes, angle = drawn
    layer = zoomed((mean + deviation * flakes)[..., None], size)
    layer = np.clip(np.where(layer < least, 0, layer), 0, 1)
    layer = motion_blur(layer, (radius, blur), angle - math.pi / 2)
    colours = image.shape[2] == 3
    grey = (image @ ([0.299, 0.587, 0.114] if colours else np.full(image.shape[2], 1 / image.shape[2])))[..., None]
    return kept * image + (1 - kept) * np.maximum(image, grey * 1.5 + 0.5) + layer + np.rot90(layer, 2)


def by_hsv(image, change):
    out = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        rgb = image[place] if image.shape[2] == 3 else [image[place][0]] * 3
        out[place] = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*rgb)))[: image.shape[2]]
    return out


def brightness(image, more, _):
    return by_hsv(image, lambda h, s, v: (h, s, min(v + more, 1)))


def saturate(image, level, _):
    return by_hsv(image, lambda h, s, v: (h, min(max(s * level[0] + level[1], 0), 1), v))


def contrast(image, share, _):
    return (image - image.mean((0, 1))) * share + image.mean((0, 1))


def boxed(line, length):
    """Pillow's box filter along the first axis: the mean of the pixels whose centres lie in a bin, as bytes."""
    scale = len(line) / length
    rows = []
    for number in range(length):
        centre = (number + 0.5) * scale
        near = [p for p in range(len(line)) if -0.5 < (p + 0.5 - centre) / max(1, scale) <= 0.5]
        rows.append(line[near].mean(0))
    return np.floor(np.stack(rows) + 0.5)


def pixelate(image, share, _):
    height, width, _ = image.shape
    bytes_ = np.rint(255 * image)
    for rows, columns in ((int(height * share), int(width * share)), (height, width)):
        bytes_ = boxed(boxed(bytes_.swapaxes(0, 1), columns).swapaxes(0, 1), rows)
    return bytes_ / 255


def jpeg(image, quality, _):
    file = io.BytesIO()
    bytes_ = np.rint(255 * image).astype(np.uint8)
    PIL.Image.fromarray(bytes_ if image.shape[2] == 3 else bytes_[..., 0]).save(file, "JPEG", quality=quality)
    return np.asarray(PIL.Image.open(file)).reshape(image.shape) / 255


def elastic_drawn(generator, shape, level):
    corners = 2 * torch.rand(shape[0], 3, 2, generator=generator) - 1
    fields = 2 * torch.rand(shape[0], 2, *shape[2:], generator=generator) - 1 if level[0] else [None] * shape[0]
    return list(zip(corners.double().numpy(), (f if f is None else f.double().numpy() for f in fields)))


def elastic(image, level, drawn):
    corners, fields = drawn
    height, width, channels = image.shape
    side = min(height, width)
    strength, smoothness, move = (side * share for share in level)
    centre, square = np.array([width // 2, height // 2]), side // 3
    before = np.array([centre + square, [centre[0] + square, centre[1] - square], centre - square])
    there = np.linalg.solve(np.c_[before, np.ones(3)], before + move * corners).T  # [2, 3], of (x, y, 1)
    back = np.linalg.inv(np.vstack([there, [0, 0, 1]]))
    y, x = np.mgrid[:height, :width]
    at_x, at_y = (back @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)]))[:2].reshape(2, height, width)
    image = np.stack([nd.map_coordinates(image[..., c], (at_y, at_x), order=1, mode="mirror") for c in range(channels)])
    if not strength:
        return image.transpose(1, 2, 0)
    right, down = (
        strength * nd.gaussian_filter(field, smoothness, mode="reflect", truncate=3) for field in (fields[0], fields[1])
    )
    moved = [nd.map_coordinates(plane, (y + down, x + right), order=1, mode="reflect") for plane in image]
    return np.stack(moved, -1)


def nothing(generator, shape, level):
    return [None] * shape[0]


LITERAL = {
    "gaussian-blur": (nothing, gaussian_blur),
    "glass-blur": (glass_drawn, glass_blur),
    "defocus-blur": (nothing, defocus_blur),
    "motion-blur": (angles, motion_blur),
    "zoom-blur": (nothing, zoom_blur),
    "fog": (plasma_drawn, fog),
    "snow": (snow_drawn, snow),
    "brightness": (nothing, brightness),
    "contrast": (nothing, contrast),
    "saturate": (nothing, saturate),
    "pixelate": (nothing, pixelate),
    "jpeg": (nothing, jpeg),
    "elastic": (elastic_drawn, elastic),
}
"""Corruption -> what draws for every image, and what changes one. Frost has a test of its own: its ice is drawn."""


@pytest.fixture(scope="module")
def photographs():
    """Cuts of two photographs that scikit-learn ships, ``[N, 3, 32, 32]``, and one of grey alone."""
    cuts = []
    for photograph in load_sample_images().images:
        small = np.asarray(PIL.Image.fromarray(photograph).resize((160, 96), PIL.Image.Resampling.BOX))
        cuts += [small[:32, :32], small[32:64, 64:96]]
    cuts.append(cuts[0].mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8))
    return torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).contiguous()


def compare(images, name, severity):
    """The largest difference between the code and the literal form, of pixels in 0..1."""
    level = CORRUPTIONS[name].levels[severity - 1]
    drawing, literal = LITERAL[name]
    x = images.float() / 255
    drawn = drawing(Generator().manual_seed(severity), x.shape, level)
    expected = np.stack([literal(i, level, d) for i, d in zip(x.permute(0, 2, 3, 1).double().numpy(), drawn)])
    changed = CORRUPTIONS[name].change(x, level, Generator().manual_seed(severity)).permute(0, 2, 3, 1).numpy()
    return float(np.abs(changed - expected).max())


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", LITERAL)
def test_every_pixel_is_as_the_source_has_it(name, severity, photographs):
    assert compare(photographs[[1, 2, 4]], name, severity) < 2e-5


@pytest.mark.parametrize("channels, height, width", [(1, 28, 28), (3, 8, 8), (3, 20, 33)])
@pytest.mark.parametrize("name", LITERAL)
def test_other_sizes_and_channels_too(name, channels, height, width):
    images = torch.randint(0, 256, (2, channels, height, width), generator=Generator().manual_seed(1)).to(torch.uint8)
    if channels == 1 and name == "saturate":
        assert torch.equal(corrupt(images, name, 5), images)  # grey has no saturation
    else:
        assert compare(images, name, 5) < 2e-5


def test_ice_has_the_colour_and_the_deviations_of_the_photographs():
    black = torch.zeros(600, 3, 32, 32)
    ice = CORRUPTIONS["frost"].change(black, (1.0, 1.0), Generator().manual_seed(0))
    means = ice.mean((2, 3))
    assert means.mean(0).tolist() == pytest.approx([144 / 255, 166 / 255, 178 / 255], abs=0.01)
    assert float(means.mean(1).std()) == pytest.approx(38.6 / 255, rel=0.05)
    assert float(ice.mean(1).var((1, 2)).mean().sqrt()) == pytest.approx(22.0 / 255, rel=0.05)
    beside = (ice[..., 1:] - ice[..., 1:].mean((2, 3), True)) * (ice[..., :-1] - ice[..., :-1].mean((2, 3), True))
    assert float(beside.mean() / ice.var((2, 3)).mean()) == pytest.approx(0.34, abs=0.1)
    kept = CORRUPTIONS["frost"].change(black + 0.5, (0.8, 0.3), Generator().manual_seed(0))
    torch.testing.assert_close(kept, 0.8 * 0.5 + 0.3 * ice)


def test_shares_grow_with_the_image_and_radii_do_not(photographs):
    large = photographs[:4].repeat_interleave(2, 2).repeat_interleave(2, 3)

    def distance(images, name):
        return float((corrupt(images, name, 3).float() - images).square().mean().sqrt())

    for name in ("gaussian-blur", "defocus-blur", "motion-blur"):
        assert distance(large, name) < 0.9 * distance(photographs[:4], name), name
    for name in ("fog", "contrast", "zoom-blur"):
        assert distance(large, name) == pytest.approx(distance(photographs[:4], name), rel=0.15), name
