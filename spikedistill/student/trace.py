"""From a network to a graph of operations in which every layer follows train() and eval().

torch.fx freezes the values of flags when it traces. So dropout and batch norm that are called as functions become
modules. After an operation in place, later nodes read its result instead of its input.
"""

import functools
import inspect
import operator
import os
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jaxtyping
import torch
import torch.nn.functional as F
from torch import fx, nn

from spikedistill.compute.winograd import WinogradConv2d
from spikedistill.errors import ConversionError, UnsupportedError
from spikedistill.inputs import NAMES, evaluating

DROPOUT_CALLS = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d}
NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
POOL_CALLS: dict[Any, Any] = {
    F.max_pool1d: nn.MaxPool1d,
    F.max_pool2d: nn.MaxPool2d,
    F.max_pool3d: nn.MaxPool3d,
    torch.max_pool1d: nn.MaxPool1d,
    torch.max_pool2d: nn.MaxPool2d,
    torch.max_pool3d: nn.MaxPool3d,
    F.adaptive_max_pool1d: nn.AdaptiveMaxPool1d,
    F.adaptive_max_pool2d: nn.AdaptiveMaxPool2d,
    F.adaptive_max_pool3d: nn.AdaptiveMaxPool3d,
}
POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
IN_PLACE_CALLS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    **{name + "_": name for name in ("add", "sub", "mul", "div")},
}
"""Operations in place, and the same operations with a new result."""
NUMBERED = (
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"),
    *("reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "broadcast_to"),
    *("chunk", "narrow", "select", "tile", "roll", "mean", "sum", "amax", "amin"),
    *(f"{kind}_pool{places}d" for kind in ("avg", "max") for places in (1, 2, 3)),
)
"""Functions of lists or numbers that a forward may compute from its input: the parts of a chunk, a height."""
PLACES: tuple[Any, ...] = (torch, F, torch._C._nn)
"""Where a forward, and the code that torch.fx writes, find these functions."""
MACHINERY = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(str(jaxtyping.__file__)) + os.sep, __file__)
"""Files whose lines are not user code."""


class _Tracer(fx.Tracer):
    """torch.fx's tracer; it also remembers the node that each module path returned.

    ``F.avg_pool2d(x, x.size(3))`` and ``torch.cat(x.chunk(2, 1), 1)`` are traced under every torch. Functions of older
    ones (2.6, 2.8) refuse a proxy in place of a number or a list. Then the forward is traced again, and such calls are
    recorded here. The first trace is without, as modules that torch imports then must find its functions unchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.output_nodes: dict[str, fx.Node] = {}
        self.asked: dict[Any, Any] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        try:
            return super().trace(root, concrete_args)
        except TypeError as error:
            if str(error).partition("(")[0] not in NUMBERED or "Proxy" not in str(error):
                raise
        vars(self).update(vars(type(self)()))
        held = [(place, name, vars(place)[name]) for place in PLACES for name in NUMBERED if name in vars(place)]
        self.asked = {self._recording(function): function for _, _, function in held}
        try:
            for (place, name, _), recording in zip(held, self.asked):
                setattr(place, name, recording)
            return super().trace(root, concrete_args)
        finally:
            for place, name, function in held:
                setattr(place, name, function)

    def _recording(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, but that a call which it refuses for a proxy becomes a node."""

        @functools.wraps(function)
        def recording(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                if "Proxy" not in str(error):
                    raise
                return self.create_proxy("call_function", function, args, kwargs)

        return recording

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        return super().create_proxy(kind, self.asked.get(target, target), *args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WinogradConv2d) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.output_nodes[path] = result.node
        return result


def trace(network: nn.Module) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """The network as a graph, and for each module path the node of its output.

    Raises:
        ConversionError: if the network cannot be traced, or does not map one tensor to one tensor.
    """
    tracer = _Tracer()
    try:
        with evaluating(network):
            graph = tracer.trace(network, concrete_args=_defaults(network))
    except Exception as error:  # whatever the user's forward raises on proxies
        raise UnsupportedError(
            f"{type(network).__name__} cannot be traced by torch.fx ({_first_line(error)}) at {_line_of(error)}:"
            " its forward depends on the values of tensors or converts them. Rewrite that part with fixed shapes and"
            " branches, or pass only the inner network."
        ) from error
    _drop_fixed_arguments(graph)
    _input_first(graph)
    known = set(network.modules())
    moved = {
        **_functional_dropout(network, graph),
        **_functional_norm(network, graph),
        **_functional_pools(network, graph),
    }
    _free_of_layout(graph)
    _keep_batches_of_one(graph)
    _follow_in_place(network, graph)
    module = fx.GraphModule(network, graph)
    for part in module.modules():
        if part not in known:  # the root, and what stands for functions
            part.training = network.training
    return module, {path: moved.get(node, node) for path, node in tracer.output_nodes.items()}


def _defaults(network: nn.Module) -> dict[str, Any]:
    """The defaults of all arguments of forward except the first."""
    parameters = list(inspect.signature(network.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _drop_fixed_arguments(graph: fx.Graph) -> None:
    """Remove the placeholders and assertions of arguments that are fixed at their defaults."""
    for node in reversed(list(graph.nodes)):
        checked = node.op == "call_function" and getattr(node.target, "__name__", "").startswith("_assert")
        fixed = node.op == "placeholder" and not node.users and node.prev.op == "placeholder"
        if (
            checked
            or (not node.users and node.op == "call_function" and node.target in (operator.eq, operator.is_))
            or fixed
        ):
            graph.erase_node(node)


def _input_first(graph: fx.Graph) -> None:
    """Make an input that was passed by name the first argument, where all later code expects it."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_module") and not node.args and "input" in node.kwargs:
            node.args, node.kwargs = (node.kwargs["input"],), {k: v for k, v in node.kwargs.items() if k != "input"}


def _functional_dropout(network: nn.Module, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Turn ``F.dropout`` into modules, which follow train() and eval(): tracing freezes its ``training``."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target in DROPOUT_CALLS]
    moved = {}
    for number, node in enumerate(found):
        layer = DROPOUT_CALLS[node.target](argument(node, 1, "p", 0.5), bool(argument(node, 3, "inplace", 0.0)))
        name = free_name(network, f"dropout_{number}")
        network.add_module(name, layer)
        moved[node] = _call_instead(graph, node, name)
    return moved


def _functional_norm(network: nn.Module, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Turn ``F.batch_norm`` into modules with the same weights and statistics: tracing freezes its ``training``."""
    moved, constants = {}, constants_of(graph)
    for node in [node for node in graph.nodes if node.op == "call_function" and node.target is F.batch_norm]:
        if node.args[0] in constants:  # weights are standardised
            continue
        given = {**dict(zip(NORM_ARGUMENTS, node.args)), **node.kwargs}
        tensors = [given.get(name) for name in NORM_ARGUMENTS[1:5]]
        own = all(value is None or (isinstance(value, fx.Node) and value.op == "get_attr") for value in tensors)
        if not own or tensors[0] is None or given.get("training"):
            raise ConversionError(
                f"A batch norm without running statistics at {source_of(node)} has no spiking equivalent: it computes"
                " statistics of every input; use batch norm with running statistics, which folds into the weights."
            )
        held = [None if value is None else operator.attrgetter(str(value.target))(network) for value in tensors]
        path = str(tensors[0].target).rpartition(".")[0]
        owner = network.get_submodule(path)
        name = free_name(owner, "norm")
        owner.add_module(name, _norm_of(owner, given, *held))
        moved[node] = _call_instead(graph, node, f"{path}.{name}" if path else name)
    return moved


def _norm_of(owner: nn.Module, given: Mapping[str, Any], mean: Any, var: Any, weight: Any, bias: Any) -> nn.Module:
    """A batch norm that shares the tensors with which its owner called ``F.batch_norm``."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm3d, nn.BatchNorm2d)
    kind: Any = next((kind for kind in kinds if isinstance(owner, kind)), nn.BatchNorm2d)
    momentum = getattr(owner, "momentum", given.get("momentum", 0.1))
    layer = kind(mean.numel(), given.get("eps", 1e-5), momentum, affine=weight is not None or bias is not None)
    layer.running_mean, layer.running_var, layer.weight, layer.bias = mean, var, weight, bias
    return layer


def _functional_pools(network: nn.Module, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Turn max pooling that is called as a function into modules, if its sizes are numbers."""
    moved = {}
    for number, node in enumerate([node for node in graph.nodes if node.target in POOL_CALLS]):
        kind = POOL_CALLS[node.target]
        adaptive = issubclass(kind, nn.modules.pooling._AdaptiveMaxPoolNd)
        names = ("input", "output_size", "return_indices") if adaptive else POOL_ARGUMENTS
        given = {**dict(zip(names, node.args)), **node.kwargs}
        del given["input"]
        if len(node.all_input_nodes) > 1:  # its sizes come from the input
            continue
        name = free_name(network, f"max_pool_{number}")
        network.add_module(name, kind(**given))
        moved[node] = _call_instead(graph, node, name)
    return moved


def _free_of_layout(graph: fx.Graph) -> None:
    """Replace views by reshapes, which do not depend on the memory format."""
    for node in graph.nodes:
        cast = any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
        if node.op == "call_method" and node.target in ("view", "view_as") and not cast:
            node.target = {"view": "reshape", "view_as": "reshape_as"}[node.target]
            node.kwargs = {NAMES.get(name, name): value for name, value in node.kwargs.items()}


def _keep_batches_of_one(graph: fx.Graph) -> None:
    """Replace a squeeze of all dimensions, which would also remove the batch axis of a batch of one."""
    constants = constants_of(graph)
    for node in graph.nodes:
        alone = len(node.args) == 1 and not node.kwargs and node not in constants
        if alone and node.target in ("squeeze", torch.squeeze):
            node.op, node.target = "call_function", squeeze_places


def squeeze_places(x: Any) -> Any:
    """``x.squeeze()`` that keeps dimension 0, the batch."""
    if isinstance(x, fx.Proxy):  # unpickling a student traces it anew
        return x.tracer.create_proxy("call_function", squeeze_places, (x,), {})
    return x.squeeze(tuple(range(1, x.ndim)))


def _call_instead(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    """Replace a node by the call of a module on the same signal."""
    with graph.inserting_before(node):
        call = graph.call_module(name, (node.args[0],))
    call.stack_trace = node.stack_trace
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return call


def _follow_in_place(network: nn.Module, graph: fx.Graph) -> None:
    """Let later nodes read the result of an operation in place; then the operation may return a new tensor."""
    for node in graph.nodes:
        if _works_in_place(network, node):
            node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)
        if node.op in ("call_function", "call_method"):
            node.target = IN_PLACE_CALLS.get(node.target, node.target)


def _works_in_place(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    positions: dict[Any, int] = {F.relu: 1, F.relu6: 1, F.leaky_relu: 2}
    position = positions.get(node.target)
    asked = position is not None and bool(argument(node, position, "inplace", 0.0))
    return asked or node.target in (F.relu_, torch.relu_, "relu_", *IN_PLACE_CALLS)


def constants_of(graph: fx.Graph) -> set[fx.Node]:
    """Weights, and nodes that depend on weights only."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (sources and node.op != "output" and all(source in found for source in sources)):
            found.add(node)
    return found


def free_name(module: nn.Module, name: str) -> str:
    """The name, with underscores appended until the module has no such attribute."""
    while hasattr(module, name):
        name += "_"
    return name


def argument(node: fx.Node, position: int, name: str, default: float) -> float:
    """A numeric argument of a call, by position or by name."""
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return float(value)  # type: ignore[arg-type]


def source_of(node: fx.Node) -> str:
    """``file:line`` of the call, as far as torch.fx recorded it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    own = [frame for frame in frames if not frame[0].startswith(MACHINERY)]
    return ":".join(own[-1]) if own else "an unknown line"


def _line_of(error: Exception) -> str:
    """``file:line`` of the user's code that raised."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(MACHINERY)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown line"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
