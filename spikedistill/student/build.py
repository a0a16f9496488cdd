"""``to_spiking``: an ANN goes in, a spiking student and a report come out. The whole conversion is in this file."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from spikedistill.errors import ConfigError, ConversionError, out_of_memory
from spikedistill.neuron.layer import Spiking
from spikedistill.student.biases import correct_biases
from spikedistill.student.calibrate import channel_means, record, silent_layers, thresholds
from spikedistill.student.coding import DirectCoding
from spikedistill.student.conversion import USUAL, Conversion
from spikedistill.student.correct import correct_layers, some_images
from spikedistill.student.mixing import refuse_mixed
from spikedistill.student.report import Corrected, Report, sites_of
from spikedistill.student.rules import CallSite, find_activations
from spikedistill.student.student import Student
from spikedistill.student.surgery import insert_layers, make_pools
from spikedistill.student.trace import constants_of, trace
from spikedistill.teacher.load import Normalised
from spikedistill.teacher.zoo import initialise


def to_spiking(
    ann: nn.Module,
    conversion: Conversion = USUAL,
    *,
    calibrate: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Student, Report]:
    """Turn a trained ANN into a spiking student, by default with the ANN's weights and calibrated thresholds.

    Args:
        ann: a ``Teacher``, or any network that torch.fx can trace, from images ``[B, C, H, W]`` to logits ``[B, K]``;
            it is not changed.
        conversion: number of time steps, neuron and all other choices.
        calibrate: a few hundred raw images in 0..1. Thresholds are set from the ANN's activations on them.
        mean: mean per channel for the input normalisation of a network that is not a ``Teacher`` (default: none).
        std: standard deviation per channel, likewise.

    Returns:
        The student, and a report of what became of each activation.

    Raises:
        ConversionError: if a part of the network has no spiking meaning. The message names it, its line and a remedy.
        ConfigError: if calibration images are missing.
    """
    conversion = conversion.settled()
    if not isinstance(calibrate, Tensor | None):
        raise ConfigError(f"calibrate is a {type(calibrate).__name__}: give a tensor of raw images in 0..1.")
    if conversion.inherit and (calibrate is None or not len(calibrate)):
        raise ConfigError(
            "Inherited weights need calibrated thresholds: give a few hundred images as calibrate=..., or set"
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
    inputs = None if calibrate is None or not len(calibrate) else _normalised(calibrate, mean, std, module)
    if inputs is not None:
        _try(module, inputs)
    if conversion.inherit and inputs is not None:
        chosen = _calibrated(module, activations, inputs, conversion)
        if conversion.correct == "biases":
            wanted = channel_means(module, {one.node for one in activations}, inputs)
    else:
        initialise_fresh(module)
        fresh = torch.tensor(conversion.model.threshold)
        chosen = dict.fromkeys((one.node for one in activations), (fresh, None))
    before = copy.deepcopy(module) if conversion.correct == "layers" else None
    neurons = [(one, Spiking(conversion.model, chosen[one.node][0])) for one in activations]
    repeats = isinstance(conversion.coding, DirectCoding)
    pools, notes = make_pools(module, activations, conversion.max_pool, repeats)
    named = insert_layers(module, [*neurons, *pools])
    nodes = {path: named[node.name] for path, node in ends.items() if node.name in named}
    origin = {"code": f"{type(ann).__module__}:{type(ann).__qualname__}"}
    student = Student(module, nodes, [one.name for one in activations], conversion, origin, mean, std)
    student.to(next(ann.parameters()).device)
    if wanted and calibrate is not None:
        ordered = {name: wanted[one.node] for name, one in zip(student.neurons, activations)}
        correct_biases(student, module, student.neurons, ordered, calibrate, student.at_once)
    corrected: tuple[Corrected, ...] = ()
    rates = [chosen[one.node][1] for one in activations]
    if before is not None and inputs is not None and calibrate is not None:
        corrected, rates = _correct_layers(student, before, named, inputs, calibrate)
    silent: set[str] = set()
    if conversion.inherit and inputs is not None:
        named_layers = dict(zip(student.layers(), student.neurons.values()))
        size = min(16, student.at_once)
        silent = silent_layers(module, named_layers, inputs, student.states, conversion.timesteps, size)
    levels = conversion.model.levels
    made = {one.node: (layer.threshold.detach(), rate) for (one, layer), rate in zip(neurons, rates)}
    sites = sites_of(activations, made, silent, levels)
    neuron = conversion.model
    down = conversion.inherit and neuron.leak == 1 and neuron.initial == 0 and not neuron.learn_initial
    return student, Report(sites, conversion.timesteps, conversion.inherit, notes, levels, corrected, down)


def _correct_layers(
    student: Student, ann: fx.GraphModule, named: Mapping[str, str], inputs: Tensor, raw: Tensor
) -> tuple[tuple[Corrected, ...], list[float | None]]:
    """Correct layer after layer (``correct.py``). Event frames are shown as images, as for calibration."""
    kept = some_images(ann.eval(), inputs, student.timesteps)
    rows, repeats = student.shown(raw[kept].to(inputs))
    given = named, inputs[kept], rows, repeats, student.states
    done, rates = correct_layers(student.core, ann, *given)
    return done, [rates.get(student._module(path)) for path in student.layers()]


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
    return thresholds(seen, conversion.model, conversion.timesteps, rule, conversion.percentile)


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
