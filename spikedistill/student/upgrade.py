"""Recipes of format 1, as early runs wrote them, in format 2; and the conversion that a recipe describes."""

from collections.abc import Mapping
from typing import Any

from spikedistill.errors import ConfigError, RunError, one_of
from spikedistill.student.coding import CODINGS
from spikedistill.student.conversion import DEFAULT_CONVERSION, Conversion, correct_from, max_pool_from, neuron_from

FORMAT = 2
"""The format of recipes and of students' headers. In format 1 the method of a recipe was not yet its objective."""
SOFT = ("temperature", "alpha")
PAIRED = ("adapt", "margin", "partial", "label_smoothing")
METHOD_FIELDS: dict[str, tuple[str, ...]] = {
    "direct": ("label_smoothing",),
    "tet": ("label_smoothing", "lam"),
    "kdsnn-response": (*SOFT, "label_smoothing"),
    "kdsnn-feature": ("pairs", "weight", *PAIRED),
    "kdsnn": ("pairs", *SOFT, "weight", *PAIRED),
    "conversion-qcfs": ("label_smoothing",),
    "conversion-max": (),
    "conversion-percentile": (),
    "conversion-least-squares": (),
}
"""The methods of format 1, and the fields that each has in format 2."""
RENAMED: dict[str, dict[str, str]] = {
    "who": {
        "teacher": "source",
        "teacher_network": "network",
        "teacher_width": "width",
        "teacher_mean": "mean",
        "teacher_std": "std",
    },
    "student": {"student": "network", "student_width": "width"},
    "what": {"method": "name", "feature_weight": "weight"},
    "data": {"data": "name"},
    "training": {},
}
"""For each part of a recipe of format 1 the fields that have another name in format 2."""


def upgrade(recipe: Any) -> dict[str, Any]:
    """A recipe of format 1 in format 2; one of format 2 as it is.

    Args:
        recipe: a recipe of 'distill' or 'teach' as read from JSON. In the header of a student it has no kind.

    Raises:
        RunError: if it has another format or kind, or a part is missing or not a mapping.
    """
    if not isinstance(recipe, Mapping):
        raise RunError(f"The recipe is {str(recipe)[:80]!r}: expected its parts by name; the file is damaged.")
    if recipe.get("format") == FORMAT:
        return {part: _renamed(fields) if part == "student" else fields for part, fields in recipe.items()}
    kind = recipe.get("kind", "distill" if "who" in recipe else "teach")
    if "format" in recipe or kind not in ("distill", "teach"):
        raise RunError(
            f"The recipe has kind {kind!r} and format {recipe.get('format', 1)!r}: this version reads 'distill' and"
            " 'teach' in formats 1 and 2."
        )
    if kind == "teach":
        return {**recipe, "kind": kind, "format": FORMAT, "data": _part(recipe, "data")}
    return {
        "kind": kind,
        "format": FORMAT,
        "teacher": _part(recipe, "who"),
        "student": _renamed(_part(recipe, "student")),
        "method": _method(recipe),
        "data": _part(recipe, "data"),
        "training": _part(recipe, "training"),
    }


def _part(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a recipe with its fields renamed."""
    part = recipe.get(name)
    if not isinstance(part, Mapping):
        raise RunError(f"The recipe's part '{name}' is {str(part)[:80]!r}: expected fields; the file is damaged.")
    return {RENAMED[name].get(str(field), str(field)): value for field, value in part.items()}


def _renamed(student: Any) -> Any:
    """The choices of a student, with today's names of its max pooling and its correction."""
    student = correct_from(student)
    if not isinstance(student, Mapping) or "max_pool" not in student:
        return student
    return {**student, "max_pool": max_pool_from(student["max_pool"])}


def _method(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The method with its own fields and no others."""
    given = _part(recipe, "what")
    name = str(given.get("name", "kdsnn"))
    one_of("method", name, METHOD_FIELDS)
    fixed = {"target": 1.0} if name == "tet" else {}
    return {"name": name, **{field: given[field] for field in METHOD_FIELDS[name] if field in given}, **fixed}


def conversion_from(fields: Mapping[str, Any]) -> Conversion:
    """The conversion that the student of a recipe of format 2 describes. A missing field has its default.

    Raises:
        ConfigError: if a value has the wrong type or is outside its range.
    """
    inherits = fields.get("inherit")
    inherits = fields.get("network", "same") == "same" if inherits is None else inherits
    coding = fields.get("coding", "direct")
    one_of("coding", coding, CODINGS)
    chosen = ("leak", "decay_input", "reset", "detach_reset", "threshold", "surrogate")
    try:
        neuron = neuron_from(
            fields.get("neuron", "if"),
            fresh=not inherits,
            gradient=fields.get("gradient", "exact"),
            initial=fields.get("initial", 0.5),
            learn_initial=fields.get("learn_initial", False),
            learn_threshold=fields.get("learn_threshold", False),
            levels=fields.get("levels", 1),
            **{name: fields.get(name) for name in chosen},
        )
        return Conversion(
            timesteps=fields.get("timesteps", DEFAULT_CONVERSION.timesteps),
            neuron=neuron,
            inherit=inherits,
            rule=fields.get("rule", DEFAULT_CONVERSION.rule),
            percentile=fields.get("percentile", DEFAULT_CONVERSION.percentile),
            per_channel=fields.get("per_channel", DEFAULT_CONVERSION.per_channel),
            correct=correct_from(fields).get("correct", "nothing"),
            max_pool=max_pool_from(fields.get("max_pool", "or")),
            coding=CODINGS[coding](),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"A field of the recipe's student has the wrong type ({error}): the file is damaged."
        ) from error
