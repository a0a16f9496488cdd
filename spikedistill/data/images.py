"""Data sets in memory as bytes, images or event frames: named sets, folders of images by class, and ``.npz`` files.

Images may come without labels, for distillation from a teacher's logits and features. Their label is ``UNKNOWN``.
The test part is used once, at the end of a run. ``split`` cuts a validation part out of the training part. Each set
knows the mean and standard deviation of its training pixels, by which networks normalise.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikedistill.data.arrays import read_npz, to_pixels
from spikedistill.data.folders import read_folder
from spikedistill.data.gestures import is_gestures, read_gestures
from spikedistill.data.kept import kept
from spikedistill.data.parts import UNKNOWN, Parts, check_classes, class_order, copies
from spikedistill.data.pictures import LARGEST, images_of
from spikedistill.data.recordings import Recordings
from spikedistill.errors import ConfigError, DataError, unknown
from spikedistill.files import home
from spikedistill.shapes import Labels

ENVIRONMENT = "SPIKEDISTILL_DATA"
DIGITS = Path(__file__).with_name("digits.npz")
SEEN = 2**28
"""Values from which the statistics of the pixels are computed, at most."""


@dataclass(frozen=True)
class ImageSet:
    """A training and a test part, with class names and pixel statistics.

    Args:
        name: the name that the user gave, or that of the file or folder.
        train_images: bytes ``[N, C, H, W]``; or event frames, counts as bytes ``[N, T, 2, H, W]``.
        train_labels: class numbers ``[N]``, or all ``UNKNOWN``.
        test_images: likewise, M samples.
        test_labels: class numbers ``[M]``, or all ``UNKNOWN``.
        class_names: one name per class; none if neither part has labels and no teacher has named the classes yet.
        notes: how the set was read, as far as it matters for its accuracies.
        drawn: whether the test part was drawn from a set that has none. A third-party checkpoint may be trained on it.

    Raises:
        DataError: if a part is empty, shapes or number formats are not as above, or images and labels differ in number.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    drawn: bool = False

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
                raise DataError(f"The {part} part of '{self.name}' holds no images: give at least one per class.")
            if len(images) != len(labels):
                raise DataError(
                    f"The {part} part of '{self.name}' has {len(images)} images and {len(labels)} labels: "
                    "give one label per image."
                )
            low, high = int(labels.min()), int(labels.max())
            if (low < 0 or high >= len(self.class_names)) and not low == high == UNKNOWN:
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
    def labelled(self) -> bool:
        """Whether the classes of the training images are known."""
        return int(self.train_labels[0]) != UNKNOWN

    @property
    def test_labelled(self) -> bool:
        """Whether the classes of the test images are known."""
        return int(self.test_labels[0]) != UNKNOWN

    def without_labels(self) -> "ImageSet":
        """The same images, for training without labels. The test part keeps its labels."""
        return replace(self, train_labels=torch.full_like(self.train_labels, UNKNOWN))

    def with_classes(self, names: Sequence[str]) -> "ImageSet":
        """The same images for a network of these classes. Test labels are forgotten if their classes are others.

        They are others if they differ in number, or have a name at another index.
        """
        if len(names) == self.classes and not class_order(self.class_names, names)[0]:
            return self
        unknown_labels = torch.full_like(self.test_labels, UNKNOWN)
        return replace(self, class_names=tuple(names), test_labels=unknown_labels)

    @property
    def channels(self) -> int:
        """Colour channels of an image; 2 for event frames, the polarities."""
        return self.train_images.shape[-3]

    @property
    def frames(self) -> int:
        """Frames per sample, T; 0 for images."""
        return self.train_images.shape[1] if self.train_images.ndim == 5 else 0

    @property
    def classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)

    def facts(self) -> dict[str, Any]:
        """The set without its images, as JSON values."""
        return {
            "name": self.name,
            "train_images": len(self.train_images),
            "test_images": len(self.test_images),
            "shape": list(self.train_images.shape[1:]),
            "class_names": list(self.class_names),
            "labelled": self.labelled,
            "drawn": self.drawn,
            "notes": list(self.notes),
        }

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in 0..1, over at most 10,000 evenly spaced training images.

        Of large images fewer are taken, with at most ``SEEN`` values.

        For event frames they are 0 and 1, so counts are not changed and most stay 0. This is this project's choice.
        """
        if self.frames:
            return (0.0,) * self.channels, (1.0,) * self.channels
        count = min(10_000, max(1, SEEN // self.train_images[0].numel()))
        stride = -(-len(self.train_images) // count)
        sample = self.train_images[::stride].float().div_(255.0)
        deviation, mean = torch.std_mean(sample, dim=(0, 2, 3))
        return tuple(mean.tolist()), tuple(deviation.clamp_min(1e-3).tolist())


def evenly(total: int, count: int) -> Tensor:
    """``count`` of the numbers 0..total-1, evenly spaced from the first to the last; all if ``count`` is larger."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()


def load_images(
    name: str, data_dir: str | Path | None = None, image_size: int | None = None, labelled: bool = True
) -> ImageSet:
    """Read a set by name (``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``), or from a path.

    A path is a ``.npz`` file or a folder:

    - A ``.npz`` file holds ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` and, if wanted,
      ``class_names``. Images are bytes ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``, or event frames
      ``[N, T, 2, H, W]``. Without ``class_names``, every label of 0 to K-1 must occur.
    - A folder holds ``train/CLASS/image`` and ``test/CLASS/image`` (see ``read_folder`` for other spellings).
    - A folder that holds ``CLASS/image`` has no test part. A fifth of each class becomes one.
    - A folder that holds images and no folders, or ``train/image`` and ``test/image``, has no labels, and neither has
      a ``.npz`` file without ``train_labels`` and ``test_labels``. Such a set is for distillation from a teacher.

    ``notes`` say how the set was read.

    Args:
        name: a name or a path.
        data_dir: where named sets are, or are downloaded to (default: ``$SPIKEDISTILL_DATA``, else ``./data``).
        image_size: side in pixels. The largest square in the middle of each image of a folder is resized to it. Without
            it, all must have the same size.
        labelled: False forgets the labels of the training part. A folder without a test part may then hold images in
            any subfolders.

    Raises:
        DataError: if there is no such set, or it cannot be read.
        ConfigError: if ``image_size`` is below 1, or given for anything but a folder.
    """
    path = home(name)
    if image_size is not None and (name in NAMED or not path.is_dir()):
        raise ConfigError(f"image_size (={image_size}) is for folders of images; '{name}' is not one: leave it out.")
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size (={image_size}) is a side in pixels: give 1 or more.")
    if name in NAMED:
        found = NAMED[name](_directory(data_dir))
        if Path(name).is_dir():
            beside = f"the set of that name is read; the folder '{name}' here is ./{name}"
            found = replace(found, notes=(*found.notes, beside))
        return found if labelled else found.without_labels()
    if path.is_dir():
        return _checked(path.name, read_folder(path, images_of(image_size), labelled), labelled)
    if path.suffix == ".npz":
        return _checked(path.stem, read_npz(path), labelled)
    if path.exists() or os.sep in name or path.suffix:
        state = "is neither a folder nor a .npz file" if path.exists() else "does not exist"
        raise DataError(
            f"The data path '{name}' {state}: give a folder of images by class, a .npz file or a name "
            f"({', '.join(NAMED)})."
        )
    raise DataError(unknown("data set", name, NAMED) + " A folder of images by class or a .npz file works too.")


def load_recordings(name: str, recordings: Recordings, labelled: bool = True) -> ImageSet:
    """Read a folder of event recordings as frames.

    Folders lie as for images (see ``read_folder``), or as DVS128 Gesture is published (``gestures.py``). Frames of
    many or large files are kept on disk (``kept.py``).

    Args:
        name: the folder.
        recordings: how recordings become frames.
        labelled: False forgets the labels of the training part.

    Raises:
        DataError: if the folders are neither parts nor classes, or a recording cannot be read.
    """
    path = home(name)

    def read() -> Parts:
        return read_gestures(path, recordings) if is_gestures(path) else read_folder(path, recordings.kind(), labelled)

    return _checked(path.name, kept(path, f"frames {recordings} {labelled}", read), labelled)


def _checked(name: str, parts: Parts, labelled: bool) -> ImageSet:
    """A user's data set, checked. If it has no test part, a fifth of each class becomes one."""
    made = _whole(name, parts)
    notes = [*parts.notes, *(check_classes(name, parts) if made.labelled and labelled else ())]
    made = made if labelled else made.without_labels()
    if made.drawn:
        drawn = "a fifth of each class" if made.labelled else "a fifth"
        notes.append(f"it has no test part: {len(made.test_images)} of its images, {drawn}, became one")
    same = copies((made.train_images, made.train_labels), (made.test_images, made.test_labels))
    return replace(made, notes=(*notes, *same))


def _whole(name: str, parts: Parts) -> ImageSet:
    (images, labels), names = parts.train, parts.class_names
    if parts.test is not None:
        return ImageSet(name, images, labels, *parts.test, names)
    if images.nbytes > LARGEST:
        raise DataError(
            f"'{name}' has {images.nbytes / 2**30:.0f} GiB of pixels and no test part: above {LARGEST / 2**30:.0f} GiB"
            " none is drawn from it. Put its images into train/CLASS/ and test/CLASS/."
        )
    try:
        train, test = split(labels, 0.2, seed=0)
    except DataError as error:
        raise DataError(
            f"'{name}' has no test part, and none could be drawn: a fifth of each class is taken, which needs at least"
            " two images of every class. Give more images, or a test part."
        ) from error
    return ImageSet(name, images[train], labels[train], images[test], labels[test], names, drawn=True)


def split(labels: Labels, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut a validation part out of the training part, stratified by class.

    Args:
        labels: class numbers ``[N]``.
        fraction: share of the samples that becomes the validation part, 0 <= fraction < 1.
        seed: seed of the random choice.

    Returns:
        Numbers of the training samples and of the validation samples, each in ascending order.

    Raises:
        ConfigError: if the fraction is outside its range.
        DataError: if a class is too small to be split.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"validation (={fraction}) is a share of the training set: give 0 <= validation < 1.")
    everything = torch.arange(len(labels))
    if fraction == 0:
        return everything, everything[:0]
    present, held = np.unique(labels.numpy(), return_counts=True)[1], math.ceil(fraction * len(labels))
    if min(present) < 2 or min(held, len(labels) - held) < len(present):
        raise DataError(
            f"A validation share of {fraction} cannot be cut from {len(labels)} samples of {len(present)} classes, the"
            f" smallest of {min(present)}: a class needs 2 samples or more, and both parts at least as many samples as"
            " there are classes. Give more images, or validation=0."
        )
    draw = np.random.RandomState(seed)
    kept = _shares(present, len(labels) - held, draw)
    left = _shares(present - kept, held, draw)
    parts = np.split(np.argsort(labels.numpy(), kind="stable"), np.cumsum(present)[:-1])
    mixed = [part[draw.permutation(len(part))] for part in parts]
    train = np.sort(np.concatenate([part[:count] for part, count in zip(mixed, kept)]))
    ends = zip(mixed, kept, left)
    return torch.from_numpy(train), torch.from_numpy(np.sort(np.concatenate([x[k : k + n] for x, k, n in ends])))


def _shares(counts: NDArray[Any], total: int, draw: np.random.RandomState) -> NDArray[Any]:
    """How many samples of each class, in proportion to its size; which of equal remainders round up is drawn.

    The numbers, and what is drawn, are those of scikit-learn 1.4 to 1.8, so that its splits stay as they were.
    """
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    rest = exact - shares
    for value in np.unique(rest)[::-1]:
        if (missing := int(total - shares.sum())) <= 0:
            break
        equal = np.flatnonzero(rest == value)
        shares[draw.choice(equal, min(missing, len(equal)), replace=False)] += 1
    return shares.astype(np.int64)


# --- named sets -------------------------------------------------------------------------------------------------------


def _directory(given: str | Path | None) -> Path:
    return home(given or os.environ.get(ENVIRONMENT) or "data")


def read_digits() -> Parts:
    """The 1,797 digits of 8 x 8 pixels that come with the package, without a test part (``LICENSE.digits``)."""
    with np.load(DIGITS, allow_pickle=False) as digits:
        images = torch.from_numpy((digits["images"] * (255 / 16)).round().astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits["labels"].astype(np.int64))
    return Parts((images, labels), None, tuple("0123456789"))


def _digits(_: Path) -> ImageSet:
    """The digits. A fifth, drawn with seed 0, is the test part."""
    return _whole("digits", read_digits())


def _packed(name: str, pack: str, source: str) -> Callable[[Path], ImageSet]:
    """A reader of ``name.npz`` or the pack in the data directory, or else of torchvision's files there."""

    def read(directory: Path) -> ImageSet:
        for file in (directory / f"{name}.npz", directory / pack):
            if file.is_file():
                return _whole(name, read_npz(file))
        from torchvision import datasets

        return _read_torchvision(name, getattr(datasets, source), directory)

    return read


def _read_torchvision(name: str, source: Callable[..., Any], directory: Path) -> ImageSet:
    parts = []
    for train in (True, False):
        try:
            parts.append(source(directory, train=train, download=False))
        except (RuntimeError, ValueError, AssertionError) as error:
            parts.append(_download(name, source, directory, train, error))
    images = [to_pixels(np.asarray(part.data)) for part in parts]
    labels = [torch.as_tensor(part.targets, dtype=torch.int64) for part in parts]
    return ImageSet(name, images[0], labels[0], images[1], labels[1], tuple(parts[0].classes))


def _download(name: str, source: Callable[..., Any], directory: Path, train: bool, before: Exception) -> Any:
    try:
        return source(directory, train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        why = str(before).partition(". ")[0] or "damaged files"
        raise DataError(
            f"'{name}' cannot be read from '{directory}' ({why}) and could not be downloaded"
            f" ({error}): put '{name}.npz' or torchvision's files there, or name the place with --data-dir or"
            f" ${ENVIRONMENT}."
        ) from error


NAMED: dict[str, Callable[[Path], ImageSet]] = {
    "digits": _digits,
    "mnist": _packed("mnist", "mnist_webp.npz", "MNIST"),
    "fashion-mnist": _packed("fashion-mnist", "fashion_webp.npz", "FashionMNIST"),
    "cifar10": _packed("cifar10", "cifar10_webp.npz", "CIFAR10"),
    "cifar100": _packed("cifar100", "cifar100_webp.npz", "CIFAR100"),
}
