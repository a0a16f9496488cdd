"""Every figure of README's and the docs' tables is read from a file of docs/results; every link leads somewhere."""

import csv
import itertools
import json
import re
import runpy
import statistics
from pathlib import Path

import PIL.Image
import pytest
import torch

import spikedistill
from spikedistill.evaluate.paired import p_value

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUMBER = r"(?<![\w.-])[+-]?\d+(?:\.\d+)?(?![\w]|\.\d)"
RESULT = re.compile(r"\(((?:docs/)?results/[\w-]+\.csv)\)")
MAIN_JOB = runpy.run_path(str(ROOT / "benchmarks" / "main_job.py"))


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(page):
    """Each table of a page that a results file was named before: the file, its rows, and the cells of each line."""
    text, file = text_of(page), None
    for block in re.split(r"\n\n", text):
        found = RESULT.findall(block)
        file = found[-1] if found else None if block.startswith("## ") else file
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if file and len(lines) > 2:
            path = (ROOT / page).parent / file
            yield path, rows_of(path), [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def is_number(value):
    return re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", value or "") is not None


def known(rows):
    """What can be said from rows of a results file: values, and over seeds means, deviations, gains, their p."""
    numbers = [float(value) for row in rows for value in row.values() if is_number(value)]
    yield from numbers
    measured = "value" if rows and "value" in rows[0] else "accuracy"
    groups = {}
    for row in rows:
        if is_number(row.get("seed")) and is_number(row.get(measured)):
            key = tuple((name, value) for name, value in row.items() if name not in ("seed", measured, "command"))
            groups.setdefault(key, {})[row["seed"]] = float(row[measured])
    several = {key: values for key, values in groups.items() if len(values) > 1}
    for values in several.values():
        yield from (statistics.fmean(values.values()), statistics.stdev(values.values()))
    for (one, ours), (other, theirs) in itertools.permutations(several.items(), 2):
        if len(set(one) ^ set(other)) == 2 and ours.keys() == theirs.keys():
            gains = [ours[seed] - theirs[seed] for seed in ours]
            yield from (statistics.fmean(gains), statistics.stdev(gains))
            p = p_value(gains)
            yield from () if p is None else (p,)


def unknown(cells, rows):
    """The numbers of a table's line that no row says, to their last digit."""
    numbers = list(known(rows))
    plain = re.sub(r"`[^`]*`|\*|p < 0.001|width \d+|T = \d+|ANN of 3 bits", "", " | ".join(cells))
    return [
        found
        for found in re.findall(NUMBER, plain)
        if not any(f"{number:.{len(found.partition('.')[2])}f}" == found.lstrip("+") for number in numbers)
    ]


@pytest.mark.parametrize("page, count", [("README.md", 3), ("docs/demo.md", 2), ("docs/benchmarks.md", 9)])
def test_the_numbers_of_tables_stand_in_their_results_file(page, count):
    seen = 0
    for path, rows, lines in tables(page):
        named = {row["name"] for row in rows if "name" in row}
        seen += bool(lines)
        for label, *cells in lines:
            about = [row for row in rows if f"`{row['name']}`" == label] if f"{label}".strip("`") in named else rows
            assert unknown(cells, about) == [], (path.name, label)
    assert seen >= count


@pytest.mark.parametrize(
    "cell, missing",
    [
        ("91.60 %", []),
        ("91.61 %", ["91.61"]),
        ("91.600", []),
        ("**+1.00 ± 1.41** (p = 0.500)", []),
        ("+1.01 ± 1.41", ["+1.01"]),
        ("2.30 ± 0.43", ["0.43"]),
        ("-2.30", []),
        ("VGG-9, `--lr 7.5`", []),
        ("(p = 0.501)", ["0.501"]),
    ],
)
def test_a_wrong_number_would_be_found(cell, missing):
    values = {"a": (90.0, 91.6), "b": (90.0, 93.6), "c": (92.3, 93.9)}
    rows = [
        {"method": method, "seed": str(seed), "accuracy": str(value)}
        for method, both in values.items()
        for seed, value in enumerate(both)
    ]
    assert unknown([cell], rows) == missing


def named_rows(name):
    return {row["name"]: row for row in rows_of(ROOT / "docs" / "results" / f"{name}.csv")}


def test_the_readme_has_its_numbers_in_their_places():
    text, runs = text_of("README.md"), named_rows("cifar10")
    for ann, student, levels in (("teacher", "kdsnn", 1), ("third-party-teacher-measured", "third-party-1x4", 4)):
        (line,) = [line for line in text.splitlines() if line.startswith("|") and f" {student}`" in line]
        run = runs[student]
        assert f"| {runs[ann]['accuracy']} % | **{run['accuracy']} %** | {run['timesteps']}x{levels} |" in line
        assert f"| {run['minutes']} |" in line
    assert f"has {runs['kdsnn']['accuracy']} % with KDSNN, {runs['direct']['accuracy']} % without" in text


ELSEWHERE = {"105.9", "2.7", "3.11", "2.0", "2304.05627"}
"""Two figures with tests of their own, two versions, and a paper's number."""


def test_the_numbers_in_the_readmes_sentences_are_known_too():
    text = re.sub(r"```.*?```|`[^`]*`", "", text_of("README.md"), flags=re.DOTALL)
    numbers = [number for file in RESULT.findall(text) for number in known(rows_of(ROOT / file))]
    found = set(re.findall(r"\d+\.\d+", text)) - ELSEWHERE
    assert [one for one in found if not any(f"{x:.{len(one.partition('.')[2])}f}" == one for x in numbers)] == []
    assert {"97.60", "91.37"} <= found


def test_the_readme_says_what_energy_with_memory_traffic_costs():
    rows = rows_of(ROOT / "docs" / "results" / "kdsnn-energy.csv")
    ours = [row for row in rows if (row["student"], row["method"]) == ("resnet18", "kdsnn")]
    energy = {row["setting"]: float(row["value"]) for row in ours if row["metric"] == "energy_uJ_memory"}
    assert f"{energy[''] / energy['quantised-ann']:.1f} times" in text_of("README.md")


def test_the_picture_shows_the_results_of_the_run(tmp_path):
    picture = runpy.run_path(str(ROOT / "benchmarks" / "picture.py"))
    results = json.loads((ROOT / "examples" / "resnet20_t4" / "results.json").read_text(encoding="utf-8"))
    told = f"accuracy by step {results['accuracy_by_step']}, teacher {results['teacher_accuracy']}"
    spikes = [torch.ones(4, side, side) for side in (32, 32, 16)]
    picture["draw"](tmp_path / "student.png", torch.zeros(32, 32, 3), "horse", ["cat", *["horse"] * 3], spikes)
    for path in (tmp_path / "student.png", ROOT / "docs" / "images" / "student.png"):
        with PIL.Image.open(path) as shown:
            assert shown.info["Description"] == told and shown.size == (1760, 688)


def test_the_readme_is_read_in_a_minute():
    assert len(text_of("README.md").splitlines()) <= 150


def test_results_of_ours_say_where_they_come_from():
    for name in ("cifar10", "rate_accuracy", "immunity_causes", "peers", "demo_longer"):
        for row in rows_of(ROOT / "docs" / "results" / f"{name}.csv"):
            assert row["source"], (name, row)
            measured_here = not row["source"].startswith("https://")
            assert not measured_here or all(row[column] for column in ("command", "machine", "date")), (name, row)
            if name == "cifar10" and row["command"]:
                asked = row["command"].partition(" --only ")[2].split()
                assert asked and set(asked) <= set(MAIN_JOB["RUNS"]), row["command"]


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} of {page.name}"
        assert not anchor or anchor in anchors(file), f"{target} of {page.name}"


def test_every_page_is_reached_from_the_readme():
    text = text_of("README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name}" in text, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_benchmarks_exist(page):
    for command in re.findall(r"`python (benchmarks/[^`]+)`", page.read_text(encoding="utf-8")):
        script, *words = command.split()
        source = (ROOT / script).read_text(encoding="utf-8") + (ROOT / "benchmarks" / "rivals.py").read_text("utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), command


SOURCE = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "spikedistill").rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_pages_name_exist(page):
    text = re.sub(
        r"`(?:python|torchrun) [^`]*`|^ *(?:python|pip|pytest|torchrun|accelerate|srun|#SBATCH) .*$",
        "",
        page.read_text(encoding="utf-8"),
        flags=re.M,
    )
    for option in re.findall(r"[` ]--(?:no-)?([a-z][a-z-]+)", text):
        field = option.replace("-", "_")
        found = re.search(rf'\b{field}\b|"{option}"', SOURCE) or re.search(rf"{field}: \w+ = ", text)
        assert option == "help" or found, option


def test_the_glossary_names_what_exists():
    words = re.findall(r"`([A-Za-z_]+)[`(.]", text_of("docs/glossary.md"))
    known_elsewhere = {"spikedistill", "recipe", "accuracy_by_step"}
    assert [word for word in words if word not in known_elsewhere and not hasattr(spikedistill, word)] == []
