"""Image sets and event frames held in memory as bytes: named sets, folders of images by class, and ``.npz`` files.

The test part is touched once, at the end of a run; a validation part is cut out of the training part by
``split``. Mean and deviation of the training pixels belong to the set, and every network takes them from there.
"""

import io
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from spikedistill.errors import ConfigError, DataError, SpikeDistillError, unknown
from spikedistill.shapes import Labels, Pixels

ENVIRONMENT = "SPIKEDISTILL_DATA"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
LARGEST = 16 * 2**30
"""Bytes of pixels beyond which a folder is refused: this loader keeps everything in memory."""


@dataclass(frozen=True)
class ImageSet:
    """A training and a test part, with class names and pixel statistics.

    Args:
        name: what the user called it.
        train_images: bytes ``[N, C, H, W]``; or event frames, counts as bytes ``[N, T, 2, H, W]``.
        train_labels: class numbers ``[N]``.
        test_images: likewise, M samples.
        test_labels: class numbers ``[M]``.
        class_names: one name a class.

    Raises:
        DataError: if a part is empty, or images and labels do not belong together.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for part, images, labels in (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            fits = images.ndim == 4 or (images.ndim == 5 and images.shape[2] == 2)
            if images.dtype != torch.uint8 or not fits or labels.ndim != 1 or labels.is_floating_point():
                raise DataError(
                    f"The {part} part of '{self.name}' has {images.dtype} images of shape {tuple(images.shape)} and "
                    f"{labels.dtype} labels of shape {tuple(labels.shape)}: expected bytes [N, C, H, W], or event"
                    " frames [N, T, 2, H, W], and whole numbers [N]."
                )
            if len(images) == 0:
                raise DataError(f"The {part} part of '{self.name}' holds no images: give at least one a class.")
            if len(images) != len(labels):
                raise DataError(
                    f"The {part} part of '{self.name}' has {len(images)} images and {len(labels)} labels: "
                    "give one label an image."
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.class_names):
                raise DataError(
                    f"The {part} labels of '{self.name}' run from {low} to {high} for {len(self.class_names)} classes: "
                    f"expected 0 to {len(self.class_names) - 1}."
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise DataError(
                f"'{self.name}' has training images of shape {tuple(self.train_images.shape[1:])} and test images of "
                f"shape {tuple(self.test_images.shape[1:])} (time steps of frames, channels, rows, columns): make them"
                " equal."
            )

    @property
    def channels(self) -> int:
        """Colour channels of an image; of event frames the two polarities."""
        return self.train_images.shape[-3]

    @property
    def frames(self) -> int:
        """How many frames a sample has, T; 0 for images."""
        return self.train_images.shape[1] if self.train_images.ndim == 5 else 0

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in 0..1, over at most 10,000 evenly spaced training images.

        Of event frames 0 and 1, so that counts stay as they are and most of them 0; this project's choice.
        """
        if self.frames:
            return (0.0,) * self.channels, (1.0,) * self.channels
        stride = -(-len(self.train_images) // 10_000)
        sample = self.train_images[::stride].float().div_(255.0)
        deviation, mean = torch.std_mean(sample, dim=(0, 2, 3))
        return tuple(mean.tolist()), tuple(deviation.clamp_min(1e-3).tolist())


def evenly(total: int, count: int) -> Tensor:
    """So many places out of a total, evenly spaced from the first to the last; all where there are no more."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()


def load_images(name: str, data_dir: str | Path | None = None, image_size: int | None = None) -> ImageSet:
    """Read a set by name (``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``), or from a path.

    A path is a ``.npz`` file with ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` (images
    ``[N, H, W]`` or ``[N, H, W, C]``, or event frames ``[N, T, 2, H, W]``, bytes) and perhaps ``class_names``, or a
    folder ``train/CLASS/image`` and ``test/CLASS/image``, or a folder
    ``CLASS/image`` of which a fifth becomes the test part.

    Args:
        name: a name or a path.
        data_dir: where named sets lie or are downloaded to; else ``$SPIKEDISTILL_DATA``; else ``./data``.
        image_size: side to which a folder's images are resized; without it they must all have one size.

    Raises:
        DataError: if nothing readable is found there.
        ConfigError: if ``image_size`` is below 1, or given where nothing is resized.
    """
    path = Path(name).expanduser()
    if image_size is not None and (name in NAMED or not path.is_dir()):
        raise ConfigError(f"image_size (={image_size}) is for folders of images; '{name}' is none: leave it away.")
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size (={image_size}) is a side in pixels: give 1 or more.")
    if name in NAMED:
        return NAMED[name](_directory(data_dir))
    if path.is_dir():
        return _read_folder(path, image_size)
    if path.suffix == ".npz":
        return _read_npz(path, path.stem)
    if path.exists() or os.sep in name or path.suffix:
        state = "is neither a folder nor a .npz file" if path.exists() else "does not exist"
        raise DataError(
            f"The data path '{name}' {state}: give a folder of images by class, a .npz file or a name "
            f"({', '.join(NAMED)})."
        )
    raise DataError(unknown("data set", name, NAMED) + " A folder of images by class or a .npz file works too.")


def split(labels: Labels, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut a validation part out of the training part, with each class in proportion.

    Args:
        labels: class numbers ``[N]``.
        fraction: the share that becomes validation, 0 <= fraction < 1.
        seed: chooses the samples.

    Returns:
        Index tensors of the training and of the validation samples, each in ascending order.

    Raises:
        ConfigError: if the fraction is outside its range.
        DataError: if a class is too small to be split.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"validation (={fraction}) is a share of the training set: give 0 <= validation < 1.")
    everything = torch.arange(len(labels))
    if fraction == 0:
        return everything, everything[:0]
    from sklearn.model_selection import train_test_split

    try:
        train, held = train_test_split(
            everything.numpy(), test_size=fraction, random_state=seed, stratify=labels.numpy()
        )
    except ValueError as error:
        raise DataError(
            f"A validation share of {fraction} cannot be cut from {len(labels)} samples of {len(labels.unique())}"
            f" classes ({error}): give more images, or validation=0."
        ) from error
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(held))


# --- named sets -------------------------------------------------------------------------------------------------------


def _directory(given: str | Path | None) -> Path:
    return Path(given or os.environ.get(ENVIRONMENT) or "data").expanduser()


def _digits(_: Path) -> ImageSet:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; a fifth, drawn once with seed 0, is the test part."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = split(labels, 0.2, seed=0)
    return ImageSet("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _packed(name: str, pack: str, source: str) -> Callable[[Path], ImageSet]:
    """A reader that takes ``name.npz`` or the pack in the data directory, else the files of torchvision's class."""

    def read(directory: Path) -> ImageSet:
        for file in (directory / f"{name}.npz", directory / pack):
            if file.is_file():
                return _read_npz(file, name)
        from torchvision import datasets

        return _read_torchvision(name, getattr(datasets, source), directory)

    return read


def _read_torchvision(name: str, source: Callable[..., Any], directory: Path) -> ImageSet:
    parts = []
    for train in (True, False):
        try:
            parts.append(source(directory, train=train, download=False))
        except (RuntimeError, ValueError, AssertionError):
            parts.append(_download(name, source, directory, train))
    images = [_to_pixels(np.asarray(part.data), name) for part in parts]
    labels = [torch.as_tensor(part.targets, dtype=torch.int64) for part in parts]
    return ImageSet(name, images[0], labels[0], images[1], labels[1], tuple(parts[0].classes))


def _download(name: str, source: Callable[..., Any], directory: Path, train: bool) -> Any:
    try:
        return source(directory, train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise DataError(
            f"'{name}' is not in '{directory}' and could not be downloaded ({error}): put '{name}.npz' or torchvision's"
            f" files there, or name the place with --data-dir or ${ENVIRONMENT}."
        ) from error


NAMED: dict[str, Callable[[Path], ImageSet]] = {
    "digits": _digits,
    "mnist": _packed("mnist", "mnist_webp.npz", "MNIST"),
    "fashion-mnist": _packed("fashion-mnist", "fashion_webp.npz", "FashionMNIST"),
    "cifar10": _packed("cifar10", "cifar10_webp.npz", "CIFAR10"),
    "cifar100": _packed("cifar100", "cifar100_webp.npz", "CIFAR100"),
}


# --- files ------------------------------------------------------------------------------------------------------------


def _read_npz(path: Path, name: str) -> ImageSet:
    if not path.is_file():
        raise DataError(f"The data file '{path}' does not exist: check the path.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
            read = _sheets if "train_sheets" in pack.files else _arrays
            parts = [read(pack, part, path) for part in ("train", "test")]
            labels = [_to_labels(pack[f"{part}_labels"], str(path)) for part in ("train", "test")]
            named = [str(text) for text in pack["class_names"]] if "class_names" in pack.files else None
    except SpikeDistillError:
        raise
    except Exception as error:  # damaged bytes raise anything in numpy, zipfile and Pillow
        raise DataError(
            f"The data file '{path}' cannot be read ({error}): expected a .npz with train_images, train_labels, "
            "test_images and test_labels, without pickled objects."
        ) from error
    names = named or [
        str(number) for number in range(max((int(part.max()) for part in labels if len(part)), default=0) + 1)
    ]
    return ImageSet(name, parts[0], labels[0], parts[1], labels[1], tuple(names))


def _arrays(pack: Any, part: str, path: Path) -> Tensor:
    return _to_pixels(pack[f"{part}_images"], str(path))


def _sheets(pack: Any, part: str, path: Path) -> Pixels:
    """Tiles cut row by row from sheets of WebP; the format is described in the data folder's README."""
    height, width, channels = (int(size) for size in pack["tile_hwc"])
    rows, columns = (int(size) for size in pack["grid_rc"])
    stored, ends = pack[f"{part}_sheets"].tobytes(), pack[f"{part}_offsets"]
    tiles = []
    for start, end in itertools.pairwise(ends):
        sheet = np.asarray(Pillow.open(io.BytesIO(stored[start:end])).convert("RGB"))[:, :, :channels]
        grid = sheet.reshape(rows, height, columns, width, channels).transpose(0, 2, 1, 3, 4)
        tiles.append(grid.reshape(rows * columns, height, width, channels))
    return _to_pixels(np.concatenate(tiles)[: len(pack[f"{part}_labels"])], str(path))


def _to_labels(array: NDArray[Any], name: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DataError(
            f"The labels of '{name}' are {array.dtype} of shape {array.shape}: expected whole numbers of shape [N]."
        )
    return torch.from_numpy(array.astype(np.int64))


def _to_pixels(array: NDArray[Any], name: str) -> Tensor:
    """Arrays [N, H, W] or [N, H, W, C] of bytes to a tensor [N, C, H, W]; event frames [N, T, 2, H, W] as they are."""
    if array.dtype != np.uint8 or array.ndim not in (3, 4, 5):
        raise DataError(
            f"The images of '{name}' are {array.dtype} of shape {array.shape}: expected bytes (uint8, 0 to 255) of"
            " shape [N, H, W] or [N, H, W, C], or event frames [N, T, 2, H, W]."
        )
    if array.ndim == 5:
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.ndim == 3:
        return torch.from_numpy(np.ascontiguousarray(array))[:, None]
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _read_folder(path: Path, size: int | None) -> ImageSet:
    names = _folders(path)
    if "train" not in names:
        return _read_single(path, names, size)
    test = next((name for name in ("test", "val", "valid") if name in names), None)
    if test is None:
        raise DataError(
            f"'{path}' has a folder 'train' but no 'test' or 'val': add one, or give CLASS/image folders alone."
        )
    classes = _folders(path / "train")
    strange = set(_folders(path / test)) - set(classes)
    if strange:
        raise DataError(f"'{path / test}' has classes that 'train' has not: {', '.join(sorted(strange))}.")
    train_images, train_labels = _read_classes(path / "train", classes, size)
    test_images, test_labels = _read_classes(path / test, classes, size)
    return ImageSet(path.name, train_images, train_labels, test_images, test_labels, tuple(classes))


def _folders(path: Path) -> list[str]:
    """The names of what lies below, sorted, hidden ones left out."""
    return sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _read_single(path: Path, classes: list[str], size: int | None) -> ImageSet:
    images, labels = _read_classes(path, classes, size)
    train, test = split(labels, 0.2, seed=0)
    return ImageSet(path.name, images[train], labels[train], images[test], labels[test], tuple(classes))


def _read_classes(path: Path, classes: list[str], size: int | None) -> tuple[Pixels, Labels]:
    files = [(file, number) for number, name in enumerate(classes) for file in _image_files(path / name)]
    if not files:
        raise DataError(
            f"The folder '{path}' holds no images: expected {path}/CLASS/image.png ({', '.join(SUFFIXES)})."
        )
    first = _read_image(files[0][0], size)
    needed = len(files) * first.nbytes
    if needed > LARGEST:
        raise DataError(
            f"'{path}' needs {needed / 2**30:.0f} GiB in memory, more than {LARGEST / 2**30:.0f}: give a smaller "
            "--image-size, or fewer images."
        )
    pixels = np.empty((len(files), *first.shape), np.uint8)
    for row, (file, _) in enumerate(files):
        image = _read_image(file, size)
        if image.shape != first.shape:
            raise DataError(f"'{file}' has shape {image.shape}, '{files[0][0]}' has {first.shape}: give --image-size.")
        pixels[row] = image
    return _to_pixels(pixels, str(path)), torch.tensor([number for _, number in files])


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _read_image(file: Path, size: int | None) -> NDArray[np.uint8]:
    try:
        with Pillow.open(file) as opened:
            if opened.mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {opened.mode}, not of 8 bits")
            image = opened.convert("RGB")
        return np.asarray(image.resize((size, size), Pillow.Resampling.BILINEAR) if size else image)
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise DataError(f"The image '{file}' cannot be read ({error}): replace, convert or delete it.") from error
