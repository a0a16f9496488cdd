"""The page of a run: its figures are those of the run's files, and nothing of them can act in a browser."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from spikedistill.data.noise import CORRUPTIONS
from spikedistill.deliver.inspect import DRAWN
from spikedistill.deliver.report import report
from spikedistill.errors import ConfigError, RunError
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

HOSTILE = "<script>alert(1)</script>"

pytestmark = pytest.mark.usefixtures("without_compiler")


class Page(html.parser.HTMLParser):
    """Ids, tags and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.tags, self.links, self.words = [], [], [], []
        self.open = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs):
    """A teacher, two seeds of its student with two time steps, a graded one; a class has a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    write_blobs(folder, 96, 48)
    arrays = dict(np.load(folder / "blobs.npz"))
    np.savez(folder / "blobs.npz", **arrays, class_names=np.array(["$red & green$", "blue", HOSTILE]))
    data = Data(str(folder / "blobs.npz"), validation=0.25)
    training = Training(epochs=2, batch_size=16, lr=0.05, precision="fp32", device="cpu")
    teach(Teach("vgg9", width=4, data=data, training=training), folder / "ann")
    for name, choice, seed in (
        ("s0", StudentChoice(timesteps=2), 0),
        ("s1", StudentChoice(timesteps=2), 1),
        ("graded", StudentChoice(timesteps=1, levels=3), 0),
    ):
        own = Training(epochs=2, batch_size=16, lr=0.05, precision="fp32", device="cpu", seed=seed)
        distill(Distill(TeacherChoice(str(folder / "ann")), choice, data=data, training=own), folder / name)
    return folder


@pytest.fixture(scope="module")
def single(home):
    return report([home / "s0"]).read_text(encoding="utf-8")


def test_a_page_has_every_section_once(home, single):
    assert (home / "s0" / "report.html").read_text(encoding="utf-8") == single
    page = Page(single)
    for section in ("built", "learning", "time", "inside", "mistakes", "noise", "energy", "again"):
        assert page.ids.count(f"run0-{section}") == 1, section
    assert len(page.ids) == len(set(page.ids)), "an id is there twice"
    inside = {link for link in page.links if link.startswith("#")}
    assert {link[1:] for link in inside} <= set(page.ids), "a link leads nowhere"
    assert len(single.encode()) < 5_000_000


def test_its_figures_are_those_of_the_run(home, single):
    run, text = Run(home / "s0"), Page(single).text
    results = run.read("results")
    assert f"{results['test_accuracy']:.2f} % test accuracy" in text
    assert f"{results['teacher_accuracy']:.2f} % teacher's test accuracy" in text
    assert f"where its teacher has {results['teacher_accuracy']:.2f} %" in text
    for line in run.lines("metrics"):
        assert f" {line['epoch']} {line['train_accuracy']:.4g} {line['validation_accuracy']:.4g} " in text
    steps = " ".join(f"{t} {value:.2f} {results['teacher_accuracy']:.2f}" for t, value in
                     enumerate(results["accuracy_by_step"], 1))  # fmt: skip
    for part in re.findall(r"\d [\d.]+ [\d.]+", steps):
        assert part in text
    for name, value in (("training.lr", run.read("recipe")["training"]["lr"]), ("training.seed", 0)):
        assert f"{name} {value}" in text
    assert run.read("environment")["versions"]["torch"] in text
    assert "latency 9 layer by layer or 2 step by step (sub-steps until the answer) training" in text


def test_it_reaches_out_to_nothing_and_names_cannot_act(single):
    page = Page(single)
    outside = [link for link in page.links if not link.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert "alert(1)" in page.text and HOSTILE not in single
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    (policy,) = [found["content"] for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert not any(name.startswith("on") for _, found in page.tags for name in found)


def test_pictures_are_told_without_seeing_them(single):
    page = Page(single)
    pictures = [found for tag, found in page.tags if found.get("role") == "img" and tag == "div"]
    assert len(pictures) > 10 and all(len(one["aria-label"]) > 20 for one in pictures)
    assert all(found.get("alt") for tag, found in page.tags if tag == "img")
    described = {one["aria-describedby"] for one in pictures if "aria-describedby" in one}
    assert described <= set(page.ids) and len(described) >= 6


def test_graded_spikes_are_shown_as_sub_steps(home):
    page = Page(report([home / "graded"], out=home / "graded.html").read_text(encoding="utf-8"))
    assert "A time step has 3 sub-steps of at most one spike." in page.text
    assert "layer 1.1 1.2 1.3" in page.text
    assert "run0-time" not in page.ids, "there is one time step alone"


def test_several_runs_are_compared_with_deviations_over_seeds(home):
    page = Page(report([home], out=home / "all.html").read_text(encoding="utf-8"))
    accuracies = [Run(home / name).read("results")["test_accuracy"] for name in ("s0", "s1")]
    mean = sum(accuracies) / 2
    assert f"{mean:.2f} ± " in page.text and "2 seeds (0: " in page.text
    assert "comparison" in page.ids and "compared-steps" in page.ids and "compared-learning" in page.ids
    assert [found["id"] for tag, found in page.tags if tag == "section"] == ["run0", "run1", "run2"]


def test_a_teacher_has_a_page_too(home):
    page = Page(report([home / "ann"], out=home / "ann.html").read_text(encoding="utf-8"))
    accuracy = Run(home / "ann").read("results")["test_accuracy"]
    assert f"Its test accuracy is {accuracy:.2f} %." in page.text
    assert "run0-learning" in page.ids and "run0-inside" not in page.ids


def test_an_unfinished_run_has_a_page_of_what_it_did(home, tmp_path):
    shutil.copytree(home / "s0", tmp_path / "cut")
    for name in ("results.json", "model.safetensors", "report.html"):
        (tmp_path / "cut" / name).unlink(missing_ok=True)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "cut" / "metrics.jsonl").write_text(lines[0] + "\n")
    page = Page(report([tmp_path / "cut"]).read_text(encoding="utf-8"))
    assert "Not finished: 1 of 2 epochs are done." in page.text
    assert "run0-learning" in page.ids and "--resume" in page.text


def test_what_cannot_run_is_told_from_its_files(home, tmp_path):
    shutil.copytree(home / "s0", tmp_path / "moved")
    page = Page(report([tmp_path / "moved"], data_dir=None, out=tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "Told from its files alone" not in page.text
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"damaged")
    run = Run(tmp_path / "moved")
    buffers = [{"bits": 1000}, {"bits": 234}]
    run.write("results", {**run.read("results"), "latency": {"layer-by-layer": 68}, "buffers": buffers})
    page = Page(report([tmp_path / "moved"], out=tmp_path / "b.html").read_text(encoding="utf-8"))
    assert "Told from its files alone, since it could not be run here" in page.text
    assert "68 layer by layer (sub-steps until the answer); 1,234 bits of spikes wait in 2 buffers" in page.text
    assert "run0-learning" in page.ids


def test_wrong_values_are_refused_and_nothing_is_replaced(home, tmp_path, call, capsys):
    (tmp_path / "notes.html").write_text("my notes")
    with pytest.raises(RunError, match=r"notes\.html"):
        report([home / "s0"], out=tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "my notes"
    with pytest.raises(ConfigError, match=r"give a name that ends in \.html"):
        report([home / "s0"], out=tmp_path / "x.pdf")
    for wrong in (("report",), ("report", home / "s0", "--images", 0), ("report", tmp_path / "none")):
        assert call(*wrong) == 2
    assert capsys.readouterr().err.count("spikedistill: ") == 3
    assert [file.name for file in tmp_path.iterdir()] == ["notes.html"]


def test_a_recipe_that_was_changed_by_hand_is_escaped(home, tmp_path):
    shutil.copytree(home / "s0", tmp_path / "run")
    for name in ("recipe", "environment"):
        file = tmp_path / "run" / f"{name}.json"
        facts = json.loads(file.read_text())
        facts.pop("checksum", None), facts.pop("run", None)
        facts |= {"date": HOSTILE} if name == "environment" else {}
        file.write_text(json.dumps(facts))
    try:
        text = report([tmp_path / "run"], out=tmp_path / "x.html").read_text(encoding="utf-8")
    except RunError:
        return  # noticed, which is as good
    assert HOSTILE not in text


def test_the_perturbations_that_are_drawn_exist():
    assert {CORRUPTIONS[name].kind: name for name in DRAWN.values()} == DRAWN
