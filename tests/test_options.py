"""Functions and values as options: what tyro is told of them."""

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from commands import run_command as call
from tyro.conf import Positional, arg

from spikedistill.cli.options import ask, strip_markup
from spikedistill.cli.parse import given_to, parse_recipe
from spikedistill.errors import ConfigError
from spikedistill.objective.terms import Objective


def work(
    paths: Annotated[Sequence[Path], Positional, arg(metavar="RUN ...")],
    images: int | None = 1000,
    rates: tuple[float, ...] = (),
    kind: Literal["a", "b"] | None = None,
    deep: bool = True,
    quiet: bool = False,
    *,
    place: str | None = None,
    say: object = print,
):
    """Do the work.

    More of it.

    Args:
        paths: run directories.
        images: how many of ``them`` (default: all).
        rates: a T of what (default: the usual).
        kind: which one
            of the two (default: b for large, else a).
        deep: go down.
        quiet: say nothing.
        place: cpu, cuda (default: here).
        say: told.
    """
    return paths, images, rates, kind, deep, quiet, place, say


def asked(*words):
    return ask("work", work, words, {"say": len})[0]


class TestAsk:
    def test_calls_the_function_with_what_was_given(self):
        assert asked("x", "y") == ([Path("x"), Path("y")], 1000, (), None, True, False, None, len)
        words = "x --images 3 --rates 0.5 1 --kind b --no-deep --quiet --place gpu".split()  # noqa: SIM905
        assert asked(*words) == ([Path("x")], 3, (0.5, 1.0), "b", False, True, "gpu", len)

    @pytest.mark.parametrize(
        "words, told",
        [
            ("--images x", "--images: invalid literal for int() with base 10: 'x'"),
            ("--kind c", "Expected one of ('a', 'b', 'None')"),
        ],
    )
    def test_says_what_is_wrong_with_a_value_that_may_be_left_away(self, words, told, capsys):
        with pytest.raises(SystemExit) as end:
            asked("x", *words.split())
        assert end.value.code == 2
        shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert told in shown and "NoneType" not in shown and "{None}" not in shown

    def test_takes_the_word_none_for_what_may_be_left_away(self):
        assert asked("x", "--images", "None", "--kind", "None")[1:4] == (None, (), None)

    def test_tells_what_the_docstring_tells(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            asked("--help")
        assert end.value.code == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "usage: spikedistill work [-h] [OPTIONS]" in shown and "Do the work." in shown
        assert "RUN ... Run directories." in shown
        assert "--images INT How many of 'them'. (default: 1000)" in shown
        assert "--rates FLOAT ... A T of what (default: the usual)." in shown
        assert "--kind {a,b} Which one of the two (default: b for large, else a)." in shown
        assert "--no-deep Go down. (on by default; this turns it off)" in shown
        assert "--quiet Say nothing." in shown and "--no-quiet" not in shown
        assert "--place TEXT cpu, cuda (default: here)." in shown and "--say" not in shown

    @pytest.mark.parametrize(
        "command, module, name",
        [
            ("evaluate", "evaluate", "evaluate"),
            ("energy", "energy", "measure_energy"),
            ("immunity", "immunity", "measure_immunity"),
        ],
    )
    def test_reaches_device_and_precision_of_every_measurement(self, command, module, name, monkeypatch, capsys):
        place = importlib.import_module(f"spikedistill.cli.{module}")
        seen = {}
        made = {"evaluate": {}, "energy": [], "immunity": (["network"], [])}[command]
        stub = functools.wraps(getattr(place, name))(lambda **given: seen.update(given) or made)
        monkeypatch.setattr(place, name, stub)
        assert call(command, "some/run", "--device", "cuda:1", "--precision", "bf16") == 0
        assert (seen["device"], seen["precision"]) == ("cuda:1", "bf16")
        assert call(command, "some/run") == 0
        assert seen["device"] is seen["precision"] is None


class TestGivenTo:
    @pytest.mark.parametrize(
        "words, expected",
        [
            ("--method a", ["a"]),
            ("--method a b --seed 3", ["a", "b"]),
            ("--method=a --seed 3", ["a"]),
            ("--method a --method b c", ["b", "c"]),
            ("--seed 3", []),
            ("--method", []),
            ("--method --seed 3", []),
        ],
    )
    def test_is_what_stands_after_the_option(self, words, expected):
        assert given_to("--method", words.split()) == expected


@dataclass(frozen=True)
class First:
    """One."""

    size: int = 3
    """How large."""
    nested: tuple[tuple[str, str], ...] = ()
    held: object = object()


@dataclass(frozen=True)
class Second(Objective):
    """Two."""

    size: int = 4


class TestParseRecipe:
    def test_changes_what_was_given_and_keeps_what_is_no_option(self):
        first = First()
        (made,) = parse_recipe("x", "", {"group": [first]}, ["--nested", "a", "b", "c", "d"], "")
        assert made == First(3, (("a", "b"), ("c", "d")), first.held)

    def test_names_a_command_that_can_be_typed_where_an_option_is_wrong(self, capsys):
        with pytest.raises(SystemExit):
            parse_recipe("x", "", {"group": [First()]}, ["--wrong"], "")
        assert "run spikedistill x --help" in capsys.readouterr().err

    def test_refuses_an_objective_whose_field_is_an_option(self):
        with pytest.raises(
            ConfigError, match=r"The field 'size' of test_options.py:Second is an option already, --size"
        ):
            parse_recipe("x", "", {"group": [First()], "method": [Second()]}, [], "")


def test_plain_keeps_paragraphs_and_drops_marks():
    assert strip_markup("a\n   b ``c``\n\n  d") == "a b 'c'\n\nd"
