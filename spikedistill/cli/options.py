"""Functions and frozen values as options: signature and docstring say all of it, and are said once.

A default in words stands at the end of a field's docstring, as ``(default: 0.1 for fresh weights)``. It is shown where
the value is None or empty; any other value is shown itself.
"""

import contextlib
import dataclasses
import inspect
import os
import re
import shutil
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from docstring_parser import parse_from_object
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

PLAIN = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "{True,False}"}
NOTHING: Mapping[str, Any] = types.MappingProxyType({})
WIDEST = 120
"""Columns that help takes at most."""
WORDS = re.compile(r"\s*\(default: [^()]*\)")
"""A default in words."""


def ask(
    command: str, function: Callable[..., Any], arguments: Sequence[str], given: Mapping[str, Any] = NOTHING
) -> tuple[Any, dict[str, Any]]:
    """Call a function with what the command line says.

    Args:
        command: its name.
        function: its parameters become options, those annotated ``Positional`` are given by place.
        arguments: of the command.
        given: parameters that are no options.

    Returns:
        What the function returns, and the options by name.
    """
    parameters = inspect.signature(function).parameters
    defaults = {
        name: dataclasses.MISSING if one.default is one.empty else one.default
        for name, one in parameters.items()
        if name not in given
    }
    kind = options_of(command.title(), [function], get_type_hints(function, include_extras=True), defaults)
    values = parse(kind, command, arguments, strip_markup(parse_from_object(function).short_description or ""))
    asked = {name: getattr(values, name) for name in defaults}
    return function(**given, **asked), asked


def options_of(
    name: str,
    sources: Sequence[Any],
    hints: Mapping[str, Any],
    defaults: Mapping[str, Any],
    hidden: Collection[str] = (),
) -> type:
    """A dataclass whose fields tyro shows as this project's help does.

    Args:
        name: of the dataclass.
        sources: functions and classes whose docstrings say what the fields are; the first that says it counts.
        hints: annotation of each field.
        defaults: value of each field; ``dataclasses.MISSING`` where one must be given.
        hidden: fields that are options and are not shown.
    """
    texts: dict[str, str] = {}
    for source in sources:
        for one in parse_from_object(source).params:
            texts.setdefault(one.arg_name, strip_markup(one.description or ""))
    fields: list[Any] = []
    for field, default in defaults.items():
        shown: Any = Annotated[hints[field], _told(hints[field], default, texts.get(field, ""))]
        shown = Annotated[shown, tyro.conf.Suppress] if field in hidden else shown
        fields.append((field, shown) if default is dataclasses.MISSING else (field, shown, _held(default)))
    return dataclasses.make_dataclass(name, fields, frozen=True)


def parse(kind: type, command: str, arguments: Sequence[str], about: str) -> Any:
    """Values for the fields of a dataclass, which may hold other dataclasses as groups of options.

    Of a truth value only the option that changes it is listed; the other one is understood.
    """
    with _one_column():
        return tyro.cli(
            kind,
            prog=f"spikedistill {command}",
            description=about,
            args=list(_changing(kind, arguments)),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            registry=_registry(),
        )


def _registry() -> ConstructorRegistry:
    """How values are read where tyro's own way is not enough."""
    made = ConstructorRegistry()
    made.primitive_rule(_perhaps)
    return made


def _perhaps(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How ``X | None`` is read: as X, whose message is said where a value is wrong; and the word None as None."""
    kinds = [part for part in get_args(info.type) if part is not types.NoneType]
    if info.type_origin not in (Union, types.UnionType) or len(kinds) != 1:
        return None
    read = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(read, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        read,
        choices=read.choices and (*read.choices, "None"),
        instance_from_str=lambda words: None if words == ["None"] else read.instance_from_str(words),
        is_instance=lambda value: value is None or read.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else read.str_from_instance(value),
    )


@contextlib.contextmanager
def _one_column() -> Iterator[None]:
    """Groups of options one below the other on a wide terminal too, where tyro would set them side by side."""
    given = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, WIDEST))
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if given is not None:
            os.environ["COLUMNS"] = given


def option_name(hint: Any, field: str) -> str:
    """The option that a field becomes, without dashes before it."""
    names = [mark.name for mark in getattr(hint, "__metadata__", ()) if getattr(mark, "name", None)]
    return (names or [field])[0].replace("_", "-")


def strip_markup(text: str) -> str:
    """Paragraphs of a docstring, each in one line, without marks for code."""
    return "\n\n".join(" ".join(part.split()) for part in text.replace("``", "'").split("\n\n"))


def _told(hint: Any, default: Any, text: str) -> Any:
    """How an option is shown: what follows it, what it is, and its default."""
    missing = default is dataclasses.MISSING
    if not missing and default not in (None, (), ""):
        text = WORDS.sub("", text)
    marks = [mark for mark in getattr(hint, "__metadata__", ()) if hasattr(mark, "metavar")]
    mark: Any = marks[0] if marks else tyro.conf.arg()
    behaviour = ("" if _by_place(hint) else None) if missing else _default_in_words(default)
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]+ ", text) else text
    follows = None if isinstance(default, bool) and _is_flag(hint) else mark.metavar or _metavar(hint)
    return dataclasses.replace(mark, metavar=follows, help=text, help_behavior_hint=behaviour)


def _default_in_words(default: Any) -> str:
    if isinstance(default, bool):
        return "(on by default; this turns it off)" if default else ""
    if isinstance(default, tuple | list):
        default = " ".join(str(part) for part in default)
    return "" if default in (None, "") else f"(default: {default})"


def _metavar(hint: Any) -> str | None:
    """What follows an option; None where tyro knows better."""
    if get_origin(hint) is Annotated:
        return _metavar(get_args(hint)[0])
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        known = [_metavar(part) for part in parts if part is not types.NoneType]
        return "|".join(one for one in known if one) if all(known) else None
    if get_origin(hint) is Literal:
        return f"{{{','.join(map(str, parts))}}}"
    if get_origin(hint) is Sequence or (get_origin(hint) is tuple and parts[-1] is ...):
        each = _metavar(parts[0])
        return each and f"{each} ..."
    if get_origin(hint) is tuple:
        every = [_metavar(part) for part in parts]
        return " ".join(one for one in every if one) if all(every) else None
    return PLAIN.get(hint)


def _held(default: Any) -> Any:
    """A default as dataclasses take it."""
    made = type(default).__hash__ is None
    return dataclasses.field(default_factory=lambda: default) if made else default


def _changing(kind: type, arguments: Sequence[str]) -> Sequence[str]:
    """The arguments without options that say what a truth value is by default, and those before them."""
    kept = list(arguments)
    for on, off in _pairs(kind):
        places = [place for place, word in enumerate(kept) if word in (on, off)]
        if places:
            last = kept[places[-1]]
            kept = [word for word in kept if word not in (on, off)] + ([last] if last == off else [])
    return kept


def _pairs(kind: Any) -> list[tuple[str, str]]:
    """Of every truth value the option that says its default, and the one that changes it."""
    found: list[tuple[str, str]] = []
    for field in dataclasses.fields(kind):
        hint = field.type
        if dataclasses.is_dataclass(field.type):
            found += _pairs(field.type)
        elif isinstance(field.default, bool) and _is_flag(hint):
            name = option_name(hint, field.name)
            words = (f"--{name}", f"--no-{name}")
            found.append(words if field.default else words[::-1])
    return found


def _by_place(hint: Any) -> bool:
    """Whether an argument is given by its place, and says so."""
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def _is_flag(hint: Any) -> bool:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint is bool
