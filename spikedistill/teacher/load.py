"""Trained ANNs from files and libraries, as networks with their own input normalisation.

``Architecture.build`` makes a network by name. ``load_weights`` fills it with tensors from safetensors, ``.npz`` or a
torch file (``weights.py``; nothing is unpickled). ``Teacher`` freezes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.answer import Answer, Learner
from spikedistill.errors import ConfigError, WeightsError, one_of, unknown
from spikedistill.files import note, weights_file
from spikedistill.inputs import AnyLayout, normalise
from spikedistill.shapes import ClassLogits, Logits
from spikedistill.teacher.capture import capture_features
from spikedistill.teacher.code import own_network
from spikedistill.teacher.weights import check_formats, of_network, read_weights
from spikedistill.teacher.zoo import ZOO

LARGEST = 2**24
"""Sizes of networks are below it."""


def from_library(name: str) -> bool:
    """Whether an architecture's name means a network of torchvision or timm."""
    return name.startswith(("torchvision/", "timm/"))


def is_elsewhere(name: str) -> bool:
    """Whether an architecture's name means a network from outside the zoo."""
    return from_library(name) or ".py:" in name


@dataclass(frozen=True)
class Architecture:
    """What it takes to build a network again.

    Args:
        name: a zoo name, ``torchvision/NAME``, ``timm/NAME``, or ``FILE.py:FUNCTION`` (called with ``classes``).
        classes: number of logits, K.
        channels: input channels.
        width: channels of the first stage, for the zoo only (default: the architecture's usual width).

    Raises:
        ConfigError: if a size is below 1, or a width is given for a network from outside the zoo.
    """

    name: str
    classes: int = 10
    channels: int = 3
    width: int | None = None

    def __post_init__(self) -> None:
        sizes = {"classes": self.classes, "channels": self.channels, "width": 1 if self.width is None else self.width}
        for field, value in sizes.items():
            if type(value) is not int or not 1 <= value < LARGEST:
                raise ConfigError(f"{field} (={value!r}) of '{self.name}' must be 1 or more, and below {LARGEST:,}.")
        if self.width is not None and is_elsewhere(self.name):
            raise ConfigError(f"width (={self.width}) is for the zoo's networks, '{self.name}' has its own: omit it.")

    def build(self) -> nn.Module:
        """The network with fresh weights.

        Raises:
            ConfigError: if there is no such architecture, its library is missing, or its code cannot be run.
        """
        if self.names_code:
            return own_network(self.name, self.classes)
        if from_library(self.name):
            origin, _, name = self.name.partition("/")
            return _library(origin, name, self.classes, self.channels)
        if self.name not in ZOO:
            raise ConfigError(
                unknown("architecture", self.name, ZOO)
                + " Also: torchvision/NAME, timm/NAME, FILE.py:FUNCTION, or a run directory or weights file of 'teach'."
            )
        extra = {} if self.width is None else {"width": self.width}
        return ZOO[self.name](classes=self.classes, channels=self.channels, **extra)

    @property
    def names_code(self) -> bool:
        """Whether building the network executes a file of Python code."""
        return ".py:" in self.name

    def facts(self) -> dict[str, Any]:
        """The fields, as JSON values."""
        return asdict(self)


def _library(origin: str, name: str, classes: int, channels: int) -> nn.Module:
    if origin == "torchvision":
        import torchvision

        one_of("torchvision model", name, torchvision.models.list_models())
        if channels != 3:
            raise ConfigError(
                f"torchvision's models take 3 input channels, the data have {channels}: take a network of the zoo."
            )
        return torchvision.models.get_model(name, weights=None, num_classes=classes)
    timm = _timm(name)
    if not timm.is_model(name):
        raise ConfigError(unknown("timm model", name, timm.list_models()))
    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)


def _timm(name: str) -> Any:
    """The optional library timm."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"'timm/{name}' needs timm: pip install timm.") from error
    return timm


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill a network with tensors by name. If no name fits, what is put before all of them is removed: ``of_network``.

    Raises:
        WeightsError: if a tensor is missing, unknown to the network, of the wrong shape or not finite.
    """
    wanted = network.state_dict()
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    held, tensors = len(tensors), of_network(tensors, wanted, source)
    if others := held - len(tensors):
        note(f"{source} holds {others} tensors beside those of the network, which are left out.")
    check_formats(tensors, source)
    faults = [f"missing key '{name}'" for name in wanted.keys() - tensors.keys() - optional]
    faults += [f"unexpected key '{name}'" for name in tensors.keys() - wanted.keys()]
    faults += [
        f"size mismatch for '{name}': {tuple(tensors[name].shape)}, the network's is {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    faults += [
        f"'{name}' holds {tensors[name].dtype}, the network needs {wanted[name].dtype}"
        for name in wanted.keys() & tensors.keys()
        if wanted[name].is_floating_point() and not tensors[name].is_floating_point()
    ]
    faults += [f"'{name}' holds NaN or infinity" for name, value in tensors.items() if not torch.isfinite(value).all()]
    if faults:
        by_name = sorted(faults, key=lambda fault: fault.partition("'")[2])
        shown = "; ".join(by_name[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise WeightsError(
            f"The weights of {source} do not fit {type(network).__name__}: {shown}. Give the architecture, width and"
            " number of classes that they were trained with."
        )
    network.load_state_dict(tensors, strict=False)


class Normalised(nn.Module):
    """A network that takes raw images in 0..1 and normalises them itself.

    Args:
        network: any module from images ``[B, C, H, W]`` to logits ``[B, K]``.
        mean: one value per channel.
        std: one value per channel, above 0.

    Raises:
        ConfigError: if a deviation is not above 0, or the network already normalises its inputs, as students do.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if isinstance(network, Learner):
            raise ConfigError(
                f"A {type(network).__name__} normalises its inputs itself, and a second time would be wrong: do not"
                " wrap it, give it as the teacher itself."
            )
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ConfigError(f"mean {tuple(mean)} and std {tuple(std)} need one value per channel, std above 0.")
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def logits(self, images: Tensor) -> ClassLogits:
        """Images ``[B, C, H, W]`` in 0..1 to logits ``[B, K]``, in any memory order."""
        with AnyLayout():
            logits = self.network(self.normalise(images))
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"{type(self.network).__name__} returns {type(logits).__name__}, not a tensor of logits: switch its"
                " auxiliary outputs off, or wrap it in a module that returns the logits."
            )
        if logits.ndim == 3:
            raise ConfigError(
                f"{type(self.network).__name__} returns logits of shape {tuple(logits.shape)}: expected [B, K]."
                " A network with time steps teaches as SpikingTeacher(...)."
            )
        return logits

    def normalise(self, images: Tensor) -> Tensor:
        """Images in 0..1, normalised as in the network's training."""
        return normalise(images, self.mean, self.std)

    def observe(
        self, inputs: Tensor, paths: Sequence[str] = (), *, spikes: Sequence[str] = (), potentials: Sequence[str] = ()
    ) -> Answer:
        """Logits ``[1, B, K]`` and features ``[1, B, ...]`` at module paths of the network.

        Raises:
            ConfigError: if there is no module at a path, or spikes or potentials are asked for. An ANN has none.
        """
        if spikes or potentials:
            raise ConfigError(
                f"{type(self.network).__name__} is an ANN and has no spikes or potentials at"
                f" {', '.join([*spikes, *potentials])}: take a spiking network, for instance a run of 'distill'."
            )
        if not paths:
            return Answer(self.logits(inputs)[None])
        with capture_features(self.network, paths) as seen:
            logits = self.logits(inputs)
        return Answer(logits[None], {path: feature[None] for path, feature in seen.items()})

    def paths(self) -> list[str]:
        """The paths of all modules of the network."""
        return [name for name, _ in self.network.named_modules() if name]

    def layers(self) -> list[str]:
        """Empty: an ANN has no layers of neurons."""
        return []


class Teacher(Normalised):
    """A trained ANN that never changes: frozen, in evaluation mode, with its own input normalisation.

    Args:
        network: any module from images ``[B, C, H, W]`` to logits ``[B, K]``.
        mean: one value per channel, 0..1 like the images.
        std: one value per channel, above 0 and at most 1.
        class_names: the names of its classes, if they are known.

    Raises:
        ConfigError: if a value is outside its range, for instance for bytes of 0..255.
    """

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], class_names: Sequence[str] = ()
    ) -> None:
        super().__init__(network, mean, std)
        if not all(0 <= value <= 1 for value in mean) or not all(value <= 1 for value in std):
            raise ConfigError(
                f"mean {tuple(mean)} and std {tuple(std)} do not fit images in 0..1: expected mean 0 to 1, std up to 1."
                " Divide values for bytes by 255; put any other normalisation into the network."
            )
        self.class_names = tuple(map(str, class_names))
        self.requires_grad_(False)
        self.train(False)

    def forward(self, images: Tensor) -> ClassLogits:
        """Images ``[B, C, H, W]`` in 0..1 to logits ``[B, K]``."""
        return self.logits(images)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)


class TrainableANN(Normalised):
    """An ANN in training as a network of one time step, so that the same loop trains ANNs and students."""

    def forward(self, images: Tensor) -> Logits:
        """Images ``[B, C, H, W]`` in 0..1 to logits ``[1, B, K]``."""
        return self.logits(images)[None]


def code_refused(path: Path, name: str) -> ConfigError:
    """The error for a weights file that names Python code."""
    return ConfigError(
        f"'{path}' names Python code as its network, '{name}', which is not executed unasked: give the network, or"
        " trust_code=True if you trust the file (on the command line --trust-code)."
    )


def load_published(name: str) -> tuple[Teacher, Architecture]:
    """A network with the weights that its library publishes, downloaded or from the library's cache.

    Args:
        name: ``torchvision/NAME`` (its default weights) or ``timm/NAME``.

    Returns:
        The teacher and its architecture.

    Raises:
        ConfigError: if there is no such network, it has no published weights, or the download fails.
    """
    origin, _, model = name.partition("/")
    network: Any
    try:
        if origin == "torchvision":
            import torchvision

            weights = torchvision.models.get_model_weights(model).DEFAULT
            mean, std = weights.transforms().mean, weights.transforms().std
            architecture = Architecture(name, len(weights.meta["categories"]))
            network = architecture.build()
            network.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
            names = weights.meta["categories"]
        else:
            network = _timm(model).create_model(model, pretrained=True)
            mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
            architecture, names = Architecture(name, network.num_classes, len(mean)), ()
    except Exception as error:  # whatever the library and its download raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"The published weights of '{name}' cannot be loaded ({reason}): check the name and the connection, or give"
            " a weights file with --teacher-network."
        ) from error
    return Teacher(network, mean, std, names), architecture


def load_teacher(
    source: str | Path,
    *,
    architecture: Architecture | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust_code: bool = False,
) -> tuple[Teacher, Architecture]:
    """A trained ANN from a run directory or weights file.

    Args:
        source: a run directory of ``spikedistill teach``, or a weights file.
        architecture: the network of the weights. A file of ``teach`` contains it.
        mean: mean of the input normalisation, one value per channel, 0..1. A file of ``teach`` contains it.
        std: likewise the standard deviation, above 0 and at most 1.
        trust_code: whether to execute the Python file that the weights file names as its network.

    Returns:
        The teacher and its architecture.

    Raises:
        WeightsError: if the weights cannot be read or do not fit.
        ConfigError: if architecture or normalisation are neither given nor in the file, or the file names Python code
            without ``trust_code``.
    """
    path = weights_file(source)
    tensors, facts = read_weights(path)
    if architecture is None:
        if "architecture" not in facts:
            raise ConfigError(
                f"'{path}' does not say which network its weights belong to: name the architecture (--teacher-network)."
            )
        try:
            architecture = Architecture(**facts["architecture"])
            refused = architecture.names_code and not trust_code
        except (ConfigError, TypeError) as error:
            raise WeightsError(
                f"'{path}' names its network in a way that this version does not know ({error}): name the architecture."
            ) from error
        if refused:
            raise code_refused(path, architecture.name)
    mean, std = mean or facts.get("mean"), std or facts.get("std")
    if mean is None or std is None:
        raise ConfigError(
            f"'{path}' does not say how its inputs were normalised: give mean and std, one value per channel"
            " (--teacher-mean and --teacher-std)."
        )
    names = facts.get("class_names") or ()
    if not (_holds(mean, (int, float)) and _holds(std, (int, float)) and _holds(names, str)):
        raise WeightsError(f"The header of '{path}' holds a damaged mean, std or class_names: put a copy of it back.")
    network = architecture.build()
    load_weights(network, tensors, f"'{path}'")
    return Teacher(network, mean, std, names), architecture


def _holds(given: Any, kinds: Any) -> bool:
    """Whether this is a list of such values."""
    return isinstance(given, list | tuple) and all(isinstance(one, kinds) for one in given)
