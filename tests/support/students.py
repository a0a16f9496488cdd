"""What tests of students share: conversion without a compiler, and networks as users write them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.neuron.dynamics import IF
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.report import ConversionReport
from spikedistill.student.student import Student

HERE = Path(__file__)


def line(marker: str, file: Path = HERE) -> str:
    """``file:line`` of the one line of a file that ends with a marker."""
    numbers = [n for n, text in enumerate(file.read_text().splitlines(), 1) if text.endswith(f"# {marker}")]
    assert len(numbers) == 1
    return f"{file}:{numbers[0]}"


def convert(
    network: nn.Module, images: Tensor | None, timesteps: int = 2, **options
) -> tuple[Student, ConversionReport]:
    """A student whose neurons run step by step, so that nothing is compiled."""
    student, report = to_spiking(network, Conversion(timesteps=timesteps, **options), calibration_images=images)
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student, report


PIXELS = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1, 1)


def two_neurons(*layers: nn.Module, timesteps: int = 4) -> Student:
    """Two neurons that see one and a half of a pixel, and what follows them."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), *layers)
    student, _ = convert(network, None, timesteps, neuron=IF, inherit=False)
    student.core.get_submodule("0").weight.data = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    return student.eval()


def can_learn(student: Student, images: Tensor) -> None:
    student.train()
    student(images).square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert any(parameter.grad.abs().max() > 0 for parameter in student.parameters())


class Sized(nn.Module):
    """A convolution, an activation, a classifier; how they are joined is up to the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


class Own(nn.Module):
    """What users write: functions, methods, one module called twice, a skip, pooling, dropout, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))  # first
        x = torch.add(self.act(self.conv2(x)), x)  # second
        x = self.pool(self.act(x))
        x = F.max_pool2d(torch.relu(x), 2)
        x = F.dropout(x, 0.5, self.training)
        x = x.view(x.size(0), -1)
        return self.fc2(self.fc1(x).relu())  # last
