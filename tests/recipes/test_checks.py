"""What is found out about data and teacher before a student is taught, from the command line to the tables."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from spikedistill.data.images import load_images
from spikedistill.files import read_tensors, write_tensors
from spikedistill.recipes.config import read_config
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.distill import distill as again
from spikedistill.train.run import Run

QUICK = ("--epochs", 1, "--batch-size", 16, "--lr", 0.05, "--device", "cpu", "--precision", "fp32")
STUDENT = ("--student", "vgg9", "--student-width", 4, "--timesteps", 2, "--method", "direct")
BARE = (
    "--teacher-network",
    "vgg9",
    "--teacher-width",
    4,
    "--teacher-mean",
    0.4,
    0.4,
    0.4,
    "--teacher-std",
    0.3,
    0.3,
    0.3,
)

pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs, call):
    """A folder with data whose classes have names, and a trained teacher; its weights alone, and of another order."""
    folder = tmp_path_factory.mktemp("checks")
    write_blobs(folder, 288, 48)
    arrays = dict(np.load(folder / "blobs.npz"))
    np.savez(folder / "blobs.npz", **arrays, class_names=np.array(["red", "green", "blue"]))
    np.savez(folder / "other.npz", **arrays, class_names=np.array(["Green", "Red", "Blue"]))
    np.savez(folder / "near.npz", **arrays, class_names=np.array(["red", "green", "navy"]))
    trained = ("--lr", 0.1, "--epochs", 4)
    ann = ("teach", "--network", "vgg9", "--width", 4, "--data", folder / "blobs.npz", *QUICK, *trained)
    assert call(*ann, "--out", folder / "teacher") == 0
    tensors = load_file(folder / "teacher" / "model.safetensors")
    save_file(tensors, folder / "bare.safetensors")
    last = max(name for name in tensors if name.startswith("classifier") and name.endswith("weight"))
    for name in (last, last.replace("weight", "bias")):
        tensors[name] = tensors[name][[1, 2, 0]].clone()
    save_file(tensors, folder / "turned.safetensors")
    return folder


def distill(home, out, *options, data="blobs.npz", teacher="teacher"):
    return ("distill", "--data", home / data, "--teacher", home / teacher, *STUDENT, *QUICK, "--out", out, *options)


def test_a_teacher_of_ones_own_is_introduced_and_not_doubted(home, tmp_path, call, capsys):
    assert call(*distill(home, tmp_path / "run")) == 0
    caught, found = capsys.readouterr(), Run(tmp_path / "run").read("results")["teacher"]
    assert found == Run(tmp_path / "run").read("teacher")
    assert found["images"] == 29 and found["accuracy"] > 90
    assert (found["doubts"], found["class_names"], found["may_have_seen"]) == ([], "same", [])
    assert f"the teacher has {found['accuracy']:.2f} % on 29 images held out of training" in caught.err
    assert caught.err.index("the teacher has") < caught.err.index("epoch 1 of")
    assert "warning" not in caught.err and "may have seen" not in caught.err
    assert " ?" not in caught.out


def test_what_an_introduction_found_is_not_looked_for_again_on_resume(home, tmp_path, call, capsys):
    assert call(*distill(home, tmp_path / "run")) == 0
    Run(tmp_path / "run").write("teacher", {**Run(tmp_path / "run").read("teacher"), "accuracy": 12.5})
    (tmp_path / "run" / "results.json").unlink()
    assert call(*distill(home, tmp_path / "run", "--resume")) == 0
    assert "the teacher has 12.50 %" in capsys.readouterr().err


def test_a_teacher_of_others_may_have_seen_what_is_held_out(home, tmp_path, call, capsys):
    assert call(*distill(home, tmp_path / "run", *BARE, teacher="bare.safetensors")) == 0
    found = Run(tmp_path / "run").read("results")["teacher"]
    assert (found["may_have_seen"], found["class_names"]) == (["validation"], "not known")
    assert "the teacher may have seen images of validation in its training" in capsys.readouterr().err


def test_one_of_other_samples_is_as_one_of_others(home, tmp_path, call):
    assert call(*distill(home, tmp_path / "run", "--validation", 0.2)) == 0
    assert Run(tmp_path / "run").read("results")["teacher"]["may_have_seen"] == ["validation"]


def test_a_folder_that_is_split_here_may_have_been_seen_whole(home, tmp_path, call, capsys):
    from PIL import Image

    images = load_images(str(home / "blobs.npz"))
    for number, (pixels, label) in enumerate(zip(images.train_images, images.train_labels.tolist())):
        file = tmp_path / "photos" / images.class_names[label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    ann = ("teach", "--network", "vgg9", "--width", 4, "--data", tmp_path / "photos", *QUICK, "--out", tmp_path / "own")
    assert call(*ann) == 0
    assert (
        "'photos': it has no test part: 58 of its images, a fifth of each class, became one" in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "own" / "data.json").read_text())["data"]["drawn"] is True
    known = distill(tmp_path, tmp_path / "first", data="photos", teacher="own")
    assert call(*known) == 0
    assert Run(tmp_path / "first").read("results")["teacher"]["may_have_seen"] == []
    save_file(load_file(tmp_path / "own" / "model.safetensors"), tmp_path / "bare.safetensors")
    capsys.readouterr()
    assert call(*distill(tmp_path, tmp_path / "second", *BARE, data="photos", teacher="bare.safetensors")) == 0
    assert Run(tmp_path / "second").read("results")["teacher"]["may_have_seen"] == ["validation", "test"]
    assert "may have seen images of validation and test in its training" in capsys.readouterr().err


def test_a_teacher_of_other_order_is_warned_of_and_marked(home, tmp_path, call, capsys):
    assert call(*distill(home, tmp_path / "run", *BARE, teacher="turned.safetensors")) == 0
    caught, found = capsys.readouterr(), Run(tmp_path / "run").read("results")["teacher"]
    assert found["accuracy"] < 50
    assert "warning: check the teacher: with its classes in another order it has" in caught.err
    assert "warning: check the teacher: its accuracy is no better than that of a guess" in caught.err
    assert f"{Run(tmp_path / 'run').read('results')['teacher_accuracy']:.2f} ?" in caught.out


def test_from_python_where_nothing_is_shown_doubts_are_logged(home, tmp_path, call, caplog):
    assert call(*distill(home, tmp_path / "run", *BARE, teacher="turned.safetensors")) == 0
    caplog.clear()
    again(read_config(tmp_path / "run", Distill), tmp_path / "again")
    assert "note: check the teacher: with its classes in another order it has" in caplog.text


def test_known_names_in_another_order_are_refused_before_anything_is_written(home, tmp_path, call, capsys):
    assert call(*distill(home, tmp_path / "run", data="other.npz")) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "knows the classes of 'other' in another order: 'Green' is 0 and 1, 'Red' is 1 and 0" in message
    assert "Bring them into its order (red, green, blue)" in message
    assert not (tmp_path / "run").exists()


def test_other_names_are_warned_of(home, tmp_path, call, capsys):
    assert call(*distill(home, tmp_path / "run", data="near.npz")) == 0
    assert Run(tmp_path / "run").read("results")["teacher"]["class_names"] == "other: 'navy' and 'blue'"
    assert "warning: the teacher has other names for classes (other: 'navy' and 'blue')" in capsys.readouterr().err


def test_a_spiking_teacher_is_asked_too(home, tmp_path, call, capsys):
    assert call(*distill(home, tmp_path / "large")) == 0
    shutil.copytree(tmp_path / "large", home / "large", dirs_exist_ok=True)
    assert call(*distill(home, tmp_path / "small", teacher="large")) == 0
    found = Run(tmp_path / "small").read("results")["teacher"]
    assert (found["class_names"], found["may_have_seen"], found["images"]) == ("same", [], 29)
    capsys.readouterr()
    assert call(*distill(home, tmp_path / "no", data="other.npz", teacher="large")) == 2
    assert "in another order" in capsys.readouterr().err


def test_a_run_without_a_teacher_has_none_to_introduce(home, tmp_path, call, capsys):
    assert (
        call(*distill(home, tmp_path / "run")[:3], "--teacher", "none", *STUDENT, *QUICK, "--out", tmp_path / "run")
        == 0
    )
    assert "teacher" not in Run(tmp_path / "run").read("results") and not (tmp_path / "run" / "teacher.json").exists()
    assert "the teacher has" not in capsys.readouterr().err


def test_a_teacher_of_before_is_one_whose_samples_are_not_known(home, tmp_path, call):
    tensors, facts = read_tensors(home / "teacher" / "model.safetensors")
    facts = {name: value for name, value in facts.items() if name not in ("samples", "class_names")}
    write_tensors(home / "old" / "model.safetensors", tensors, facts)
    assert call(*distill(home, tmp_path / "run", teacher="old")) == 0
    found = Run(tmp_path / "run").read("results")["teacher"]
    assert (found["class_names"], found["may_have_seen"]) == ("not known", ["validation"])
    assert torch.isfinite(torch.tensor(found["accuracy"]))


@pytest.mark.parametrize("size, doubted", [(None, True), (8, False)])
def test_a_teacher_that_learned_from_another_size_is_doubted(tmp_path, call, capsys, size, doubted):
    draw = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "test"), "ab", range(20)):
        file = tmp_path / "photos" / part / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file)
    given = ("--data", tmp_path / "photos", "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--precision", "fp32")
    small = ("--network", "resnet20", "--width", 4, "--image-size", 8, "--out", tmp_path / "teacher")
    assert call("teach", *given, *small) == 0
    sized = () if size is None else ("--image-size", size)
    run = ("--teacher", tmp_path / "teacher", "--method", "conversion-max", "--timesteps", 2, "--out", tmp_path / "run")
    assert call("distill", *given, *sized, *run) == 0
    said = "it learned from images of 8 x 8 pixels and these have 12 x 12: give it the size it knows (--image-size 8)"
    assert (said in " ".join(capsys.readouterr().err.split())) is doubted
