"""``check``: what conversion would make of a network, without training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from spikedistill.data.feed import calibration_inputs
from spikedistill.data.images import ImageSet, load_images
from spikedistill.deliver.record import Record
from spikedistill.errors import ConfigError, DataError, WeightsError
from spikedistill.evaluate.firing import firing_rates
from spikedistill.evaluate.measure import check_fits
from spikedistill.files import note, read_facts, weights_file
from spikedistill.recipes.choices import StudentChoice
from spikedistill.student.build import to_spiking
from spikedistill.student.report import ConversionReport
from spikedistill.student.student import Student
from spikedistill.teacher.classes import count_classes
from spikedistill.teacher.load import Architecture, Normalised, Teacher, from_library, load_teacher
from spikedistill.train.recipe import check

TRIED = 4
"""Number of random images on which a network is tried if no data are given."""


@dataclass(frozen=True)
class Preview:
    """What conversion makes of a network.

    Args:
        report: what becomes of each activation. Its thresholds are meaningful only if ``calibrated``.
        calibrated: whether thresholds were calibrated on data, from trained weights.
        parameters: number of parameters of the student.
        neurons: for each activation its number of neurons for one image.
        shape: shape of the image, channels first.
    """

    report: ConversionReport
    calibrated: bool
    parameters: int
    neurons: dict[str, int]
    shape: tuple[int, ...]


def preview(
    network: Annotated[str, Positional, arg(metavar="NETWORK")],
    *,
    data: str | None = None,
    data_dir: str | None = None,
    image_size: int | None = None,
    channels: int = 3,
    classes: int = 10,
    width: int | None = None,
    architecture: str | None = None,
    timesteps: int = 4,
    levels: int = 1,
    neuron: Literal["if", "lif", "plif"] = "if",
    max_pool: Literal["cumulative", "or", "average"] = "cumulative",
    coding: Literal["direct", "frames", "latency", "rate"] = "direct",
    rule: Literal["least-squares", "max", "percentile"] = "least-squares",
    per_channel: bool = True,
    calibration: int = 512,
    trust_code: bool = False,
) -> Preview:
    """Say what conversion to a spiking student would do, without training.

    Args:
        network: a zoo name (resnet18, vgg9 ...), torchvision/NAME, timm/NAME or FILE.py:FUNCTION, with random weights;
            or a run directory of 'teach' or a weights file, with its trained weights.
        data: data set that the network is tried on, and that trained weights are calibrated on: a named set, a folder
            or a .npz file (default: for a run directory its own, else random images).
        data_dir: folder of the named sets (default: $SPIKEDISTILL_DATA, else ./data).
        image_size: side of the images in pixels (default: that of the data; without data 32, for torchvision and timm
            224).
        channels: input channels, without data.
        classes: number of classes, without data or without labels.
        width: channels of the first stage, for a zoo network (default: its own).
        architecture: the network of a weights file that does not name it, named as for NETWORK.
        timesteps: number of time steps T.
        levels: number of levels D, spikes that a neuron may fire within a time step.
        neuron: model of the neurons: integrate-and-fire (if), leaky (lif), or leaky with a learned leak (plif).
        max_pool: what max pooling becomes: max pooling of the cumulative input (cumulative) or of each step alone (or),
            or average pooling (average).
        coding: what the student sees at each step, as in 'distill'.
        rule: how thresholds are calibrated.
        per_channel: one threshold per channel, otherwise one per layer.
        calibration: number of training images on which thresholds are calibrated.
        trust_code: execute the Python code that a weights file may name as its network.

    Raises:
        ConversionError: if parts of the network have no spiking equivalent; the message names each with its line and a
            remedy.
        ConfigError: if the network does not exist, or a choice cannot work.
        DataError: if the data do not exist or cannot be read.
        WeightsError: if the weights cannot be read or do not fit.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size (={image_size}), the side of an image in pixels, must be 1 or more.")
    images = _images(network, data, data_dir, image_size)
    channels = channels if images is None else images.channels
    classes = classes if images is None else images.classes or _classes(network, architecture, channels, classes, width)
    named = network if architecture is None else architecture
    ann = _network(network, Architecture(named, classes, channels, width), architecture is not None, trust_code)
    inherit = images is not None and isinstance(ann, Teacher)
    choice = StudentChoice(
        inherit=inherit,
        timesteps=timesteps,
        levels=levels,
        neuron=neuron,
        max_pool=max_pool,
        coding=coding,
        rule=rule,
        per_channel=per_channel,
        calibration=calibration,
    )
    check(choice)
    if images is None:
        side = image_size or (224 if from_library(named) else 32)
        inputs = torch.rand(TRIED, len(ann.mean), side, side, generator=torch.Generator().manual_seed(0))
    else:
        check_fits(ann, images, f"The network '{network}'")
        inputs = calibration_inputs(images, calibration if inherit else TRIED)
        inputs = inputs.flatten(0, 1) if images.frames else inputs
    student, report = to_spiking(ann, choice.conversion(), calibration_images=inputs)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return Preview(report, inherit, parameters, _neurons(student, inputs[:1], coding), tuple(inputs.shape[1:]))


def _images(network: str, data: str | None, data_dir: str | None, image_size: int | None) -> ImageSet | None:
    """The data set that is given, else that of a run directory."""
    if data is not None:
        return load_images(data, data_dir, image_size)
    if not Path(network).is_dir() or image_size is not None:
        return None
    try:
        return Record.read(network).images(data_dir)
    except DataError as error:
        note(f"the data of '{network}' are left out: {error}")
        return None


def _classes(network: str, architecture: str | None, channels: int, classes: int, width: int | None) -> int:
    """The number of classes for images without labels: that of the weights file if its network is named."""
    return classes if architecture is None else count_classes(network, architecture, channels, width)


def _network(source: str, architecture: Architecture, named: bool, trust_code: bool) -> Normalised:
    """The network with the weights of its file, or with random weights where only its name is given.

    Raises:
        WeightsError: if its network is named, but the file does not exist.
    """
    if not Path(source).exists():
        if named:
            raise WeightsError(f"The weights file '{source}' does not exist: check the path.")
        return Normalised(architecture.build(), (0.5,) * architecture.channels, (0.25,) * architecture.channels)
    facts = read_facts(weights_file(source))
    if facts.get("kind") == "student":
        raise ConfigError(
            f"'{source}' is already a spiking student: give an ANN, or read conversion.json in its run directory."
        )
    usual = None if "mean" in facts else (0.5,) * architecture.channels
    spread = None if "std" in facts else (0.25,) * architecture.channels
    given = architecture if named else None
    return load_teacher(source, architecture=given, mean=usual, std=spread, trust_code=trust_code)[0]


@torch.no_grad()
def _neurons(student: Student, image: Tensor, coding: str) -> dict[str, int]:
    """The number of neurons in each layer for one image."""
    timesteps, levels = student.timesteps, student.conversion.neuron_model.levels
    with firing_rates(student) as rates:
        student.eval()(image.expand(timesteps, *image.shape) if coding == "frames" else image)
    neurons = rates.neurons(timesteps * levels)
    return {layer: neurons[key] for layer, key in zip(student.layers(), student.neurons)}
