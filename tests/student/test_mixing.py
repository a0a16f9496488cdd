import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikedistill.errors import ConversionError
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion

BY_DIMENSION = {
    "batch norm without statistics": lambda x, net: net.anew(x),
    "concatenation": lambda x, net: torch.cat([x, x]),
    "concatenation along axis": lambda x, net: torch.cat([x, x], axis=0),
    "stack": lambda x, net: torch.stack([x, x]).mean(1),
    "chunk": lambda x, net: x.chunk(2)[0],
    "chunk by function": lambda x, net: torch.chunk(x, 2, dim=0)[0],
    "split": lambda x, net: torch.split(x, 1)[0],
    "slice": lambda x, net: x[1:],
    "stride": lambda x, net: x[::2, :],
    "index": lambda x, net: x[0],
    "new axis in front": lambda x, net: x[None],
    "mean of the batch": lambda x, net: x - x.mean(0),
    "mean of all": lambda x, net: x - x.mean(),
    "sum over several": lambda x, net: x - torch.sum(x, dim=(0, 2)),
    "mean kept": lambda x, net: x - x.mean(dim=0, keepdim=True),
    "transpose": lambda x, net: x.transpose(0, 1),
    "permute": lambda x, net: x.permute(1, 0, 2, 3),
    "permute by function": lambda x, net: torch.permute(x, (2, 0, 1, 3)),
    "transpose by name": lambda x, net: torch.transpose(x, dim0=1, dim1=0),
    "permute by name": lambda x, net: x.permute(dims=(1, 0, 2, 3)),
    "flatten of all": lambda x, net: x.flatten(),
    "flatten module": lambda x, net: net.flatten(x),
    "unflatten": lambda x, net: net.unflatten(x),
    "squeeze": lambda x, net: x.squeeze(0),
    "unsqueeze": lambda x, net: x.unsqueeze(0),
}
BY_TRIAL = {
    "negative dimension": lambda x, net: x - x.mean(-4, keepdim=True),
    "concatenation from behind": lambda x, net: torch.cat([x, x], dim=-4),
    "a view across samples": lambda x, net: x.reshape(-1, 2, 6, 6),
    "a view with the halves side by side": lambda x, net: x.reshape(x.size(1), x.size(0), 6, 6).transpose(1, 2),
    "padding of the batch": lambda x, net: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)),
    "each sample in the place of the next": lambda x, net: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)),
    "flatten from behind": lambda x, net: x.flatten(-4, -3),
    "transposed from behind": lambda x, net: x.transpose(-4, -3),
}
HARMLESS = {
    "channels": lambda x, net: torch.cat([x, x], dim=1)[:, 2:6],
    "channels by ellipsis": lambda x, net: x[..., 1:],
    "channel shuffle": lambda x, net: x.view(x.size(0), 2, 2, 6, 6).transpose(1, 2).reshape(x.shape[0], 4, 6, 6),
    "channels last and back": lambda x, net: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "permute by name": lambda x, net: torch.permute(x, dims=(0, 1, 3, 2)).permute(dims=[0, 1, 3, 2]),
    "transpose by name": lambda x, net: torch.transpose(x, dim0=2, dim1=3),
    "all samples from the first": lambda x, net: x[0:][::1],
    "squeeze by function": lambda x, net: torch.squeeze(x.mean((2, 3), keepdim=True)),
    "chunks of channels": lambda x, net: torch.cat(torch.chunk(x, 2, dim=1)[::-1], 1),
    "a mean of places": lambda x, net: x - x.mean((2, 3), keepdim=True),
    "a mean of weights": lambda x, net: x * net.scale.mean() + torch.cat([net.scale, net.scale])[:4].view(1, 4, 1, 1),
    "squeeze of places": lambda x, net: x.mean((2, 3), keepdim=True).squeeze().flatten(1),
    "usual batch norm": lambda x, net: net.norm(x),
}


class Doing(nn.Module):
    """A network with one operation in its middle; it classifies the mean of what that returns."""

    def __init__(self, work):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(1, 3)
        self.anew = nn.BatchNorm2d(4, track_running_stats=False)
        self.flatten, self.unflatten = nn.Flatten(0), nn.Unflatten(0, (1, -1))
        self.scale = nn.Parameter(torch.rand(4))
        self.work = work

    def forward(self, x):
        x = self.work(F.relu(self.conv(x)), self)
        return self.fc(x.flatten(1).mean(1, keepdim=True))


@pytest.mark.parametrize("inherit", [True, False])
@pytest.mark.parametrize("name", BY_DIMENSION)
def test_what_works_along_the_batch_is_refused_without_images_too(name, inherit):
    images = torch.rand(4, 1, 6, 6) if inherit else None
    with pytest.raises(ConversionError, match=r"test_mixing\.py.*The batch also holds the time steps"):
        to_spiking(Doing(BY_DIMENSION[name]), Conversion(inherit=inherit), calibration_images=images)


@pytest.mark.parametrize("inherit", [True, False])
@pytest.mark.parametrize("name", BY_TRIAL)
def test_what_mixes_samples_in_another_way_shows_on_images(name, inherit):
    with pytest.raises(ConversionError, match=r"mixes the samples of a batch|does not accept the calibration images"):
        to_spiking(Doing(BY_TRIAL[name]), Conversion(inherit=inherit), calibration_images=torch.rand(4, 1, 6, 6))


@pytest.mark.parametrize("name", HARMLESS)
def test_what_works_on_each_sample_is_kept(name):
    torch.manual_seed(1)
    network, images = Doing(HARMLESS[name]).eval(), torch.rand(4, 1, 6, 6)
    student, _ = to_spiking(network, Conversion(timesteps=3), calibration_images=images)
    whole = student.eval()(images)
    alone = torch.cat([student(images[i : i + 2]) for i in (0, 2)], dim=1)
    torch.testing.assert_close(alone, whole)
    state = None
    for logits in whole:
        answer, state = student.step(images, state)
        torch.testing.assert_close(answer, logits)


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("name", HARMLESS)
def test_a_batch_of_one_is_a_batch(name, timesteps):
    images = torch.rand(4, 1, 6, 6)
    student, _ = to_spiking(Doing(HARMLESS[name]).eval(), Conversion(timesteps=timesteps), calibration_images=images)
    student.eval()
    for given in (student, pickle.loads(pickle.dumps(student))):
        torch.testing.assert_close(given(images[:1]), student(images)[:, :1])
        torch.testing.assert_close(given.step(images[:1])[0], student(images)[0, :1])


def test_a_batch_of_one_is_a_batch_before_the_first_neuron():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.hidden, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(F.relu(self.hidden(self.conv(x).mean((2, 3), keepdim=True).squeeze())))

    images = torch.rand(4, 1, 6, 6)
    student, _ = to_spiking(Early(), Conversion(timesteps=4), calibration_images=images)
    torch.testing.assert_close(student.eval()(images[:1]), student(images)[:, :1])


def test_a_single_calibration_image_is_enough_to_tell():
    with pytest.raises(ConversionError, match="mixes the samples"):
        to_spiking(Doing(BY_TRIAL["negative dimension"]), calibration_images=torch.rand(1, 1, 6, 6))
