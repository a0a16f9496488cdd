"""Image files: bytes of three colours, turned as their EXIF says, transparent parts white."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps
from torch import Tensor

from spikedistill.data.folders import SampleKind
from spikedistill.data.kept import pixels_on_disk
from spikedistill.errors import DataError

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif"),
    *(".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
LARGEST = 16 * 2**30
"""Bytes of pixels from which on they stay on disk (see ``kept.py``)."""
AT_ONCE = 256
"""Images that threads read before the next are begun."""
ORIENTATION = 0x0112
"""The EXIF tag for the orientation of the camera."""


def images_of(size: int | None) -> SampleKind:
    """Folders of images.

    Args:
        size: side in pixels. The largest square in the middle of an image is resized to it. Without it, all must have
            the same size.
    """
    return SampleKind("images", SUFFIXES, "image.png", partial(_read_files, size=size))


def _read_files(path: Path, files: Sequence[Path], tally: Counter[str], size: int | None) -> Tensor:
    """Images of one size from files below a folder, bytes ``[N, 3, H, W]``."""
    height, width, colours = _read_image(files[0], size, Counter()).shape
    shape, read = (colours, height, width), partial(_read_some, first=files[0], size=size)
    if len(files) * math.prod(shape) > LARGEST:
        return pixels_on_disk(path, f"pixels {size}", files, shape, tally, partial(read, shape=shape))
    return torch.from_numpy(read(files, tally, shape=shape))


def _read_some(
    files: Sequence[Path], tally: Counter[str], first: Path, size: int | None, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Images of one shape, bytes ``[N, 3, H, W]``. ``first`` is an image that has it."""
    pixels = np.empty((len(files), *shape), np.uint8)
    for row, (image, seen) in enumerate(_read_ahead(files, size)):
        if image.transpose(2, 0, 1).shape != shape:
            theirs = *shape[1:], shape[0]
            raise DataError(f"'{files[row]}' has shape {image.shape}, '{first}' has {theirs}: give --image-size.")
        pixels[row] = image.transpose(2, 0, 1)
        tally.update(seen)
    return pixels


def _read_ahead(files: Sequence[Path], size: int | None) -> Iterator[tuple[NDArray[np.uint8], Counter[str]]]:
    """Images in order, each with what was counted. Threads read several at a time."""

    def read(file: Path) -> tuple[NDArray[np.uint8], Counter[str]]:
        seen = Counter[str]()
        return _read_image(file, size, seen), seen

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), AT_ONCE):
            yield from pool.map(read, files[start : start + AT_ONCE])


def _read_image(file: Path, size: int | None, tally: Counter[str]) -> NDArray[np.uint8]:
    """An image ``[H, W, 3]``, rotated as its EXIF says, with transparent parts white.

    Raises:
        DataError: if it is damaged, has pixels of more than 8 bits, or holds several images.
    """
    try:
        with Pillow.open(file) as opened:
            if opened.mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {opened.mode}, not of 8 bits")
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":  # cameras put a preview behind the picture
                raise ValueError(f"it holds {frames} images, expected one")
            tally["turned"] += opened.getexif().get(ORIENTATION, 1) in range(2, 9)
            image = _on_white(ImageOps.exif_transpose(opened), tally)
        return np.asarray(ImageOps.fit(image, (size, size), Pillow.Resampling.BILINEAR) if size else image)
    except Exception as error:  # damaged bytes raise anything in Pillow
        reason = str(error) or type(error).__name__
        raise DataError(f"The image '{file}' cannot be read ({reason}): replace, convert or delete it.") from error


def _on_white(image: Pillow.Image, tally: Counter[str]) -> Pillow.Image:
    """An image in three colours. Transparent parts become white."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB")
    whole = image.convert("RGBA")
    tally["transparent"] += min(whole.getchannel("A").tobytes()) < 255
    return Pillow.alpha_composite(Pillow.new("RGBA", whole.size, "white"), whole).convert("RGB")
