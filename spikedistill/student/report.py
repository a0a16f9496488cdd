"""The report of a conversion, for people and for files."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from spikedistill.shapes import steps_and_levels
from spikedistill.student.rules import CallSite


@dataclass(frozen=True)
class Site:
    """One activation of the ANN and the layer of neurons that replaced it.

    ``threshold`` is the mean over channels if thresholds are per channel. ``expected_rate`` is in spikes per neuron and
    sub-step, 0..1. ``silent`` means that the layer never fires on the calibration images.
    """

    name: str
    kind: str
    source: str
    threshold: float
    expected_rate: float | None
    note: str = ""
    silent: bool = False


def sites_of(
    activations: Sequence[CallSite],
    chosen: Mapping[str, tuple[Tensor, float | None]],
    silent: Collection[str],
    levels: int,
) -> tuple[Site, ...]:
    """What became of each activation.

    Args:
        activations: the ANN's, in order.
        chosen: by node the thresholds of its layer, and the spikes per step that are expected of its neurons.
        silent: names of the layers that never fire.
        levels: D, the most spikes within a step.
    """
    found = []
    for one in activations:
        threshold, count = chosen[one.node]
        rate = None if count is None else count / levels
        named = one.name, one.kind, one.source
        found.append(Site(*named, float(threshold.mean()), rate, one.note, one.name in silent))
    return tuple(found)


@dataclass(frozen=True)
class PoolSite:
    """One call of max pooling in the ANN, and what it is in the student."""

    name: str
    kind: str
    source: str
    note: str


@dataclass(frozen=True)
class Corrected:
    """What the correction of one layer did, measured on the calibration images.

    ``before`` and ``after`` are squared errors of the mean over time, in parts of the variance of the ANN's values. Of
    a convolution or linear layer they are taken after its batch norm and sum, of a layer of neurons at its output.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class ConversionReport:
    """What became of every activation and every max pooling, and what was corrected layer by layer."""

    sites: tuple[Site, ...]
    timesteps: int
    inherited: bool
    pools: tuple[PoolSite, ...] = ()
    levels: int = 1
    corrected: tuple[Corrected, ...] = ()
    rounds_down: bool = False
    """Whether neurons that do not leak begin at 0 and take the ANN's weights: rates are then too low throughout."""
    start: str = ""
    """The run or file of the student whose weights and thresholds this one has; empty for a fresh conversion."""

    def __str__(self) -> str:
        """A table for people."""
        kind = f"those of '{self.start}' as" if self.start else "inherited" if self.inherited else "fresh"
        steps = steps_and_levels(self.timesteps, self.levels)
        head = f"{len(self.sites)} layers of neurons, {kind} weights, {steps}"
        lines = [head + self._said_of_corrected() + self._said_of_silent() + self._said_of_rounding()]
        width = max(len(name) for name in [*(s.name for s in self.sites), *(p.name for p in self.pools)])
        for site in self.sites:
            rate = "" if site.expected_rate is None else f"  rate {site.expected_rate:.3f}"
            note = f"  ({site.note})" if site.note else ""
            lines.append(
                f"  {site.name:{width}}  {site.kind:10}  threshold {site.threshold:8.4g}{rate}  {site.source}{note}"
            )
        lines += [f"  {pool.name:{width}}  {pool.kind:10}  {pool.note}  {pool.source}" for pool in self.pools]
        return "\n".join(lines)

    def _said_of_corrected(self) -> str:
        """How many layers were corrected, and the error that is left at the last of them."""
        if not self.corrected:
            return ""
        last = self.corrected[-1]
        change = f"error of '{last.name}' {last.before:.3f} -> {last.after:.3f} of its variance"
        return f"; {len(self.corrected)} layers corrected, {change}"

    def _said_of_rounding(self) -> str:
        """That spikes round activations down, and what to do; empty if they do not."""
        if not self.rounds_down:
            return ""
        return (
            "; the initial potential is 0, so spikes round activations down: give initial=0.5 to round to the nearest"
        )

    def _said_of_silent(self) -> str:
        """Which layers never fire on the calibration images, and what to do; empty if all fire."""
        silent = [site.name for site in self.sites if site.silent]
        if not silent:
            return ""
        return (
            f"; never firing on the calibration images: {', '.join(silent)}. No signal passes these layers: use more"
            " time steps or levels, or a neuron with less leak or with decay_input=False"
        )
