"""The trained students that come with the package: each is as its card says, and damage is noticed."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import spikedistill
from spikedistill.data.images import load_images
from spikedistill.deliver import pretrained as module
from spikedistill.deliver.pretrained import PRETRAINED, pretrained, read_card, sample_images, sample_logits
from spikedistill.errors import ConfigError, WeightsError
from spikedistill.evaluate.accuracy import accuracy_by_step, predict
from spikedistill.files import PRETRAINED_DIR as FOLDER
from spikedistill.files import shipped
from spikedistill.student.student import Student

LARGEST = 2_000_000
TEXTS = ("data", "network", "licence", "command", "date", "machine", "sha256")
pytestmark = pytest.mark.usefixtures("without_compiler")
NAMED = r"(?P<data>[a-z0-9]+)-(?P<network>[a-z0-9-]+)-(?P<timesteps>\d+)x(?P<levels>\d+)"


def test_every_file_has_a_card_and_every_card_a_file():
    assert {file.stem for file in FOLDER.glob("*.safetensors")} == set(PRETRAINED) and PRETRAINED
    assert spikedistill.PRETRAINED == PRETRAINED and spikedistill.pretrained is pretrained


@pytest.mark.parametrize("name", PRETRAINED)
class TestEach:
    def test_is_small_named_after_what_it_is_and_described(self, name):
        card, file = read_card(name), FOLDER / f"{name}.safetensors"
        assert file.stat().st_size == card["bytes"] <= LARGEST
        said = re.fullmatch(NAMED, name)
        assert said["data"] == card["data"] and card["network"].startswith(said["network"])
        assert (int(said["timesteps"]), int(said["levels"])) == (card["timesteps"], card["levels"])
        assert all(isinstance(card[field], str) and card[field] for field in TEXTS)
        assert card["minutes"] > 0 and card["teacher"]["accuracy"] > card["accuracy"] - 5
        assert str(Path.home()) not in json.dumps(card)

    def test_loads_as_its_card_says_without_code_of_others(self, name):
        student, card = pretrained(name), read_card(name)
        assert isinstance(student, Student) and not student.training
        assert (student.timesteps, student.conversion.neuron.levels) == (card["timesteps"], card["levels"])
        assert student.card == card and list(student.class_names) == card["class_names"]
        assert sum(weight.numel() for weight in student.parameters()) == card["parameters"]
        assert all(value.dtype != torch.float16 for value in student.state_dict().values())
        assert "name" in student.origin and ".py" not in student.origin["name"]

    def test_gives_the_logits_of_its_card(self, name):
        card = read_card(name)
        found = sample_logits(pretrained(name), tuple(card["shape"]))
        expected = torch.tensor(card["sample_logits"])
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        # a spike that rounding moves changes a logit a little, another network changes all of them
        assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    "name", [name for name in PRETRAINED if read_card(name)["data"] == "digits" or os.environ.get("SPIKEDISTILL_DATA")]
)
def test_has_the_accuracy_of_its_card(name):
    card = read_card(name)
    images = load_images(card["data"])
    found = accuracy_by_step(predict(pretrained(name), images.test_images), images.test_labels)[-1]
    assert len(images.test_labels) == card["images"]
    assert found == pytest.approx(card["accuracy"], abs=max(0.3, 200 / card["images"]))


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the first student and its card, which the package takes for its own."""
    for file in FOLDER.glob(f"{PRETRAINED[0]}.*"):
        shutil.copyfile(file, tmp_path / file.name)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return tmp_path / f"{PRETRAINED[0]}.safetensors"


class TestDamage:
    def test_of_a_single_bit_is_noticed(self, copied):
        pretrained(PRETRAINED[0])
        content = bytearray(copied.read_bytes())
        content[-9] ^= 1
        copied.write_bytes(content)
        with pytest.raises(
            WeightsError, match=r"is not that of its card .*so it is damaged: install spikedistill again"
        ):
            pretrained(PRETRAINED[0])

    def test_of_a_missing_file_is_said(self, copied):
        copied.unlink()
        with pytest.raises(WeightsError, match=r"is missing .*install spikedistill again"):
            pretrained(PRETRAINED[0])

    @pytest.mark.parametrize("text", ["{", "[]", "{}"])
    def test_of_a_card_is_said(self, text, copied):
        copied.with_suffix(".json").write_text(text)
        with pytest.raises(WeightsError, match=r"card .* cannot be read"):
            pretrained(PRETRAINED[0])


@pytest.mark.parametrize("name", ["", "nobody", "../pretrained/" + "".join(PRETRAINED[:1])])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(ConfigError, match=rf"trained student.*{PRETRAINED[0]}"):
        pretrained(name)
    assert shipped(name) == Path(name)


def test_the_sample_images_are_the_same_everywhere_and_unlike_each_other():
    images = sample_images((3, 8, 8))
    assert images.shape == (4, 3, 8, 8) and 0 <= images.min() < images.max() <= 1
    # row 2, column 3 of image 1, channel 2: 2 * 8 + 3 * 17 + 64
    assert images[1, 2, 2, 3] == torch.tensor(131.0) / 255
    assert len({tuple(image.flatten().tolist()) for image in images}) == 4


class TestCommandLine:
    def test_lists_them(self, call, capsys):
        assert call("pretrained") == 0
        shown = capsys.readouterr().out
        assert all(name in shown and f"{read_card(name)['accuracy']:.2f}" in shown for name in PRETRAINED)

    def test_evaluates_one_by_its_name(self, call, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (name,) = [name for name in PRETRAINED if name.startswith("digits")]
        assert call("evaluate", name, "--device", "cpu", "--precision", "fp32") == 0
        shown = capsys.readouterr().out
        found = float(re.search(r"test accuracy +([\d.]+) %", shown)[1])
        assert found == pytest.approx(read_card(name)["accuracy"], abs=0.6)

    def test_prefers_a_folder_of_that_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert shipped(PRETRAINED[0]).parent == FOLDER
        (tmp_path / PRETRAINED[0]).mkdir()
        assert shipped(PRETRAINED[0]) == Path(PRETRAINED[0])
