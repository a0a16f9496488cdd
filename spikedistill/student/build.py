"""``to_spiking``: an ANN goes in, a spiking student and a report come out. The whole conversion is in this file."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikedistill.errors import ConfigError, ConversionError, out_of_memory
from spikedistill.neuron.layer import Spiking
from spikedistill.student.biases import correct_biases
from spikedistill.student.calibrate import channel_means, record, silent_layers, thresholds
from spikedistill.student.coding import DirectCoding
from spikedistill.student.conversion import DEFAULT_CONVERSION, Conversion
from spikedistill.student.correct import correct_layers, some_images
from spikedistill.student.mixing import refuse_mixed
from spikedistill.student.report import ConversionReport, Corrected, sites_of
from spikedistill.student.rules import CallSite, find_activations
from spikedistill.student.student import Student
from spikedistill.student.surgery import insert_layers, make_pools
from spikedistill.student.trace import constants_of, trace
from spikedistill.teacher.load import Normalised
from spikedistill.teacher.zoo import initialise


def to_spiking(
    ann: nn.Module,
    conversion: Conversion = DEFAULT_CONVERSION,
    *,
    calibration_images: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Student, ConversionReport]:
    """Turn a trained ANN into a spiking student, by default with the ANN's weights and calibrated thresholds.

    Args:
        ann: a ``Teacher``, or any network that torch.fx can trace, from images ``[B, C, H, W]`` to logits ``[B, K]``;
            it is not changed.
        conversion: number of time steps, neuron and all other choices.
        calibration_images: a few hundred raw images in 0..1. Thresholds are set from the ANN's activations on them.
        mean: mean per channel for the input normalisation of a network that is not a ``Teacher`` (default: none).
        std: standard deviation per channel, likewise.

    Returns:
        The student, and a report of what became of each activation.

    Raises:
        ConversionError: if a part of the network has no spiking equivalent. The message names it, its line and a
            remedy.
        ConfigError: if calibration images are missing.
    """
    conversion = conversion.settled()
    if not isinstance(calibration_images, Tensor | None):
        raise ConfigError(
            f"calibration_images is a {type(calibration_images).__name__}: give a tensor of raw images in 0..1."
        )
    if conversion.inherit and (calibration_images is None or not len(calibration_images)):
        raise ConfigError(
            "Inherited weights need calibrated thresholds: give a few hundred images as calibration_images=..., or set"
            " inherit=False."
        )
    if isinstance(ann, Normalised):
        mean, std, ann = ann.mean.flatten().tolist(), ann.std.flatten().tolist(), ann.network
    mean, std = mean or (0.0,), std or (1.0,)
    copied = copy.deepcopy(ann).requires_grad_(True)
    copied.train(True)
    module, ends = trace(copied)
    activations = find_activations(module)
    chosen: Mapping[str, tuple[Tensor, float | None]]
    wanted: dict[str, Tensor] = {}
    inputs = (
        None
        if calibration_images is None or not len(calibration_images)
        else _normalised(calibration_images, mean, std, module)
    )
    if inputs is not None:
        _try(module, inputs)
    if conversion.inherit and inputs is not None:
        chosen = _calibrated(module, activations, inputs, conversion)
        if conversion.correct == "biases":
            wanted = channel_means(module, {one.node for one in activations}, inputs)
    else:
        initialise_fresh(module)
        fresh = torch.tensor(conversion.neuron_model.threshold)
        chosen = dict.fromkeys((one.node for one in activations), (fresh, None))
    before = copy.deepcopy(module) if conversion.correct == "layers" else None
    neurons = [(one, Spiking(conversion.neuron_model, chosen[one.node][0])) for one in activations]
    repeats = isinstance(conversion.coding, DirectCoding)
    pools, notes = make_pools(module, activations, conversion.max_pool, repeats)
    named = insert_layers(module, [*neurons, *pools])
    nodes = {path: named[node.name] for path, node in ends.items() if node.name in named}
    origin = {"code": f"{type(ann).__module__}:{type(ann).__qualname__}"}
    student = Student(module, nodes, [one.name for one in activations], conversion, origin, mean, std)
    student.to(next(ann.parameters()).device)
    if wanted and calibration_images is not None:
        ordered = {name: wanted[one.node] for name, one in zip(student.neurons, activations)}
        correct_biases(student, module, student.neurons, ordered, calibration_images, student.eval_batch_size)
    corrected: tuple[Corrected, ...] = ()
    rates = [chosen[one.node][1] for one in activations]
    if before is not None and inputs is not None and calibration_images is not None:
        corrected, rates = _correct_layers(student, before, named, inputs, calibration_images)
    silent: set[str] = set()
    if conversion.inherit and inputs is not None:
        named_layers = dict(zip(student.layers(), student.neurons.values()))
        size = min(16, student.eval_batch_size)
        silent = silent_layers(module, named_layers, inputs, student.states, conversion.timesteps, size)
    levels = conversion.neuron_model.levels
    made = {one.node: (layer.threshold.detach(), rate) for (one, layer), rate in zip(neurons, rates)}
    sites = sites_of(activations, made, silent, levels)
    neuron = conversion.neuron_model
    down = conversion.inherit and neuron.leak == 1 and neuron.initial == 0 and not neuron.learn_initial
    return student, ConversionReport(sites, conversion.timesteps, conversion.inherit, notes, levels, corrected, down)


def _correct_layers(
    student: Student, ann: fx.GraphModule, named: Mapping[str, str], inputs: Tensor, raw: Tensor
) -> tuple[tuple[Corrected, ...], list[float | None]]:
    """Correct layer after layer (``correct.py``). Event frames are shown as images, as for calibration."""
    kept = some_images(ann.eval(), (inputs[:1],), len(inputs), student.timesteps)
    given = _given(student, raw[kept].to(inputs))
    done, rates = correct_layers(student.core, given, ann, (inputs[kept],), named, len(kept))
    return done, [rates.get(student._module(path)) for path in student.layers()]


def _given(student: Student, images: Tensor) -> tuple[Any, ...]:
    """What a student's graph takes for calibration images."""
    rows, repeats = student.shown(images)
    return rows, student.timesteps, repeats, (None,) * student.states, False


def starting_from(
    student: Student, report: ConversionReport, source: str, other: Student | None = None, images: Tensor | None = None
) -> ConversionReport:
    """Report a student that has another's weights, after it was brought nearer to that one, layer by layer.

    They are of the same network and may differ in T, levels or neuron. If they do not, nothing is changed.

    Args:
        student: the student, changed in place.
        report: that of its conversion.
        source: the run or file of the other one, for the report.
        other: the student whose weights, thresholds and input normalisation it has; None to correct nothing.
        images: raw calibration images ``[B, C, H, W]``; needed with ``other``.

    Raises:
        ConversionError: if the two differ in structure.
    """
    corrected: tuple[Corrected, ...] = ()
    rates: list[float | None] = [None] * len(report.sites)
    if other is not None and images is not None and not _alike(student, other):
        named = {node.name: node.name for node in other.core.graph.nodes}
        if named.keys() != {node.name for node in student.core.graph.nodes}:
            raise ConversionError(
                f"The student cannot be corrected by that of {source}, whose layers have other names: give"
                " correct='nothing'."
            )
        images = images.to(next(student.parameters()))
        other.to(images.device)
        kept = images[some_images(other.core.eval(), _given(other, images[:1]), len(images), student.timesteps)]
        given, shown = _given(student, kept), _given(other, kept)
        corrected, found = correct_layers(student.core, given, other.core, shown, named, len(kept))
        rates = [found.get(student._module(path)) for path in student.layers()]
    layers, levels = student.neurons.values(), student.conversion.neuron_model.levels
    sites = tuple(
        replace(site, threshold=float(layer.threshold.mean()), expected_rate=rate and rate / levels, silent=False)
        for site, layer, rate in zip(report.sites, layers, rates)
    )
    return replace(report, sites=sites, corrected=corrected, start=source)


def _alike(student: Student, other: Student) -> bool:
    """Whether two students of one network have the same T and neuron."""
    return student.timesteps == other.timesteps and student.conversion.neuron_model == other.conversion.neuron_model


@torch.no_grad()
def _normalised(images: Tensor, mean: Sequence[float], std: Sequence[float], module: nn.Module) -> Tensor:
    device = next(module.parameters()).device
    return Normalised(nn.Identity(), mean, std).to(device).normalise(images.to(device))


def _calibrated(
    module: fx.GraphModule, activations: Sequence[CallSite], inputs: Tensor, conversion: Conversion
) -> dict[str, tuple[Tensor, float]]:
    """For each node the thresholds of its layer and the spikes per step that are expected of its neurons."""
    seen = record(module, {one.node for one in activations}, inputs, conversion.per_channel)
    rule = "max" if conversion.correct == "layers" else conversion.rule  # the correction chooses among smaller ones
    return thresholds(seen, conversion.neuron_model, conversion.timesteps, rule, conversion.percentile)


def _try(module: fx.GraphModule, inputs: Tensor) -> None:
    """Refuse a network that does not accept the inputs, or that mixes the samples of a batch."""
    try:
        refuse_mixed(module, inputs, constants_of(module.graph))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # what layers raise on other shapes
        if out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"The network does not accept the calibration images of shape {tuple(inputs.shape)} ({reason}): give images"
            " like those that it was trained on."
        ) from error


def initialise_fresh(module: nn.Module) -> None:
    """Draw new weights for every layer that has ``reset_parameters`` or a rule in ``teacher.zoo.initialise``."""
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
    initialise(module)
