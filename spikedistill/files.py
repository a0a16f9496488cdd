"""Files written whole or not at all: tensors as safetensors with facts as JSON in the header, and text.

A file is written beside its place and moved there whole, so that a kill at any moment leaves the old one or the new.
Nothing is ever pickled.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
