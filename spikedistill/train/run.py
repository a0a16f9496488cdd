"""A run directory: what was asked, where it ran, what came out.

recipe.json             every choice, resolved
environment.json        versions, processor, threads
metrics.jsonl           one line an epoch; the same numbers in an interrupted and resumed run
timing.jsonl            one line an epoch; seconds, which are never the same
checkpoint.safetensors  all that the next step needs
model.safetensors       the weights, when the run is done
results.json            the measurements on the test set, when the run is done
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spikedistill.errors import RunError
from spikedistill.files import write_text


@dataclass(frozen=True)
class Run:
    """The files of one run; ``path`` is its directory."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """All that the next step needs."""
        return self.path / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        """The finished weights."""
        return self.path / "model.safetensors"

    def start(self, recipe: Mapping[str, Any], resume: bool) -> None:
        """Create the directory, or make sure that what lies there is the same run.

        Raises:
            RunError: if a run lies there already and is not to be resumed, or has another recipe.
        """
        file = self.path / "recipe.json"
        if file.exists() and not resume:
            raise RunError(f"'{self.path}' already holds a run: go on with it by --resume, or choose another --out.")
        if resume and file.exists():
            before = self.read("recipe")
            changed = [key for key in recipe if before.get(key) != json.loads(json.dumps(recipe[key]))]
            if changed:
                shown = ", ".join(f"{key} was {before.get(key)!r}, now {recipe[key]!r}" for key in changed[:3])
                raise RunError(
                    f"'{self.path}' was begun with another recipe ({shown}): give the same, or another --out."
                )
            return
        if resume:
            raise RunError(f"There is no run in '{self.path}' to resume: check --out, or leave --resume away.")
        self.write("recipe", recipe)
        self.write("environment", environment())

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file of the directory."""
        write_text(self.path / f"{name}.json", json.dumps(content, indent=2) + "\n")

    def read(self, name: str) -> dict[str, Any]:
        """Read one JSON file of the directory.

        Raises:
            RunError: if it is missing or broken.
        """
        file = self.path / f"{name}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"'{file}' cannot be read ({error}): is '{self.path}' the directory of a run?") from error

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read one ``.jsonl`` file; a line cut short by a kill is left out."""
        file = self.path / f"{name}.jsonl"
        if not file.exists():
            return []
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add one line to a ``.jsonl`` file."""
        with (self.path / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, epoch: int) -> None:
        """Drop the lines of epochs that the checkpoint does not know of yet."""
        for name in ("metrics", "timing"):
            kept = [json.dumps(line) + "\n" for line in self.lines(name) if line["epoch"] <= epoch]
            write_text(self.path / f"{name}.jsonl", "".join(kept))


def environment() -> dict[str, Any]:
    """What a reader needs to know of the machine."""
    names = ("spikedistill", "torch", "torchvision", "accelerate", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
