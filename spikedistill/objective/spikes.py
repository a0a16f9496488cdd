"""Distilling Spikes: a large SNN teaches a small one by its spikes (Kushawaha et al., ICPR 2020, arXiv 2005.00288).

The idea is known to us from the paper's abstract and from memory: spikes of the teacher's layers are counted in windows
over time, over the whole train or over a sliding window, and the student's counts are brought near to them. We do not
know its distances, windows, layers and weights. These are this project's choices: to divide counts by the length of the
window, and the distance by the teacher's size; to pair the last layers of the stages; and every constant.

Windows are given in steps of the student. A teacher of another T is counted over the same parts of its own train; a
step of which a window covers a part counts in part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from spikedistill.answer import Learner
from spikedistill.errors import ConfigError
from spikedistill.objective.features import STAGE, make_adapter, match_size
from spikedistill.objective.kdsnn import KDSNNResponse
from spikedistill.objective.terms import NO_TEACHER, Batch, Needs, Pairs, Terms, check_weight, identity

Distance = Literal["l2", "l1"]
DEPTHS = 3
"""Layers that are paired by their depth, where networks have no stages."""


@dataclass(frozen=True)
class DistillingSpikes(KDSNNResponse):
    """``(1 - alpha) CE + alpha tau^2 KL + weight * distance``, the mean distance of spike counts over all pairs."""

    alpha: float = 0.0
    """Weight of the soft targets against the labels, 0 to 1. By default spikes alone teach."""
    spike_pairs: Pairs = ()
    """Pairs of layers of neurons (teacher, student) whose spikes are compared (default: the last of each stage)."""
    window: int = 0
    """Time steps of the student in a window; 0 for the whole train."""
    stride: int = 1
    """Time steps from one window to the next."""
    distance: Distance = "l2"
    """Distance of counts: squared (l2) or absolute (l1), relative to the teacher's counts."""
    weight: float = 1.0
    """Weight of the distance, 0 or more."""
    adapt: bool | None = None
    """Compare through 1 x 1 convolutions even if channels are equal in number (default: True unless weights are
    inherited)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("weight", self.weight)
        if self.window < 0 or self.stride < 1:
            raise ConfigError(
                f"window (={self.window}) and stride (={self.stride}) are time steps: give a window of 0 or more, and a"
                " stride of 1 or more."
            )

    @property
    def needs(self) -> Needs:
        """Spikes of both networks; with a window at every time step."""
        theirs, ours = zip(*self.spike_pairs) if self.spike_pairs else ((), ())
        layers = Needs(teacher_spikes=theirs, student_spikes=ours, every_step=self.window > 0)
        return super().needs | layers

    def settled(self, teacher: Learner | None, student: Learner, inherits: bool) -> "DistillingSpikes":
        """The same objective with ``spike_pairs`` and ``adapt`` set.

        Raises:
            ConfigError: if the teacher has no spikes, the window is longer than the student's T, or both networks have
                different levels and are not adapted.
        """
        steps = getattr(student, "timesteps", self.window)
        if self.window > steps:
            raise ConfigError(
                f"window (={self.window}) is longer than the student's T (={steps}): give at most {steps}."
            )
        if teacher is None:
            if self.spike_pairs and self.adapt is not None:
                return self
            raise ConfigError(NO_TEACHER)
        if not teacher.layers():
            raise ConfigError(
                "This objective needs a spiking teacher, and the teacher is an ANN: give a run of 'distill', or take"
                " --method kdsnn."
            )
        adapt = not inherits if self.adapt is None else self.adapt
        levels = [
            network.conversion.neuron_model.levels for network in (teacher, student) if hasattr(network, "conversion")
        ]
        if not adapt and len(set(levels)) > 1:
            raise ConfigError(
                f"Teacher and student fire up to {levels[0]} and {levels[1]} spikes per step, so their counts differ in"
                " scale: give --adapt True, or both the same --levels."
            )
        pairs = self.spike_pairs or layers_at_ends(teacher.layers(), student.layers())
        return replace(self, spike_pairs=pairs, adapt=adapt)

    def without_labels(self) -> "DistillingSpikes":
        """The same objective without the cross-entropy: with alpha 0 spikes alone teach, with 1 soft targets too.

        Raises:
            ConfigError: if alpha or label_smoothing were chosen for labels.
        """
        if self.alpha not in (0.0, 1.0):
            raise ConfigError(
                f"alpha (={self.alpha}) weights labels, and the images have none: give 0, then spikes alone teach, or 1"
                " for soft targets too."
            )
        super().without_labels()  # refuses label_smoothing
        return self

    def modules(self, probe: Batch, teacher: Learner | None) -> nn.ModuleDict:
        """1 x 1 convolutions (for vectors linear layers) where channels differ, or for all pairs with ``adapt``."""
        theirs, ours = probe.require_teacher().spikes, probe.student.spikes
        pairs = enumerate(self.spike_pairs)
        return nn.ModuleDict({str(n): make_adapter(ours[b][0], theirs[a][0], bool(self.adapt)) for n, (a, b) in pairs})

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """The terms ``labels``, ``soft`` if alpha is above 0, and ``distance``; without labels no ``labels``."""
        teacher, steps = batch.require_teacher(), len(batch.student.logits)
        response = super().__call__(batch, modules) if self.alpha else self.hard(batch)
        distances = []
        for number, (theirs, ours) in enumerate(self.spike_pairs):
            windows = windows_of(steps, self.window, self.stride)
            wanted = window_rates(teacher.spikes[theirs].float(), windows, steps).flatten(0, 1)
            seen = window_rates(batch.student.spikes[ours].float(), windows, steps).flatten(0, 1)
            seen, wanted = match_size(modules[str(number)](seen), wanted)
            distances.append(relative_distance(seen, wanted, self.distance, batch.mean_over_processes))
        return {**response, "distance": self.weight * torch.stack(distances).mean()}


def windows_of(timesteps: int, window: int, stride: int) -> list[tuple[int, int]]:
    """First step of each window, and the step after its last.

    >>> windows_of(6, 4, 2), windows_of(6, 0, 1)
    ([(0, 4), (2, 6)], [(0, 6)])
    """
    length = window or timesteps
    return [(begin, begin + length) for begin in range(0, timesteps - length + 1, stride)]


def window_rates(spikes: Tensor, windows: Sequence[tuple[int, int]], timesteps: int) -> Tensor:
    """Mean spikes per step in windows, for a train that lasts as long as ``timesteps`` steps of the student.

    Args:
        spikes: counts ``[T', B, ...]``; T' may be another number of steps.
        windows: first step and the step after the last, in steps of the student.
        timesteps: T of the student.

    Returns:
        ``[windows, B, ...]``, per step of T'.

    >>> train = torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None]
    >>> window_rates(train, [(0, 1), (0, 2)], 2)[:, 0].tolist()
    [0.5, 0.75]
    """
    if windows == [(0, timesteps)]:
        return spikes.mean(0, keepdim=True)
    steps = torch.arange(len(spikes), device=spikes.device)
    ratio = len(spikes) / timesteps
    ends = torch.tensor(windows, dtype=torch.float32, device=spikes.device) * ratio
    covered = torch.minimum(ends[:, 1:], steps + 1.0) - torch.maximum(ends[:, :1], steps.float())
    shares = covered.clamp_min(0) / (ends[:, 1:] - ends[:, :1])
    with torch.autocast(spikes.device.type, enabled=False):  # 1/3 rounds to 0.334 in bfloat16
        return torch.tensordot(shares.to(spikes.dtype), spikes, 1)


def relative_distance(
    student: Tensor, teacher: Tensor, kind: Distance = "l2", whole: Callable[[Tensor], Tensor] = identity
) -> Tensor:
    """Mean squared or absolute difference, divided by the teacher's mean square or mean absolute value, a scalar.

    It is 0 if both are equal and 1 for a silent student. ``whole`` is ``Batch.mean_over_processes``.
    """
    if kind == "l1":
        return (student - teacher).abs().mean() / whole(teacher.abs().mean()).clamp_min(1e-12)
    return (student - teacher).square().mean() / whole(teacher.square().mean()).clamp_min(1e-12)


def layers_at_ends(teacher: Sequence[str], student: Sequence[str]) -> Pairs:
    """Pair the last layers of neurons of both networks' stages, from the last stage backwards.

    Networks without stages (layer1, stage1, ...) are paired at three depths instead.

    >>> layers_at_ends(["layer1.0.relu", "layer1.1.relu", "layer2.0.relu"], ["layer1.0.relu", "layer2.0.relu"])
    (('layer1.1.relu', 'layer1.0.relu'), ('layer2.0.relu', 'layer2.0.relu'))
    >>> layers_at_ends(["a", "b", "c", "d"], ["A", "B"])
    (('b', 'A'), ('d', 'B'))
    """
    theirs, ours = (_last_of_stages(layers) for layers in (teacher, student))
    if not theirs or not ours:
        count = min(DEPTHS, len(teacher), len(student))
        theirs, ours = (
            [layers[(number + 1) * len(layers) // count - 1] for number in range(count)]
            for layers in (teacher, student)
        )
    return tuple(zip(reversed(theirs), reversed(ours)))[::-1]


def _last_of_stages(layers: Sequence[str]) -> list[str]:
    found: dict[str, str] = {}
    for layer in layers:
        if (stage := STAGE.match(layer)) is not None:
            found[stage[0]] = layer
    return list(found.values())
