import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikedistill.errors import ConversionError
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.fold import fold
from spikedistill.teacher.capture import capture_features
from spikedistill.teacher.load import Teacher
from spikedistill.teacher.zoo import ZOO


def used(network):
    """The network after its batch norms have seen something."""
    network.train()
    for _ in range(3):
        network(2 * torch.rand(8, 3, 16, 16) - 0.3)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.3, 0.3)
    return network.eval()


def norms(network):
    return sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg9", "wrn16-2", "pyramidnet18", "preact-resnet18"])
def test_a_teacher_answers_as_before_and_is_not_changed(name):
    teacher = Teacher(used(ZOO[name](width=4)), (0.5,) * 3, (0.2,) * 3)
    before = copy.deepcopy(teacher.state_dict())
    images = torch.rand(4, 3, 16, 16)
    folded = fold(teacher)
    torch.testing.assert_close(folded(images), teacher(images), rtol=1e-3, atol=1e-4)
    assert norms(folded) < norms(teacher)
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_a_student_spikes_as_before():
    images = torch.rand(4, 3, 16, 16)
    student, _ = to_spiking(used(ZOO["resnet20"](width=4)), Conversion(timesteps=3), calibration_images=images)
    student = student.double().eval()
    folded = fold(student)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(images.double()), student(images.double()))


def test_features_stay_where_they_were():
    network = used(ZOO["resnet18"](width=4))
    images = torch.rand(2, 3, 16, 16)
    paths = ("stem.0", "layer1", "layer3")
    folded = fold(network, keep=("stem.0",))
    with capture_features(network, paths) as expected, capture_features(folded, paths) as found:
        network(images)
        folded(images)
    for path in paths:
        torch.testing.assert_close(found[path], expected[path], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spiking", [False, True])
def test_what_a_container_returns_is_kept_too(spiking):
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    network = used(nn.Sequential(stem, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 3)))
    images = torch.rand(2, 3, 16, 16)
    with capture_features(network, ("0",)) as expected:
        network(images)
    if spiking:
        student, _ = to_spiking(network, Conversion(timesteps=1), calibration_images=images)
        found = fold(student, keep=("0",)).observe(images, ("0",)).features
        torch.testing.assert_close(found["0"][0], expected["0"])
    else:
        folded = fold(network, keep=("0",))
        with capture_features(folded, ("0",)) as seen:
            folded(images)
        torch.testing.assert_close(seen["0"], expected["0"])


def test_a_convolution_before_functional_dropout_stays():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.relu(F.dropout(self.conv(x), 0.5, self.training)).mean((2, 3)))

    network, images = Dropping().eval(), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(fold(network)(images), network(images))


def test_linear_layers_fold_too():
    network = used(nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)))
    folded = fold(network)
    images = torch.rand(4, 3, 16, 16)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """One convolution under two norms, and one norm over two convolutions."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.first(self.conv(x)) + self.second(self.conv(x))
        return F.relu(self.second(self.other(x)))


def test_what_is_called_twice_is_left_alone():
    network = used(Twice())
    images = torch.rand(4, 3, 16, 16)
    folded = fold(network)
    assert norms(folded) == 2
    torch.testing.assert_close(folded(images), network(images))


def test_what_cannot_be_traced_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConversionError, match="cannot be traced"):
        fold(Branching())
