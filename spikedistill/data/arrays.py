"""Sets in one ``.npz`` file: arrays of images or event frames, or packs of WebP sheets.

An array that can be read in one way only is read that way, with a note. Everything ambiguous is refused.
"""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from spikedistill.data.parts import UNKNOWN, Parts, listed
from spikedistill.errors import DataError, SpikeDistillError

COLOURS = (1, 3)
"""Usual numbers of channels."""
NAMES = {f"{part}_{what}" for part in ("train", "test") for what in ("images", "labels", "sheets", "offsets")}
NAMES |= {"class_names", "tile_hwc", "grid_rc"}
"""The arrays that are read. Others are ignored, with a note."""


def read_npz(path: Path) -> Parts:
    """The training and the test part in a ``.npz`` file; see ``load_images`` for its arrays.

    Raises:
        DataError: if the file cannot be read, or does not hold images with class labels.
    """
    if not path.is_file():
        raise DataError(f"The data file '{path}' does not exist: check the path.")
    notes: list[str] = []
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
            if "train_sheets" in pack.files:
                images = [_sheets(pack, part) for part in ("train", "test")]
            else:
                images = _images([pack[f"{part}_images"] for part in ("train", "test")], str(path), notes)
            if "train_labels" in pack.files or "test_labels" in pack.files:
                labels = [_labels(pack[f"{part}_labels"], str(path)) for part in ("train", "test")]
            else:
                labels = [torch.full((len(part),), UNKNOWN) for part in images]
                notes.append("it has no labels: training needs a teacher's logits or features")
            names = _class_names(pack["class_names"]) if "class_names" in pack.files else None
            if other := [name for name in pack.files if name not in NAMES]:
                notes.append(f"the arrays {listed(other)} are ignored")
    except SpikeDistillError:
        raise
    except Exception as error:  # damaged bytes raise anything in numpy, zipfile and Pillow
        raise DataError(
            f"The data file '{path}' cannot be read ({error}): expected a .npz with train_images, train_labels, "
            "test_images and test_labels, without pickled objects."
        ) from error
    train, test = zip(images, labels, strict=True)
    return Parts(train, test, tuple(names or _numbered(labels, path.stem)), tuple(notes))


def _numbered(labels: Sequence[Tensor], name: str) -> list[str]:
    """Class names "0" to "K-1" for labels that are all of 0..K-1; none for unknown labels.

    Raises:
        DataError: if a label is missing or lies outside.
    """
    present = torch.cat(list(labels)).unique().tolist()
    if present == [UNKNOWN]:
        return []
    if present and present != list(range(len(present))):
        low, high = present[0], present[-1]
        some = listed(present[:4] + present[-1:] if len(present) > 5 else present)
        raise DataError(
            f"The labels of '{name}' run from {low} to {high} and have {len(present)} values ({some}): expected all of"
            f" 0 to {len(present) - 1}. {_remedy(present)} If some classes have no images, give class_names."
        )
    return [str(number) for number in present]


def _remedy(present: Sequence[int]) -> str:
    if present[0] > 0 and present == list(range(present[0], present[0] + len(present))):
        return f"Subtract {present[0]}."
    strange = present[-1] if present[:-1] == list(range(len(present) - 1)) else present[0]
    return f"Remove the images labelled {strange}, or number the classes anew (np.unique, return_inverse)."


def _class_names(array: NDArray[Any]) -> list[str]:
    if array.ndim != 1:
        raise ValueError(f"class_names has shape {array.shape}, expected one name per class, [K]")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in array]


def _sheets(pack: Mapping[str, NDArray[Any]], part: str) -> Tensor:
    """Images cut row by row from sheets in WebP. The README of the data folder describes the format."""
    height, width, channels = (int(size) for size in pack["tile_hwc"])
    rows, columns = (int(size) for size in pack["grid_rc"])
    stored, ends = pack[f"{part}_sheets"].tobytes(), pack[f"{part}_offsets"]
    tiles = []
    for start, end in itertools.pairwise(ends):
        sheet = np.asarray(Pillow.open(io.BytesIO(stored[start:end])).convert("RGB"))[:, :, :channels]
        grid = sheet.reshape(rows, height, columns, width, channels).transpose(0, 2, 1, 3, 4)
        tiles.append(grid.reshape(rows * columns, height, width, channels))
    return to_pixels(np.concatenate(tiles)[: len(pack[f"{part}_labels"])])


def _labels(array: NDArray[Any], name: str) -> Tensor:
    """Labels as class numbers ``[N]``.

    Raises:
        DataError: if they are not whole numbers of this shape.
    """
    if array.dtype.kind in "iu" and array.ndim == 1 and not (array > np.iinfo(np.int64).max).any():
        return torch.from_numpy(array.astype(np.int64))
    remedy = "Give the number of the class, 0 to K-1, of each image."
    if array.ndim == 2 and array.shape[1] == 1:
        remedy = "Take labels[:, 0]."
    elif array.ndim == 2 and array.dtype.kind in "iufb" and ((array == 0) | (array == 1)).all():
        one = (array.sum(1) == 1).all()
        remedy = "They are one-hot: take labels.argmax(1)." if one else "Give each image one class, these have several."
    elif array.ndim == 1 and array.dtype.kind == "f" and (array == np.round(array)).all():
        remedy = "Take labels.astype(int)."
    elif array.ndim == 1 and array.dtype.kind in "SU":
        remedy = "Number them: class_names, labels = np.unique(labels, return_inverse=True)."
    raise DataError(
        f"The labels of '{name}' are {array.dtype} of shape {array.shape}: expected whole numbers of shape [N]."
        f" {remedy}"
    )


def _images(arrays: Sequence[NDArray[Any]], name: str, notes: list[str]) -> list[Tensor]:
    """Both parts as tensors ``[N, C, H, W]``, or event frames ``[N, T, 2, H, W]`` as they are."""
    for array in arrays:
        _check_images(array, name)
    if first := [array for array in arrays if array.ndim == 4 and _channels_first(array.shape)]:
        notes.append(f"images of shape {first[0].shape} were taken as [N, C, H, W], {first[0].shape[1]} channels first")
    for part, array in zip(("training", "test"), arrays):
        _check_range(array, part, name, notes)
    return [to_pixels(array) for array in arrays]


def _check_range(array: NDArray[Any], part: str, name: str, notes: list[str]) -> None:
    """Refuse images without a value above 1, and note dark ones. Counts of events may be small."""
    brightest = int(array.max()) if array.size and array.ndim < 5 else 255
    if brightest <= 1:
        raise DataError(
            f"The {part} images of '{name}' hold no byte above {brightest}: expected 0 to 255. If they were 0 to 1,"
            " multiply by 255 and round before making them bytes."
        )
    if brightest < 64:
        notes.append(f"no pixel of the {part} part is brighter than {brightest} of 255: is that their whole range?")


def _check_images(array: NDArray[Any], name: str) -> None:
    if array.dtype == np.uint8 and array.ndim in (3, 4, 5):
        return
    remedy = ""
    if array.size and array.dtype.kind in "fiub" and array.ndim in (3, 4, 5):
        low, high = float(array.min()), float(array.max())
        bytes_of = "np.round(images)" if high > 1 else "np.round(255 * images)"
        remedy = f" Values run from {low:g} to {high:g}: take {bytes_of}.astype(np.uint8)."
        if not (0 <= low <= high <= 255):  # NaN too
            remedy = f" Values run from {low:g} to {high:g}: bring them to 0 to 255 first."
    elif array.ndim == 2:
        remedy = " Reshape each image to rows and columns."
    raise DataError(
        f"The images of '{name}' are {array.dtype} of shape {array.shape}: expected bytes (uint8, 0 to 255) of"
        f" shape [N, H, W] or [N, H, W, C], or event frames [N, T, 2, H, W].{remedy}"
    )


def _channels_first(shape: Sequence[int]) -> bool:
    """Whether an array ``[N, ?, ?, ?]`` can only be ``[N, C, H, W]``, not ``[N, H, W, C]``.

    >>> _channels_first((9, 3, 32, 32)), _channels_first((9, 32, 32, 3)), _channels_first((9, 3, 4, 3))
    (True, False, False)
    """
    _, first, _, last = shape
    if (first in COLOURS) != (last in COLOURS):
        return first in COLOURS
    return first < last if last not in COLOURS else False


def to_pixels(array: NDArray[Any]) -> Tensor:
    """Bytes ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` to ``[N, C, H, W]``; event frames as they are."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and not _channels_first(array.shape):
        array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array))
