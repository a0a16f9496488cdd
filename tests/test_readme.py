import csv
import functools
import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import spikedistill
from spikedistill import cli
from spikedistill.evaluate.immunity import Score, perturbations

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": 1,
    "docs/benchmarks.md": 0,
    "docs/cross-kd.md": 0,
    "docs/data-and-teachers.md": 1,
    "docs/demo.md": 0,
    "docs/distilling-spikes.md": 1,
    "docs/export.md": 1,
    "docs/fewer-spikes.md": 0,
    "docs/glossary.md": 0,
    "docs/gpu.md": 0,
    "docs/guide.md": 14,
    "docs/how-to.md": 0,
    "docs/kdsnn.md": 0,
    "docs/measuring.md": 3,
    "docs/results.md": 0,
    "docs/run-directory.md": 0,
    "docs/temporal-decoupling.md": 0,
    "docs/tutorial.md": 8,
}
"""Page -> its number of Python blocks."""
TEXTS = [(ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES]
COMMANDS = [
    line.split("#")[0].strip()
    for text in TEXTS
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("spikedistill")
]
COMMANDS += [
    found.replace("...", "").replace("STUDY", "kdsnn-pairs")
    for text in TEXTS
    for found in re.findall(r"`(spikedistill [^`]+)`", text)
]
MAIN_JOB = runpy.run_path(str(ROOT / "benchmarks" / "main_job.py"))
COMMANDS += [f"spikedistill {kind} cifar10 {shlex.join(options)}" for kind, options in MAIN_JOB["RUNS"].values()]
GPU = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))
COMMANDS += [f"spikedistill {shlex.join(words)}" for part in GPU["RUNS"].values() for words in part.values()]
COMMANDS = list(dict.fromkeys(COMMANDS))


@pytest.mark.usefixtures("symbolic_shapes")
@pytest.mark.parametrize("page", PAGES)
def test_the_python_examples_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == PAGES[page]
    source = tmp_path / "page.py"
    source.write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path(str(source))


def test_the_notebook_is_the_tutorial():
    tutorial = runpy.run_path(str(ROOT / "benchmarks" / "tutorial.py"))
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
    assert notebook == tutorial["notebook"](page)
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "\n".join(code).split() == tutorial["code_of"](page).split()


def test_a_network_of_ones_own_becomes_a_file_in_ten_lines_and_four_commands(
    tmp_path, monkeypatch, without_compiler, symbolic_shapes
):
    """The page on export, line by line; only the installation and most epochs are left out."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8").split("## ")[1]
    assert page.startswith("From nothing to a file")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    install, *commands = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[0].splitlines()
    assert len([line for line in code.splitlines() if line]) <= 10 and len(commands) == 3
    assert install.split("#")[0].strip() == "pip install '.[export]'"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(code, encoding="utf-8")
    for line in commands:
        _, command, *arguments = shlex.split(re.sub(r"--epochs \d+", "", line))
        few = ("--epochs", "2") if command in ("teach", "distill") else ()
        cli.run(command, *arguments, *few)
    names = {file.name for file in (tmp_path / "runs" / "digits-kdsnn-response-t4").glob("*.onnx")}
    assert names == {"student.onnx", "student-step.onnx"}


def test_every_page_is_tested():
    pages = {str(file.relative_to(ROOT)) for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    assert pages == set(PAGES)


CALLED = {
    "check": ("cli.check.show_table", None),
    "compare": ("cli.compare.compare", None),
    "demo": ("cli.demo.demo", None),
    "distill": ("cli.distill.distill", {}),
    "energy": ("cli.energy.measure_energy", []),
    "evaluate": ("cli.evaluate.evaluate", {}),
    "export": ("cli.export.export", []),
    "immunity": ("cli.immunity.measure_immunity", ([], [])),
    "pretrained": ("cli.pretrained.pretrained", None),
    "recipes": ("cli.recipes.recipes", None),
    "report": ("cli.report.report", ROOT / "README.md"),
    "reproduce": ("cli.reproduce.reproduce", None),
    "several": ("recipes.several.several", []),
    "stages": ("recipes.stages.in_stages", [Path("runs/student")]),
    "teach": ("cli.teach.teach", {"test_accuracy": 0.0}),
}
"""Command -> the function that does its work, and what stands for its result."""


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_understood(line, monkeypatch):
    there = line.replace("--config runs/cifar10-kdsnn-t4", "--config examples/resnet20_t4 --trust-code")
    _, command, *arguments = shlex.split(there)
    reached = []
    monkeypatch.chdir(ROOT)
    for place, result in CALLED.values():
        module, name = f"spikedistill.{place}".rsplit(".", 1)
        module = importlib.import_module(module)
        stub = functools.wraps(getattr(module, name))(lambda *_, result=result, **__: reached.append(1) or result)
        monkeypatch.setattr(module, name, stub)
    monkeypatch.setattr(importlib.import_module("spikedistill.cli.distill"), "print_table", lambda paths: None)
    cli.run(command, *arguments)
    assert reached


def test_the_student_that_is_shipped_answers(monkeypatch):
    monkeypatch.chdir(ROOT)
    student = spikedistill.load_student("examples/resnet20_t4", trust_code=True)
    record = spikedistill.Record.read("examples/resnet20_t4")
    choice = record.recipe["student"]
    assert choice["learn_initial"] and choice["learn_threshold"] and record.training.epochs == 10
    with torch.no_grad():
        logits = student(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, 2, 10) and logits.isfinite().all()
    initial = torch.cat([layer.initial.detach() for layer in student.neurons.values()])
    assert initial.std() > 0.01


def test_the_printed_tree_is_the_package():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.split("```\nspikedistill/\n")[1].split("```")[0]
    printed, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  ") and not line.startswith("    "):
            folder = name if name.endswith("/") else ""
        printed.add(name if line[2] != " " else folder + name)
    package = ROOT / "spikedistill"
    hidden = {"__init__.py", "__main__.py"}
    real = {
        str(file.relative_to(package))
        for file in package.rglob("*.[cp]*")
        if file.suffix in (".py", ".c") and file.name not in hidden
    }
    folders = {str(file.parent.relative_to(package)) + "/" for file in package.glob("*/*.py")}
    assert printed == real | folders


def benchmark(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))


def test_a_benchmark_leaves_its_rows_with_machine_versions_and_command(monkeypatch, tmp_path):
    rivals = benchmark("rivals", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/inference.py", "--rounds", "3", "--peers", "sinabs"])
    rows = [{"contender": name, "batch": 1, "ms": ms} for name, ms in (("ours", 49.25), ("sinabs", 57.0))]
    rivals["finish"]("inference", rows, {}, check=True)
    with (tmp_path / "runs" / "benchmarks" / "inference.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["contender"], line["batch"], line["ms"]) for line in lines] == [
        ("ours", "1", "49.25"),
        ("sinabs", "1", "57.0"),
    ]
    for line in lines:
        assert line["command"] == "python benchmarks/inference.py --rounds 3 --peers sinabs"
        assert line["machine"] == rivals["machine"]() and len(line["date"]) == 10
        assert f"torch=={torch.__version__}" in line["versions"] and line["versions"].endswith(" sinabs==3.1.3")


def test_the_causes_of_noise_are_told_seed_by_seed(monkeypatch):
    causes = benchmark("immunity_causes", monkeypatch)
    noises = {name: kind for kind, name in perturbations(["noise"])}
    assert set(causes["COLUMNS"]) == {*noises, "noises"}
    rows = []
    for method, lead in (("direct", 0.0), ("kdsnn", 2.0)):
        for seed in range(3):
            scores = [Score("run", "clean", "clean", 0, 75.0 + lead)]
            scores += [
                Score("run", "noise", name, severity, 60.0 + lead * seed + 3 * (name == "erasing") - severity)
                for name in noises
                for severity in range(1, 6)
            ]
            named = {"condition": "as studied", "network": method, "seed": seed}
            rows.append({**named, **causes["means_of"](scores, "run")})
    assert rows[0]["clean"] == 75.0 and rows[0]["gaussian"] == 57.0 and rows[0]["erasing"] == 60.0
    assert rows[0]["noises"] == pytest.approx(57 + 3 / 7)
    assert causes["gained"](rows, ["as studied", "twice as long"]) == {
        "as studied: points that KDSNN gains under noises": (pytest.approx(2.0), "at least", 0.0)
    }
