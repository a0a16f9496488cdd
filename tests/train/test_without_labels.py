"""Training without labels: what is learned, and what the log says of it."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from spikedistill.data.feed import MemoryFeed
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import predict
from spikedistill.evaluate.agreement import agreement
from spikedistill.neuron.dynamics import IF
from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNNResponse
from spikedistill.objective.terms import Objective
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Teacher
from spikedistill.train.loop import fit
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


def network(seed):
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


@pytest.fixture
def student():
    made, _ = to_spiking(network(1), Conversion(timesteps=2, neuron=IF, inherit=False), mean=MEAN, std=STD)
    for layer in made.neurons.values():
        layer.backend = "reference"
    return made


@pytest.fixture
def teacher():
    return Teacher(network(2), MEAN, STD)


def train(student, objective, images, path, *, validation=0.0, teacher=None, **choices):
    usual = {"epochs": 2, "batch_size": 16, "lr": 0.1, "precision": "fp32", "device": "cpu", "channels_last": False}
    config = Training(**{**usual, **choices})
    path.mkdir()
    feed = MemoryFeed(images, config.batch_size, config.seed, validation=validation)
    return fit(student, objective, feed, config, Run(path), teacher=teacher)


def test_the_weights_are_those_of_alpha_1_with_labels(student, teacher, blobs, tmp_path):
    other = copy.deepcopy(student)
    train(student, KDSNNResponse(), blobs.without_labels(), tmp_path / "none", teacher=teacher)
    train(other, KDSNNResponse(alpha=1.0), blobs, tmp_path / "given", teacher=teacher)
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in student.state_dict().items())
    assert not torch.equal(student.state_dict()["core.0.weight"], network(1).state_dict()["0.weight"])


def test_agreement_takes_the_place_of_accuracy(student, teacher, blobs, tmp_path):
    free = blobs.without_labels()
    line = train(student, KDSNNResponse(), free, tmp_path / "run", validation=0.25, teacher=teacher)
    held, _ = MemoryFeed(free, 16, validation=0.25).held()
    expected = agreement(predict(student, held), predict(teacher, held).mean(0))
    assert line["validation_agreement"] == pytest.approx(expected)
    assert 0 <= line["train_agreement"] <= 100 and not {name for name in line if "accuracy" in name}
    assert line["loss"] == line["soft"] and "labels" not in line


def test_an_objective_that_needs_labels_is_refused(student, teacher, blobs, tmp_path):
    with pytest.raises(ConfigError, match="needs labels, and the images have none"):
        train(student, Direct(), blobs.without_labels(), tmp_path / "run", teacher=teacher)


@dataclass(frozen=True)
class Small(Objective):
    """Learns to have small logits, from nobody."""

    def without_labels(self):
        return self

    def __call__(self, batch, modules):
        return {"size": batch.student.logits.square().mean()}


def test_nobody_to_agree_with_is_refused(student, blobs, tmp_path):
    with pytest.raises(ConfigError, match="the images have none"):
        train(student, Small(), blobs.without_labels(), tmp_path / "run")


class TestFrozenNorm:
    def running(self, student):
        return {name: value for name, value in student.state_dict().items() if "running" in name or "tracked" in name}

    @pytest.mark.parametrize("frozen", [True, False])
    def test_statistics_stay_and_scales_learn(self, frozen, student, teacher, blobs, tmp_path):
        before, scale = copy.deepcopy(self.running(student)), student.get_submodule("core.1").weight.clone()
        train(student, KDSNNResponse(), blobs.without_labels(), tmp_path / "run", teacher=teacher, freeze_norm=frozen)
        assert all(torch.equal(value, before[name]) for name, value in self.running(student).items()) == frozen
        assert not torch.equal(student.get_submodule("core.1").weight, scale)
