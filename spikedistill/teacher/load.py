"""Trained ANNs from wherever users have them, as networks that own their input normalisation.

``build_network`` makes an architecture by name; ``load_weights`` fills it from safetensors, ``.npz`` or a torch file
(read with ``weights_only=True``; nothing is ever unpickled); ``Teacher`` freezes it.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikedistill.errors import ConfigError, WeightsError, one_of, unknown
from spikedistill.files import read_tensors
from spikedistill.shapes import ClassLogits, Image, Logits
from spikedistill.teacher.taps import taps
from spikedistill.teacher.zoo import ZOO


def is_library_s(name: str) -> bool:
    """Whether an architecture's name asks for a network of torchvision or timm."""
    return name.startswith(("torchvision/", "timm/"))


def is_elsewhere(name: str) -> bool:
    """Whether an architecture's name asks for a network that is not the zoo's."""
    return is_library_s(name) or ".py:" in name


@dataclass(frozen=True)
class Architecture:
    """What it takes to build a network again.

    Args:
        name: a zoo name, ``torchvision/NAME``, ``timm/NAME``, or ``FILE.py:FUNCTION`` (called with ``classes``).
        classes: outputs.
        channels: input channels.
        width: channels of the first stage (zoo only); the architecture's own where not given.

    Raises:
        ConfigError: if a size is below 1, or a network from elsewhere is to have a width.
    """

    name: str
    classes: int = 10
    channels: int = 3
    width: int | None = None

    def __post_init__(self) -> None:
        for field, value in (
            ("classes", self.classes),
            ("channels", self.channels),
            ("width", 1 if self.width is None else self.width),
        ):
            if value < 1:
                raise ConfigError(f"{field} (={value}) of '{self.name}' must be 1 or more.")
        if self.width is not None and is_elsewhere(self.name):
            raise ConfigError(f"width (={self.width}) is for the zoo's networks, '{self.name}' has its own: give none.")

    def build(self) -> nn.Module:
        """The network with fresh weights.

        Raises:
            ConfigError: if there is no such architecture.
        """
        if ".py:" in self.name:
            return _own(self.name, self.classes)
        if is_library_s(self.name):
            origin, _, name = self.name.partition("/")
            return _library(origin, name, self.classes, self.channels)
        if self.name not in ZOO:
            raise ConfigError(
                unknown("architecture", self.name, ZOO)
                + " Also: torchvision/NAME, timm/NAME, FILE.py:FUNCTION, or a run directory or weights file of 'teach'."
            )
        extra = {} if self.width is None else {"width": self.width}
        return ZOO[self.name](classes=self.classes, channels=self.channels, **extra)

    def facts(self) -> dict[str, Any]:
        """The fields as JSON keeps them."""
        return asdict(self)


def _library(origin: str, name: str, classes: int, channels: int) -> nn.Module:
    if origin == "torchvision":
        import torchvision

        one_of("torchvision model", name, torchvision.models.list_models())
        if channels != 3:
            raise ConfigError(
                f"torchvision's models take 3 input channels, the data have {channels}: use a zoo network."
            )
        return torchvision.models.get_model(name, weights=None, num_classes=classes)
    timm = _timm(name)
    if not timm.is_model(name):
        raise ConfigError(unknown("timm model", name, timm.list_models()))
    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)


def _timm(name: str) -> Any:
    """The optional library that a network of this name comes from."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"'timm/{name}' needs timm: pip install timm.") from error
    return timm


def _own(name: str, classes: int) -> nn.Module:
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"spikedistill_own_{Path(file).stem}", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ConfigError(f"The file '{file}' of architecture '{name}' does not exist: check the path.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(Path(file).resolve().parent))  # for modules that lie beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(
            f"The file '{file}' cannot be imported ({type(error).__name__}: {error}): mend it."
        ) from error
    finally:
        sys.path.pop(0)
    maker = getattr(module, function, None)
    if not callable(maker):
        raise ConfigError(unknown(f"function in '{file}'", function, [key for key in vars(module) if key[0] != "_"]))
    try:
        network = maker(classes=classes)
    except TypeError as error:
        raise ConfigError(
            f"'{name}' cannot be called with classes={classes} ({error}): let it take 'classes'."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"'{name}' returned {type(network).__name__}: it must return a torch.nn.Module.")
    return network


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the facts beside them, from ``.safetensors``, ``.npz`` or a torch file.

    Raises:
        WeightsError: if the file is missing, truncated, holds pickled objects or is not a set of tensors.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return read_tensors(path)
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
                return {name: torch.from_numpy(np.asarray(pack[name])) for name in pack.files}, {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything in numpy, zipfile and torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"'{path}' cannot be read safely ({reason}): it is truncated, or it holds pickled Python objects, which are"
            " never loaded; save the state_dict alone, best as .safetensors."
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"'{path}' holds {type(loaded).__name__}, not a state_dict (names to tensors): save one.")
    return dict(loaded), {}


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill a network; a leading ``module.`` of all names (DataParallel) is dropped.

    Raises:
        WeightsError: if a tensor is missing, superfluous, of the wrong shape or not finite.
    """
    wanted = network.state_dict()
    if all(name.startswith("module.") for name in tensors) and not wanted.keys() & tensors.keys():
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    faults = [f"'{name}' is missing" for name in wanted.keys() - tensors.keys() - optional]
    faults += [f"'{name}' has no place in the network" for name in tensors.keys() - wanted.keys()]
    faults += [
        f"'{name}' has shape {tuple(tensors[name].shape)}, the network's has {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    faults += [f"'{name}' holds NaN or infinity" for name, value in tensors.items() if not torch.isfinite(value).all()]
    if faults:
        shown = "; ".join(sorted(faults)[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise WeightsError(
            f"The weights of {source} do not fit {type(network).__name__}: {shown}. Give the architecture, width and"
            " class count that they were trained with."
        )
    network.load_state_dict(tensors, strict=False)


class Normalised(nn.Module):
    """A network with the normalisation of its inputs: raw images in 0..1 go in.

    Args:
        network: any module from images ``[B, C, H, W]`` to logits ``[B, K]``.
        mean: one value a channel.
        std: one value a channel, above 0.

    Raises:
        ConfigError: if a deviation is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ConfigError(f"mean {tuple(mean)} and std {tuple(std)} need one value a channel, std above 0.")
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def answer(self, images: Image) -> ClassLogits:
        """Images ``[B, C, H, W]`` in 0..1 to logits ``[B, K]``."""
        logits = self.network(self.normalise(images))
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"{type(self.network).__name__} returns {type(logits).__name__}, not a tensor of logits: switch its"
                " auxiliary outputs off, or wrap it in a module that returns one."
            )
        return logits

    def normalise(self, images: Image) -> Image:
        """Images in 0..1 as the network was trained on."""
        return (images - self.mean) / self.std


class Teacher(Normalised):
    """A trained ANN that stays as it is: frozen, in evaluation mode whatever is asked, owner of its normalisation."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(network, mean, std)
        self.requires_grad_(False)
        self.train(False)

    def forward(self, images: Image) -> ClassLogits:
        """Images ``[B, C, H, W]`` in 0..1 to logits ``[B, K]``."""
        return self.answer(images)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)


class OneStep(Normalised):
    """An ANN in training, seen as a network of one time step, so that the one loop can train it."""

    def forward(self, images: Image) -> Logits:
        """Images ``[B, C, H, W]`` in 0..1 to logits ``[1, B, K]``."""
        return self.answer(images)[None]

    def observe(self, images: Image, paths: Sequence[str]) -> tuple[Logits, dict[str, Tensor]]:
        """Logits ``[1, B, K]`` and features ``[1, B, ...]`` at module paths of the network."""
        if not paths:
            return self(images), {}
        with taps(self.network, paths) as seen:
            logits = self(images)
        return logits, {path: feature[None] for path, feature in seen.items()}


def pretrained(name: str) -> tuple[Teacher, Architecture]:
    """A network with the weights that its library publishes: downloaded, unless they lie in the library's cache.

    Args:
        name: ``torchvision/NAME`` (its default weights) or ``timm/NAME``.

    Raises:
        ConfigError: if there is no such network, it has no weights, or they cannot be had.
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
        else:
            network = _timm(model).create_model(model, pretrained=True)
            mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
            architecture = Architecture(name, network.num_classes, len(mean))
    except Exception as error:  # whatever the library and its download raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"The published weights of '{name}' cannot be had ({reason}): check the name and the connection, or give a"
            " weights file with --teacher-network."
        ) from error
    return Teacher(network, mean, std), architecture


def load_teacher(
    source: str | Path,
    *,
    architecture: Architecture | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Teacher, Architecture]:
    """A trained ANN from a run directory or weights file.

    Args:
        source: a run directory of ``spikedistill teach``, or a weights file.
        architecture: what the weights belong to; files of ``teach`` know it themselves.
        mean: input normalisation, one value a channel; files of ``teach`` know it themselves.
        std: likewise.

    Returns:
        The teacher and its architecture.

    Raises:
        WeightsError: if the weights cannot be read or do not fit.
        ConfigError: if architecture or normalisation are neither given nor known to the file.
    """
    path = Path(source)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, facts = read_weights(path)
    if architecture is None:
        if "architecture" not in facts:
            raise ConfigError(f"'{path}' does not say which network its weights belong to: name the architecture.")
        try:
            architecture = Architecture(**facts["architecture"])
        except TypeError as error:
            raise WeightsError(
                f"'{path}' names its network in a way that this version does not know ({error}): name the architecture."
            ) from error
    mean, std = mean or facts.get("mean"), std or facts.get("std")
    if mean is None or std is None:
        raise ConfigError(
            f"'{path}' does not say how its inputs were normalised: give mean and std, one value a channel."
        )
    network = architecture.build()
    load_weights(network, tensors, f"'{path}'")
    return Teacher(network, mean, std), architecture
