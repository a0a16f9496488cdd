"""Feeds: the order of batches, augmentation and views, the held-out part, and samples for calibration.

The training loop only iterates. A feed is a frozen value. Its position is two numbers, the epoch and the batches done
in it, which a checkpoint keeps. Order and augmentation of step s in epoch e depend only on (seed, e, s), so a resumed
feed yields the same batches as an uninterrupted one. With ``views`` = k, the batches of the first k epochs repeat.

With several processes, each takes its rows of every global batch (``rank``, ``processes``).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from spikedistill.data.augment import Augment, BatchShard, alternating_flip, as_frames, to_inputs
from spikedistill.data.images import ImageSet, evenly, split
from spikedistill.data.parts import check_pair
from spikedistill.errors import ConfigError, DataError
from spikedistill.files import fingerprint
from spikedistill.shapes import Labels

CPU = torch.device("cpu")
LARGEST = 4 * 2**30
"""Bytes of training samples up to which batches are made on a GPU."""
HELD = 16 * 2**30
"""Bytes of the held-out samples at most, since they are held in memory."""


@dataclass(frozen=True)
class Inputs:
    """One batch of network inputs.

    Args:
        student: the student's input, images ``[B, C, H, W]`` in 0..1 or frames ``[T, B, C, H, W]``.
        labels: class numbers ``[B]``; None for images without labels.
        samples: numbers of the samples in the training set ``[B]``; the key of the teacher's cache.
        teacher: the teacher's input, if it differs from the student's.
        source: the student's second input stream, if there is one.
    """

    student: Tensor
    labels: Labels | None
    samples: Tensor
    teacher: Tensor | None = None
    source: Tensor | None = None

    @property
    def shown_to_teacher(self) -> Tensor:
        """The teacher's input."""
        return self.student if self.teacher is None else self.teacher

    def to(self, device: torch.device, layout: torch.memory_format) -> "Inputs":
        """The same on a device, images in this memory order. Sample numbers stay where they are."""

        def moved(images: Tensor) -> Tensor:
            order = layout if images.ndim == 4 else torch.preserve_format
            return images.to(device, memory_format=order, non_blocking=True)

        teacher, source = (None if images is None else moved(images) for images in (self.teacher, self.source))
        labels = None if self.labels is None else self.labels.to(device)
        return Inputs(moved(self.student), labels, self.samples, teacher, source)


@runtime_checkable
class Feed(Protocol):
    """What the training loop asks of data. ``MemoryFeed`` and ``PairFeed`` are feeds."""

    @property
    def steps(self) -> int:
        """Batches per epoch."""

    @property
    def views(self) -> int:
        """After how many epochs batches come again; 0: never."""

    def view(self, epoch: int) -> int:
        """The epoch whose order and augmentation an epoch has."""

    def batches(self, epoch: int, done: int = 0) -> Iterator[Inputs]:
        """This process's rows of the batches of an epoch (1, 2, ...), without the first ``done`` batches."""

    def held(self) -> tuple[Tensor, Labels]:
        """The samples held out for validation, as stored, and their labels, which may be unknown. Both may be empty."""

    def calibration(self, count: int) -> Tensor:
        """``count`` evenly spaced training samples as student inputs, without augmentation."""

    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on, as JSON values."""

    def shared(self, rank: int, processes: int) -> "Feed":
        """The same feed for process ``rank`` of several. It takes its rows of every batch.

        Raises:
            ConfigError: if the processes cannot share a batch in equal parts.
        """

    def on(self, device: torch.device) -> "Feed":
        """The same feed, which makes its batches on a device if it can. Their values are the same."""


@dataclass(frozen=True)
class MemoryFeed:
    """A data set in memory, images or event frames, in a new order every epoch.

    Args:
        images: the data set. Its test part is not used.
        batch_size: samples per batch over all processes. An incomplete last batch is left out.
        seed: seed of order and augmentation.
        augment: random changes to images.
        validation: share of the training part held out, 0 <= validation < 1.
        views: 0: every epoch has new order and augmentation; k: those of the first k epochs repeat.
        rank: number of this process, 0, 1, ...
        processes: number of processes.
        device: where batches are made. The training samples are copied there once.

    Raises:
        ConfigError: if there are fewer samples than one batch, ``batch_size`` is not a multiple of ``processes``, event
            frames would be changed by more than ``crop`` and ``flip``, or the held-out samples need too much memory.
    """

    images: ImageSet
    batch_size: int
    seed: int = 0
    augment: Augment = field(default_factory=Augment)
    validation: float = 0.1
    views: int = 0
    rank: int = 0
    processes: int = 1
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= len(self._parts[0]) or self.batch_size % self.processes:
            raise ConfigError(
                f"batch_size (={self.batch_size}) must be at most the {len(self._parts[0])} training samples and a"
                f" multiple of the number of processes, {self.processes}{self._remedy()}."
            )
        each = self.images.train_images[0].nbytes
        if (held := len(self._parts[1]) * each) > HELD:
            share = HELD / (each * len(self.images.train_images))
            raise ConfigError(
                f"validation (={self.validation}) holds out {len(self._parts[1]):,} samples of {held / 2**30:.0f} GiB,"
                f" more than {HELD / 2**30:.0f}: give at most {share:.2g}."
            )
        if self.images.frames and not self.augment.suits_events:
            raise ConfigError(
                f"'{self.images.name}' holds event frames, which can be moved (crop) and mirrored (flip): leave out"
                " cutout, policy, zoom and noise, which are for images."
            )

    def _remedy(self) -> str:
        """A batch size for few samples: about a fourth of them, a power of two."""
        few = 2 ** max(1, (len(self._parts[0]) // 4).bit_length() - 1)
        return f": give --batch-size {few}, and more --epochs" if self.processes == 1 and few < self.batch_size else ""

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return len(self._parts[0]) // self.batch_size

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """The numbers of the training and of the held-out samples."""
        return split(self.images.train_labels, self.validation, seed=0)

    @cached_property
    def _stored(self) -> tuple[Tensor, Tensor]:
        """The training samples and their labels, where batches are made."""
        return self.images.train_images.to(self.device), self.images.train_labels.to(self.device)

    def view(self, epoch: int) -> int:
        """The epoch whose order and augmentation an epoch has: itself, or with ``views`` one of the first ``views``."""
        return (epoch - 1) % self.views + 1 if self.views else epoch

    def batches(self, epoch: int, done: int = 0) -> Iterator[Inputs]:
        """This process's rows of the batches of an epoch (1, 2, ...), without the first ``done`` batches."""
        view = self.view(epoch)
        order = epoch_order(self._parts[0], self.seed, view, self.batch_size)
        for step in range(done, len(order)):
            yield self._batch(order[step], view, step)

    @property
    def rows(self) -> slice:
        """This process's rows of every batch."""
        share = self.batch_size // self.processes
        return slice(self.rank * share, (self.rank + 1) * share)

    def _batch(self, samples: Tensor, view: int, step: int) -> Inputs:
        """This process's rows. Random numbers are drawn for the whole batch, whatever the number of processes."""
        mine, (stored, classes) = samples[self.rows], self._stored
        labels = classes[mine] if self.images.labelled else None
        turned = alternating_flip(len(stored), samples, view)
        pixels, seed = stored[samples], step_seed(self.seed, view, step)
        if self.images.frames:
            return Inputs(to_inputs(self.augment.frames(pixels, seed, turned, self.rows)), labels, mine)
        return Inputs(self.augment(pixels, seed, turned, self.rows), labels, mine)

    def held(self) -> tuple[Tensor, Labels]:
        """The held-out samples as stored, and their labels."""
        held = self._parts[1]
        return self.images.train_images[held], self.images.train_labels[held]

    def calibration(self, count: int) -> Tensor:
        """``count`` training samples, evenly spaced over the whole training part, without augmentation."""
        return calibration_inputs(self.images, count)

    def fingerprint(self) -> dict[str, Any]:
        """Samples, augmentation, seed, batch size, views and process."""
        return {
            "data": self.images.name,
            "samples": training_samples(self.images, self.validation),
            "augment": asdict(self.augment),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "views": self.views,
            "process": [self.rank, self.processes],
        }

    def shared(self, rank: int, processes: int) -> "MemoryFeed":
        """This feed for one of several processes."""
        return replace(self, rank=rank, processes=processes)

    def on(self, device: torch.device) -> "MemoryFeed":
        """This feed on a GPU of NVIDIA. Samples of more than ``LARGEST`` bytes, and policies, stay on the CPU."""
        moves = device.type == "cuda" and self.images.train_images.nbytes <= LARGEST and self.augment.policy == "none"
        return replace(self, device=device if moves else CPU)


@dataclass(frozen=True)
class PairFeed:
    """Event frames for the student, each with an image of the same class from a second data set.

    An epoch is one pass over the event frames. The teacher gets the image. The student's second stream gets the image
    as frames (``as_frames``). With sliding replacement (He et al., AAAI 2024, arXiv 2303.13077) more and more samples
    of it get the event frames instead, each with the probability ``progress ^ replacement``. The teacher still gets the
    image, so its outputs can be kept.

    Args:
        events: the feed of event frames.
        images: the data set of images, with the same classes.
        paired: whether recording n goes with image n, mirrored as it is and, if of the same size, moved as it is.
            Otherwise an image of its class is drawn at random by (seed, epoch, step).
        replacement: the power of the progress of training with which samples are replaced; 0: none are.
        epochs: of the whole training, for its progress.

    Raises:
        ConfigError: if ``replacement`` is negative, or there are no epochs for it.
        DataError: if classes differ in number, name or order, a class has no image, or paired sets differ in length or
            labels.
    """

    events: MemoryFeed
    images: ImageSet
    paired: bool = False
    replacement: float = 0.0
    epochs: int = 0

    def __post_init__(self) -> None:
        if self.replacement < 0 or (self.replacement and self.epochs < 1):
            raise ConfigError(
                f"replacement (={self.replacement}) is a power of the progress over epochs (={self.epochs}): give 0 or"
                " more, with the number of epochs."
            )
        ours, theirs = self.events.images, self.images
        if not (ours.labelled and theirs.labelled):
            raise DataError(
                f"'{ours.name}' and '{theirs.name}' cannot be paired without labels: give both their labels."
            )
        if not ours.frames or theirs.frames:
            raise DataError(
                f"'{ours.name}' and '{theirs.name}' cannot be paired: expected event frames and images. Give recordings"
                " by --data, or --events simulated, and images by --source."
            )
        check_pair((ours.name, theirs.name), ours.class_names, theirs.class_names)
        if self.paired and not torch.equal(ours.train_labels, theirs.train_labels[: len(ours.train_labels)]):
            raise DataError(
                f"'{ours.name}' and '{theirs.name}' are not paired sample by sample, their labels differ: leave"
                " --paired out to draw images by class."
            )
        missing = set(ours.train_labels.tolist()) - set(theirs.train_labels.tolist())
        if missing:
            raise DataError(f"'{theirs.name}' has no image of the classes {sorted(missing)} of '{ours.name}'.")

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return self.events.steps

    @property
    def views(self) -> int:
        """After how many epochs batches come again; 0: never."""
        return self.events.views

    def view(self, epoch: int) -> int:
        """The epoch whose order and augmentation an epoch has."""
        return self.events.view(epoch)

    def batches(self, epoch: int, done: int = 0) -> Iterator[Inputs]:
        """This process's rows of the batches of an epoch (1, 2, ...), without the first ``done`` batches."""
        view, own = self.view(epoch), self.events.images
        timesteps, (height, width) = own.frames, own.train_images.shape[-2:]
        for step, inputs in enumerate(self.events.batches(epoch, done), done):
            images = to_inputs(self._shown(inputs, view, step))
            source = as_frames(images, timesteps, height, width)
            if self.replacement:
                gone = self._replaced(epoch, step)[None, :, None, None, None]
                source = torch.where(gone, inputs.student, source)
            yield replace(inputs, teacher=images, source=source)

    def _replaced(self, epoch: int, step: int) -> Tensor:
        """Which samples of this process's rows get event frames in place of the image, booleans ``[B]``."""
        progress = ((epoch - 1) * self.steps + step) / (self.epochs * self.steps)
        generator = torch.Generator().manual_seed(_mix(step_seed(self.events.seed, epoch, step), 1))
        drawn = torch.rand(self.events.batch_size, generator=generator, dtype=torch.float64)[self.events.rows]
        return drawn < min(1.0, progress) ** self.replacement

    def _shown(self, inputs: Inputs, view: int, step: int) -> Tensor:
        """The images for a batch of recordings, bytes."""
        own, turned = self.events, alternating_flip(len(self.events.images.train_labels), inputs.samples, view)
        shard, pixels = (
            BatchShard(own.batch_size, own.rows),
            self.images.train_images[self._partners(inputs, view, step)],
        )
        return self._changes.moved(pixels, step_seed(own.seed, view, step), turned, shard)

    @property
    def _changes(self) -> Augment:
        """How images are changed: paired ones as their recordings, but those of another size are not moved."""
        ours, theirs = (one.train_images.shape[-2:] for one in (self.events.images, self.images))
        given, move = self.events.augment, self.paired and ours == theirs
        return replace(given, crop=given.crop if move else 0, flip=given.flip and self.paired)

    def _partners(self, inputs: Inputs, view: int, step: int) -> Tensor:
        """The numbers of the images for a batch of recordings, ``[B]``."""
        if self.paired:
            return inputs.samples
        generator = torch.Generator().manual_seed(step_seed(self.events.seed, view, step))
        places = torch.rand(self.events.batch_size, generator=generator, dtype=torch.float64)[self.events.rows]
        labels = self.events.images.train_labels[inputs.samples]
        found = [self._of_class[label] for label in labels.tolist()]
        return torch.stack([numbers[int(place * len(numbers))] for place, numbers in zip(places.tolist(), found)])

    @cached_property
    def _of_class(self) -> list[Tensor]:
        return [(self.images.train_labels == label).nonzero()[:, 0] for label in range(self.images.classes)]

    def held(self) -> tuple[Tensor, Labels]:
        """The held-out event frames as stored, and their labels."""
        return self.events.held()

    def calibration(self, count: int) -> Tensor:
        """``count`` evenly spaced event samples as student inputs."""
        return self.events.calibration(count)

    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on in both sets."""
        images = fingerprint({"images": self.images.train_images, "labels": self.images.train_labels})
        paired = "moved alike" if self._changes.crop or self._changes.flip else self.paired
        return {**self.events.fingerprint(), "source": self.images.name, "images": images, "paired": paired}

    def shared(self, rank: int, processes: int) -> "PairFeed":
        """This feed for one of several processes."""
        return replace(self, events=self.events.shared(rank, processes))

    def on(self, device: torch.device) -> "PairFeed":
        """This feed itself: pairs are made on the CPU."""
        return self


def training_samples(images: ImageSet, validation: float) -> str:
    """A digest of the training samples without the held-out ones. Networks with equal digests saw the same samples."""
    train, _ = split(images.train_labels, validation, seed=0)
    return fingerprint({"images": images.train_images, "labels": images.train_labels, "indices": train})


def calibration_inputs(images: ImageSet, count: int) -> Tensor:
    """``count`` evenly spaced training samples as student inputs, without augmentation."""
    return to_inputs(images.train_images[evenly(len(images.train_images), count)])


def epoch_order(samples: Tensor, seed: int, epoch: int, batch_size: int) -> list[Tensor]:
    """The batches of an epoch as numbers of samples. An incomplete last batch is left out."""
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    order = samples[torch.randperm(len(samples), generator=generator)]
    return [part for part in order.split(batch_size) if len(part) == batch_size]


def step_seed(seed: int, epoch: int, step: int) -> int:
    """The seed of all random numbers of one step."""
    return _mix(_mix(seed, epoch), step)


def _mix(seed: int, number: int) -> int:
    """A seed per number, in the range that generators take."""
    return (seed * 1_000_003 + number) % 2**63
