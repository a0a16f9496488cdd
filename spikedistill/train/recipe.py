"""The choices of a run as frozen values, checked together, saved with the weights."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from tyro.conf import arg

from spikedistill.compute.place import Convolutions, Place, Precision, choose_place
from spikedistill.data.augment import Augment
from spikedistill.data.camera import EventCamera, seen_by_camera
from spikedistill.data.events import Binning
from spikedistill.data.feed import Feed, MemoryFeed, PairFeed
from spikedistill.data.images import NAMED, ImageSet, load_images, load_recordings
from spikedistill.data.recordings import Recordings, holds_recordings
from spikedistill.errors import ConfigError
from spikedistill.files import home


@dataclass(frozen=True)
class Data:
    """Images or event frames, and how they are augmented."""

    name: Annotated[str, arg(name="data")] = "digits"
    """A named set (digits, mnist, fashion-mnist, cifar10, cifar100), a folder with one subfolder of images or event
    recordings per class, a folder of images alone, or a .npz file of images or event frames."""
    labels: Literal["given", "none"] = "given"
    """given: use the labels that the data have; a folder of images alone has none. none: do not use them. Without
    labels the student learns from its teacher only and is measured by agreement with it."""
    source: str | None = None
    """Images of the same classes, for methods with a second input stream besides event frames: a named set, a folder or
    a .npz file. --image-size resizes those of a folder."""
    paired: bool = False
    """With --source: take the image with the same index as the recording, not a random one of the same class. It is
    flipped with its recording, and also cropped with it if both have one size."""
    data_dir: str | None = None
    """Folder of the named sets (default: $SPIKEDISTILL_DATA, else ./data)."""
    image_size: int | None = None
    """Side in pixels: the largest square in the middle of each image of a folder is resized to it, in --data and in
    --source. Event recordings are reduced to it whole, not cropped (default: both stay as they are)."""
    events: Literal["recorded", "simulated"] = "recorded"
    """recorded: those in the data, if they are event recordings. simulated: those that an event camera would send,
    looking at each image along three saccades."""
    event_frames: int | None = None
    """Frames in which the events of a recording are counted (default: --timesteps)."""
    event_binning: Literal["time", "number"] = "time"
    """Frames of recordings last equally long (time) or hold equally many events (number)."""
    event_duration: float | None = None
    """How long a frame of a recording lasts, in the unit of its times, mostly microseconds (default: a part of the
    recording)."""
    sensor: tuple[int, int] | None = None
    """Rows and columns of the camera of a folder of recordings (default: those of the smallest known camera that holds
    all events)."""
    validation: float = 0.1
    """Fraction of the training set held out for validation, 0 to 1."""
    crop: int = 0
    """Augmentation: pixels of padding before a random crop; 0 for none. Also for event frames."""
    border: Literal["zeros", "mirror"] = "zeros"
    """Augmentation: padding of the crop, zeros or the image mirrored at its border."""
    flip: bool = False
    """Augmentation: flip images left to right, each in every other epoch. Also for event frames."""
    cutout: int = 0
    """Augmentation: side in pixels of an erased square; 0 for none."""
    policy: Literal["none", "trivial", "autoaugment"] = "none"
    """Augmentation: a policy of changes in colour and shape."""
    zoom: float = 0.0
    """Augmentation: smallest fraction of the area that a random resized crop keeps, above 0 to 1; 0 for none. 0.5 suits
    photographs."""
    noise: float = 0.0
    """Augmentation: largest standard deviation of Gaussian noise, 0 to 1; each image draws its own. 0.1 is strong."""

    def augment(self) -> Augment:
        """The augmentation that the fields describe."""
        return Augment(self.crop, self.flip, self.cutout, self.policy, self.border, self.noise, self.zoom)

    def load(self) -> ImageSet:
        """The data set that the fields name; raises ``DataError`` if it does not exist."""
        labelled, frames = self.labels == "given", self.event_frames or EventCamera.timesteps
        if self.holds_recordings:
            binning = Binning(self.event_binning, self.event_duration)
            return load_recordings(self.name, Recordings(frames, binning, self.sensor, self.image_size), labelled)
        size = None if self._is_folder(self.source) and not self._is_folder(self.name) else self.image_size
        found = load_images(self.name, self.data_dir, size, labelled)
        return seen_by_camera(found, EventCamera(frames)) if self.events == "simulated" else found

    def at(self, data_dir: str | None) -> "Data":
        """The same data in another folder: a named set in it, or a folder or file of the same name in it, or itself."""
        if data_dir is None:
            return self
        place, inside = home(data_dir), home(data_dir) / home(self.name).name
        if self.name in NAMED or (home(self.name).exists() and not inside.exists()):
            return replace(self, data_dir=data_dir)
        return replace(self, name=str(inside if inside.exists() else place), data_dir=data_dir)

    @property
    def loaded(self) -> str:
        """In words what decides which samples are loaded, as arrays of which values."""
        more: dict[str, Any] = {"size": self.image_size, "frames": self.event_frames, "sensor": self.sensor}
        more |= {"duration": self.event_duration, "events": self.events if self.events != "recorded" else None}
        more |= {"binning": self.event_binning if self.event_binning != "time" else None}
        return ", ".join([self.name, *(f"{name} {value}" for name, value in more.items() if value is not None)])

    @property
    def holds_recordings(self) -> bool:
        """Whether the data are a folder of event recordings."""
        return self._is_folder(self.name) and holds_recordings(home(self.name))

    def load_source(self) -> ImageSet | None:
        """The images of the second input stream, if there is one; those of a folder have ``image_size``."""
        if self.source is None:
            return None
        return load_images(self.source, self.data_dir, self.image_size if self._is_folder(self.source) else None)

    @staticmethod
    def _is_folder(name: str | None) -> bool:
        """Whether a set is a folder, for which ``image_size`` is."""
        return name is not None and name not in NAMED and home(name).is_dir()

    def feed(
        self, images: ImageSet, training: "Training", source: ImageSet | None = None, replacement: float = 0.0
    ) -> Feed:
        """The feed that yields the batches of a training; with a source, pairs of inputs (see ``PairFeed``).

        Raises:
            ConfigError: if there are fewer samples than in one batch.
            DataError: if the source has other classes.
        """
        feed = MemoryFeed(images, training.batch_size, training.seed, self.augment(), self.validation, training.views)
        if source is None:
            return feed
        return PairFeed(feed, source, self.paired, replacement, training.epochs)

    def problems(self) -> list[str]:
        """What cannot work, one sentence for each problem."""
        problems = []
        if not 0 <= self.validation < 1:
            problems.append(f"validation (={self.validation}) must be 0 or more and below 1")
        if self.image_size is not None and self.image_size < 1:
            problems.append(f"image_size (={self.image_size}), a side in pixels, must be 1 or more")
        if self.crop < 0 or self.cutout < 0:
            problems.append(f"crop (={self.crop}) and cutout (={self.cutout}), in pixels, must be 0 or more")
        if not 0 <= self.zoom <= 1:
            problems.append(f"zoom (={self.zoom}), a fraction of the area, must be above 0 to 1, or 0 for none")
        if self.labels == "none" and self.source is not None:
            problems.append(f"source (={self.source}) is paired by labels: give labels=given")
        if not 0 <= self.noise <= 1:
            problems.append(f"noise (={self.noise}), a standard deviation for pixels in 0..1, must be 0 to 1")
        if self.event_frames is not None and self.event_frames < 1:
            problems.append(f"event_frames (={self.event_frames}) must be 1 or more")
        if self.event_duration is not None and (not self.event_duration > 0 or self.event_binning == "number"):
            problems.append(f"event_duration (={self.event_duration}) must be above 0, with event_binning=time")
        if self.sensor is not None and min(self.sensor) < 1:
            problems.append(f"sensor (={self.sensor}), rows and columns, must be 1 or more")
        given = {"event_binning": self.event_binning != "time"}
        given |= {name: getattr(self, name) is not None for name in ("event_duration", "sensor", "event_frames")}
        if self.events == "simulated" and not self.holds_recordings:
            given["event_frames"] = False  # simulated events have frames too
        if not self.holds_recordings and (unused := [name for name, said in given.items() if said]):
            problems.append(f"{', '.join(unused)} of '{self.name}' is for folders of event recordings: omit it")
        if self.events == "simulated" and self.holds_recordings:
            problems.append(f"'{self.name}' holds event recordings already: omit events")
        if self.paired and self.source is None:
            problems.append("paired needs a source, the images of the recordings: give --source")
        return problems


@dataclass(frozen=True)
class Training:
    """How a network is trained."""

    epochs: int = 10
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step, over all processes."""
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """SGD with Nesterov momentum, AdamW, or Muon for the kernels of convolutions and SGD for everything else. Under
    Muon each kernel keeps its norm, which suits networks with batch norm."""
    lr: float | None = None
    """Peak learning rate (default: 0.02 for a student that starts from trained weights, else 0.1; 0.001 for AdamW)."""
    muon_lr: float = 0.24
    """Peak learning rate of the kernels with Muon, relative to the norm of each."""
    norm_lr: float = 1.0
    """Learning rate of the biases of batch norm, relative to --lr. Other than 1, they have weight decay too."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of matrices and kernels; biases, norm layers and thresholds have none."""
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    """Schedule of the learning rate. cosine: warm-up, then half a cosine down. one-cycle: a straight line up, then
    down."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises, 0 to 1."""
    lr_first: float = 0.0
    """Learning rate at the start of the warm-up, relative to the peak, 0 to 1."""
    lr_last: float = 0.0
    """Learning rate at the end, relative to the peak, 0 to 1."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 for no limit."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, which becomes the result; 0 for none, 0.999 is
    usual. After n steps it is at most (1 + n) / (10 + n), so that short trainings are not averaged with their
    beginning."""
    freeze_norm: bool = False
    """Keep the running statistics of batch norm as they are at the start, and normalise by them in training too. Their
    scales and shifts are trained. For a few hundred images, whose batches have statistics of their own."""
    lookahead: int = 0
    """Lookahead: every so many steps the weights go back towards slow weights, which become the result; 0 for none, 5
    is usual."""
    seed: int = 0
    """Seed of initial weights, order of images and augmentation."""
    views: int = 0
    """Draw augmentations for this number of epochs only and repeat them in turn, with the teacher's logits and features
    kept on disk; 0: draw new ones in every epoch."""
    cache_dir: str | None = None
    """With --views: folder of the teacher's logits and features, for several runs (default: the run directory)."""
    precision: Precision = "auto"
    """Number format of convolutions and matrix products; auto takes bf16 if the hardware supports it."""
    channels_last: bool = True
    """Keep the channels of images last in memory, which makes most convolutions faster. It is not used on a CPU for
    networks for which oneDNN computes wrong gradients with it (a strided 1 x 1 convolution of few channels)."""
    convolutions: Convolutions = "auto"
    """torch: PyTorch's convolutions. winograd: this package's, by Winograd's algorithm, on a CPU. auto takes winograd
    where it was measured to be faster, if there is a C compiler: on processors with AVX2 alone in float32, and on those
    with AVX-512 and bfloat16 but without AMX."""
    compile: bool = False
    """Compile the training step: a minute at the start. Then an ANN trains about a sixth faster on a CPU, and a graded
    student a fifth. A student must have one time step, or --gradient quantised."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto takes a GPU if there is one."""
    keep_memory: bool = True
    """On a Linux CPU keep freed memory instead of returning it to the system. This is faster and takes more memory:
    without it the peak was 32 to 64 % smaller. See also --recompute."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints within an epoch; each epoch ends with one."""
    tensorboard: bool = False
    """Also write events for TensorBoard."""

    def place(self) -> Place:
        """Device and number format of the run; raises ``ConfigError`` if the device does not exist."""
        return choose_place(self.device, self.precision, self.channels_last, self.convolutions, self.keep_memory)

    @property
    def peak(self) -> float:
        """The peak learning rate: as given, or the default of the optimiser."""
        usual = 1e-3 if self.optimizer == "adamw" else 0.1
        return usual if self.lr is None else self.lr

    def problems(self) -> list[str]:
        """What cannot work, one sentence for each problem."""
        least = {"epochs": 1, "batch_size": 2}
        least |= dict.fromkeys(("weight_decay", "clip", "views", "checkpoint_minutes"), 0)
        least |= dict.fromkeys(("muon_lr", "norm_lr", "lookahead"), 0)
        problems = [
            f"{name} (={getattr(self, name)}) must be {low} or more"
            for name, low in least.items()
            if not getattr(self, name) >= low
        ]
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed (={self.seed}) must be 0 or more and below 2**63")
        if not self.peak >= 0:
            problems.append(f"lr (={self.lr}) must be 0 or more")
        if 1 <= self.epochs <= self.views and self.cache_dir is None:
            problems.append(
                f"views (={self.views}) repeat only in more epochs (={self.epochs}): lower views, or give 0"
            )
        if self.cache_dir is not None and not self.views:
            problems.append(f"cache_dir (={self.cache_dir!r}) is for repeated views: give views, 1 or more")
        for name in ("momentum", "warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} (={getattr(self, name)}) must be 0 or more and below 1")
        for name in ("lr_first", "lr_last"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} (={getattr(self, name)}), a fraction of the peak, must be 0 to 1")
        if self.ema and self.lookahead:
            problems.append(
                f"ema (={self.ema}) and lookahead (={self.lookahead}) both average weights: give one of them"
            )
        return problems


def check(*parts: Any) -> None:
    """Report every problem of a recipe's parts at once.

    Raises:
        ConfigError: if any part has a problem.
    """
    problems = [problem for part in parts for problem in part.problems()]
    if problems:
        raise ConfigError("The recipe is not valid: " + "; ".join(problems) + ".")
