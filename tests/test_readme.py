import csv
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
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": 2, "docs/guide.md": 13, "docs/results.md": 0}
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
COMMANDS = list(dict.fromkeys(COMMANDS))


@pytest.mark.parametrize("page", PAGES)
def test_the_python_examples_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == PAGES[page]
    source = tmp_path / "page.py"
    source.write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path(str(source))


def test_every_page_is_tested():
    pages = {str(file.relative_to(ROOT)) for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    assert pages == set(PAGES)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_understood(line, monkeypatch):
    _, command, *arguments = shlex.split(line)
    reached = []
    monkeypatch.chdir(ROOT)
    for name in ("spikedistill.recipes.teach.teach", "spikedistill.recipes.distill.distill"):
        monkeypatch.setattr(name, lambda *given, **_: reached.append(given) or {"test_accuracy": 0.0})
    monkeypatch.setattr("spikedistill.deliver.record.evaluate", lambda *given: reached.append(given) or {})
    monkeypatch.setattr("spikedistill.recipes.demo.demo", lambda *given: reached.append(given) or [])
    monkeypatch.setattr("spikedistill.deliver.immunity.measure_immunity", lambda *a, **_: reached.append(a) or ([], []))
    monkeypatch.setattr("spikedistill.deliver.energy.measure_energy", lambda *given: reached.append(given) or [])
    monkeypatch.setattr("spikedistill.studies.reproduce.reproduce", lambda *given: reached.append(given) or "")
    monkeypatch.setattr(cli, "_print_table", reached.append)
    cli.COMMANDS[command](arguments)
    assert reached or command == "recipes"


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
    tree = README.split("```\nspikedistill/\n")[1].split("```")[0]
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


def test_all_public_names_exist_and_are_sorted():
    assert all(hasattr(spikedistill, name) for name in spikedistill.__all__)
    assert set(spikedistill.__all__) == {
        name for name, value in vars(spikedistill).items() if name[0] != "_" and not _is_module(value)
    }


def _is_module(value):
    return type(value).__name__ == "module"


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
