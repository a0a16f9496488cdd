"""Activations by module path, without changing the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from spikedistill.errors import ConfigError, unknown

See = Callable[[str, tuple[object, ...], object], None]
"""What is called after a module: with its path, its arguments and its output."""


@contextmanager
def watched(network: nn.Module, paths: Sequence[str], see: See) -> Iterator[None]:
    """Call ``see`` after every call of the modules at these paths while the context is open.

    Raises:
        ConfigError: if there is no module at a path.
    """
    modules = dict(network.named_modules())
    handles = []
    for path in paths:
        if path not in modules:
            raise ConfigError(unknown(f"module in {type(network).__name__}", path, [name for name in modules if name]))

    for path in paths:

        def tell(_: nn.Module, given: tuple[object, ...], output: object, path: str = path) -> None:
            see(path, given, output)

        handles.append(modules[path].register_forward_hook(tell))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_features(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the modules at these paths while the context is open.

    For a module that is called more than once, the last output is kept.

    >>> import torch
    >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with capture_features(network, ["0"]) as seen:
    ...     _ = network(torch.zeros(1, 2))
    >>> seen["0"].shape
    torch.Size([1, 3])

    Raises:
        ConfigError: if there is no module at a path, or it does not return a tensor.
    """
    seen: dict[str, Tensor] = {}

    def keep(path: str, _: tuple[object, ...], output: object) -> None:
        seen[path] = _copied(path, output)

    with watched(network, paths, keep):
        yield seen


@contextmanager
def capture_calls(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs of every call of the modules at these paths, in order, while the context is open.

    Of a tuple, such as spikes and potential, the first is kept.

    Raises:
        ConfigError: if there is no module at a path, or it does not return a tensor.
    """
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str, _: tuple[object, ...], output: object) -> None:
        seen[path].append(_copied(path, first_of(output)))

    with watched(network, paths, keep):
        yield seen


def first_of(output: object) -> object:
    """The first of a tuple; anything else as it is."""
    return output[0] if isinstance(output, tuple) and output else output


def _copied(path: str, output: object) -> Tensor:
    """A copy of a module's output, since a later module may work in place."""
    if not isinstance(output, Tensor):
        raise ConfigError(f"The module '{path}' returns {type(output).__name__}: tap one that returns a tensor.")
    return output.clone()
