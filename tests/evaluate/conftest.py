"""A teacher, its student, and the student's scores under attack: what immunity and attacks are tried on."""

import pytest
import torch
from torch import Generator, nn

from spikedistill.evaluate.immunity import immunity
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Teacher


@pytest.fixture(scope="session")
def trio():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)
    teacher = Teacher(nn.Sequential(*layers), (0.5,), (0.25,))
    student, _ = to_spiking(teacher, Conversion(timesteps=3), calibration_images=torch.rand(16, 1, 8, 8))
    for layer in student.neurons.values():
        layer.backend = "reference"
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=Generator().manual_seed(2))
    with torch.no_grad():
        labels = teacher(images.float() / 255).argmax(-1)
    return teacher, student.eval(), images, labels


@pytest.fixture(scope="session")
def under_attack(trio):
    """Networks, images, labels of which a third are wrong, and options."""
    teacher, student, images, labels = trio
    wrong = labels.clone()
    wrong[::3] = (wrong[::3] + 1) % 3
    return ({"snn": student}, images, wrong), {
        "teachers": {"snn": teacher},
        "kinds": ["attack"],
        "attacked": 20,
        "seed": 5,
    }


@pytest.fixture(scope="session")
def attacked(under_attack):
    """The student's scores under attack, its teacher's transfer among them."""
    given, options = under_attack
    return immunity(*given, **options)
