"""Methods by name: their classes, how a recipe writes an objective, and objectives in users' files."""

import dataclasses
import hashlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spikedistill.errors import ConfigError, unknown
from spikedistill.objective.budget import Budget, Penalty
from spikedistill.objective.cross_kd import CrossKD
from spikedistill.objective.decoupled import TemporalDecoupling
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.qcfs import QCFS
from spikedistill.objective.schedule import Constant, Ramp, Schedule, Switch
from spikedistill.objective.spikes import DistillingSpikes
from spikedistill.objective.temperatures import HeterogeneousTemperatures
from spikedistill.objective.terms import Objective, Sum
from spikedistill.student.calibrate import Rule
from spikedistill.teacher.code import import_object

METHODS: dict[str, type[Objective]] = {
    "direct": Direct,
    "tet": TET,
    "kdsnn-response": KDSNNResponse,
    "kdsnn-feature": KDSNNFeature,
    "kdsnn": KDSNN,
    "temporal-decoupling": TemporalDecoupling,
    "heterogeneous-temperatures": HeterogeneousTemperatures,
    "budget": Budget,
    "distilling-spikes": DistillingSpikes,
    "cross-kd": CrossKD,
    "conversion-qcfs": QCFS,
}
"""Methods that train."""
CONVERSIONS: dict[str, Rule] = {
    "conversion-max": "max",
    "conversion-percentile": "percentile",
    "conversion-least-squares": "least-squares",
}
"""Methods without training, and their rules for thresholds. The recipe then has no objective."""


def find_method(name: str) -> type[Objective]:
    """The class of an objective by its name, or from ``FILE.py:CLASS``; such a file is executed.

    Raises:
        ConfigError: if it does not exist, or is not a frozen dataclass that derives from ``Objective``.
    """
    if ".py:" not in name:
        if name not in METHODS:
            raise ConfigError(unknown("method", name, [*METHODS, *CONVERSIONS]) + " Also: FILE.py:CLASS.")
        return METHODS[name]
    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, Objective) and _is_frozen(found)):
        raise ConfigError(
            f"'{name}' is not an objective: expected a class @dataclass(frozen=True) that derives from"
            " spikedistill.Objective."
        )
    if found.__call__ is Objective.__call__:
        raise ConfigError(f"'{name}' lacks __call__(self, batch, modules), which returns the terms: add it.")
    return found


def _is_frozen(kind: type) -> bool:
    """Whether a class is a dataclass whose values cannot be changed."""
    return dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def name_of(method: Objective) -> str:
    """The name of an objective in tables: its name in ``METHODS``, or ``FILE.py:CLASS``."""
    known = {kind: name for name, kind in METHODS.items()}
    if type(method) in known:
        return known[type(method)]
    file, kind = source_of(method), type(method).__qualname__
    return kind if file is None else f"{file.name}:{kind}"


def source_of(method: Objective) -> Path | None:
    """The file of a user's objective; None for this package's objectives and for classes without a file."""
    if type(method).__module__.split(".")[0] == "spikedistill":
        return None
    try:
        return Path(inspect.getfile(type(method)))
    except (OSError, TypeError):
        return None


def sources_of(method: Objective | None) -> list[Path]:
    """The files of a user's objective; for a sum those of its parts too."""
    parts = method.parts if isinstance(method, Sum) else ()
    found = [] if method is None else [source_of(method), *itertools.chain(*(sources_of(part) for _, part in parts))]
    return [file for file in dict.fromkeys(found) if file is not None]


def written(method: Objective) -> dict[str, Any]:
    """An objective in a form that JSON can hold: name, fields, and for a user's own the SHA-256 of its file."""
    facts: dict[str, Any] = {"name": name_of(method)}
    file = source_of(method)
    if file is not None:
        facts["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return facts | {each.name: _plain(getattr(method, each.name)) for each in dataclasses.fields(method)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, Objective):
        return written(value)
    if isinstance(value, Schedule) and dataclasses.is_dataclass(value):
        return {"name": type(value).__name__, **dataclasses.asdict(value)}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


NAMED: dict[str, type] = {**METHODS, **{kind.__name__: kind for kind in (Sum, Penalty, Constant, Ramp, Switch)}}
"""The names in a written objective and its parts, besides ``FILE.py:CLASS``."""


def from_written(facts: Any, own: Callable[[str, str], type[Objective]]) -> Any:
    """The objective that ``written`` wrote. A missing field has its default.

    Args:
        facts: the objective as read from JSON.
        own: returns the class of a user's objective for its ``FILE.py:CLASS`` and the SHA-256 of its file.

    Raises:
        ConfigError: if its name or a field is unknown, or a value is not allowed.
    """
    name = str(facts.get("name")) if isinstance(facts, Mapping) else str(facts)
    if not isinstance(facts, Mapping) or (".py:" not in name and name not in NAMED):
        raise ConfigError(unknown("method", name, [*METHODS, *CONVERSIONS]))
    kind: Any = own(name, str(facts.get("sha256", ""))) if ".py:" in name else NAMED[name]
    fields = {field: _read(value, own) for field, value in facts.items() if field not in ("name", "sha256")}
    if strange := fields.keys() - {each.name for each in dataclasses.fields(kind)}:
        raise ConfigError(f"'{name}' has no field {', '.join(sorted(strange))}: it was written by another version.")
    try:
        return kind(**fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"'{name}' cannot be created from its written fields ({error}).") from error


def _read(value: Any, own: Callable[[str, str], type[Objective]]) -> Any:
    if isinstance(value, Mapping):
        return from_written(value, own)
    return tuple(_read(part, own) for part in value) if isinstance(value, list | tuple) else value
