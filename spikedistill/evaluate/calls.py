"""All calls that a network makes: modules, functions, methods and operators.

A layer and the function that it calls are one call here. So counts do not depend on how a network is written.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spikedistill.compute.winograd import WinogradConv2d, applies
from spikedistill.errors import ConfigError
from spikedistill.neuron.layer import Spiking


@dataclass(frozen=True)
class Call:
    """One call: the path of its module, the function's name, the arguments and the result."""

    where: str
    name: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    result: Any

    def of(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, by position or by name."""
        return self.arguments[position] if len(self.arguments) > position else self.options.get(name, default)


class Listener(TorchFunctionMode):
    """Reports every function of torch that is called while it is active.

    Args:
        hear: called with each call. Its own computations are not reported.

    Attributes:
        where: paths of the modules that run now, the innermost last. The function's name is appended to a path that
            ends with a dot.
    """

    def __init__(self, hear: Callable[[Call], None]) -> None:
        super().__init__()
        self.hear = hear
        self.where: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._tell(str(getattr(func, "__name__", func)).split(".")[0], args, kwargs or {}, result)
        return result

    def tell_convolution(self, layer: nn.Module, x: Any, result: Any) -> None:
        """Report a convolution that our own code computed, which is not a function of torch."""
        if isinstance(layer, WinogradConv2d) and applies(x, layer.weight):
            rest = (layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
            self._tell("conv2d", (x, layer.weight, *rest), {}, result)

    def _tell(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        where = self.where[-1] if self.where else ""
        with torch._C.DisableTorchFunction():
            self.hear(Call(where + name if where[-1:] in ("", ".") else where, name, args, kwargs, result))


@contextmanager
def calls_of(
    network: nn.Module, hear: Callable[[Call], None], began: Callable[[Tensor], None] = lambda given: None
) -> Iterator[None]:
    """Report the calls of an ANN while the context is open.

    Each call has the path of the module that makes it; if that module contains others, ``PATH.FUNCTION``.

    Args:
        network: the ANN.
        hear: called with each call.
        began: called with the first input tensor of the network, before its calls.

    Raises:
        ConfigError: if the network's calls cannot be seen.
    """
    _refuse_deaf(network)
    listener = Listener(hear)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is None:
            raise ConfigError(f"{type(network).__name__} got no tensor as input: give it a batch of images, [B, ...].")
        began(given)
        listener.__enter__()

    with ExitStack() as stack:
        stack.callback(network.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for path, module in network.named_modules():
            _name_calls(stack, listener, path, module)
        leave = network.register_forward_hook(lambda *_: listener.__exit__(None, None, None), always_call=True)
        stack.callback(leave.remove)
        yield


def _name_calls(stack: ExitStack, listener: Listener, path: str, module: nn.Module) -> None:
    """Tell the listener when a module runs."""
    holds = any(True for _ in module.children())

    def begin(_: nn.Module, __: Any) -> None:
        listener.where.append(f"{path}." if path and holds else path)

    def end(_: nn.Module, given: Any, result: Any) -> None:
        if given:
            listener.tell_convolution(module, given[0], result)
        listener.where.pop()

    stack.callback(module.register_forward_pre_hook(begin).remove)
    stack.callback(module.register_forward_hook(end, always_call=True).remove)


def _refuse_deaf(network: nn.Module) -> None:
    for path, module in network.named_modules():
        kind = type(module).__name__
        if isinstance(module, Spiking):
            raise ConfigError(
                f"{type(network).__name__} holds neurons at '{path}' but is not a Student, so it is not known which of"
                " its rows are time steps: make it by to_spiking, or measure the student inside it."
            )
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise ConfigError(
                f"{kind} at '{path}' is compiled, so its calls cannot be seen: give the network before compilation."
            )
