"""The package imports what is asked for, when it is asked for, and looks to everybody as if it were all there."""

import ast
import importlib
import pickle
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import spikedistill

HEAVY = ("torch", "numpy", "rich", "tyro", "torchvision", "accelerate", "sklearn", "scipy", "matplotlib", "PIL")


def typed_imports():
    """By name the module from which type checkers import it; other names they must not find."""
    tree = ast.parse(Path(spikedistill.__file__).read_text(encoding="utf-8"))
    guarded, unseen = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(unseen.test) == "not TYPE_CHECKING" and unseen.body[0].name == "__getattr__"
    return {alias.name: node.module for node in guarded.body for alias in node.names}


def fresh(code, *arguments):
    """What a new interpreter prints."""
    command = [sys.executable, *(("-c", code) if code else ()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class TestNames:
    def test_that_are_public_typed_and_found_lazily_are_the_same(self):
        lazy = {name: f"spikedistill.{module}" for name, module in spikedistill._MODULES.items()}
        assert lazy == typed_imports() and sorted(lazy) == sorted(spikedistill.__all__)
        assert len(set(spikedistill.__all__)) == len(spikedistill.__all__)

    @pytest.mark.parametrize("name", spikedistill.__all__)
    def test_are_those_of_their_modules(self, name):
        module = importlib.import_module(f"spikedistill.{spikedistill._MODULES[name]}")
        assert getattr(spikedistill, name) is getattr(module, name)

    def test_can_be_imported_all_at_once(self):
        names: dict[str, object] = {}
        exec("from spikedistill import *", names)
        assert names.keys() >= set(spikedistill.__all__)

    def test_are_listed_before_they_are_imported_and_have_help(self):
        code = "import spikedistill, sys; print(*dir(spikedistill)); assert 'torch' not in sys.modules"
        listed, _, shown = fresh(code + "; help(spikedistill)").partition("\n")
        assert {*spikedistill.__all__, "__version__", "__all__"} <= set(listed.split())
        assert "class Student(" in shown and "to_spiking(" in shown

    def test_of_parts_of_the_package_need_no_import_of_their_own(self):
        code = "import spikedistill; print(spikedistill.student.__name__, spikedistill.errors.__name__)"
        assert fresh(code) == "spikedistill.student spikedistill.errors\n"

    @pytest.mark.parametrize("name", ["Student", "Ramp", "ConfigError", "to_spiking"])
    def test_can_be_pickled(self, name):
        value = getattr(spikedistill, name)
        assert pickle.loads(pickle.dumps(value)) is value

    @pytest.mark.parametrize(
        "name, hint",
        [("Studnt", ": did you mean 'Student'?"), ("zzzzzz", ""), ("__wrapped__", "")],
    )
    def test_that_are_wrong_name_the_nearest(self, name, hint):
        with pytest.raises(AttributeError) as caught:
            getattr(spikedistill, name)
        assert re.fullmatch(rf"module 'spikedistill' has no attribute '{name}'({re.escape(hint)})", str(caught.value))


def test_the_version_is_that_of_the_distribution():
    assert spikedistill.__version__ == version("spikedistill")


class TestFirstWords:
    """What is said without torch is said at once."""

    @pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("--version",)], ids=repr)
    def test_import_nothing_large(self, arguments):
        code = f"""
import sys
sys.argv = ["spikedistill", *{arguments!r}]
from spikedistill.cli import main
main()
print(*sorted({{name.partition(".")[0] for name in sys.modules}}.intersection({HEAVY!r})), file=sys.stderr)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.split() == [] and done.stdout

    def test_are_the_same_from_the_module(self):
        assert fresh("", "-m", "spikedistill", "--version") == f"spikedistill {spikedistill.__version__}\n"
        assert fresh("", "-m", "spikedistill", "--help").startswith("usage: spikedistill COMMAND")

    @pytest.mark.parametrize("command", ["teach", "distill"])
    def test_of_a_command_import_torch_and_nothing_else_that_is_large(self, command):
        code = f"""
import sys
sys.argv = ["spikedistill", "{command}", "--help"]
from spikedistill.cli import main
try:
    main()
except SystemExit:
    pass
print(*sorted({{name.partition(".")[0] for name in sys.modules}}.intersection({HEAVY!r})), file=sys.stderr)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert set(done.stderr.split()) <= {"torch", "numpy", "rich", "tyro", "PIL"}, done.stderr
