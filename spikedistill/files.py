"""Files written whole or not at all: tensors as safetensors with facts as JSON in the header, and text.

A file is written beside its place and moved there whole, so that a kill at any moment leaves the old one or the new.
Nothing is ever pickled.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spikedistill.errors import RunError, WeightsError

FACTS = "spikedistill"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts (anything JSON holds) to one safetensors file, atomically."""
    dense = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {FACTS: json.dumps(facts), "format": "pt"}
    _replace(path, lambda part: save_file(dense, part, metadata=header))


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    _replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_csv(path: Path, columns: Iterable[str], lines: Iterable[Iterable[Any]]) -> None:
    """Write a table as comma-separated values, its columns named in the first line, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    write_text(path, text.getvalue())


def write_bytes(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` write a file of any other kind, atomically."""
    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise RunError(
            f"'{path}' could not be written ({error}); what was there before is untouched: free some disk space or"
            " choose another directory, then go on with --resume."
        ) from error


def weights_file(path: str | Path) -> Path:
    """A weights file, or that of a run directory."""
    return Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone; none where the file is missing, broken, or not this project's."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
            return facts if isinstance(facts, dict) else {}
    except (SafetensorError, OSError, ValueError):
        return {}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and facts; facts are empty in a file that this project did not write.

    Raises:
        WeightsError: if the file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise WeightsError(f"The weights file '{path}' does not exist: check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"'{path}' cannot be read as safetensors ({error}): it is truncated or of another kind; copy it again."
        ) from error


def fingerprint(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A digest of names, shapes, number formats and bits; devices and orders of memory do not matter.

    >>> ones = torch.ones(2, 3)
    >>> fingerprint({"a": ones}) == fingerprint({"a": ones.T.contiguous().T}) != fingerprint({"a": -ones})
    True
    """
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_of(network: nn.Module) -> str:
    """A digest of a network's modules, parameters and buffers, those too that no file of weights holds."""
    return fingerprint({**dict(network.named_parameters()), **dict(network.named_buffers())}, str(network))
