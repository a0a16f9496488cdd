"""7. Results: finished runs read back, tables and pictures."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """The module ``plot``, imported when it is first asked for."""
    if name == "plot":
        return importlib.import_module("spikedistill.deliver.plot")
    raise AttributeError(f"module 'spikedistill.deliver' has no attribute '{name}'")
