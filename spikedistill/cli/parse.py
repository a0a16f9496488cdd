"""Recipes as options: every field of a recipe can be given, and what a recipe says is the default."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from tyro.conf import arg

from spikedistill.cli.options import option_name, options_of, parse, strip_markup
from spikedistill.errors import ConfigError, one_of
from spikedistill.objective.terms import Objective
from spikedistill.recipes.config import read_config
from spikedistill.recipes.methods import name_of

FEW = {
    "data": ("name", "labels", "data_dir", "image_size", "crop", "flip"),
    "training": ("epochs", "batch_size", "lr", "seed", "device"),
    "teacher": ("source", "network", "mean", "std"),
    "student": ("network", "timesteps", "levels", "neuron", "inherit", "gradient"),
}
"""The fields of each group that --help shows; of other groups it shows all."""
SECOND_STREAM = ("source", "paired", "events", "event_frames", "event_binning", "event_duration", "sensor")
"""The fields of data that --help also shows for a method with a second input stream."""


@dataclass(frozen=True)
class Where:
    """Where the run is written, and where it starts from."""

    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Run directory (default: a folder below 'runs', named by RECIPE or the data, method, T and seed)."""
    resume: bool = False
    """Go on with the run that lies there; with more --epochs a finished run is extended."""
    config: Annotated[Path | None, arg(metavar="RUN")] = None
    """Take every choice from a past run, given by its directory or its recipe.json; options here override them."""
    trust_code: bool = False
    """Execute the Python code that a teacher's file or the run of --config names as its network or method."""
    help_all: bool = False
    """List every option."""


def find_recipe(
    arguments: Sequence[str], known: Mapping[str, Callable[[], Any]], kind: type
) -> tuple[str, Any, Sequence[str]]:
    """The name of a recipe, the recipe, and the arguments that are left.

    It is what the first argument names, if that is no option; else that of ``--config``; else the defaults.

    Raises:
        ConfigError: if there is no such recipe, or two are given.
    """
    name, rest = "", arguments
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
        one_of("recipe", name, known)
    files = given_to("--config", rest)
    if files and name:
        raise ConfigError(f"Two recipes are given, '{name}' and --config {files[-1]}: leave one of them out.")
    if files:
        return "", read_config(Path(files[-1]), kind, given_to("--method", rest), "--trust-code" in rest), rest
    return name, known[name]() if name else kind(), rest


def given_to(option: str, arguments: Sequence[str]) -> list[str]:
    """The values that an option has where it stands last."""
    found: list[str] = []
    for place, word in enumerate(arguments):
        if word.startswith(f"{option}="):
            found = [word.removeprefix(f"{option}=")]
        if word == option:
            rest = arguments[place + 1 :]
            end = next((number for number, one in enumerate(rest) if one.startswith("-")), len(rest))
            found = list(rest[:end])
    return found


def parse_recipe(
    command: str, about: str, groups: Mapping[str, Sequence[Any]], arguments: Sequence[str], examples: str
) -> list[Any]:
    """Every field of frozen values as an option; what they are by default is what they are here.

    Args:
        command: its name.
        about: what it does.
        groups: by the title of a group of options the values whose fields stand in it.
        arguments: of the command.
        examples: shown below the options.

    Returns:
        The values in the same order, changed.

    Raises:
        ConfigError: if two fields would be the same option.
    """
    asks = {"-h", "--help", "--help-all"}.intersection(arguments)
    every = [value for values in groups.values() for value in values]
    few = _few(every) if asks and "--help-all" not in arguments else {}
    check_names(every)
    made = [_group(title, values, few.get(title)) for title, values in groups.items()]
    kind = dataclasses.make_dataclass(
        "Options", [(title, one, field(default=one())) for title, one in zip(groups, made)], frozen=True
    )
    words = ["--help" if word == "--help-all" else word for word in arguments]
    try:
        parsed = parse(kind, f"{command} [RECIPE]" if asks else command, words, about)
    except SystemExit as end:
        if not end.code:
            print(examples)
        raise
    return [
        dataclasses.replace(value, **{name: getattr(getattr(parsed, title), name) for name in fields_of(value)})
        for title, values in groups.items()
        for value in values
    ]


def _few(values: Sequence[Any]) -> Mapping[str, Sequence[str]]:
    """``FEW``, with what a second input stream needs if a method has one."""
    if any(isinstance(value, Objective) and value.needs.source for value in values):
        return {**FEW, "data": (*FEW["data"], *SECOND_STREAM)}
    return FEW


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a value that are options, by name: those that hold numbers, words, or several of them."""
    values = {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.init}
    return {name: one for name, one in values.items() if _is_plain(one)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Path)


def names_of(value: Any) -> list[str]:
    """The options of a value, without dashes before them."""
    hints = get_type_hints(type(value), include_extras=True)
    return [option_name(hints[name], name) for name in fields_of(value)]


def check_names(values: Sequence[Any]) -> None:
    """Refuse an objective of the user's with a field that is an option already."""
    counted = Counter(name for value in values for name in names_of(value))
    for value in values:
        for own, name in zip(fields_of(value), names_of(value)):
            if counted[name] > 1 and isinstance(value, Objective):
                raise ConfigError(
                    f"The field '{own}' of {name_of(value)} is an option already, --{name}: rename the field."
                )


def _group(title: str, values: Sequence[Any], shown: Sequence[str] | None) -> type:
    """A group of options."""
    hints = {name: hint for one in values for name, hint in get_type_hints(type(one), include_extras=True).items()}
    fields = {name: value for one in values for name, value in fields_of(one).items()}
    hidden = () if shown is None else [name for name in fields if name not in shown]
    sources = [kind for one in values for kind in type(one).__mro__ if dataclasses.is_dataclass(kind)]
    made = options_of(title.title(), sources, hints, fields, hidden)
    made.__doc__ = strip_markup(type(values[0]).__doc__ or "")
    return made
