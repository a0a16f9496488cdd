"""Trained students that come with the package, for use without a network connection.

The folder ``spikedistill/pretrained`` holds each as NAME.safetensors, with its card NAME.json beside it.
``benchmarks/pretrained.py`` makes both from a run, and measures the students again.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from spikedistill.errors import ConfigError, WeightsError, unknown
from spikedistill.files import PRETRAINED_DIR as FOLDER
from spikedistill.student.save import load_student
from spikedistill.student.student import Student

PRETRAINED: tuple[str, ...] = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))
"""The names of the students, for ``pretrained`` and the command line."""


def pretrained(name: str) -> Student:
    """A trained student that comes with the package, in evaluation mode. No code of others is executed.

    Its attribute ``class_names`` names its classes, in the order of its logits. Its attribute ``card`` is the content
    of its card (see ``read_card``).

    Args:
        name: one of ``PRETRAINED``.

    Raises:
        ConfigError: if there is no such student.
        WeightsError: if its file is damaged.
    """
    card = read_card(name)
    file = FOLDER / f"{name}.safetensors"
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != card.get("sha256"):
        state = "is not that of its card" if file.is_file() else "is missing"
        raise WeightsError(f"The file of '{name}' {state} ('{file}'), so it is damaged: install spikedistill again.")
    student = load_student(file)
    vars(student).update(card=card, class_names=tuple(card["class_names"]))
    return student


def read_card(name: str) -> dict[str, Any]:
    """The card of a student that comes with the package.

    Returns:
        ``data`` and ``class_names``; ``accuracy`` on its test set in percent, as measured on the shipped file, and
        ``images``, their number; ``timesteps`` and ``levels``; ``network`` and ``parameters``; ``teacher`` with its
        ``accuracy``; ``licence``, ``command``, ``seed``, ``date``, ``machine`` and ``minutes`` of training; ``sha256``
        and ``bytes`` of the file; and ``sample_logits``, its logits for ``sample_images`` of this ``shape``.

    Raises:
        ConfigError: if there is no such student.
        WeightsError: if the card cannot be read.
    """
    if name not in PRETRAINED:
        raise ConfigError(unknown("trained student", name, PRETRAINED))
    file = FOLDER / f"{name}.json"
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(card, dict) or "class_names" not in card:
            raise ValueError("it holds no card")
        return card
    except (OSError, ValueError) as error:
        raise WeightsError(f"The card '{file}' cannot be read ({error}): install spikedistill again.") from error


def sample_images(shape: tuple[int, ...], count: int = 4) -> Tensor:
    """Images ``[count, C, H, W]`` in 0..1, with the same bits everywhere: stripes of different slopes.

    Args:
        shape: channels, rows and columns of an image.
        count: number of images.
    """
    image, channel, row, column = torch.meshgrid(*map(torch.arange, (count, *shape)), indexing="ij")
    return ((row * (3 * image + 5) + column * (5 * channel + 7) + 64 * image) % 256).float() / 255


@torch.no_grad()
def sample_logits(student: Student, shape: tuple[int, ...]) -> Tensor:
    """The mean logits ``[4, K]`` of a student for ``sample_images``, in float32."""
    return student(sample_images(shape)).mean(0)
