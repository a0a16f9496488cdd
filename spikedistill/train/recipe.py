"""The choices of a run as frozen values, checked as a whole, saved beside the weights."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

from spikedistill.compute.place import Convolutions, Place, Precision, choose_place
from spikedistill.data.augment import Augment
from spikedistill.data.feed import Feed, MemoryFeed, PairFeed
from spikedistill.data.images import ImageSet, load_images
from spikedistill.errors import ConfigError


@dataclass(frozen=True)
class Data:
    """What comes in."""

    name: Annotated[str, arg(name="data")] = "digits"
    """A set (digits, mnist, fashion-mnist, cifar10, cifar100), a folder of images by class, or a .npz file, which may
    also hold event frames."""
    source: str | None = None
    """Images of the same classes beside event frames, for methods with a second input stream: a set, folder or file."""
    paired: bool = False
    """With source: take the image with the same number as the recording, instead of one of its class at random."""
    data_dir: str | None = None
    """Where named sets lie; else $SPIKEDISTILL_DATA; else ./data."""
    image_size: int | None = None
    """Side in pixels to which the images of a folder are resized."""
    validation: float = 0.1
    """Share of the training set held out for choosing (0: none)."""
    crop: int = 0
    """Augmentation: pixels of padding before a random crop."""
    border: Literal["zeros", "mirror"] = "zeros"
    """Augmentation: what that padding is, zeros or the image mirrored at its border."""
    flip: bool = False
    """Augmentation: mirror every image in every other epoch, half of them in each."""
    cutout: int = 0
    """Augmentation: side in pixels of an erased square."""
    policy: Literal["none", "trivial", "autoaugment"] = "none"
    """Augmentation: a policy of colour and shape changes."""
    noise: float = 0.0
    """Augmentation: largest standard deviation of Gaussian noise, 0 to 1; every image draws its own (0.1 is much)."""

    def augment(self) -> Augment:
        """The augmentation that the fields describe."""
        return Augment(self.crop, self.flip, self.cutout, self.policy, self.border, self.noise)

    def load(self) -> ImageSet:
        """The set that the fields name; a ``DataError`` where there is none."""
        return load_images(self.name, self.data_dir, self.image_size)

    def load_source(self) -> ImageSet | None:
        """The images of the second input stream, if there is one."""
        return None if self.source is None else load_images(self.source, self.data_dir)

    def feed(self, images: ImageSet, training: "Training", source: ImageSet | None = None) -> Feed:
        """What yields the batches of a training; with a source, pairs.

        Raises:
            ConfigError: if there are fewer samples than one batch.
            DataError: if the source has other classes.
        """
        feed = MemoryFeed(images, training.batch_size, training.seed, self.augment(), self.validation, training.views)
        return feed if source is None else PairFeed(feed, source, self.paired)

    def faults(self) -> list[str]:
        """What cannot work, one sentence each."""
        faults = []
        if not 0 <= self.validation < 1:
            faults.append(f"validation (={self.validation}) is a share of the training set: 0 <= validation < 1")
        if self.image_size is not None and self.image_size < 1:
            faults.append(f"image_size (={self.image_size}) is a side in pixels: 1 or more")
        if self.crop < 0 or self.cutout < 0:
            faults.append(f"crop (={self.crop}) and cutout (={self.cutout}) are sizes in pixels: 0 or more")
        if not 0 <= self.noise <= 1:
            faults.append(f"noise (={self.noise}) is a deviation of pixels in 0..1: 0 to 1")
        if self.paired and self.source is None:
            faults.append("paired needs a source, the images that go with the recordings: give --source")
        return faults


@dataclass(frozen=True)
class Training:
    """How a network is trained."""

    epochs: int = 10
    """Passes over the training set."""
    batch_size: int = 128
    """Images a step, over all processes."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    lr: float | None = None
    """Highest learning rate; by default 0.1, for a student that inherits its weights or starts from a run 0.02."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Decay of weight matrices and kernels; biases, norms and thresholds have none."""
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    """Cosine: short warm-up, then half a cosine to 0. One-cycle: up and down in straight lines."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises."""
    clip: float = 0.0
    """Largest norm of the gradient (0: no limit)."""
    ema: float = 0.0
    """Decay a step of the averaged weights that become the result (0: none; 0.999 is usual)."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    views: int = 0
    """0: every epoch sees new augmentations; k: those of k epochs in turn, the teacher's answers kept on disk."""
    cache_dir: str | None = None
    """With views: where the teacher's answers lie, also those of other runs; by default the run's own directory."""
    precision: Precision = "auto"
    """Number format of the large operations; auto takes bf16 where the processor has it."""
    channels_last: bool = True
    """Memory order of images inside the network; faster for convolutions nearly everywhere. Left out where oneDNN's
    gradients would be wrong with it (a strided 1 x 1 convolution of few channels on a CPU)."""
    convolutions: Convolutions = "auto"
    """PyTorch's, or on a CPU in float32 our own by Winograd's algorithm; auto takes ours where they were found to be
    faster: on processors with AVX2 and without AVX-512, where there is a C compiler."""
    compile: bool = False
    """Compile the whole training step of an ANN (a minute at the start, then about a sixth faster on a CPU); of a
    student only with gradient=quantised."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto takes the best there is."""
    keep_memory: bool = True
    """On a Linux CPU hold freed memory instead of returning it to the system: faster, and a third to a half more
    resident; without it less memory (see also --recompute)."""
    checkpoint_minutes: float = 5.0
    """Minutes between resumable checkpoints within an epoch (each epoch ends with one)."""
    tensorboard: bool = False
    """Also write TensorBoard events."""

    def place(self) -> Place:
        """Where a run computes; a ``ConfigError`` where there is no such device."""
        return choose_place(
            self.device, self.precision, self.channels_last, self.convolutions, self.compile, self.keep_memory
        )

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return 0.1 if self.lr is None else self.lr

    def faults(self) -> list[str]:
        """What cannot work, one sentence each."""
        least = {"epochs": 1, "batch_size": 2}
        least |= dict.fromkeys(("weight_decay", "clip", "views", "checkpoint_minutes"), 0)
        faults = [
            f"{name} (={getattr(self, name)}) must be {low} or more"
            for name, low in least.items()
            if not getattr(self, name) >= low
        ]
        if not self.peak >= 0:
            faults.append(f"lr (={self.lr}) must be 0 or more")
        if 1 <= self.epochs <= self.views and self.cache_dir is None:
            faults.append(f"views (={self.views}) come again only in more epochs (={self.epochs}): lower it, or give 0")
        if self.cache_dir is not None and not self.views:
            faults.append(f"cache_dir (={self.cache_dir!r}) holds the answers to repeated views: give views, 1 or more")
        for name in ("momentum", "warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} (={getattr(self, name)}) must be 0 or more and below 1")
        return faults


def check(*parts: Any) -> None:
    """Report every fault of a recipe's parts at once.

    Raises:
        ConfigError: if any part has a fault.
    """
    faults = [fault for part in parts for fault in part.faults()]
    if faults:
        raise ConfigError("The recipe cannot work: " + "; ".join(faults) + ".")
