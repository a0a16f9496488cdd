"""Which choices differ between two recipes, and which of them may differ when a run goes on."""

from collections.abc import Mapping
from typing import Any

RESULT_NEUTRAL_FIELDS = ("checkpoint_minutes", "tensorboard")
"""Choices of a training that do not change its results."""
EXECUTION_FIELDS = (
    *("device", "channels_last", "convolutions", "compile", "keep_memory", "recompute"),
    *("cache_dir", "data_dir", *RESULT_NEUTRAL_FIELDS),
)
"""Choices of where and how a run is computed and kept. Its results change by rounding at most, so that it can go on
with others."""
PARTS = ("student", "data", "training")
"""The parts of a recipe that have such choices."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The fields in which two recipes differ, with both values.

    If the version that wrote ``before`` did not have a field yet, its value is taken from ``defaults``.

    >>> differences({"training": {"lr": 0.1, "seed": 0}}, {"training": {"lr": 0.2, "seed": 0}}, {})
    ['lr was 0.1, now 0.2']
    """
    if before.get("kind") != now.get("kind"):
        return [f"kind was {before.get('kind')!r}, now {now.get('kind')!r}"]
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        usual = defaults.get(name)
        old, new = before.get(name, usual), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, usual if isinstance(usual, dict) else {})
        elif old != new:
            found.append(f"{name} was {old!r}, now {new!r}")
    return found


def without_execution_fields(recipe: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """A recipe without the choices of ``EXECUTION_FIELDS``, and without others of the same parts."""
    left_out = {*EXECUTION_FIELDS, *others}
    return {
        name: {key: value for key, value in part.items() if key not in left_out} if name in PARTS else part
        for name, part in recipe.items()
    }


def with_execution_fields_of(written: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in the directory with the choices of ``EXECUTION_FIELDS`` of another one."""
    return {
        name: {**part, **{key: value for key, value in now[name].items() if key in EXECUTION_FIELDS}}
        if name in PARTS and name in now
        else part
        for name, part in written.items()
    }
