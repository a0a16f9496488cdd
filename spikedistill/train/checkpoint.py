"""Resumable checkpoints: everything that the next step depends on, in one safetensors file, and the one before it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.errors import RunError, WeightsError
from spikedistill.files import note, read_tensors, write_tensors


def previous(path: Path) -> Path:
    """Where the checkpoint before this one is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> None:
    """Write modules, optimiser, random state and facts, atomically; what was there becomes the one before."""
    tensors = {
        f"{role}.{name}": value for role, module in modules.items() for name, value in module.state_dict().items()
    }
    tensors |= _optimiser_tensors(optimiser)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, tensors, {"optimiser": type(optimiser).__name__, **facts}, previous(path))


def load_checkpoint(path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Give modules, optimiser and random state back what ``save_checkpoint`` wrote; return the facts.

    Where the file is missing or damaged the one before it takes its place, with a note.

    Raises:
        WeightsError: if both are missing or damaged.
        RunError: if it belongs to another run, network or optimiser.
    """
    tensors, facts = _read(path)
    try:
        if facts.pop("optimiser") != type(optimiser).__name__:
            raise KeyError(f"the optimiser is now {type(optimiser).__name__}")
        for role, module in modules.items():
            prefix = f"{role}."
            module.load_state_dict({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
        _restore_optimiser(optimiser, tensors)
    except (RuntimeError, IndexError, KeyError) as error:
        raise RunError(
            f"The checkpoint '{path}' belongs to another network or optimiser ({str(error).splitlines()[0]}): resume"
            " with the recipe that it was made with, or start in a new directory."
        ) from error
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return facts


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint that is whole."""
    before = previous(path)
    try:
        return read_tensors(path)
    except WeightsError as error:
        if not before.exists():
            raise WeightsError(f"{error} There is no checkpoint before it: or begin anew in another --out.") from error
        damage = error
    try:
        found = read_tensors(before)
    except WeightsError as error:
        raise WeightsError(f"{damage} So is the one before it, '{before}': or begin anew in another --out.") from error
    note(f"{damage} Going on from the one before it.")
    os.replace(before, path)  # else the next one would put the damaged one in its place
    return found


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {
        f"optimiser.{index}.{key}": value
        for index, entries in state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def _restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = _placed(value, parameters[int(index)])
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A state tensor in the memory layout of its parameter, which fused optimisers expect."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
