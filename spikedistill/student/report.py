"""What a conversion did, for people and for files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One activation of the ANN and the neurons that took its place.

    Where thresholds differ by channel, ``threshold`` is their mean; ``expected_rate`` is in spikes a step, 0..1.
    """

    name: str
    kind: str
    source: str
    threshold: float
    expected_rate: float | None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a conversion did, activation by activation."""

    sites: tuple[Site, ...]
    timesteps: int
    inherited: bool

    def __str__(self) -> str:
        """A table for people."""
        kind = "inherited" if self.inherited else "fresh"
        lines = [f"{len(self.sites)} layers of neurons, {kind} weights, T={self.timesteps}"]
        width = max(len(site.name) for site in self.sites)
        for site in self.sites:
            rate = "" if site.expected_rate is None else f"  rate {site.expected_rate:.3f}"
            note = f"  ({site.note})" if site.note else ""
            lines.append(
                f"  {site.name:{width}}  {site.kind:10}  threshold {site.threshold:8.4g}{rate}  {site.source}{note}"
            )
        return "\n".join(lines)
