"""The number of classes of a weights file."""

import pytest
import torch
from safetensors.torch import save_file

from spikedistill.errors import ConfigError
from spikedistill.teacher.classes import count_classes
from spikedistill.teacher.load import Architecture

FIXED = """
from torch import nn


def fixed(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 11))
"""


@pytest.mark.parametrize("name", ["resnet20", "vgg9", "resnet20-a"])
@pytest.mark.parametrize("classes, start", [(2, ""), (3, "module."), (101, "")])
def test_is_that_of_the_network_that_was_saved(name, classes, start, tmp_path):
    network = Architecture(name, classes, 1, 4).build()
    save_file({start + path: value for path, value in network.state_dict().items()}, tmp_path / "it.safetensors")
    before = torch.get_rng_state()
    assert count_classes(tmp_path / "it.safetensors", name, 1, 4) == classes
    assert torch.equal(torch.get_rng_state(), before)


def test_of_a_network_that_always_has_as_many_is_its_own(tmp_path):
    (tmp_path / "own.py").write_text(FIXED)
    save_file({"3.bias": torch.zeros(11)}, tmp_path / "it.safetensors")
    assert count_classes(tmp_path / "it.safetensors", f"{tmp_path / 'own.py'}:fixed", 3) == 11


def test_of_a_file_without_a_classifier_is_not_guessed(tmp_path):
    save_file({"stem.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "it.safetensors")
    with pytest.raises(ConfigError, match="does not show how many classes 'resnet20' has"):
        count_classes(tmp_path / "it.safetensors", "resnet20", 1, 4)
