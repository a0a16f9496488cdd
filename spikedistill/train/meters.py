"""Sums over an epoch: loss terms, accuracy, and at some steps the firing rate."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from spikedistill.evaluate.firing import firing_rates
from spikedistill.student.student import Student

EVERY = 20
"""The firing rate is measured once in every ``EVERY`` steps."""


@dataclass
class Meters:
    """Sums over an epoch, from which its line in metrics.jsonl is made."""

    steps: int = 0
    samples: int = 0
    correct: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, terms: Mapping[str, float], correct: int, samples: int) -> None:
        """Count one step."""
        self.steps, self.samples, self.correct = self.steps + 1, self.samples + samples, self.correct + correct
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self, measure: str = "accuracy") -> dict[str, float]:
        """Mean terms, their sum, and the accuracy in percent; or what ``measure`` names, which was counted instead."""
        if not self.steps:
            return {}
        terms = {name: value / self.steps for name, value in self.sums.items()}
        return {"loss": sum(terms.values()), **terms, f"train_{measure}": 100.0 * self.correct / self.samples}


class FiringRateMeter:
    """The firing rate of a student, measured at some steps only, since counting takes a pass over all spikes."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student if isinstance(student, Student) else None
        self.percent: float | None = None

    def due(self, step: int) -> bool:
        """Whether the firing rate is measured at this step."""
        return self.student is not None and step % EVERY == 0

    @contextlib.contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Count the spikes of this step, if the firing rate is measured at it."""
        if self.student is None or not self.due(step):
            yield
            return
        with firing_rates(self.student) as rates:
            yield
        if rates.possible_spikes:  # all steps trained as one have none
            self.percent = 100.0 * rates.mean()

    def facts(self) -> dict[str, float]:
        """The last firing rate, spikes per neuron and sub-step in percent."""
        return {} if self.percent is None else {"firing_rate": self.percent}
