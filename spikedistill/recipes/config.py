"""Read recipes back: from recipe.json, as a run wrote it, to the frozen value."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spikedistill.deliver.record import Record
from spikedistill.errors import ConfigError, RunError
from spikedistill.files import note, read_json
from spikedistill.objective.terms import Objective
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.methods import CONVERSIONS, find_method, from_written
from spikedistill.recipes.teach import Teach
from spikedistill.student.conversion import read_part
from spikedistill.student.upgrade import upgrade
from spikedistill.train.extend import EXTENDED
from spikedistill.train.recipe import Data, Training

Own = Callable[[str, str], type[Objective]]
"""A function that finds the class of a user's objective by its name and the SHA-256 of its file."""
RecipeKind = TypeVar("RecipeKind")


def read_config(path: Path, kind: type, methods: Sequence[str] = (), trust_code: bool = False) -> Any:
    """The recipe of a past run, with the values that the run filled in for open fields.

    Args:
        path: a run directory, its recipe.json, or the file of a student.
        kind: ``Teach`` or ``Distill``.
        methods: methods that replace the recipe's. A single one is put into the recipe; if it is the recipe's own
            ``FILE.py:CLASS``, it keeps the recipe's fields. Such a file is executed.
        trust_code: execute the copy of a user's method next to the recipe.

    Raises:
        RunError: if there is no recipe, or it is for the other command.
        ConfigError: if a value cannot be read, or the method is Python code that is not trusted.
    """
    facts = _recipe_in(path) if path.suffix == ".json" else Record.read(path).recipe
    wanted = kind.__name__.lower()
    if facts.get("kind") != wanted:
        raise RunError(
            f"'{path}' holds a recipe of '{facts.get('kind')}', but this command is '{wanted}': use the other command."
        )
    try:
        return read_teach(facts) if kind is Teach else _with_methods(path, facts, methods, trust_code)
    except ConfigError as error:
        raise ConfigError(f"The recipe in '{path}' cannot be used: {error}") from error


def _recipe_in(path: Path) -> dict[str, Any]:
    """What a recipe.json holds, in today's format."""
    found = read_json(path)
    if "training" not in found:
        raise RunError(f"'{path}' holds no recipe: give a run directory, or the recipe.json in it.")
    return upgrade(found)


def read_teach(facts: Mapping[str, Any]) -> Teach:
    """The recipe that ``Teach.written`` wrote.

    Raises:
        ConfigError: if a field is unknown or has the wrong type.
    """
    parts = {"data": lambda given: read_part(Data, given), "training": lambda given: read_part(Training, given)}
    about = ("kind", "format", EXTENDED)
    return read_part(Teach, {name: value for name, value in facts.items() if name not in about}, parts)


def read_distill(facts: Mapping[str, Any], own: Own) -> Distill:
    """The recipe that ``Distill.written`` wrote.

    Args:
        facts: the content of recipe.json.
        own: see ``methods.from_written``.

    Raises:
        ConfigError: if a field is unknown or has the wrong type.
    """
    method = facts.get("method")
    named = method.get("name") if isinstance(method, Mapping) else None
    return Distill(
        read_part(TeacherChoice, facts.get("teacher", {})),
        read_part(StudentChoice, facts.get("student", {})),
        None if named in CONVERSIONS else from_written(method, own),
        read_part(Data, facts.get("data", {})),
        read_part(Training, facts.get("training", {})),
    )


def check_code(path: Path, recipe: Any, read: Any, trust_code: bool) -> None:
    """Refuse to execute Python code that only the past run names as a network, not the user.

    Args:
        path: where the recipe was read.
        recipe: the recipe that will be run.
        read: the recipe as it was read.
        trust_code: whether such code may be executed.

    Raises:
        ConfigError: if it is not trusted.
    """
    for name in _networks(recipe):
        if ".py:" in name and name in _networks(read) and not trust_code:
            raise ConfigError(
                f"The recipe in '{path}' names Python code as a network, '{name}', which is not executed by default:"
                " give --trust-code if you trust it, or name another network."
            )


def _networks(recipe: Any) -> list[str]:
    named = [recipe.network] if isinstance(recipe, Teach) else [recipe.teacher.network, recipe.student.network]
    return [str(name) for name in named]


def _with_methods(path: Path, facts: Mapping[str, Any], methods: Sequence[str], trust_code: bool) -> Distill:
    """A recipe of ``distill``, with the given method if there is one."""
    method = facts.get("method")
    written = str(method.get("name")) if isinstance(method, Mapping) else ""
    same = [name for name in methods if name.rpartition(":")[2] == written.rpartition(":")[2]]
    if methods and not same:  # the written method is replaced, so its code is not needed
        facts = {**facts, "method": {"name": "direct"}}
    recipe = read_distill(facts, lambda name, digest: _own(path, name, digest, same, trust_code))
    return recipe if same or len(methods) != 1 else recipe.with_method(methods[0])


def _own(path: Path, name: str, digest: str, given: Sequence[str], trust_code: bool) -> type[Objective]:
    """The class of a user's objective: from the file that is given, or from the trusted copy next to the recipe."""
    wanted = name.rpartition(":")[2]
    if not given and not trust_code:
        raise ConfigError(
            f"its method is Python code, '{name}', which is not executed by default: give --method FILE.py:{wanted}, or"
            " --trust-code for the copy next to the recipe."
        )
    folder = path if path.is_dir() else path.parent
    copies = [file for file in sorted(folder.glob("method*.py")) if _digest(file) == digest]
    if given:
        if _digest(Path(given[0].rpartition(":")[0])) != digest:
            note(f"'{given[0]}' is not the file that '{path}' was trained with.")
        return find_method(given[0])
    if not copies:
        raise ConfigError(f"the file of its method '{name}' is not next to it: give --method FILE.py:{wanted}.")
    return find_method(f"{copies[0]}:{wanted}")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
