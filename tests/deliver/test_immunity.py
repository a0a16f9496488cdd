import csv

import PIL.Image
import pytest
import torch

from spikedistill.deliver import immunity as module
from spikedistill.deliver.immunity import measure_immunity, summary
from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.immunity import Score
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.05, precision="fp32", device="cpu")


pytestmark = pytest.mark.usefixtures("without_compiler")


def test_writes_scores_a_table_and_a_picture_for_each_kind(home, tmp_path):
    runs = [home / "teacher", home / "student"]
    columns, rows = measure_immunity(runs, tmp_path, kinds=("noise", "hardware"), images=9, baseline="student")
    assert columns[:4] == ["network", "clean", "noise", "hardware"]
    assert [row[0] for row in rows] == ["teacher", "student"]
    with (tmp_path / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["name"] for line in lines if line["kind"] == "noise"} == {
        *("gaussian", "uniform", "salt-and-pepper", "poisson", "speckle", "impulse", "erasing")
    }
    assert sum(line["network"] == "teacher" for line in lines) == 1 + 7 * 5 + 5  # of the faults only the weights'
    assert (tmp_path / "immunity.md").read_text().count("\n") == 4
    for kind in ("noise", "hardware"):
        with PIL.Image.open(tmp_path / f"{kind}.png") as picture:
            assert picture.size[0] > 500 and len(picture.convert("L").getcolors()) > 5


def test_goes_on_where_it_was_interrupted_with_the_same_result(home, tmp_path, monkeypatch):
    runs = [home / "student"]
    whole = measure_immunity(runs, tmp_path / "whole", kinds=("noise",), images=6)
    said = []

    def interrupt(line):
        said.append(line)
        if len(said) == 10:
            raise KeyboardInterrupt

    options = {"kinds": ("noise",), "images": 6}
    with pytest.raises(KeyboardInterrupt):
        measure_immunity(runs, tmp_path / "cut", **options, say=interrupt)
    with pytest.raises(RunError, match="already holds a run: go on with it by --resume"):
        measure_immunity(runs, tmp_path / "cut", **options)
    with pytest.raises(RunError, match="begun with another recipe"):
        measure_immunity(runs, tmp_path / "cut", kinds=("noise",), images=7, resume=True)
    assert measure_immunity(runs, tmp_path / "cut", **options, say=said.append, resume=True) == whole
    assert len(said) == 1 + 7 * 5
    assert (tmp_path / "cut" / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()


def test_counts_where_a_network_beats_the_baseline():
    def curve(who, name, kind, heights):
        return [Score(who, kind, name, severity, float(height)) for severity, height in enumerate(heights, 1)]

    scores = [Score("a", "clean", "clean", 0, 90.0), Score("b", "clean", "clean", 0, 90.0)]
    scores += curve("a", "gaussian", "noise", [80, 70, 60, 50, 40]) + curve("b", "gaussian", "noise", [81] * 5)
    scores += curve("a", "impulse", "noise", [80] * 5) + curve("b", "impulse", "noise", [79] * 5)
    columns, rows = summary(scores, ["a", "b"], ["noise"], "a")
    assert columns[-1] == "better than a"
    assert rows == [["a", "90.00", "70.00", "", ""], ["b", "90.00", "80.00", "", "1 of 2 noise"]]


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
    assert module.KINDS == ("noise", "natural", "hardware", "attack")


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
