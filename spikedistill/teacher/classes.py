"""The number of classes of a weights file, for data that do not say it."""

from pathlib import Path

import torch

from spikedistill.errors import ConfigError
from spikedistill.files import weights_file
from spikedistill.teacher.load import Architecture
from spikedistill.teacher.weights import of_network, read_weights


def count_classes(source: str | Path, name: str, channels: int, width: int | None = None) -> int:
    """How many classes the network of a weights file has: the size by which two such networks differ.

    A network that is the same for any number of classes has its own: the length of its last tensor.

    Raises:
        WeightsError: if the weights cannot be read.
        ConfigError: if the network cannot be built, or the file lacks the tensor that says it.
    """
    tensors, _ = read_weights(weights_file(source))
    with torch.random.fork_rng(devices=[]):
        few, more = (Architecture(name, count, channels, width).build().state_dict() for count in (2, 3))
    if all(value.shape == more[path].shape for path, value in few.items()):
        return next((len(value) for value in reversed(few.values()) if value.ndim), 1)
    tensors = of_network(tensors, few, f"'{source}'")
    for path, value in few.items():
        changed = [axis for axis, size in enumerate(value.shape) if size != more[path].shape[axis]]
        if len(changed) == 1 and path in tensors and tensors[path].ndim == value.ndim:
            return tensors[path].shape[changed[0]]
    raise ConfigError(
        f"'{source}' does not show how many classes '{name}' has: give data with labels, or a run of 'teach'."
    )
