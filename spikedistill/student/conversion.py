"""``Conversion``: how an ANN becomes a student, a frozen value for ``to_spiking`` that a saved student carries."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from spikedistill.errors import ConfigError, one_of
from spikedistill.neuron.dynamics import NEURONS, Neuron, Reset
from spikedistill.neuron.surrogate import SURROGATES, Rectangle, Triangle
from spikedistill.student.calibrate import Rule
from spikedistill.student.coding import CODINGS, Coding, DirectCoding
from spikedistill.student.pool import MaxPool

Value = TypeVar("Value")
Correct = Literal["nothing", "biases", "layers"]
"""What is corrected after conversion, without gradients: nothing, biases (``biases.py``), or weights, biases and
thresholds of layer after layer (``correct.py``)."""

INHERITED_NEURON = Neuron(initial=0.5, surrogate=Rectangle())
"""The default neuron for inherited weights: IF that starts at half its threshold, so the mean over T steps rounds. In
pilots (LOG.md) the rectangle surrogate gained most."""
SCRATCH_NEURON = replace(INHERITED_NEURON, threshold=1.5, detach_reset=True, surrogate=Triangle())
"""The default neuron for fresh weights. In pilots (LOG.md) its students learned fastest on currents from batch norm."""


@dataclass(frozen=True)
class Conversion:
    """How an ANN becomes a spiking student.

    Args:
        timesteps: T, 1 or more.
        neuron: the neuron model (default: ``INHERITED_NEURON``, for fresh weights ``SCRATCH_NEURON``).
        inherit: keep the ANN's weights and batch norm. False gives fresh weights and the initial threshold
            ``neuron.threshold``; no calibration is needed.
        rule: how a threshold is calibrated from activations; see ``calibrate.choose_threshold``.
        percentile: for the rule of that name, 0..100.
        per_channel: one threshold per channel, otherwise one per layer. Fresh weights always begin with one per layer.
        correct: what is corrected after calibration, on the same images and without labels or gradients. ``biases``
            shifts biases so that each channel has the ANN's mean activation (``biases.py``). ``layers`` fits weights,
            biases and thresholds of layer after layer to what each layer really gets (``correct.py``).
        max_pool: what max pooling becomes. ``cumulative`` pools the cumulative input, which is exact for the mean over
            time (``student/pool.py``). ``or`` pools each step alone: over spikes a logical or, whose error does not
            shrink as T grows. ``average`` replaces it by average pooling.
        coding: what the student sees at each step (default: the image itself).

    Raises:
        ConfigError: if a value is outside its range or has the wrong type, or something is to be corrected
            with fresh weights.
    """

    timesteps: int = 4
    neuron: Neuron | None = None
    inherit: bool = True
    rule: Rule = "least-squares"
    percentile: float = 99.9
    per_channel: bool = True
    correct: Correct = "nothing"
    max_pool: MaxPool = "cumulative"
    coding: Coding = field(default_factory=DirectCoding)

    def __post_init__(self) -> None:
        if not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ConfigError(f"timesteps (={self.timesteps}) must be 1 or more, and a whole number.")
        if not isinstance(self.neuron, Neuron | None):
            raise ConfigError(f"neuron (={self.neuron!r}) must be a Neuron, for instance IF or LIF.")
        one_of("rule", self.rule, get_args(Rule))
        one_of("max_pool", self.max_pool, get_args(MaxPool))
        one_of("correct", self.correct, get_args(Correct))
        if self.correct != "nothing" and not self.inherit:
            raise ConfigError(f"correct (={self.correct!r}) needs inherited weights: omit it, or set inherit=True.")
        if not 0 <= self.percentile <= 100:
            raise ConfigError(f"percentile (={self.percentile}) must be between 0 and 100.")
        if isinstance(self.coding, type) or not isinstance(self.coding, Coding):
            raise ConfigError(
                f"coding (={self.coding!r}) must have encode and frame, as for instance FrameCoding() has."
            )

    @property
    def neuron_model(self) -> Neuron:
        """The neuron, or the default one for these weights."""
        return self.neuron or (INHERITED_NEURON if self.inherit else SCRATCH_NEURON)

    def settled(self) -> "Conversion":
        """The same conversion with its default neuron filled in."""
        return replace(self, neuron=self.neuron_model)

    def facts(self) -> dict[str, Any]:
        """The fields in a form that JSON can hold, with the default neuron filled in.

        Raises:
            ConfigError: if the surrogate or the coding is a user's own class, which a file cannot name.
        """
        neuron: dict[str, Any] = {
            part.name: getattr(self.neuron_model, part.name) for part in dataclasses.fields(Neuron)
        }
        neuron["reset"] = self.neuron_model.reset.value
        neuron["surrogate"] = _written("surrogate", self.neuron_model.surrogate, SURROGATES)
        facts = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        return {**facts, "neuron": neuron, "coding": _written("coding", self.coding, CODINGS)}

    @classmethod
    def from_facts(cls, facts: Any) -> "Conversion":
        """The conversion that ``facts`` wrote.

        Raises:
            ConfigError: if a field is missing or unknown, or its value has the wrong type or is outside its range.
        """
        parts: dict[str, Callable[[Any], Any]] = {
            "neuron": _neuron,
            "coding": lambda given: _named(given, CODINGS),
            "max_pool": max_pool_from,
        }
        return read_fields(cls, correct_from(facts), parts)


DEFAULT_CONVERSION = Conversion()
"""Every field at its default."""


def neuron_from(
    name: str,
    *,
    fresh: bool,
    gradient: str = "exact",
    leak: float | None = None,
    decay_input: bool | None = None,
    reset: str | None = None,
    detach_reset: bool | None = None,
    initial: float = 0.5,
    learn_initial: bool = False,
    threshold: float | None = None,
    learn_threshold: bool = False,
    surrogate: str | None = None,
    levels: int = 1,
) -> Neuron:
    """The neuron that the choices of a recipe describe; see ``Neuron`` and ``recipes.choices.StudentChoice``.

    None takes the named neuron's default. For fresh weights threshold, surrogate and ``detach_reset`` are those of
    ``SCRATCH_NEURON``, except that the rate-based gradient keeps the reset in the gradient.

    Raises:
        ConfigError: if the neuron, reset or surrogate does not exist, or a value is outside its range.
    """
    one_of("neuron", name, NEURONS)
    one_of("reset", reset or "zero", [known.value for known in Reset])
    kind = surrogate or ("triangle" if fresh else "rectangle")
    one_of("surrogate", kind, SURROGATES)
    base = NEURONS[name]
    usual = SCRATCH_NEURON.threshold if fresh and name == "if" else base.threshold
    return Neuron(
        leak=base.leak if leak is None else leak,
        learn_leak=base.learn_leak,
        decay_input=base.decay_input if decay_input is None else decay_input,
        reset=base.reset if reset is None else Reset(reset),
        detach_reset=fresh and gradient != "rate" if detach_reset is None else detach_reset,
        threshold=usual if threshold is None else threshold,
        learn_threshold=learn_threshold,
        initial=initial,
        learn_initial=learn_initial,
        surrogate=SURROGATES[kind](),
        levels=levels,
    )


def read_fields(kind: type[Value], given: Any, parts: Mapping[str, Callable[[Any], Any]]) -> Value:
    """A frozen value from the JSON form of its fields.

    Args:
        kind: the dataclass.
        given: its fields by name, all of them.
        parts: functions that read the fields which are not plain values.

    Raises:
        ConfigError: if fields are missing, unknown or of the wrong type, or the dataclass refuses their values.
    """
    expected = [part.name for part in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if not isinstance(given, Mapping) or set(given) != set(expected):
        found = list(given) if isinstance(given, Mapping) else given
        raise ConfigError(
            f"{kind.__name__} is written as {str(found)[:200]}: expected the fields {', '.join(expected) or 'none'}."
            " The file is damaged or was written by another version."
        )
    hints = get_type_hints(kind)
    values = {name: parts[name](value) if name in parts else value for name, value in given.items()}
    for name, value in values.items():
        if name not in parts and not _fits(hints[name], value):
            wanted = hints[name].__name__ if isinstance(hints[name], type) else str(hints[name])
            raise ConfigError(
                f"{kind.__name__}: {name} (={str(value)[:80]!r}) has the wrong type: expected"
                f" {wanted.removeprefix('typing.')}. The file is damaged."
            )
    return kind(**values)


def read_part(kind: type[Value], given: Any, parts: Mapping[str, Callable[[Any], Any]] | None = None) -> Value:
    """A part of a recipe. Fields that an earlier version did not write have their defaults.

    Raises:
        ConfigError: see ``read_fields``.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"its part {kind.__name__} is {str(given)[:80]!r}: expected fields; the file is damaged.")
    usual = {one.name: getattr(kind(), one.name) for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if strange := [name for name in given if name not in usual]:
        raise ConfigError(f"its part {kind.__name__} has unknown fields, {', '.join(map(repr, strange))[:200]}")
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    readers = {name: read for name, read in (parts or {}).items() if name in given}
    return read_fields(kind, {**usual, **given, **lists}, readers)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value from JSON has the annotated type: a number, a string, a boolean or None."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(part, value) for part in get_args(hint))
    if hint is float:
        return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:  # (float, ...) or (int, int), a list in JSON
        kinds = get_args(hint)
        long = isinstance(value, list | tuple) and (kinds[-1] is ... or len(value) == len(kinds))
        return long and all(_fits(kinds[0], part) for part in value)
    return hint in (bool, int, str, NoneType) and type(value) is hint


def correct_from(fields: Any) -> Any:
    """Fields of a conversion or of a recipe's student. Early versions wrote ``correct_bias``, true or false."""
    if not isinstance(fields, Mapping) or not isinstance(fields.get("correct_bias"), bool) or "correct" in fields:
        return fields
    renamed = {"correct_bias": ("correct", "biases" if fields["correct_bias"] else "nothing")}
    return dict(renamed.get(name, (name, value)) for name, value in fields.items())


def max_pool_from(written: Any) -> Any:
    """The name of the max pooling in a file. Early versions wrote 'keep' for 'or'."""
    return "or" if written == "keep" else written


def _neuron(given: Any) -> Neuron:
    parts: dict[str, Callable[[Any], Any]] = {"reset": _reset, "surrogate": lambda given: _named(given, SURROGATES)}
    if isinstance(given, Mapping) and {*given, "levels"} == {part.name for part in dataclasses.fields(Neuron)}:
        given = {"levels": 1, **given}  # a file from before graded spikes has none
    return read_fields(Neuron, given, parts)


def _reset(given: Any) -> Reset:
    one_of("reset", given, [known.value for known in Reset])
    return Reset(given)


def _written(kind: str, value: object, known: Mapping[str, type]) -> dict[str, Any]:
    """The name and the fields of a value whose class a file can name."""
    name = next((name for name, known_kind in known.items() if type(value) is known_kind), None)
    if name is None:
        raise ConfigError(
            f"The {kind} {type(value).__name__} is not part of this package and cannot be written to a file: use one of"
            f" {', '.join(known)}, or save the weights by state_dict."
        )
    return {"name": name, **{part.name: getattr(value, part.name) for part in dataclasses.fields(value)}}  # type: ignore[arg-type]


def _named(given: Any, known: Mapping[str, type]) -> Any:
    """The value that ``_written`` wrote."""
    if not isinstance(given, Mapping) or given.get("name") not in list(known):
        raise ConfigError(f"{str(given)[:200]!r} is none of {', '.join(known)}: the file is damaged.")
    return read_fields(known[given["name"]], {name: value for name, value in given.items() if name != "name"}, {})
