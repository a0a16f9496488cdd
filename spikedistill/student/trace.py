"""From a network to a graph of operations whose every layer follows train() and eval().

torch.fx traces a forward with the values of its flags frozen. Dropout and batch norm that were called as functions
become modules again, and what works in place hands on its result.
"""

import inspect
import operator
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

import jaxtyping
import torch
import torch.nn.functional as F
from torch import fx, nn

from spikedistill.compute.winograd import WinogradConv2d
from spikedistill.errors import ConversionError
from spikedistill.inputs import NAMES

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
"""What works in place, and what gives the same beside it."""
MACHINERY = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(str(jaxtyping.__file__)) + os.sep, __file__)
"""Files whose lines are no user's."""


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which also remembers what each module path returned."""

    def __init__(self) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.ends: dict[str, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WinogradConv2d) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.ends[path] = result.node
        return result


def trace(network: nn.Module) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """The network as a graph, and the node at which each module path ends.

    Raises:
        ConversionError: if the network cannot be traced, or does not map one tensor to one tensor.
    """
    tracer = _Tracer()
    training = network.training
    network.eval()
    try:
        graph = tracer.trace(network, concrete_args=_defaults(network))
    except Exception as error:  # whatever the user's forward raises on proxies
        raise ConversionError(
            f"{type(network).__name__} cannot be traced by torch.fx ({_first_line(error)}) at {_line_of(error)}:"
            " its forward depends on values or leaves the tensors. Rewrite that part with fixed shapes and branches, or"
            " pass the inner network alone."
        ) from error
    finally:
        network.train(training)
    _drop_fixed_arguments(graph)
    _input_first(graph)
    moved = {
        **_functional_dropout(network, graph),
        **_functional_norm(network, graph),
        **_functional_pools(network, graph),
    }
    _free_of_layout(graph)
    _keep_batches_of_one(graph)
    _follow_in_place(network, graph)
    module = fx.GraphModule(network, graph)
    module.train(training)
    return module, {path: moved.get(node, node) for path, node in tracer.ends.items()}


def _defaults(network: nn.Module) -> dict[str, Any]:
    """Fix every argument of forward but the first at its default."""
    parameters = list(inspect.signature(network.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _drop_fixed_arguments(graph: fx.Graph) -> None:
    """The placeholders and assertions that fixed arguments leave behind."""
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
    """An input that was given by name becomes the first argument, where all that follows looks for it."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_module") and not node.args and "input" in node.kwargs:
            node.args, node.kwargs = (node.kwargs["input"],), {k: v for k, v in node.kwargs.items() if k != "input"}


def _functional_dropout(network: nn.Module, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Tracing freezes ``F.dropout(training=...)``; a module keeps following train() and eval()."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target in DROPOUT_CALLS]
    moved = {}
    for number, node in enumerate(found):
        layer = DROPOUT_CALLS[node.target](argument(node, 1, "p", 0.5), bool(argument(node, 3, "inplace", 0.0)))
        name = free_name(network, f"dropout_{number}")
        network.add_module(name, layer)
        moved[node] = _call_instead(graph, node, name)
    return moved


def _functional_norm(network: nn.Module, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Tracing freezes ``F.batch_norm(training=...)`` too; a module with the same weights and statistics goes on."""
    moved, constants = {}, constants_of(graph)
    for node in [node for node in graph.nodes if node.op == "call_function" and node.target is F.batch_norm]:
        if node.args[0] in constants:  # weights are standardised
            continue
        given = {**dict(zip(NORM_ARGUMENTS, node.args)), **node.kwargs}
        tensors = [given.get(name) for name in NORM_ARGUMENTS[1:5]]
        own = all(value is None or (isinstance(value, fx.Node) and value.op == "get_attr") for value in tensors)
        if not own or tensors[0] is None or given.get("training"):
            raise ConversionError(
                f"A batch norm without running statistics of its own at {source_of(node)} has no spiking meaning: it"
                " measures each input anew; use batch norm, which folds into the weights."
            )
        held = [None if value is None else operator.attrgetter(str(value.target))(network) for value in tensors]
        path = str(tensors[0].target).rpartition(".")[0]
        owner = network.get_submodule(path)
        name = free_name(owner, "norm")
        owner.add_module(name, _norm_of(owner, given, *held))
        moved[node] = _call_instead(graph, node, f"{path}.{name}" if path else name)
    return moved


def _norm_of(owner: nn.Module, given: Mapping[str, Any], mean: Any, var: Any, weight: Any, bias: Any) -> nn.Module:
    """A batch norm that shares the tensors which its owner called ``F.batch_norm`` with."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm3d, nn.BatchNorm2d)
    kind: Any = next((kind for kind in kinds if isinstance(owner, kind)), nn.BatchNorm2d)
    momentum = getattr(owner, "momentum", given.get("momentum", 0.1))
    layer = kind(mean.numel(), given.get("eps", 1e-5), momentum, affine=weight is not None or bias is not None)
    layer.running_mean, layer.running_var, layer.weight, layer.bias = mean, var, weight, bias
    return layer


def _functional_pools(network: nn.Module, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Max pooling called as a function becomes a module, where its sizes are numbers."""
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
    """A view needs its memory in one order; a reshape gives the same in any."""
    for node in graph.nodes:
        cast = any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
        if node.op == "call_method" and node.target in ("view", "view_as") and not cast:
            node.target = {"view": "reshape", "view_as": "reshape_as"}[node.target]
            node.kwargs = {NAMES.get(name, name): value for name, value in node.kwargs.items()}


def _keep_batches_of_one(graph: fx.Graph) -> None:
    """A squeeze of every dimension would take a batch of one for none, in a stream and before the first neuron."""
    constants = constants_of(graph)
    for node in graph.nodes:
        alone = len(node.args) == 1 and not node.kwargs and node not in constants
        if alone and node.target in ("squeeze", torch.squeeze):
            node.op, node.target = "call_function", squeeze_places


def squeeze_places(x: Any) -> Any:
    """``x.squeeze()``, but that a batch of one stays a batch."""
    if isinstance(x, fx.Proxy):  # a student that comes out of pickle is traced anew
        return x.tracer.create_proxy("call_function", squeeze_places, (x,), {})
    return x.squeeze(tuple(range(1, x.ndim)))


def _call_instead(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    """Exchange a call on the signal for the call of a module."""
    with graph.inserting_before(node):
        call = graph.call_module(name, (node.args[0],))
    call.stack_trace = node.stack_trace
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return call


def _follow_in_place(network: nn.Module, graph: fx.Graph) -> None:
    """What is used after something that works in place is its result, which then may lie in a place of its own."""
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
    """Weights, and what is made of them alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (sources and node.op != "output" and all(source in found for source in sources)):
            found.add(node)
    return found


def free_name(module: nn.Module, name: str) -> str:
    """The name, with as many underscores as it takes to be new."""
    while hasattr(module, name):
        name += "_"
    return name


def argument(node: fx.Node, position: int, name: str, default: float) -> float:
    """A number that a function was called with, by position or by name."""
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
