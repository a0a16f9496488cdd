import csv
import shutil
from contextlib import contextmanager

import PIL.Image
import pytest
import torch
from rich.console import Console

from spikedistill.deliver import immunity as module
from spikedistill.deliver.immunity import gains, measure_immunity, panels, summary
from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.accuracy import standard_error
from spikedistill.evaluate.attacks import ATTACKS, SURROGATES
from spikedistill.evaluate.immunity import Score, perturbations
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.05, precision="fp32", device="cpu")


pytestmark = pytest.mark.usefixtures("without_compiler")


class Told(Progress):
    """Keeps what it is told, and interrupts the work at the so-manieth score."""

    def __init__(self, most=1000):
        super().__init__(Console(quiet=True))
        self.most, self.lines_said, self.scores, self.counted = most, [], [], 0

    def say(self, text):
        self.lines_said.append(text)

    @contextmanager
    def part(self, title, total=None):
        self.total = total
        yield self.seen

    def seen(self, done=1, facts=""):
        self.counted += done
        self.scores += [facts] if facts else []
        if len(self.scores) == self.most:
            raise KeyboardInterrupt


def test_writes_scores_a_table_and_a_picture_for_each_kind(home, tmp_path):
    runs = [home / "teacher", home / "student"]
    columns, rows = measure_immunity(runs, tmp_path, kinds=("noise", "hardware"), images=9, baseline="student")
    assert columns[:7] == ["network", "T x D", "images", "format", "clean", "noise", "hardware"]
    assert [row[0] for row in rows] == ["teacher", "student"]
    with (tmp_path / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["name"] for line in lines if line["kind"] == "noise"} == {
        *("gaussian", "uniform", "salt-and-pepper", "poisson", "speckle", "impulse", "erasing")
    }
    assert sum(line["network"] == "teacher" for line in lines) == 1 + 7 * 5 + 5  # of the faults only the weights'
    text = (tmp_path / "immunity.md").read_text()
    assert "9 of 24 test images" in text and sum(line.startswith("|") for line in text.splitlines()) == 4
    for line in lines:
        assert line["images"] == "9" and line["format"] == "float32"
        assert float(line["error"]) == pytest.approx(standard_error(float(line["accuracy"]), 9), abs=1e-3)
    for row in rows:
        assert row[1:4] == ["2x1" if row[0] == "student" else "", "9", "float32"]
        for cell, kind in zip(row[4:7], ("clean", "noise", "hardware")):
            found = [float(line["accuracy"]) for line in lines if line["network"] == row[0] and line["kind"] == kind]
            mean = sum(found) / len(found)
            assert cell == f"{mean:.2f} ± {standard_error(mean, 9):.2f}"
    for kind in ("noise", "hardware"):
        with PIL.Image.open(tmp_path / f"{kind}.png") as picture:
            assert picture.size[0] > 500 and len(picture.convert("L").getcolors()) > 5


def test_attacks_are_named_one_by_one_with_a_transfer_where_the_teacher_is_there(home, tmp_path, monkeypatch):
    monkeypatch.setitem(ATTACKS, "pgd", (2, ATTACKS["pgd"][1]))  # for time
    told = Told()
    runs = [home / "teacher", home / "student"]
    columns, rows = measure_immunity(runs, tmp_path, kinds=("attack",), attacked=4, progress=told)
    assert columns[:6] == ["network", "T x D", "images", "format", "clean", "attack"] and rows[0][2] == "24"
    text = (tmp_path / "immunity.md").read_text()
    head, _, *lines = [line.strip("| ").split(" | ") for line in text.split("\n\n")[-1].splitlines()]
    assert head == ["network", "format", "images", "attack", "clean", "worst", "own", *SURROGATES, "teacher"]
    assert [line[:4] for line in lines] == [
        [name, "float32", "4", attack] for name in ("teacher", "student") for attack in ("fgsm", "pgd")
    ]
    assert all("±" in cell for line in lines[2:] for cell in line[4:])
    with (tmp_path / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert {line["images"] for line in scores if line["kind"] in ("attack", "gradient", "attacked")} == {"4"}
    own = {line["name"] for line in scores if line["network"] == "teacher" and line["kind"] == "gradient"}
    assert own == {"fgsm by own", "pgd by own"}
    assert {float(score["accuracy"]) for score in scores if score["name"] == "attacked"} <= {0, 25, 50, 75, 100}
    assert len(told.scores) == told.counted == told.total == len(scores)
    assert told.scores[0] == f"teacher, clean: {float(scores[0]['accuracy']):.2f} %"
    drawn = panels([Score(**line) for line in Run(tmp_path).lines("scores")], ["student"], "attack")
    clean = next(
        float(line["accuracy"]) for line in scores if line["name"] == "attacked" and line["network"] == "student"
    )
    assert set(drawn) == {"fgsm", "pgd"} and drawn["pgd"]["student"][0] == (0.0, clean)


def test_says_where_there_is_no_teacher_for_a_transfer(home, tmp_path):
    shutil.copytree(home / "student", tmp_path / "orphan")
    recipe = Run(home / "student").read("recipe")
    recipe["teacher"]["source"] = str(tmp_path / "gone")
    Run(tmp_path / "orphan").write("recipe", recipe)
    told = Told(most=1)
    with pytest.raises(KeyboardInterrupt):
        measure_immunity([tmp_path / "orphan"], tmp_path / "out", kinds=("attack",), attacked=1, progress=told)
    (line,) = told.lines_said
    assert line.startswith("orphan: its teacher does not exist any more")


@pytest.mark.parametrize("kind", ["natural", "hardware", "attack"])
def test_scores_of_other_definitions_are_not_gone_on_with(home, tmp_path, kind):
    run = Run(tmp_path)
    before = {"kind": "immunity", "runs": [str(home / "teacher")], "kinds": [kind], "images": 6}
    run.start(before | {"attacked": 500, "seed": 0, "weights": {}}, False)
    run.append("scores", {"network": "teacher", "kind": "clean", "name": "clean", "severity": 0, "accuracy": 1.0})
    with pytest.raises(RunError, match="definitions"):
        measure_immunity([home / "teacher"], tmp_path, kinds=(kind,), images=6, resume=True)


def test_goes_on_where_it_was_interrupted_with_the_same_result(home, tmp_path, monkeypatch):
    runs = [home / "student"]
    whole = measure_immunity(runs, tmp_path / "whole", kinds=("noise",), images=6)
    options = {"kinds": ("noise",), "images": 6}
    with pytest.raises(KeyboardInterrupt):
        measure_immunity(runs, tmp_path / "cut", **options, progress=Told(most=10))
    with pytest.raises(RunError, match="already holds a run: continue it with --resume"):
        measure_immunity(runs, tmp_path / "cut", **options)
    with pytest.raises(RunError, match="begun with another recipe"):
        measure_immunity(runs, tmp_path / "cut", kinds=("noise",), images=7, resume=True)
    told = Told()
    assert measure_immunity(runs, tmp_path / "cut", **options, progress=told, resume=True) == whole
    assert len(told.scores) == 1 + 7 * 5 - 10 and told.counted == told.total == 1 + 7 * 5
    assert (tmp_path / "cut" / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()


def test_counts_where_a_network_beats_the_baseline():
    def curve(who, name, kind, heights):
        return [Score(who, kind, name, severity, float(height)) for severity, height in enumerate(heights, 1)]

    scores = [Score("a", "clean", "clean", 0, 90.0), Score("b", "clean", "clean", 0, 90.0)]
    scores += curve("a", "gaussian", "noise", [80, 70, 60, 50, 40]) + curve("b", "gaussian", "noise", [81] * 5)
    scores += curve("a", "impulse", "noise", [80] * 5) + curve("b", "impulse", "noise", [79] * 5)
    columns, rows = summary(scores, ["a", "b"], ["noise"], "a")
    assert columns[3:] == ["relative mCE, noise (a = 100)", "mCE (a = 100)", "falls less than a", "higher mean than a"]
    assert rows == [
        ["a", "90.00", "70.00", "100.00", "", "", ""],
        ["b", "90.00", "80.00", "70.00", "", "1 of 2 noise", "1 of 2 noise"],  # falls 9 / 30 and 11 / 10
    ]


def test_a_lead_on_clean_images_wins_no_fall_and_ties_are_no_wins():
    grey = [Score("a", "natural", "saturate", severity, 80.0) for severity in range(1, 6)]
    grey += [Score("b", "natural", "saturate", severity, 90.0) for severity in range(1, 6)]
    fog = [Score("a", "natural", "fog", severity, 70.0) for severity in range(1, 6)]
    fog += [Score("b", "natural", "fog", severity, 80.0) for severity in range(1, 6)]
    clean = [Score("a", "clean", "clean", 0, 80.0), Score("b", "clean", "clean", 0, 90.0)]
    snow = [Score(who, "natural", "snow", severity, 70.0) for who in "ab" for severity in range(1, 6)]
    _, rows = summary([*clean, *grey, *fog, *snow], ["a", "b"], ["natural"], "a")
    assert rows[1][3:] == ["150.00 (2 of 3)", "72.22", "0 of 3 natural", "2 of 3 natural"]
    _, rows = summary([*clean, *grey], ["a", "b"], ["natural"], "a")
    assert rows[1][3:] == ["", "50.00", "0 of 1 natural", "1 of 1 natural"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"baseline": "studnet"}, "studnet.*[Dd]id you mean.*student"),
        ({"kinds": ("nois",)}, "nois.*[Dd]id you mean.*noise"),
        ({"images": 0}, r"images \(=0\) must be 1 or more"),
        ({"attacked": 0}, r"attacked \(=0\)"),
    ],
)
def test_refuses_what_cannot_work(options, message, home, tmp_path):
    with pytest.raises(ConfigError, match=message):
        measure_immunity([home / "teacher", home / "student"], tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_refuses_runs_of_different_data_and_of_one_name(home, tmp_path, write_blobs):
    write_blobs(tmp_path, 48, 24)
    other = Data(str(tmp_path / "blobs.npz"))
    teach(Teach("vgg9", width=4, data=other, training=TRAINING), tmp_path / "teacher")
    with pytest.raises(ConfigError, match="trained on different data"):
        measure_immunity([home / "student", tmp_path / "teacher"], tmp_path / "x")
    with pytest.raises(ConfigError, match="Two of the runs have one name"):
        measure_immunity([home / "teacher", tmp_path / "teacher"], tmp_path / "x")


def test_refuses_a_run_that_is_not_finished(home, tmp_path):
    run = Run(tmp_path / "begun")
    run.write("recipe", Run(home / "student").read("recipe"))
    with pytest.raises(RunError, match="holds no finished run"):
        measure_immunity([tmp_path / "begun"], tmp_path / "x")


def test_measures_every_run_where_it_was_trained(home, elsewhere, tmp_path, monkeypatch):
    asked, measure = {}, module.immunity

    def remember(networks, *given, **options):
        kernels = {name: network.core.get_submodule("layer1.0").weight for name, network in networks.items()}
        asked.update(
            dtypes=options["dtypes"], last={name: not kernel.is_contiguous() for name, kernel in kernels.items()}
        )
        return measure(networks, *given, **options)

    monkeypatch.setattr(module, "immunity", remember)
    measure_immunity([home / "student", elsewhere], tmp_path / "out", kinds=("noise",), images=3)
    assert asked["dtypes"] == {"student": torch.float32, "elsewhere": torch.bfloat16}
    assert asked["last"] == {"student": True, "elsewhere": False}
    given = {"kinds": ("noise",), "images": 3, "precision": "fp32"}
    measure_immunity([home / "student", elsewhere], tmp_path / "fp32", device="cpu", **given)
    assert set(asked["dtypes"].values()) == {torch.float32}
    with pytest.raises(RunError, match="precision"):
        measure_immunity([home / "student", elsewhere], tmp_path / "out", resume=True, device="cpu", **given)


def scores_of(heights, perturbations=("fog",)):
    """Scores of networks by name: clean, then at severities 1..5 of each perturbation."""
    for name, (clean, *found) in heights.items():
        yield Score(name, "clean", "clean", 0, float(clean))
        for what in perturbations:
            yield from (Score(name, "natural", what, x, float(height)) for x, height in enumerate(found, 1))


def test_gains_are_points_above_the_baseline_or_alone_above_clean_images():
    scores = [*scores_of({"a": [90, 80, 70, 60, 50, 40], "b": [91, 82, 73, 64, 55, 39]})]
    assert gains(panels(scores, ["a", "b"], "natural"), ["a", "b"], "a") == {"b\nminus a": {"fog": [2, 3, 4, 5, -1]}}
    alone = gains(panels(scores, ["b"], "natural"), ["b"], "b")
    assert alone == {"b\nminus itself on clean images": {"fog": [-9, -18, -27, -36, -52]}}


def test_many_perturbations_are_one_map_of_gains_and_few_are_curves(tmp_path, monkeypatch):
    kept = []
    for name in ("curves", "heat_maps"):
        monkeypatch.setattr(module, name, lambda path, *given, name=name, **_: kept.append((path.name, name)))
    corruptions = [name for _, name in perturbations(["natural"])]
    for count in (8, 9):
        scores = [*scores_of({"a": [90] * 6, "b": [91] * 6}, corruptions[:count])]
        module.draw_kind(tmp_path / f"{count}.png", scores, ["a", "b"], "natural", "a", "", "")
    assert kept == [("8.png", "curves"), ("9.png", "heat_maps")]
