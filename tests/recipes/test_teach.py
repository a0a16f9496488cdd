import dataclasses

import numpy as np
import pytest
import torch

from spikedistill.data.images import load_images
from spikedistill.errors import ConfigError, RunError
from spikedistill.files import read_tensors
from spikedistill.recipes.teach import Teach, teach
from spikedistill.teacher.airbench import whitening
from spikedistill.teacher.load import load_teacher
from spikedistill.train import loop
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=2, batch_size=16, precision="fp32", device="cpu")

OWN = """
from torch import nn

def small(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))
"""


@pytest.fixture
def file(blobs, tmp_path):
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_images"] = getattr(blobs, f"{part}_images").permute(0, 2, 3, 1).numpy()
        arrays[f"{part}_labels"] = getattr(blobs, f"{part}_labels").numpy()
    np.savez(tmp_path / "blobs.npz", **arrays, class_names=np.array(blobs.class_names))
    return str(tmp_path / "blobs.npz")


@pytest.fixture
def recipe(file):
    return Teach("vgg9", width=4, data=Data(file), training=TRAINING)


def test_the_result_is_the_accuracy_that_the_loaded_teacher_has(recipe, tmp_path):
    results = teach(recipe, tmp_path / "run")
    teacher, _ = load_teacher(tmp_path / "run")
    images = load_images(recipe.data.name)
    right = teacher(images.test_images.float() / 255).argmax(1) == images.test_labels
    assert results == Run(tmp_path / "run").read("results")
    assert results == {"test_accuracy": pytest.approx(100 * right.double().mean().item())}
    assert results["test_accuracy"] > 60


def test_the_weights_know_their_network_normalisation_and_classes(recipe, blobs, tmp_path):
    teach(recipe, tmp_path / "run")
    _, facts = read_tensors(tmp_path / "run" / "model.safetensors")
    assert facts["architecture"] == {"name": "vgg9", "classes": 3, "channels": 3, "width": 4}
    assert facts["class_names"] == ["red", "green", "blue"]
    pixels = blobs.train_images.double() / 255
    assert facts["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-5)
    assert facts["std"] == pytest.approx(pixels.std((0, 2, 3)).tolist(), rel=1e-2)
    assert facts["kind"] == "teacher"


def test_a_network_of_ones_own_is_taught_and_loaded_again(file, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    recipe = Teach(f"{tmp_path / 'own.py'}:small", width=32, data=Data(file), training=TRAINING)
    teach(recipe, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"names Python code .*own\.py:small.*--trust-code"):
        load_teacher(tmp_path / "run")
    teacher, architecture = load_teacher(tmp_path / "run", trust_code=True)
    assert architecture.name.endswith("own.py:small") and architecture.width is None
    assert teacher(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_a_network_that_starts_from_images_has_whitened_them_and_keeps_that(blobs, file, tmp_path):
    arrays = dict(np.load(file))
    for part in ("train", "test"):
        arrays[f"{part}_images"] = arrays[f"{part}_images"].repeat(2, 1).repeat(2, 2)
    np.savez(tmp_path / "larger.npz", **arrays)
    training = dataclasses.replace(TRAINING, lookahead=2, norm_lr=4.0, momentum=0.5)
    recipe = Teach("airbench94", width=4, data=Data(str(tmp_path / "larger.npz")), training=training)
    teach(recipe, tmp_path / "run")
    tensors, facts = read_tensors(tmp_path / "run" / "model.safetensors")
    images, (mean, std) = (
        load_images(recipe.data.name),
        (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std")),
    )
    expected = whitening((images.train_images.float() / 255 - mean) / std)
    torch.testing.assert_close(tensors["white.weight"], torch.cat([expected, -expected]))
    assert tensors["white.bias"].any()
    assert load_teacher(tmp_path / "run")[1].name == "airbench94"


def test_an_image_that_is_too_small_for_the_network_is_refused(file, tmp_path):
    with pytest.raises(ConfigError, match=r"airbench94.*8"):
        teach(Teach("airbench94", data=Data(file), training=TRAINING), tmp_path / "run")


def test_label_smoothing_reaches_the_loss(recipe, tmp_path):
    losses = []
    for share in (0.0, 0.5):
        recipe = dataclasses.replace(recipe, label_smoothing=share)
        teach(recipe, tmp_path / str(share))
        losses.append(Run(tmp_path / str(share)).lines("metrics")[-1]["loss"])
    assert losses[1] > losses[0]


def test_an_interrupted_run_is_resumed_to_the_same_bits(recipe, tmp_path, monkeypatch):
    teach(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "learning_rate", _interrupted_after(7))
        teach(recipe, tmp_path / "cut")
    teach(recipe, tmp_path / "cut", resume=True)
    for name in ("metrics.jsonl", "results.json", "recipe.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    (tensors, facts), (others, again) = (read_tensors(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert facts == again
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())


def _interrupted_after(steps):
    original, left = loop.learning_rate, [steps]

    def rate(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*args)

    return rate


def test_a_run_is_not_overwritten(recipe, tmp_path):
    teach(recipe, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="already holds a run"):
        teach(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "wrong", [{"label_smoothing": 2.0}, {"training": Training(batch_size=1000, device="cpu")}], ids=["value", "batch"]
)
def test_what_was_refused_can_be_put_right_in_the_same_directory(recipe, wrong, tmp_path):
    with pytest.raises(ConfigError, match=r"label_smoothing \(=2.0\)|batch_size \(=1000\)"):
        teach(dataclasses.replace(recipe, **wrong), tmp_path / "run")
    assert teach(recipe, tmp_path / "run")["test_accuracy"] > 60
