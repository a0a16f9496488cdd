"""The report of a conversion, for people and for files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One activation of the ANN and the layer of neurons that replaced it.

    ``threshold`` is the mean over channels if thresholds are per channel. ``expected_rate`` is in spikes per neuron and
    step, 0..1. ``silent`` means that the layer never fires on the calibration images.
    """

    name: str
    kind: str
    source: str
    threshold: float
    expected_rate: float | None
    note: str = ""
    silent: bool = False


@dataclass(frozen=True)
class PoolSite:
    """One call of max pooling in the ANN, and what it is in the student."""

    name: str
    kind: str
    source: str
    note: str


@dataclass(frozen=True)
class Report:
    """What became of every activation and every max pooling."""

    sites: tuple[Site, ...]
    timesteps: int
    inherited: bool
    pools: tuple[PoolSite, ...] = ()

    def __str__(self) -> str:
        """A table for people."""
        kind = "inherited" if self.inherited else "fresh"
        lines = [f"{len(self.sites)} layers of neurons, {kind} weights, T={self.timesteps}{self._said_of_silent()}"]
        width = max(len(name) for name in [*(s.name for s in self.sites), *(p.name for p in self.pools)])
        for site in self.sites:
            rate = "" if site.expected_rate is None else f"  rate {site.expected_rate:.3f}"
            note = f"  ({site.note})" if site.note else ""
            lines.append(
                f"  {site.name:{width}}  {site.kind:10}  threshold {site.threshold:8.4g}{rate}  {site.source}{note}"
            )
        lines += [f"  {pool.name:{width}}  {pool.kind:10}  {pool.note}  {pool.source}" for pool in self.pools]
        return "\n".join(lines)

    def _said_of_silent(self) -> str:
        """Which layers never fire on the calibration images, and what to do; empty if all fire."""
        silent = [site.name for site in self.sites if site.silent]
        if not silent:
            return ""
        return (
            f"; never firing on the calibration images: {', '.join(silent)}. No signal passes these layers: use more"
            " time steps, or a neuron with less leak or with decay_input=False"
        )
