"""Image files: bytes of three colours, turned as their EXIF says, transparent parts white."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps
from torch import Tensor

from spikedistill.data.folders import Kind
from spikedistill.errors import DataError

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif"),
    *(".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
LARGEST = 16 * 2**30
"""A folder with more bytes of pixels is refused, because this loader keeps everything in memory."""
ORIENTATION = 0x0112
"""The EXIF tag for the orientation of the camera."""


def images_of(size: int | None) -> Kind:
    """Folders of images.

    Args:
        size: side in pixels to which they are resized. Without it, all must have the same size.
    """
    return Kind("images", SUFFIXES, "image.png", partial(_read_files, size=size))


def _read_files(path: Path, files: Sequence[Path], tally: Counter[str], size: int | None) -> Tensor:
    """Images of one size from files below a folder, bytes ``[N, 3, H, W]``."""
    first = _read_image(files[0], size, Counter())
    needed = len(files) * first.nbytes
    if needed > LARGEST:
        raise DataError(
            f"'{path}' needs {needed / 2**30:.0f} GiB in memory, more than {LARGEST / 2**30:.0f}: give a smaller "
            "--image-size, or fewer images."
        )
    pixels = np.empty((len(files), *first.shape), np.uint8)
    for row, file in enumerate(files):
        image = _read_image(file, size, tally)
        if image.shape != first.shape:
            raise DataError(f"'{file}' has shape {image.shape}, '{files[0]}' has {first.shape}: give --image-size.")
        pixels[row] = image
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


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
        return np.asarray(image.resize((size, size), Pillow.Resampling.BILINEAR) if size else image)
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
