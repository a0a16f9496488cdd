"""Run directories of before, of format 1: read, compared, begun from and taught by; unfinished ones are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from spikedistill.deliver.record import Record
from spikedistill.files import read_facts, read_tensors, write_tensors
from spikedistill.train.run import Run

PARTS = json.loads("""{
"who": {"teacher": "", "teacher_network": null, "teacher_width": null, "teacher_mean": null, "teacher_std": null},
"student": {"student": "same", "student_width": null, "inherit": null, "start": null, "timesteps": 2, "neuron": "if",
    "leak": null, "decay_input": null, "reset": null, "detach_reset": null, "initial": 0.5, "learn_initial": false,
    "threshold": null, "learn_threshold": false, "gradient": "exact", "recompute": "nothing", "surrogate": null,
    "rule": "least-squares", "percentile": 99.9, "per_channel": true, "calibration": 512, "correct_bias": false,
    "max_pool": "keep", "coding": "direct"},
"what": {"method": "kdsnn", "temperature": 3.0, "alpha": 0.7, "feature_weight": 0.5, "pairs": [], "adapt": null,
    "margin": false, "partial": false, "label_smoothing": 0.0, "lam": 0.001},
"data": {"data": "", "data_dir": null, "image_size": null, "validation": 0.1, "crop": 0, "border": "zeros",
    "flip": false, "cutout": 0, "policy": "none"},
"training": {"epochs": 1, "batch_size": 16, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0005,
    "schedule": "cosine", "warmup": 0.05, "clip": 0.0, "ema": 0.0, "seed": 0, "views": 0, "cache_dir": null,
    "precision": "fp32", "channels_last": true, "compile": false, "device": "cpu", "checkpoint_minutes": 5.0,
    "tensorboard": false}
}""")
"""What stood in recipe.json; the method had the fields of all methods."""
QUICK = ("--epochs", 1, "--batch-size", 16, "--lr", 0.05, "--device", "cpu", "--precision", "fp32")


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs, call):
    """A folder with a teacher and a student as they are written today, and below ``old`` as they were before."""
    folder = tmp_path_factory.mktemp("old")
    write_blobs(folder, 48, 24)
    data = ("--data", folder / "blobs.npz", *QUICK)
    assert call("teach", "--network", "vgg9", "--width", 4, "--out", folder / "teacher", *data) == 0
    assert call(*distill(folder, folder / "teacher"), "--out", folder / "student") == 0
    who = PARTS["who"] | {"teacher": str(folder / "teacher")}
    recipe = PARTS | {"who": who, "data": PARTS["data"] | {"data": str(folder / "blobs.npz")}}
    shared = {"data": recipe["data"], "training": recipe["training"]}
    as_before(folder, "teacher", {"kind": "teach", "network": "vgg9", "width": 4, "label_smoothing": 0.0, **shared})
    as_before(folder, "student", {"kind": "distill", **recipe})
    _, facts = read_tensors(folder / "student" / "model.safetensors")
    header = {"kind": "student", "architecture": facts["network"], "recipe": recipe, "data": facts["data"]}
    header |= {"mean": facts["mean"], "std": facts["std"], "results": Run(folder / "old" / "student").read("results")}
    tensors, _ = read_tensors(folder / "student" / "model.safetensors")
    write_tensors(folder / "old" / "student" / "model.safetensors", tensors, header)
    return folder


def distill(home, teacher, *options):
    """The command that made the student; max pooling was a logical or then."""
    method = ("--temperature", 3, "--weight", 0.5, "--max-pool", "or")
    return ("distill", "--data", home / "blobs.npz", *QUICK, "--teacher", teacher, "--timesteps", 2, *method, *options)


def as_before(folder, name, recipe):
    """A copy of a run with a recipe of format 1, and without what was not written then."""
    shutil.copytree(folder / name, folder / "old" / name)
    run = Run(folder / "old" / name)
    run.write("recipe", recipe)
    run.write("results", {key: value for key, value in run.read("results").items() if key != "method"})


def test_the_files_are_like_those_of_the_example(home):
    example = Path(__file__).parents[1] / "examples" / "resnet20_t4"
    theirs, ours = (Run(run).read("recipe") for run in (example, home / "old" / "student"))
    assert {name: theirs[name].keys() for name in theirs if name != "kind"} == {
        name: ours[name].keys() for name in ours if name != "kind"
    }
    headers = [read_facts(run / "model.safetensors") for run in (example, home / "old" / "student")]
    assert headers[0].keys() == headers[1].keys() and headers[0]["recipe"].keys() == headers[1]["recipe"].keys()


def test_the_example_is_read_and_compared(call, capsys):
    example = Path(__file__).parents[1] / "examples" / "resnet20_t4"
    record = Record.read(example)
    assert record.recipe["method"]["name"] == "kdsnn" and record.recipe["method"]["weight"] == 1.0
    assert (record.data.name, record.training.lr) == ("cifar10", 0.03)
    assert call("compare", example) == 0
    assert "resnet20_t4" in capsys.readouterr().out
    assert call("evaluate", example) == 2
    assert "examples/resnet20_cifar.py:resnet20" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["teacher", "student"])
class TestBothKinds:
    def test_mean_today_s_recipe(self, home, name):
        old, new = (Record.read(folder / name).recipe for folder in (home / "old", home))
        parts = [part for part in ("student", "method", "data", "training") if part in new]
        assert {**new, **old} == new | {part: old[part] for part in parts}
        for part in parts:
            assert old[part].items() <= new[part].items()

    def test_have_the_same_network(self, home, name):
        old, new = (Record.read(folder / name).network().state_dict() for folder in (home / "old", home))
        assert old.keys() == new.keys() and all(torch.equal(value, new[key]) for key, value in old.items())

    @pytest.mark.parametrize("command", ["evaluate", "compare"])
    def test_are_measured_and_shown_as_they_are_today(self, home, name, command, call, capsys):
        shown = []
        for folder in (home, home / "old"):
            assert call(command, folder / name) == 0
            shown.append(capsys.readouterr())
        assert shown[0] == shown[1]
        assert shown[0].err == ("evaluate: measuring on 24 test images\n" if command == "evaluate" else "")

    def test_teach_as_they_do_today(self, home, name, tmp_path, call):
        choice = ("--student", "vgg9", "--student-width", 4)
        for number, folder in enumerate((home, home / "old")):
            assert call(*distill(home, folder / name, *choice), "--out", tmp_path / str(number)) == 0
        assert Run(tmp_path / "0").lines("metrics") == Run(tmp_path / "1").lines("metrics")
        today, old = (Run(tmp_path / number).read("results") for number in "01")
        assert {**old, "teacher": None} == {**today, "teacher": None}  # an old run does not say what it held out

    def test_that_are_not_finished_are_refused_by_name(self, home, name, tmp_path, call, capsys):
        shutil.copytree(home / "old" / name, tmp_path / name)
        (tmp_path / name / "results.json").unlink()
        teach = ("teach", "--network", "vgg9", "--width", 4, "--data", home / "blobs.npz", *QUICK)
        command = teach if name == "teacher" else distill(home, home / "teacher")
        before = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        assert call(*command, "--out", tmp_path / name, "--resume") == 2
        assert f"The run in '{tmp_path / name}' was begun and not finished by an older" in capsys.readouterr().err
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == before


def test_a_student_goes_on_from_one_as_from_one_of_today(home, tmp_path, call):
    for number, folder in enumerate((home, home / "old")):
        start = ("--start", folder / "student", "--out", tmp_path / str(number))
        assert call(*distill(home, home / "teacher"), "--timesteps", 3, *start) == 0
    assert Run(tmp_path / "0").lines("metrics") == Run(tmp_path / "1").lines("metrics")
    assert Run(tmp_path / "1").read("before") != Run(home / "student").read("before")  # it does not begin anew


def test_a_finished_one_is_left_as_it_is_by_the_same_command_and_refused_to_another(home, tmp_path, call, capsys):
    shutil.copytree(home / "old" / "student", tmp_path / "student")
    command = (*distill(home, home / "teacher"), "--out", tmp_path / "student", "--resume")
    assert call(*command) == 0
    old, results = (Run(folder / "student").read("results") for folder in (home, tmp_path))
    assert old == results
    capsys.readouterr()
    assert call(*command, "--weight", 0.25) == 2
    assert "begun with another recipe (weight was 0.5, now 0.25)" in capsys.readouterr().err


def test_a_finished_one_is_not_extended_and_nothing_is_touched(home, tmp_path, call, capsys):
    shutil.copytree(home / "old" / "teacher", tmp_path / "teacher")
    before = {file.name: file.read_bytes() for file in (tmp_path / "teacher").iterdir()}
    teach = ("teach", "--network", "vgg9", "--width", 4, "--data", home / "blobs.npz", *QUICK, "--epochs", 2)
    assert call(*teach, "--out", tmp_path / "teacher", "--resume") == 2
    assert "was made by an earlier version of spikedistill and cannot be extended" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "teacher").iterdir()} == before


@pytest.mark.parametrize("part", ["who", "student", "what", "data", "training"])
@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_one_that_lacks_a_part_is_refused_by_name(part, command, home, tmp_path, call, capsys):
    shutil.copytree(home / "old" / "student", tmp_path / "torn")
    recipe = Run(tmp_path / "torn").read("recipe")
    del recipe[part]
    (tmp_path / "torn" / "recipe.json").write_text(json.dumps(recipe))
    assert call(command, tmp_path / "torn") == 2
    assert f"torn' holds no run that can be read (The recipe's part '{part}' is 'None'" in capsys.readouterr().err
