"""The noise-immunity suite: how much accuracy each network loses under perturbations.

Kinds of perturbation, at five severities each:

- ``noise`` and ``natural``: noise on pixels, and corruptions (``data/noise.py``).
- ``hardware``: faults of weights and neurons; for an ANN of weights only.
- ``attack``: by each network's own gradient and its teacher's (``evaluate/attacks.py``).
- ``event``: faults of event cameras, for event frames, which have no pixels.

All networks get the same noise and corruptions. Faults depend on the seed only. The levels of faults and attacks are
our choice.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from spikedistill.data.noise import CORRUPTIONS, SEVERITIES, check_severity, corrupt
from spikedistill.errors import ConfigError, one_of
from spikedistill.evaluate.accuracy import accuracy_by_step, predict, standard_error
from spikedistill.evaluate.attacks import ATTACKS, Target
from spikedistill.neuron.dynamics import charge
from spikedistill.neuron.layer import Spiking, is_channels_last
from spikedistill.shapes import Labels
from spikedistill.student.graph import repeat_time

KINDS = ("noise", "natural", "hardware", "attack")
"""Kinds of perturbation for images."""
EVENT_KINDS = ("event", "hardware")
"""Kinds of perturbation for event frames."""


@dataclass(frozen=True)
class Score:
    """The accuracy (percent) of one network under one perturbation.

    Severity 0 is the unchanged images: all of them (kind and name ``clean``), or those that are attacked
    (``attacked``). Kind ``gradient`` is an attack by one of several gradients. Kind ``attack`` is the worst of them for
    each image.

    Args:
        images: the number of images; 0 if it is not known.
        format: number format of the large operations.
    """

    network: str
    kind: str
    name: str
    severity: int
    accuracy: float
    images: int = 0
    format: str = ""

    @property
    def error(self) -> float:
        """Standard error of the accuracy in points, for independent images; NaN if their number is not known."""
        return standard_error(self.accuracy, self.images)


def immunity(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    labels: Labels,
    *,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    attacked: int = 500,
    teachers: Mapping[str, nn.Module] | None = None,
    known: Iterable[Score] = (),
    keep: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """Measure every network under every perturbation.

    Args:
        networks: name -> network, from images in 0..1, or event counts ``[T, B, 2, H, W]``, to logits ``[T, B, K]`` or
            ``[B, K]``. They are not changed.
        images: bytes ``[N, C, H, W]``, or event frames ``[N, T, 2, H, W]`` (``data.events.to_frames``).
        labels: ``[N]``.
        kinds: kinds of perturbation (default: all kinds for such images).
        seed: seed of all random choices.
        dtypes: by network the number format of its large operations (default: float32).
        attacked: number of images that are attacked, drawn by the seed. Attacks take eleven gradients per image,
            severity and entry of ``attacks.gradients``.
        teachers: by network its teacher, on the same device, for a transfer attack (default: no transfer attack).
        known: scores of an interrupted call with the same arguments; they are not measured again.
        keep: called with every score after it is measured.

    Returns:
        One score per network, perturbation and severity. Faults of neurons are only for networks with neurons,
        saturation only for colour images. For attacks see ``Score``.

    Raises:
        ConfigError: if a kind does not exist, or not for such images; if images are not bytes with one label each; if
            no image is attacked; or if no gradient reaches the pixels of a network without a teacher.
    """
    measured = _asked(images, labels, kinds)
    if attacked < 1:
        raise ConfigError(f"attacked (={attacked}) must be 1 image or more. To omit attacks, name the other kinds.")
    formats = {who: (dtypes or {}).get(who, torch.float32) for who in networks}
    found = {(score.network, score.name, score.severity): score for score in known}
    scores: list[Score] = []
    for task in _tasks(measured, networks, images, labels, formats, seed, attacked, teachers or {}):
        if (score := found.get((task.network, task.name, task.severity))) is None:
            form = str(formats[task.network]).removeprefix("torch.")
            score = Score(task.network, task.kind, task.name, task.severity, task.measure(), task.images, form)
            keep(score)
        scores.append(score)
    return scores


def _asked(images: Tensor, labels: Labels, kinds: Sequence[str] | None) -> list[tuple[str, str]]:
    """Kind and name of every perturbation to be measured."""
    possible = EVENT_KINDS if images.ndim == 5 else KINDS
    measured = perturbations(possible if kinds is None else kinds)
    for kind in () if kinds is None else kinds:
        if kind not in possible:
            raise ConfigError(
                f"The kind '{kind}' is not for inputs of shape {tuple(images.shape)}: 'event' is for event frames"
                f" [N, T, 2, H, W], 'noise', 'natural' and 'attack' are for images. Choose from {', '.join(possible)}."
            )
    if images.dtype != torch.uint8 or not len(images) or labels.shape != images.shape[:1]:
        raise ConfigError(
            f"{tuple(images.shape)} of {images.dtype} were given with labels of shape {tuple(labels.shape)}: expected"
            " bytes (torch.uint8), at least one sample, and one label per sample."
        )
    colours = images.ndim == 4 and images.shape[1] == 3
    return [(kind, name) for kind, name in measured if colours or name != "saturate"]


@dataclass(frozen=True)
class _Task:
    """One accuracy to be measured, and the number of its images."""

    network: str
    kind: str
    name: str
    severity: int
    images: int
    measure: Callable[[], float]


def _tasks(
    measured: Sequence[tuple[str, str]],
    networks: Mapping[str, nn.Module],
    images: Tensor,
    labels: Labels,
    formats: Mapping[str, torch.dtype],
    seed: int,
    attacked: int,
    teachers: Mapping[str, nn.Module],
) -> Iterator[_Task]:
    """All measurements in order. What a task needs is made only when it is measured."""
    for who, network in networks.items():
        clean = partial(_accuracy, network, images, labels, formats[who])
        yield _Task(who, "clean", "clean", 0, len(images), clean)
    targets: dict[str, Target] = {}
    if any(kind == "attack" for kind, _ in measured):
        some = sample(len(images), attacked, seed)
        for who, network in networks.items():
            targets[who] = Target(network, teachers.get(who), images[some], labels[some], formats[who], seed)
            yield _Task(who, "attacked", "attacked", 0, len(some), targets[who].clean)
    for kind, name in measured:
        for severity in SEVERITIES:
            changed = cache(partial(corrupt, images, name, severity, seed))
            for who, network in networks.items():
                if kind == "attack":
                    yield from _attacks(who, targets[who], name, severity)
                elif kind != "hardware":
                    under = partial(_accuracy_under, network, changed, labels, formats[who])
                    yield _Task(who, kind, name, severity, len(images), under)
                elif name == "weight-noise" or _neurons(network):
                    broken = partial(fault, network, name, severity, seed)
                    measure = partial(_accuracy_broken, broken, images, labels, formats[who])
                    yield _Task(who, kind, name, severity, len(images), measure)


def _attacks(who: str, target: Target, name: str, severity: int) -> Iterator[_Task]:
    """An attack by each gradient, then the worst of them."""
    for gradient in target.gradients:
        measure = partial(target.accuracy, name, severity, gradient)
        yield _Task(who, "gradient", f"{name} by {gradient}", severity, len(target.labels), measure)
    yield _Task(who, "attack", name, severity, len(target.labels), partial(target.worst, name, severity))


def sample(total: int, count: int, seed: int) -> Tensor:
    """``count`` different random places below ``total``, in ascending order; all of them if there are no more."""
    return torch.randperm(total, generator=Generator().manual_seed(seed))[:count].sort().values


def perturbations(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Kind and name of every perturbation of these kinds.

    Raises:
        ConfigError: if a kind does not exist.
    """
    for kind in kinds:
        one_of("kind of perturbation", kind, dict.fromkeys((*KINDS, *EVENT_KINDS)))
    pixels = [(corruption.kind, name) for name, corruption in CORRUPTIONS.items()]
    others = [("hardware", name) for name in FAULTS] + [("attack", name) for name in ATTACKS]
    return [(kind, name) for kind, name in [*pixels, *others] if kind in kinds]


def _accuracy(network: nn.Module, images: Tensor, labels: Labels, dtype: torch.dtype) -> float:
    return accuracy_by_step(predict(network, images, dtype), labels)[-1]


def _accuracy_under(network: nn.Module, changed: Callable[[], Tensor], labels: Labels, dtype: torch.dtype) -> float:
    return _accuracy(network, changed(), labels, dtype)


def _accuracy_broken(broken: Callable[[], nn.Module], images: Tensor, labels: Labels, dtype: torch.dtype) -> float:
    return _accuracy(broken(), images, labels, dtype)


def _neurons(network: nn.Module) -> dict[str, Spiking]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, Spiking)}


def fault(network: nn.Module, name: str, severity: int, seed: int = 0) -> nn.Module:
    """A copy of the network with a fault of that severity.

    Raises:
        ConfigError: if the fault or severity does not exist.
    """
    one_of("fault", name, FAULTS)
    check_severity(severity)
    make, levels = FAULTS[name]
    faulty = copy.deepcopy(network)
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        make(faulty, levels[severity - 1], generator)
    return faulty


def weight_noise(network: nn.Module, deviation: float, generator: Generator) -> None:
    """Multiply every weight of a convolution or linear layer by ``1 + deviation x normal``: device mismatch."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + deviation * drawn.to(parameter))


class _Pattern:
    """One random number for each neuron of a layer, drawn when its shape is first known and then kept."""

    def __init__(self, draw: Callable[..., Tensor], generator: Generator) -> None:
        self.draw = draw
        self.seed = int(torch.randint(2**62, (), generator=generator))
        self.drawn: Tensor | None = None

    def __call__(self, like: Tensor) -> Tensor:
        """One number per neuron."""
        if self.drawn is None or self.drawn.shape != like.shape[1:]:
            self.drawn = self.draw(like.shape[1:], generator=Generator().manual_seed(self.seed)).to(like.device)
        return self.drawn


def threshold_mismatch(network: nn.Module, deviation: float, generator: Generator) -> None:
    """Multiply each neuron's threshold by ``1 + deviation x normal``, at least by 0.1.

    Potentials are in units of the threshold, so a higher threshold is implemented as a smaller current.
    """
    for layer in _neurons(network).values():
        pattern = _Pattern(torch.randn, generator)

        def weaken(_: nn.Module, given: tuple[Any, ...], pattern: _Pattern = pattern) -> tuple[Any, ...]:
            current = given[0]
            own = (1 + deviation * pattern(current)).clamp_min(0.1)
            return ((current / own).to(current.dtype), *given[1:])

        layer.register_forward_pre_hook(weaken)


def dropped_spikes(network: nn.Module, share: float, generator: Generator) -> None:
    """Drop each spike with this probability; of a count n each of its n spikes."""
    for layer in _neurons(network).values():
        own = Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

        def lose(layer: Spiking, _: Any, result: tuple[Tensor, Any], own: Generator = own) -> tuple[Tensor, Any]:
            spikes, state = result
            counts = (spikes / layer.heights(spikes).to(spikes)).round()
            kept = torch.zeros_like(counts)
            for number in range(layer.neuron.levels):
                stays = torch.rand(spikes.shape, generator=own) >= share
                kept += stays.to(spikes) * (counts > number)
            return torch.where(counts > 0, spikes * (kept / counts), spikes), state

        layer.register_forward_hook(lose)


def stuck_neurons(network: nn.Module, share: float, generator: Generator) -> None:
    """Break this fraction of the neurons: half of them never fire, half fire at every sub-step."""
    for layer in _neurons(network).values():
        pattern = _Pattern(torch.rand, generator)

        def stick(
            layer: Spiking, _: Any, result: tuple[Tensor, Any], pattern: _Pattern = pattern
        ) -> tuple[Tensor, Any]:
            spikes, state = result
            drawn = pattern(spikes)
            always = layer.neuron.levels * layer.heights(spikes).to(spikes)
            spikes = torch.where(drawn < share / 2, torch.zeros_like(always), spikes)
            return torch.where((drawn >= share / 2) & (drawn < share), always, spikes), state

        layer.register_forward_hook(stick)


def membrane_noise(network: nn.Module, deviation: float, generator: Generator) -> None:
    """Add normal noise to every potential after the charge of every step, in units of the threshold.

    Sub-steps within a step fire from the same charge, so it is drawn once for them. The noise is added to the current.
    If the neuron scales its input down, the noise is scaled up to compensate.
    """
    for layer in _neurons(network).values():
        own = Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

        def shake(layer: Spiking, given: tuple[Any, ...], own: Generator = own) -> tuple[Any, ...]:
            current, timesteps, repeats, *rest = given
            current = repeat_time(current, repeats)
            drawn = torch.randn(current.shape, generator=own).to(current)
            one = torch.ones_like(layer.leak)
            gain = charge(one, 0 * one, layer.neuron, layer.leak)
            shaken = current + deviation * (layer.heights(current) / gain).to(current) * drawn
            order = torch.channels_last if is_channels_last(current) else torch.contiguous_format
            return (shaken.contiguous(memory_format=order), timesteps, 1, *rest)

        layer.register_forward_pre_hook(shake)


Levels = tuple[float, float, float, float, float]
FAULTS: dict[str, tuple[Callable[[nn.Module, float, Generator], None], Levels]] = {
    "weight-noise": (weight_noise, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "threshold-mismatch": (threshold_mismatch, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "dropped-spikes": (dropped_spikes, (0.01, 0.02, 0.05, 0.10, 0.20)),
    "stuck-neurons": (stuck_neurons, (0.001, 0.002, 0.005, 0.01, 0.02)),
    "membrane-noise": (membrane_noise, (0.02, 0.05, 0.10, 0.15, 0.20)),
}
"""Fault -> the function that applies it, and its five levels."""
