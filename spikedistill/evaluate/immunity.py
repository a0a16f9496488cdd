"""The noise-immunity suite: how much accuracy noise costs, network by network, on equal terms.

Kinds of perturbation, five severities each: ``noise`` and ``natural`` corruptions of the pixels (``data/noise.py``),
``hardware`` faults of weights and neurons (of an ANN: of weights alone), ``attack`` by each network's own gradient, and
of event frames, which know no pixels, ``event``: what event cameras do wrong.
Every network meets the same noise and corruptions; faults are drawn from the seed alone. The levels of faults and
attacks are this project's choice.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from spikedistill.data.images import evenly
from spikedistill.data.noise import CORRUPTIONS, SEVERITIES, check_severity, corrupt
from spikedistill.errors import ConfigError, one_of
from spikedistill.evaluate.accuracy import accuracy_by_step, in_batches, predict
from spikedistill.neuron.layer import Spiking, is_channels_last
from spikedistill.shapes import Image, Labels
from spikedistill.student.graph import repeat_time

KINDS = ("noise", "natural", "hardware", "attack")
"""Of images."""
EVENT_KINDS = ("event", "hardware")
"""Of event frames."""


@dataclass(frozen=True)
class Score:
    """The accuracy (percent) of one network under one perturbation; severity 0 is the clean set."""

    network: str
    kind: str
    name: str
    severity: int
    accuracy: float


def immunity(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    labels: Labels,
    *,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    attacked: int = 500,
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
        attacked: how many of the images, evenly spaced, are attacked: it takes a gradient each.
        known: scores of an interrupted call with the same arguments; they are not measured again.
        keep: told every score that was measured.

    Returns:
        One score a network, perturbation and severity; faults of neurons only for networks that have some.

    Raises:
        ConfigError: if there is no such kind, or not for such images.
    """
    possible = EVENT_KINDS if images.ndim == 5 else KINDS
    measured = perturbations(possible if kinds is None else kinds)
    for kind in () if kinds is None else kinds:
        if kind not in possible:
            raise ConfigError(
                f"The kind '{kind}' is not for inputs of shape {tuple(images.shape)}: 'event' is for event frames"
                f" [N, T, 2, H, W], 'noise', 'natural' and 'attack' for images. Choose among {', '.join(possible)}."
            )
    formats = {who: (dtypes or {}).get(who, torch.float32) for who in networks}
    found = {(score.network, score.name, score.severity): score for score in known}
    scores: list[Score] = []

    def add(who: str, kind: str, name: str, severity: int, measure: Callable[[], float]) -> None:
        if (who, name, severity) not in found:
            found[who, name, severity] = Score(who, kind, name, severity, measure())
            keep(found[who, name, severity])
        scores.append(found[who, name, severity])

    for who, network in networks.items():
        add(who, "clean", "clean", 0, partial(_accuracy, network, images, labels, formats[who]))
    for kind, name in measured:
        for severity in SEVERITIES:
            changed = cache(partial(corrupt, images, name, severity, seed))
            for who, network in networks.items():
                dtype = formats[who]
                if kind in ("noise", "natural", "event"):
                    add(who, kind, name, severity, lambda: _accuracy(network, changed(), labels, dtype))  # noqa: B023
                elif kind == "attack":
                    given = (network, images, labels, name, severity, seed, dtype, attacked)
                    add(who, kind, name, severity, partial(_attacked, *given))
                elif name == "weight-noise" or _neurons(network):
                    faulty = partial(fault, network, name, severity, seed)
                    add(who, kind, name, severity, lambda: _accuracy(faulty(), images, labels, dtype))  # noqa: B023
    return scores


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


def area(scores: Sequence[Score], network: str, name: str) -> float:
    """Mean height, in percent, of the curve of accuracy over severity 0..5 (trapezoids)."""
    found = {score.severity: score.accuracy for score in scores if score.network == network and score.name == name}
    found[0] = next(score.accuracy for score in scores if score.network == network and score.name == "clean")
    curve = torch.tensor([found[severity] for severity in (0, *SEVERITIES)], dtype=torch.float64)
    return float(torch.trapezoid(curve)) / len(SEVERITIES)


def mean_corruption_error(scores: Sequence[Score], network: str, baseline: str, kind: str = "natural") -> float:
    """Errors over all severities in percent of a baseline's, mean over perturbations, after mCE (arXiv 1903.12261).

    That one takes 15 corruptions, noises among them, and AlexNet as baseline: its figures are others than these.

    Raises:
        ConfigError: if the scores hold nothing of that kind, or no such network.
    """
    names = sorted({score.name for score in scores if score.kind == kind and score.network == network})
    if not names:
        raise ConfigError(f"The scores hold no '{kind}' of '{network}': measure it first.")

    def error(who: str, name: str) -> float:
        found = [100.0 - score.accuracy for score in scores if score.network == who and score.name == name]
        if len(found) != len(SEVERITIES):
            raise ConfigError(f"The scores hold {len(found)} severities of '{name}' for '{who}': expected 5.")
        return sum(found)

    ratios = [error(network, name) / max(1e-9, error(baseline, name)) for name in names]
    return 100.0 * sum(ratios) / len(ratios)


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
    """Normal noise on every potential at every step, in thresholds."""
    for layer in _neurons(network).values():
        own = Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

        def shake(layer: Spiking, given: tuple[Any, ...], own: Generator = own) -> tuple[Any, ...]:
            current, timesteps, repeats, *rest = given
            current = repeat_time(current, repeats)
            drawn = torch.randn(current.shape, generator=own).to(current)
            shaken = current + deviation * layer.heights(current).to(current) * drawn
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
ATTACKED_AT_ONCE = 100
"""Images of a batch under attack."""
ATTACKS: dict[str, tuple[int, Levels]] = {
    "fgsm": (1, (0.5, 1.0, 2.0, 4.0, 8.0)),
    "pgd": (10, (0.5, 1.0, 2.0, 4.0, 8.0)),
}
"""Attack -> gradient steps, and the largest change of a value in 255ths (l-infinity) at the five severities."""


def attack(
    network: nn.Module, images: Image, labels: Labels, *, reach: float, steps: int, generator: Generator
) -> Image:
    """Images changed by at most ``reach`` a value so that the network errs, through the surrogate gradient.

    One step is FGSM (Goodfellow et al., arXiv 1412.6572); more are PGD from a random start, each of 2.5 reach / steps
    (Madry et al., arXiv 1706.06083).
    """
    start = images
    if steps > 1:
        start = (images + reach * (2 * torch.rand(images.shape, generator=generator).to(images) - 1)).clamp(0, 1)
    size = reach if steps == 1 else 2.5 * reach / steps
    changed = start
    for _ in range(steps):
        changed = changed.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(_mean_logits(network, changed), labels), changed)
        moved = changed.detach() + size * slope.sign()
        changed = torch.minimum(torch.maximum(moved, images - reach), images + reach).clamp(0, 1)
    return changed.detach()


def _mean_logits(network: nn.Module, images: Image) -> Tensor:
    """Logits ``[B, K]`` of a network with time or without."""
    logits = network(images).float()
    return logits.mean(0) if logits.ndim == 3 else logits


def _attacked(
    network: nn.Module,
    images: Tensor,
    labels: Labels,
    name: str,
    severity: int,
    seed: int,
    dtype: torch.dtype,
    most: int,
) -> float:
    """Accuracy in percent under attack, on evenly spaced images."""
    steps, levels = ATTACKS[name]
    chosen = evenly(len(images), most)
    images, labels = images[chosen], labels[chosen]
    generator = Generator().manual_seed(seed)
    truths = iter(labels.split(ATTACKED_AT_ONCE))

    def work(batch: Tensor) -> Tensor:
        truth = next(truths).to(batch.device)
        with torch.enable_grad():
            reach = levels[severity - 1] / 255
            changed = attack(network, batch, truth, reach=reach, steps=steps, generator=generator)
        return (_mean_logits(network, changed).argmax(-1) == truth).sum().cpu()

    right = in_batches(network, work, images, dtype, ATTACKED_AT_ONCE)
    return 100.0 * float(torch.stack(right).sum()) / len(labels)
