import copy

import pytest
import torch
from torch import nn

from spikedistill.compute.place import choose_place
from spikedistill.evaluate.accuracy import predict
from spikedistill.inputs import AnyLayout
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.fold import fold
from spikedistill.teacher.load import Teacher, TrainableANN

FLATTENS = {
    "view": lambda x: x.view(x.size(0), -1),
    "view of a tuple": lambda x: x.view((x.shape[0], -1)),
    "view by name": lambda x: x.view(size=(x.size(0), -1)),
    "view by number": lambda x: x.view(-1, 4 * 16),
    "view as": lambda x: x.view_as(torch.empty(x.size(0), 64)),
    "torch.Tensor.view": lambda x: torch.Tensor.view(x, x.size(0), -1),
    "of a part": lambda x: x[:, :4].view(x.size(0), -1),
    "in two steps": lambda x: x.view(x.size(0), 4, 16).view(x.size(0), 64),
}
UNTRACEABLE = ("view as", "torch.Tensor.view")


class Flattened(nn.Module):
    """What most tutorials write."""

    def __init__(self, flatten):
        super().__init__()
        self.conv, self.act, self.fc, self.flatten = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Linear(64, 3), flatten

    def forward(self, x):
        return self.fc(self.flatten(self.act(self.conv(x))))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", FLATTENS)
def test_every_network_runs_in_every_layout(name, channels_last):
    torch.manual_seed(0)
    stored = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    images = stored / 255
    network = Flattened(FLATTENS[name]).eval()
    expected = network(images).detach()
    place = choose_place("cpu", "fp32", channels_last=channels_last)
    teacher = Teacher(network, (0.0,), (1.0,))
    place.prepare(teacher)
    torch.testing.assert_close(predict(teacher, stored)[0], expected)
    torch.testing.assert_close(predict(copy.deepcopy(network).to(memory_format=place.layout), stored)[0], expected)
    (feature,) = teacher.observe(images.to(memory_format=place.layout), ["conv"]).features.values()
    assert feature.shape == (1, 5, 4, 4, 4)
    learner = TrainableANN(copy.deepcopy(network).requires_grad_(True), (0.0,), (1.0,))
    place.prepare(learner)
    learner.train()(images.to(memory_format=place.layout)).sum().backward()
    if name in UNTRACEABLE:
        return
    folded = fold(teacher.eval())
    place.prepare(folded)
    torch.testing.assert_close(predict(folded, stored)[0], expected)
    student, _ = to_spiking(network, Conversion(timesteps=3), calibration_images=images)
    wanted = student.eval()(images).detach()
    place.prepare(student)
    torch.testing.assert_close(predict(student, stored), wanted)
    student.train()(images.to(memory_format=place.layout)).sum().backward()


def test_the_fault_is_real_and_other_calls_are_left_alone():
    x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        x.view(2, -1)
    with AnyLayout():
        assert torch.equal(x.view(2, -1), x.flatten(1))
        assert torch.equal(x.view(torch.int32), x.contiguous().view(torch.int32))
        assert torch.equal(x.view(dtype=torch.int32), x.contiguous().view(torch.int32))
        y = torch.zeros(2, 3)
        assert y.view(3, 2).data_ptr() == y.data_ptr()
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            x.view(5, 5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_kernels_of_three_dimensions_are_moved(channels_last):
    network = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 32, 3))
    clips = torch.rand(5, 3, 2, 4, 4)
    expected = network(clips).detach()
    place = choose_place("cpu", "fp32", channels_last=channels_last)
    assert place.for_training(network).layout is torch.contiguous_format
    teacher = Teacher(network, (0.0,), (1.0,))
    place.prepare(teacher)
    torch.testing.assert_close(teacher(clips), expected)
    student, _ = to_spiking(network, Conversion(timesteps=3), calibration_images=clips)
    place.prepare(student)
    assert student.train()(clips).shape == (3, 5, 3)
