"""A study: its teachers, its cells, and how they are measured."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spikedistill.recipes.distill import Distill
from spikedistill.recipes.teach import Teach

Budget = Literal["full", "small"]
Measurement = Literal["pairs", "samples", "timesteps", "noise", "energy", "front"]
"""What a study measures on its finished runs, and how it draws the results."""
Recipe = Teach | Distill
"""The recipe of a teacher."""


@dataclass(frozen=True)
class Cell:
    """One student of a study: its teacher, network, method and seed, with its recipe and run directory."""

    teacher: str
    student: str
    method: str
    seed: int
    recipe: Distill
    path: Path
    setting: str = ""
    """What else tells cells of one method apart, for instance temperatures."""


@dataclass(frozen=True)
class Study:
    """A study: what is trained, and what is measured.

    ``prepare`` is called first, and makes data that the study has of its own. ``teachers`` are trained next, in order:
    ANNs, and spiking networks that teach.
    """

    name: str
    title: str
    claim: str
    kind: Measurement
    budget: Budget
    teachers: dict[str, tuple[Recipe, Path]]
    cells: tuple[Cell, ...]
    seeds: int
    prepare: Callable[[], None] | None = None


def width_of(made: Recipe) -> int | None:
    """The width of the network that a recipe trains; None for the network's own."""
    return made.width if isinstance(made, Teach) else made.student.width
