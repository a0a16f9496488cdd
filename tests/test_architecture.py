"""A later folder may import an earlier one, never the reverse; the rooms on the ground know nothing of each other."""

import ast
from pathlib import Path

import pytest

import spikedistill

PACKAGE = Path(spikedistill.__file__).parent
GROUND = ("compute", "data", "teacher", "neuron", "objective")
ORDER = (*GROUND, "student", "evaluate", "train", "deliver", "recipes", "studies", "cli")
FOUNDATION = {"shapes", "errors", "files", "answer", "inputs"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path, package=PACKAGE):
    """The parts of the package that a file imports, at its top or inside its functions, with their lines."""
    inside = ["spikedistill", *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "spikedistill" else [module]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "spikedistill" and name != "spikedistill.__version__":
                yield (*name.split("."), "__init__")[1], node.lineno


def allowed(room):
    """What the files of a room may import."""
    if room in FOUNDATION:
        return FOUNDATION
    if room in GROUND:
        return FOUNDATION | {room}
    return FOUNDATION | set(ORDER[: ORDER.index(room) + 1])


def room_of(path, package=PACKAGE):
    return path.relative_to(package).parts[0].removesuffix(".py")


def violations(paths, package=PACKAGE):
    return [
        f"{path.relative_to(package)}:{line} imports {part}"
        for path in paths
        for part, line in imported(path, package)
        if part not in allowed(room_of(path, package))
    ]


def test_no_folder_imports_a_later_one():
    assert violations(path for path in FILES if room_of(path) not in ("__init__", "__main__")) == []


def test_every_folder_and_file_has_its_place_in_the_order():
    rooms = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms - FOUNDATION - set(ORDER) == set()
    assert rooms >= FOUNDATION | set(GROUND)


def test_only_the_command_line_is_what_the_package_runs():
    assert {part for part, _ in imported(PACKAGE / "__main__.py")} == {"cli"}


@pytest.mark.parametrize(
    "room, source, found",
    [
        ("data", "from spikedistill.errors import DataError", []),
        ("data", "from spikedistill.data.images import split", []),
        ("data", "from .images import split", []),
        ("data", "import numpy.random, torch", []),
        ("train", "from spikedistill.evaluate.accuracy import predict", []),
        ("data", "from spikedistill.teacher.zoo import ZOO", ["data/x.py:1 imports teacher"]),
        ("data", "import spikedistill.student.build as build", ["data/x.py:1 imports student"]),
        ("data", "from spikedistill import teacher", ["data/x.py:1 imports teacher"]),
        ("data", "from ..teacher import zoo", ["data/x.py:1 imports teacher"]),
        ("data", "from .. import teacher", ["data/x.py:1 imports teacher"]),
        ("data", "import spikedistill", ["data/x.py:1 imports __init__"]),
        ("evaluate", "def f():\n    from spikedistill.train import loop", ["evaluate/x.py:2 imports train"]),
        ("recipes", "from spikedistill.cli import main", ["recipes/x.py:1 imports cli"]),
    ],
)
def test_a_violation_in_any_form_would_be_found(tmp_path, room, source, found):
    (tmp_path / room).mkdir()
    (tmp_path / room / "x.py").write_text(source)
    assert violations([tmp_path / room / "x.py"], tmp_path) == found
