"""The command line without labels: a folder of images, its student, and all that reads the run."""

import json

import numpy as np
import pytest
from PIL import Image

from spikedistill.train.run import Run

QUICK = ("--epochs", 1, "--batch-size", 16, "--lr", 0.02, "--device", "cpu", "--precision", "fp32")

pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs, call):
    """A teacher of three classes; its images as a folder without classes; a student of both."""
    folder = tmp_path_factory.mktemp("unlabelled")
    write_blobs(folder, 48, 24)
    with np.load(folder / "blobs.npz") as blobs:
        for part in ("train", "test"):
            (folder / "photos" / part).mkdir(parents=True)
            for number, image in enumerate(blobs[f"{part}_images"]):
                Image.fromarray(image).save(folder / "photos" / part / f"{number}.png")
    blobs = ("--data", folder / "blobs.npz", *QUICK, "--epochs", 6, "--lr", 0.1)
    assert call("teach", "--network", "vgg9", "--width", 4, "--out", folder / "teacher", *blobs) == 0
    assert call(*distill(folder), "--zoom", 0.6, "--out", folder / "run") == 0
    return folder


def distill(home, data="photos", method="kdsnn"):
    teacher = ("--teacher", home / "teacher", "--timesteps", 2)
    return ("distill", "--data", home / data, *teacher, "--method", method, *QUICK)


def test_the_run_says_agreement_and_no_accuracy(home):
    run = Run(home / "run")
    for name, at in (("results", 24), ("before", 48)):
        found = run.read(name)
        assert found["agreement"] == found["agreement_by_step"][-1] and len(found["agreement_by_step"]) == 2
        assert found["agreement"] * at / 100 == pytest.approx(round(found["agreement"] * at / 100))
        assert not [key for key in found if "accuracy" in key]
    (line,) = run.lines("metrics")
    assert {"soft", "features", "train_agreement", "validation_agreement"} < line.keys() and "labels" not in line
    assert run.read("results")["method"]["alpha"] == 1.0
    assert run.read("data")["data"]["labelled"] is False and run.read("data")["data"]["class_names"] == ["0", "1", "2"]
    teacher = run.read("teacher")
    assert "accuracy" not in teacher and 1 <= teacher["classes"] <= 3 and 100 / 3 <= teacher["confidence"] <= 100


def test_evaluate_finds_the_same(home, call, capsys):
    assert call("evaluate", home / "run", "--confidence", 0.5) == 0
    shown, found = capsys.readouterr().out, Run(home / "run").read("results")
    assert f"agreement with teacher   {found['agreement']:.2f} %" in shown
    assert "agreement at t=1..2" in shown and "early exit agreement" in shown and "accuracy" not in shown


def test_tables_show_agreement(home, call, capsys):
    assert call("compare", home / "run") == 0
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert "agreement (%)" in head and "accuracy" not in head
    assert row.split()[1] == f"{Run(home / 'run').read('results')['agreement']:.2f}"
    assert call("compare", home / "run", "--csv", "-") == 0
    head, row = (line.split(",") for line in capsys.readouterr().out.splitlines())
    assert head[-2:] == ["agreement_t1", "agreement_t2"] and row[head.index("test_accuracy")] == ""


def test_energy_and_check_work_and_immunity_says_why_not(home, call, capsys):
    assert call("energy", home / "run", "--images", 3) == 0
    assert "no labels" in capsys.readouterr().out
    assert call("check", home / "teacher", "--data", home / "photos") == 0
    capsys.readouterr()
    assert call("immunity", home / "run", "--out", home / "immunity") == 2
    assert "have no labels, and immunity is measured in accuracy" in capsys.readouterr().err


def test_labels_none_shows_the_accuracy_beside_the_agreement(home, tmp_path, call, capsys):
    command = distill(home, "blobs.npz", "kdsnn-response")
    assert call(*command, "--labels", "none", "--out", tmp_path / "run") == 0
    found, run = Run(tmp_path / "run").read("results"), Run(tmp_path / "run")
    assert {"test_accuracy", "teacher_accuracy", "agreement_by_step", "accuracy_by_step"} < found.keys()
    assert "accuracy" not in " ".join(run.lines("metrics")[0])
    capsys.readouterr()
    assert call("compare", tmp_path / "run", home / "run") == 0
    shown = capsys.readouterr().out
    assert f"{found['test_accuracy']:.2f}" in shown and "accuracy (%)" in shown


@pytest.mark.parametrize("method", ["direct", "tet", "conversion-qcfs"])
def test_methods_of_labels_are_refused(method, home, tmp_path, call, capsys):
    assert call(*distill(home, method=method), "--out", tmp_path / "run") == 2
    assert "needs labels, and the images have none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_weights_file_says_how_many_classes_its_network_has(home, tmp_path, call, capsys):
    named = ("--teacher-network", "vgg9", "--teacher-width", 4, "--teacher-mean", 0.5, 0.5, 0.5)
    file = ("--teacher", home / "teacher" / "model.safetensors", *named, "--teacher-std", 0.25, 0.25, 0.25)
    assert call(*distill(home, method="conversion-least-squares"), *file, "--out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "data.json").read_text())["data"]["class_names"] == ["0", "1", "2"]
    assert "agreement" in Run(tmp_path / "run").read("results")


@pytest.mark.parametrize(
    "command, message",
    [
        (("teach", "--network", "vgg9"), "has no labels, and a teacher learns from labels"),
        (("distill", "--teacher", "none", "--student", "vgg9", "--method", "direct"), "the student needs a teacher"),
    ],
)
def test_nobody_to_learn_from_is_said(command, message, home, tmp_path, call, capsys):
    assert call(*command, "--data", home / "photos", *QUICK, "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
