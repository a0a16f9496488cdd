"""Resumable checkpoints: everything that the next step depends on, in one safetensors file. The previous one is kept.

The optimiser's state is saved by parameter name, so it does not depend on their order or the number of processes.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.errors import RunError, WeightsError, out_of_memory
from spikedistill.files import note, read_tensors, write_tensors


def previous(path: Path) -> Path:
    """The path of the previous checkpoint."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> None:
    """Write modules, optimiser, random state and facts atomically. The existing checkpoint becomes the previous one."""
    tensors = {
        f"{role}.{name}": value for role, module in modules.items() for name, value in module.state_dict().items()
    }
    tensors |= _optimiser_tensors(optimiser, modules)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, tensors, {"optimiser": type(optimiser).__name__, **facts}, previous(path))


def load_checkpoint(path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore modules, optimiser and random state from a checkpoint; return the facts that were saved with them.

    If the file is missing or damaged, the previous checkpoint is used, with a note.

    Raises:
        WeightsError: if both are missing or damaged.
        RunError: if it belongs to another run, network or optimiser.
    """
    tensors, facts = read_checkpoint(path)
    try:
        if facts.pop("optimiser") != type(optimiser).__name__:
            raise KeyError(f"the optimiser is now {type(optimiser).__name__}")
        for role, module in modules.items():
            prefix = f"{role}."
            module.load_state_dict({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
        _restore_optimiser(optimiser, modules, tensors)
    except (RuntimeError, IndexError, KeyError) as error:
        if out_of_memory(error):
            raise
        raise RunError(
            f"The checkpoint '{path}' belongs to another network or optimiser ({str(error).splitlines()[0]}): resume"
            " with the recipe of that run, or start in a new directory."
        ) from error
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return facts


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of the newest checkpoint that is not damaged. It takes the place of a damaged one.

    Raises:
        WeightsError: if both are missing or damaged.
        RunError: if it belongs to another run.
    """
    before = previous(path)
    try:
        return read_tensors(path)
    except WeightsError as error:
        if not before.exists():
            raise WeightsError(f"{error} There is no previous checkpoint: or start again in another --out.") from error
        damage = error
    try:
        found = read_tensors(before)
    except WeightsError as error:
        raise WeightsError(f"{damage} So is the previous one, '{before}': or start again in another --out.") from error
    note(f"{damage} Going on from the previous one.")
    os.replace(before, path)  # else the next save would keep the damaged file as the previous one
    return found


def _learned(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of an optimiser, in its order."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _names(modules: Mapping[str, nn.Module]) -> dict[Tensor, str]:
    """The parameters of modules, with their names in the file."""
    return {p: f"{role}.{name}" for role, module in modules.items() for name, p in module.named_parameters()}


def _optimiser_tensors(optimiser: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    names = _names(modules)
    return {
        f"optimiser.{names[parameter]}.{key}": value
        for parameter, entries in optimiser.state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def _restore_optimiser(
    optimiser: torch.optim.Optimizer, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the state of every parameter by name; files of earlier versions number them in the optimiser's order."""
    names, learned = _names(modules), _learned(optimiser)
    places = {names[parameter]: place for place, parameter in enumerate(learned)}
    places |= {str(place): place for place in range(len(learned))}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            parameter, _, key = name.removeprefix("optimiser.").rpartition(".")
            place = places[parameter]
            state.setdefault(place, {})[key] = value if key == "step" else _placed(value, learned[place])
    optimiser.load_state_dict(
        {"state": dict(sorted(state.items())), "param_groups": optimiser.state_dict()["param_groups"]}
    )


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A state tensor in the memory format of its parameter, which fused optimisers expect."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
