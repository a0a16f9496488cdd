"""The noise-immunity suite: how much accuracy noise costs, network by network, on equal terms.

Kinds of perturbation, five severities each: ``noise`` and ``natural`` corruptions of the pixels (``data/noise.py``),
``hardware`` faults of weights and neurons (of an ANN: of weights alone), ``attack`` by each network's own gradient and
its teacher's (``evaluate/attacks.py``), and of event frames, which know no pixels, ``event``: what event cameras do
wrong.
Every network meets the same noise and corruptions; faults are drawn from the seed alone. The levels of faults and
attacks are this project's choice.
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
"""Of images."""
EVENT_KINDS = ("event", "hardware")
"""Of event frames."""


@dataclass(frozen=True)
class Score:
    """The accuracy (percent) of one network under one perturbation.

    Severity 0 is images as they are: all of them (kind and name ``clean``), or those that are attacked (``attacked``).
    Kind ``gradient`` is an attack by one of several gradients, kind ``attack`` the worst of them, image by image.

    Args:
        images: how many were answered; 0 where that is not known.
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
        """Standard error of the accuracy in points, as of so many independent images; NaN where that is not known."""
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
        networks: name -> network, from images in 0..1, or counts of events ``[T, B, 2, H, W]``, to logits
            ``[T, B, K]`` or ``[B, K]``; left as they were.
        images: bytes ``[N, C, H, W]``, or event frames ``[N, T, 2, H, W]`` (``data.events.to_frames``).
        labels: ``[N]``.
        kinds: which kinds of perturbation; by default all that there are for such images.
        seed: of all that is drawn.
        dtypes: by network the number format of its large operations; float32 where none is named.
        attacked: how many of the images are attacked, drawn by the seed: it takes eleven gradients an image, severity
            and one of ``attacks.gradients``.
        teachers: by network the one whose gradient is tried on it too, on its device; without, there is no transfer.
        known: scores of an interrupted call with the same arguments; they are not measured again.
        keep: told every score that was measured.

    Returns:
        One score a network, perturbation and severity; faults of neurons only for networks that have some, saturation
        only of colours. Attacks as ``Score`` says.

    Raises:
        ConfigError: if there is no such kind, or not for such images, or they are no bytes with a label each; if no
            image is attacked, or no gradient reaches the pixels of a network without a teacher.
    """
    measured = _asked(images, labels, kinds)
    if attacked < 1:
        raise ConfigError(f"attacked (={attacked}) must be 1 image or more; to leave attacks away name other kinds.")
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
    """Kind and name of every perturbation that is measured."""
    possible = EVENT_KINDS if images.ndim == 5 else KINDS
    measured = perturbations(possible if kinds is None else kinds)
    for kind in () if kinds is None else kinds:
        if kind not in possible:
            raise ConfigError(
                f"The kind '{kind}' is not for inputs of shape {tuple(images.shape)}: 'event' is for event frames"
                f" [N, T, 2, H, W], 'noise', 'natural' and 'attack' for images. Choose among {', '.join(possible)}."
            )
    if images.dtype != torch.uint8 or not len(images) or labels.shape != images.shape[:1]:
        raise ConfigError(
            f"{tuple(images.shape)} of {images.dtype} were given with labels of shape {tuple(labels.shape)}: expected"
            " bytes (torch.uint8), one sample or more, and a label each."
        )
    colours = images.ndim == 4 and images.shape[1] == 3
    return [(kind, name) for kind, name in measured if colours or name != "saturate"]


@dataclass(frozen=True)
class _Task:
    """One accuracy that is to be measured, on so many images."""

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
    """All that there is to measure, in order; what a task needs is made when it is measured."""
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
    """So many different places out of a total, drawn, in ascending order; all where there are no more."""
    return torch.randperm(total, generator=Generator().manual_seed(seed))[:count].sort().values


def perturbations(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Kind and name of every perturbation of these kinds.

    Raises:
        ConfigError: if there is no such kind.
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
        ConfigError: if there is no such fault or severity.
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
    """Every weight of a convolution or linear layer times ``1 + deviation x normal``: device mismatch."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + deviation * drawn.to(parameter))


class _Pattern:
    """What is drawn once for each neuron of a layer, when its shape is first seen."""

    def __init__(self, draw: Callable[..., Tensor], generator: Generator) -> None:
        self.draw = draw
        self.seed = int(torch.randint(2**62, (), generator=generator))
        self.drawn: Tensor | None = None

    def __call__(self, like: Tensor) -> Tensor:
        """One number a neuron."""
        if self.drawn is None or self.drawn.shape != like.shape[1:]:
            self.drawn = self.draw(like.shape[1:], generator=Generator().manual_seed(self.seed)).to(like.device)
        return self.drawn


def threshold_mismatch(network: nn.Module, deviation: float, generator: Generator) -> None:
    """Each neuron with a threshold of its own, ``1 + deviation x normal`` times the layer's, at least a tenth of it.

    Potentials count in thresholds, so a higher threshold is a weaker current.
    """
    for layer in _neurons(network).values():
        pattern = _Pattern(torch.randn, generator)

        def weaken(_: nn.Module, given: tuple[Any, ...], pattern: _Pattern = pattern) -> tuple[Any, ...]:
            current = given[0]
            own = (1 + deviation * pattern(current)).clamp_min(0.1)
            return ((current / own).to(current.dtype), *given[1:])

        layer.register_forward_pre_hook(weaken)


def dropped_spikes(network: nn.Module, share: float, generator: Generator) -> None:
    """Each spike lost with that probability."""
    for layer in _neurons(network).values():
        own = Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

        def lose(_: nn.Module, __: Any, result: tuple[Tensor, Any], own: Generator = own) -> tuple[Tensor, Any]:
            spikes, state = result
            return spikes * (torch.rand(spikes.shape, generator=own) >= share).to(spikes), state

        layer.register_forward_hook(lose)


def stuck_neurons(network: nn.Module, share: float, generator: Generator) -> None:
    """That share of the neurons broken: half of them never fire, half fire at every step."""
    for layer in _neurons(network).values():
        pattern = _Pattern(torch.rand, generator)

        def stick(
            layer: Spiking, _: Any, result: tuple[Tensor, Any], pattern: _Pattern = pattern
        ) -> tuple[Tensor, Any]:
            spikes, state = result
            drawn = pattern(spikes)
            always = layer.heights(spikes).to(spikes)
            spikes = torch.where(drawn < share / 2, torch.zeros_like(always), spikes)
            return torch.where((drawn >= share / 2) & (drawn < share), always, spikes), state

        layer.register_forward_hook(stick)


def membrane_noise(network: nn.Module, deviation: float, generator: Generator) -> None:
    """Normal noise on every potential after the charge of every step, in thresholds.

    It comes in with the current, so it is made larger by what a decayed input is made smaller.
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
"""Fault -> what makes it, and its five levels."""
