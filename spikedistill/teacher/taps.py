"""Activations by module path, without changing the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from spikedistill.errors import ConfigError, unknown


@contextmanager
def taps(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the modules at these paths while the context is open.

    For a module that is called more than once, the last output is kept.

    >>> import torch
    >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with taps(network, ["0"]) as seen:
    ...     _ = network(torch.zeros(1, 2))
    >>> seen["0"].shape
    torch.Size([1, 3])

    Raises:
        ConfigError: if there is no module at a path, or it does not return a tensor.
    """
    modules = dict(network.named_modules())
    seen: dict[str, Tensor] = {}
    handles = []
    for path in paths:
        if path not in modules:
            raise ConfigError(unknown(f"module in {type(network).__name__}", path, [name for name in modules if name]))

    for path in paths:

        def keep(_: nn.Module, __: object, output: object, path: str = path) -> None:
            if not isinstance(output, Tensor):
                raise ConfigError(
                    f"The module '{path}' returns {type(output).__name__}: tap one that returns a tensor."
                )
            seen[path] = output.clone()  # a later module may work in place

        handles.append(modules[path].register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
