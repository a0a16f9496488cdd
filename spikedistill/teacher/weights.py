"""Tensors from weights files of every kind. Nothing is unpickled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikedistill.errors import WeightsError
from spikedistill.files import read_tensors


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name from a ``.safetensors``, ``.npz`` or torch file, and the file's facts (empty if it has none).

    Raises:
        WeightsError: if the file is missing, truncated, holds pickled objects or is not a set of tensors.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return read_tensors(path)
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
                return {name: torch.from_numpy(np.asarray(pack[name])) for name in pack.files}, {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything in numpy, zipfile and torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"'{path}' cannot be read safely ({reason}): it is truncated, or it holds pickled Python objects, which are"
            " never loaded; save the state_dict alone, best as .safetensors."
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"'{path}' holds {type(loaded).__name__}, not a state_dict (names to tensors): save one.")
    return dict(loaded), {}
