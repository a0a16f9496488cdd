"""Tensors from weights files of every kind. Nothing is unpickled."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikedistill.errors import WeightsError
from spikedistill.files import read_tensors

FORMATS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)
"""Number formats of weights files; integers are for counts."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name from a ``.safetensors``, ``.npz`` or torch file, and the file's facts (empty if it has none).

    A torch file is a state_dict, or a checkpoint that holds one, alone or as ``state_dict``.

    Raises:
        WeightsError: if the file is missing, truncated, holds pickled objects or is not a set of tensors.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return read_tensors(path)
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
                arrays = {name: np.asarray(pack[name]) for name in pack.files}
            native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}
            return {name: torch.from_numpy(array) for name, array in native.items()}, {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything in numpy, zipfile and torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"'{path}' cannot be read safely ({reason}): it is truncated, or it holds pickled Python objects, which are"
            " never loaded. Save the state_dict alone, where you trust the file: torch.save(torch.load(FILE,"
            " weights_only=False)['state_dict'], 'weights.pt') does it for a checkpoint of Lightning."
        ) from error
    if _is_state(loaded):
        return dict(loaded), {}
    held = {str(name): part for name, part in loaded.items() if _is_state(part)} if isinstance(loaded, Mapping) else {}
    if "state_dict" not in held and len(held) != 1:
        found = (
            f"several state_dicts ({', '.join(held)[:200]})" if held else f"{type(loaded).__name__}, not a state_dict"
        )
        raise WeightsError(f"'{path}' holds {found}: save the one state_dict (names to tensors) alone.")
    return dict(held["state_dict"] if "state_dict" in held else held.popitem()[1]), {}


def _is_state(held: object) -> bool:
    """Whether this is a state_dict: tensors by name."""
    if not isinstance(held, Mapping) or not held:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items())


def check_formats(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that are not plain numbers in memory.

    Raises:
        WeightsError: if any is quantised, sparse, without data, or of an unusual number format.
    """
    for name, value in tensors.items():
        if kind := _strange(value):
            raise WeightsError(
                f"'{name}' of {source} is {kind.removeprefix('torch.')}: expected ordinary tensors of float16,"
                " bfloat16, float32 or float64."
            )


def _strange(value: Tensor) -> str:
    """What is unusual about a tensor; empty if nothing is."""
    if value.is_quantized:
        return "quantised"
    if value.is_meta:
        return "without data"
    if value.layout is not torch.strided:
        return str(value.layout)
    return "" if value.dtype in FORMATS else str(value.dtype)


def of_network(tensors: Mapping[str, Tensor], wanted: Iterable[str], source: str) -> dict[str, Tensor]:
    """The tensors under the names that a network wants, without a prefix and without what lies beside them.

    DataParallel puts ``module.`` before names, torch.compile ``_orig_mod.``, Lightning often ``model.``. If no name
    fits, the prefix is taken under which most of the wanted names are found.

    Raises:
        WeightsError: if all are found under more than one prefix, as in a checkpoint of a network and its average.
    """
    needed = {name for name in wanted if not name.endswith("num_batches_tracked")}
    if needed & tensors.keys():
        return dict(tensors)
    found: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        found.update(".".join(parts[:n]) + "." for n in range(1, len(parts)) if ".".join(parts[n:]) in needed)
    most = max(found.values(), default=0)
    best = [prefix for prefix, count in found.items() if count == most]
    if len(best) > 1 and most == len(needed):
        raise WeightsError(
            f"{source} holds several such networks, under {', '.join(best[:4])}: save the state_dict of one alone."
        )
    if len(best) != 1:
        return dict(tensors)
    return {name.removeprefix(best[0]): value for name, value in tensors.items() if name.startswith(best[0])}
