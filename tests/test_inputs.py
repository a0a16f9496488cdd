import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spikedistill.errors import ShapeError
from spikedistill.evaluate.accuracy import predict
from spikedistill.inputs import LARGEST, check_pixels, evaluating, normalise
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import Conversion
from spikedistill.student.mixing import refuse_mixed
from spikedistill.student.trace import constants_of, trace
from spikedistill.teacher.load import Teacher

SHAPES = [(4, 3), (4, 3, 5), (4, 3, 5, 5), (4, 3, 2, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_channel_has_its_mean_and_deviation_whatever_the_dimensions(shape):
    images = torch.rand(shape)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])
    found = normalise(images, mean, std)
    assert found.shape == images.shape
    for channel in range(3):
        torch.testing.assert_close(found[:, channel], (images[:, channel] - mean[channel]) / std[channel])
    one = normalise(images, mean[:1].view(1, 1, 1), std[1:2].view(1, 1, 1))
    torch.testing.assert_close(one, (images - 0.1) / 2)


def test_grey_images_spread_over_the_channels_of_a_mean():
    assert normalise(torch.rand(2, 1, 4, 4), torch.zeros(3), torch.ones(3)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("shape", [(4, 2, 5, 5), (4, 5), (3,)])
def test_another_number_of_channels_is_refused(shape):
    with pytest.raises(ShapeError, match=r"given to a network with a mean for 3 channels: expected \[B, 3"):
        normalise(torch.rand(shape), torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.int16])
def test_integers_are_refused(dtype):
    with pytest.raises(ShapeError, match=r"were given: expected floats in 0..1; divide bytes by 255"):
        check_pixels(torch.ones(2, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize("value", [LARGEST * 1.01, 255.0, 65535.0])
def test_values_far_above_one_are_refused(value):
    images = torch.rand(2, 3, 4, 4)
    images[1, 2, 3, 0] = value
    with pytest.raises(ShapeError, match=r"values up to .* were given: expected pixels in 0..1; divide bytes by 255"):
        check_pixels(images)


@pytest.mark.parametrize(
    "images",
    [
        torch.randn(2, 3, 4, 4) * 3,
        torch.full((2, 2, 4, 4), 500.0),
        torch.full((5, 7), 1e6),
        torch.rand(0, 3),
        torch.full((2, 3, 4, 4), torch.inf),
    ],
)
def test_noise_counts_of_events_and_features_are_not(images):
    check_pixels(images)


def test_images_without_values_pass():
    check_pixels(torch.rand(2, 3, 4, 4, device="meta"))
    with FakeTensorMode() as mode:
        check_pixels(mode.from_tensor(torch.rand(2, 3, 4, 4)))


def convolutions(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    "images", [torch.rand(4, 3, 4, 4) * 255, torch.randint(0, 256, (4, 3, 4, 4), dtype=torch.uint8)]
)
def test_no_door_takes_bytes_for_pixels(images):
    student, _ = to_spiking(convolutions(), Conversion(timesteps=2), calibration_images=torch.rand(4, 3, 4, 4))
    teacher = Teacher(convolutions(), (0.5,), (0.5,))
    doors = [
        student,
        lambda given: student.step(given),
        lambda given: student.observe(given, ["0"]),
        teacher,
        teacher.observe,
        lambda given: to_spiking(convolutions(), calibration_images=given),
        lambda given: to_spiking(teacher, calibration_images=given),
    ]
    for door in doors:
        with pytest.raises(ShapeError, match="divide bytes by 255"):
            door(images)


def test_predict_takes_bytes_as_stored():
    teacher, stored = Teacher(convolutions(), (0.5,), (0.5,)), torch.randint(0, 256, (4, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(predict(teacher, stored)[0], teacher(stored / 255).detach())


@pytest.mark.parametrize("mean", [None, (0.3,), (0.1, 0.2, 0.3, 0.4, 0.5)])
def test_features_without_places_keep_their_shape(mean):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    given, std = torch.randn(64, 5), None if mean is None else tuple(0.5 for _ in mean)
    student, report = to_spiking(network, Conversion(timesteps=256), calibration_images=given, mean=mean, std=std)
    (layer,) = student.neurons.values()
    assert layer.threshold.shape == (8,) and len(report.sites) == 1
    wanted = network((given - torch.tensor(mean or (0.0,))) / 0.5 if mean else given)
    found = student.eval()(given).mean(0)
    assert student(given).shape == (256, 64, 3)
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)
    teacher = Teacher(network, mean or (0.0,), std or (1.0,))
    torch.testing.assert_close(teacher(given), wanted)


def test_features_in_frames():
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    frames = torch.randn(4, 6, 5)
    student, _ = to_spiking(
        network, Conversion(timesteps=4, coding=FrameCoding()), calibration_images=frames.flatten(0, 1)
    )
    assert student.eval()(frames).shape == (4, 6, 3)


@pytest.mark.parametrize("fails", [False, True])
def test_after_evaluation_each_module_is_in_its_own_mode_again(fails):
    """A frozen batch norm within a network that trains stays frozen, whatever happens meanwhile."""
    network, other = convolutions().train(), nn.Dropout().eval()
    frozen = next(network.children()).eval()
    try:
        with evaluating(network, other):
            assert not any(module.training for module in (*network.modules(), other))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert network.training and not frozen.training and not other.training
    trained = [module for module in network.modules() if module not in set(frozen.modules())]
    assert len(trained) > 1 and all(module.training for module in trained)


def test_tracing_and_trying_a_network_leave_a_frozen_layer_as_it_was():
    network = convolutions().train()
    frozen = next(network.children()).eval()
    module, _ = trace(network)
    assert module.training and network.training and not frozen.training
    refuse_mixed(module, torch.rand(4, 3, 4, 4), constants_of(module.graph))
    assert network.training and not frozen.training


class Dropped(nn.Module):
    """Dropout as a function, which becomes a layer when it is traced."""

    def forward(self, x):
        return F.dropout(x.flatten(1), 0.5, self.training)


@pytest.mark.parametrize("training", [True, False])
def test_what_stands_for_a_function_has_the_mode_of_its_network(training):
    module, _ = trace(Dropped().train(training))
    dropouts = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    assert len(dropouts) == 1 and dropouts[0].training is training and module.training is training
