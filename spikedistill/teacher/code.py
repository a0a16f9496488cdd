"""Networks and other objects that are Python code of the user's. Their files are executed."""

import hashlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from typing import Any

from torch import nn

from spikedistill.errors import ConfigError, unknown


def own_network(name: str, classes: int) -> nn.Module:
    """Call the function that ``FILE.py:NAME`` names.

    Raises:
        ConfigError: if it cannot be called with ``classes``, fails, or returns no network.
    """
    maker = import_object(name)
    try:
        inspect.signature(maker).bind(classes=classes)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"'{name}' cannot be called with classes={classes} ({error}): give it an argument 'classes'."
        ) from error
    try:
        network = maker(classes=classes)
    except Exception as error:  # whatever the user's function raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"'{name}', called with classes={classes}, failed ({type(error).__name__}: {error}) in '{last.filename}',"
            f" line {last.lineno}: fix it."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"'{name}' returned {type(network).__name__}: it must return a torch.nn.Module.")
    return network


def import_object(name: str) -> Any:
    """Execute a file and return the object that ``FILE.py:NAME`` names.

    Raises:
        ConfigError: if there is no such file, it cannot be imported, or it has no such name.
    """
    file, _, wanted = name.rpartition(":")
    place = hashlib.sha256(str(Path(file).resolve()).encode()).hexdigest()[:8]  # two files may have one name
    spec = importlib.util.spec_from_file_location(f"spikedistill_own_{Path(file).stem}_{place}", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ConfigError(f"The file '{file}' of '{name}' does not exist: check the path.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(Path(file).resolve().parent))  # for its imports from the same folder
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ConfigError(f"The file '{file}' cannot be imported ({type(error).__name__}: {error}): fix it.") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, wanted):
        raise ConfigError(
            unknown(f"function or class in '{file}'", wanted, [key for key in vars(module) if key[0] != "_"])
        )
    return getattr(module, wanted)
