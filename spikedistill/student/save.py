"""A student as one file that describes itself: safetensors with the network, the conversion and T in its header.

Loading a file never runs its code unasked. A network of the zoo, torchvision or timm is built by name. If the header
names Python code, the caller passes the network or says that the code is trusted.
"""

import importlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from spikedistill.errors import ConfigError, RunError, SpikeDistillError, WeightsError, one_of
from spikedistill.files import read_tensors, weights_file, write_tensors
from spikedistill.neuron.layer import Spiking
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion, read_fields
from spikedistill.student.recompute import Recompute
from spikedistill.student.student import Gradient, Student
from spikedistill.student.upgrade import FORMAT, conversion_from, upgrade
from spikedistill.teacher.load import Architecture, Normalised, code_refused, load_weights

OWN = ("kind", "format", "network", "conversion", "gradient", "recompute", "timesteps", "mean", "std")
"""The fields of the header of every student."""
HALVED = ("float16",)
"""The number formats to which weights may be rounded in a file; its header names it as ``stored``."""
LARGEST = 1e30
"""The largest mean or standard deviation that a header may hold."""


@dataclass(frozen=True)
class _Header:
    """The checked header of a student's file; every value has the right type."""

    network: Mapping[str, Any]
    conversion: Conversion
    gradient: Gradient
    recompute: Recompute
    timesteps: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def save_student(
    path: str | Path,
    student: Student,
    *,
    architecture: Architecture | None = None,
    facts: Mapping[str, Any] | None = None,
    stored: torch.dtype | None = None,
) -> None:
    """Write a student to one file, atomically.

    Args:
        path: the file, or a directory for its ``model.safetensors``.
        student: made by ``to_spiking``, trained or not. A student with folded batch norms cannot be loaded again.
        architecture: how to build the ANN; without it the header names the class of the ANN.
        facts: further entries for the header, anything that JSON can hold.
        stored: ``torch.float16`` halves the file: weights of convolutions and linear layers are rounded to it, and
            become float32 again when they are loaded. Thresholds, biases and batch norms are not rounded. Without it
            nothing is rounded.

    Learned thresholds below the smallest one are raised to it first, which changes no logits.

    Raises:
        ConfigError: if a name in ``facts`` is one of the header's, the surrogate or coding is a user's own class,
            ``stored`` is another format, or a weight is too large for it.
        RunError: if the file cannot be written.
    """
    taken = [name for name in facts or {} if name in (*OWN, "stored")]
    if taken:
        raise ConfigError(f"facts may not hold {', '.join(taken)}: the header uses these names. Choose other names.")
    header = {
        "kind": "student",
        "format": FORMAT,
        "network": student.origin if architecture is None else architecture.facts(),
        "conversion": student.conversion.facts(),
        "gradient": student.gradient,
        "recompute": student.recompute,
        "timesteps": student.timesteps,
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
    }
    if stored is not None:
        named = str(stored).removeprefix("torch.")
        one_of("stored format", named, HALVED)
        header["stored"] = named
    for layer in student.neurons.values():
        layer.raise_threshold()
    write_tensors(weights_file(path), _rounded(student.state_dict(), stored), {**header, **(facts or {})})


def _rounded(tensors: Mapping[str, Tensor], stored: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors with the weights of convolutions and linear layers in another number format.

    Raises:
        ConfigError: if a weight is too large for it.
    """
    large = {name for name, value in tensors.items() if name.endswith(".weight") and value.ndim > 1}
    made = {name: value.to(stored) if stored and name in large else value for name, value in tensors.items()}
    if broken := [name for name in large if not torch.isfinite(made[name]).all()]:
        raise ConfigError(f"The weights '{broken[0]}' are too large for {stored}: save without it.")
    return made


def load_student(path: str | Path, network: nn.Module | None = None, trust_code: bool = False) -> Student:
    """Load a student from its file, in evaluation mode. It gives the logits of the student that was saved.

    Args:
        path: the file, or a directory with ``model.safetensors``.
        network: the ANN, with any weights. Not needed if the file names a network of the zoo, torchvision or timm. It
            is not changed.
        trust_code: run the Python code that the file names to build the network.

    Raises:
        WeightsError: if the file is missing or broken, or its weights do not fit the network.
        RunError: if it holds no student, was written by an unknown version, or belongs to another run than its
            directory.
        ConfigError: if it names code that is not trusted, or a network that cannot be built.
        ConversionError: if the given network cannot be converted.
    """
    file, tensors, facts = read_student(path)
    header = _header(facts, file)
    ann = _build(header.network, file, trust_code) if network is None else network
    ann = ann.network if isinstance(ann, Normalised) else ann
    made = replace(header.conversion.settled(), inherit=False, correct="nothing")
    with torch.random.fork_rng(devices=[]):  # the random weights drawn here are all replaced
        student, _ = to_spiking(ann, made, mean=header.mean, std=header.std)
    student.conversion = header.conversion.settled()
    student.origin = header.network if network is None else student.origin
    student.gradient, student.recompute = header.gradient, header.recompute
    student.set_timesteps(header.timesteps)
    _in_dtypes_of(student, tensors)
    fill(student, tensors, f"'{file}'")
    return student.eval()


def read_student(path: str | Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The path of a student's file, its tensors, and its header.

    Args:
        path: a run directory, or the file itself.

    Raises:
        WeightsError: if it cannot be read.
        RunError: if it holds no student.
    """
    file = weights_file(path)
    tensors, facts = read_tensors(file)
    if isinstance(facts, dict) and facts.get("stored") in HALVED:
        tensors = {name: value.float() if value.dtype == torch.float16 else value for name, value in tensors.items()}
    kind = facts.get("kind", "weights of unknown origin") if isinstance(facts, dict) else "a damaged header"
    if kind != "student":
        raise RunError(f"'{file}' holds {kind}, not a student: give a run of 'distill'.")
    return file, tensors, facts


def start_from(student: Student, path: str | Path) -> None:
    """Load weights, thresholds and input normalisation of a trained student of the same network into a student.

    If the two differ in levels D, thresholds are multiplied by ``D before / D now``, so that the largest output of a
    neuron, D thresholds, stays.

    Raises:
        WeightsError: if the file cannot be read, or a tensor is missing or does not fit.
        RunError: if it holds no student.
    """
    file, tensors, facts = read_student(path)
    header = _header(facts, file)
    fill(student, tensors, f"'{file}'")
    student.set_normalisation(header.mean, header.std)
    for layer in student.neurons.values():
        layer.set_threshold(layer.threshold.detach() * (header.conversion.neuron_model.levels / layer.neuron.levels))


def fill(student: Student, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load weights and thresholds, per layer or per channel, into a student.

    A student that learns initial potentials keeps its own if the tensors hold none.

    Raises:
        WeightsError: if a tensor is missing or does not fit.
    """
    layers = {path: layer for path, layer in student.named_modules() if isinstance(layer, Spiking)}
    for path, layer in layers.items():
        if (given := tensors.get(f"{path}.threshold")) is not None:
            _set_threshold(layer, given, f"'{path}.threshold' of {source}")
    fixed = {f"{path}.initial" for path in layers}
    own = {name: value for name, value in student.state_dict().items() if name in fixed - tensors.keys()}
    load_weights(student, {**tensors, **own}, source)


def _set_threshold(layer: Spiking, given: Tensor, name: str) -> None:
    try:
        layer.set_threshold(given)
    except ConfigError as error:
        raise WeightsError(f"{name} is not a valid threshold ({error}): the file is damaged.") from error


def _header(facts: Mapping[str, Any], file: Path) -> _Header:
    """The header of any format, checked."""
    try:
        given = facts if facts.get("format") == FORMAT else _of_format_1(facts)
        missing = [name for name in OWN if name not in given]
        if missing:
            raise ConfigError(f"{', '.join(missing)} missing")
        one_of("gradient", given["gradient"], get_args(Gradient))
        one_of("recompute", given["recompute"], get_args(Recompute))
        if type(given["timesteps"]) is not int or given["timesteps"] < 1:
            raise ConfigError(f"timesteps (={given['timesteps']!r}) is not a whole number of 1 or more")
        mean, std = _numbers(given["mean"]), _numbers(given["std"])
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ConfigError(f"mean {mean} and std {std} are not one value per channel, std above 0")
        conversion = Conversion.from_facts(given["conversion"])
        network = _network(given["network"])
    except SpikeDistillError as error:
        raise RunError(
            f"This version cannot read the description of the student in '{file}' ({str(error).rstrip('.')}):"
            " save or distill it again."
        ) from error
    return _Header(network, conversion, given["gradient"], given["recompute"], given["timesteps"], mean, std)


def _of_format_1(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A header of format 1, as early runs of 'distill' wrote it, in format 2.

    Raises:
        SpikeDistillError: if it has another format, or its recipe is not known.
    """
    if "recipe" not in facts or "format" in facts:
        raise ConfigError(f"its format is {facts.get('format')!r}, expected 1 or 2")
    chosen = upgrade(facts["recipe"]).get("student", {})
    conversion = conversion_from(chosen)
    return {
        **{name: facts[name] for name in ("kind", "mean", "std") if name in facts},
        **({"network": facts["architecture"]} if "architecture" in facts else {}),
        "format": FORMAT,
        "conversion": conversion.facts(),
        "gradient": chosen.get("gradient", "exact"),
        "recompute": chosen.get("recompute", "nothing"),
        "timesteps": conversion.timesteps,
    }


def _numbers(given: Any) -> tuple[float, ...]:
    numbers = given if isinstance(given, list) else []
    if not numbers or not all(type(value) in (int, float) and abs(value) < LARGEST for value in numbers):
        raise ConfigError(f"{str(given)[:80]} is not a list of numbers")
    return tuple(map(float, numbers))


def _network(given: Any) -> Mapping[str, Any]:
    """``{"code": "module:QualName"}``, or the fields of an architecture."""
    if isinstance(given, Mapping) and set(given) == {"code"} and isinstance(given["code"], str):
        return given
    return read_fields(Architecture, given, {}).facts()


def _build(network: Mapping[str, Any], file: Path, trust_code: bool) -> nn.Module:
    """The ANN that a header names, with fresh weights."""
    name = network.get("code") or network["name"]
    if not trust_code and ("code" in network or ".py:" in name):
        raise code_refused(file, name)
    if "code" in network:
        return _of_code(name)
    try:
        return Architecture(**network).build()
    except (RuntimeError, MemoryError) as error:  # sizes too large for memory
        raise ConfigError(f"'{file}' names a network that cannot be built ({error}): pass network=...") from error


def _of_code(name: str) -> nn.Module:
    """A network from ``module:QualName``, called without arguments."""
    module, _, path = name.partition(":")
    said = "pass network=... (the ANN)"
    if module == "__main__" or "<locals>" in path:
        raise ConfigError(f"The network '{name}' was defined in a script or a function and cannot be imported: {said}.")
    try:
        network = operator.attrgetter(path)(importlib.import_module(module))()
    except (Exception, SystemExit) as error:  # whatever a third-party module raises
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"The network '{name}' cannot be imported and called without arguments ({reason}): {said}."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"'{name}' returned {type(network).__name__}, not a torch.nn.Module: {said}.")
    return network


def _in_dtypes_of(student: Student, tensors: Mapping[str, Tensor]) -> None:
    """Give the student the number formats of the file, so that nothing is rounded."""
    for name, own in (*student.named_parameters(), *student.named_buffers()):
        given = tensors.get(name)
        if given is not None and given.is_floating_point() and own.is_floating_point():
            own.data = own.data.to(given.dtype)
    dtype = next((each.dtype for each in student.parameters() if each.is_floating_point()), torch.float32)
    student.mean, student.std = student.mean.to(dtype), student.std.to(dtype)
