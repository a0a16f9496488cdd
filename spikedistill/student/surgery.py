"""Every activation call site becomes its own neuron.

The network is traced by torch.fx into a graph of operations. Each activation in it, be it a module, a function or a
method, and each call of a module that is called twice, becomes a ``Spiking`` layer of its own. The graph then takes,
beside the images, ``timesteps``, ``repeats``, ``states`` and ``keep``; it returns ``(output, states, features)``: state
is an argument and a result, and lives nowhere.

What comes before the first neuron does not depend on time. It keeps the batch ``[B, ...]`` and runs once; where a
time-dependent operation needs it (a skip connection), ``repeat_time`` spreads it to ``[T*B, ...]``.
"""

import inspect
import operator
import os
import re
import traceback
from dataclasses import dataclass
from typing import Any, Literal

import jaxtyping
import torch
import torch.nn.functional as F
from torch import fx, nn

from spikedistill.errors import ConversionError
from spikedistill.neuron.layer import Spiking
from spikedistill.student.winograd import WinogradConv2d

MaxPool = Literal["keep", "average"]

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
DROPOUT_CALLS = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d}
NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
IN_PLACE_CALLS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    **{name + "_": name for name in ("add", "sub", "mul", "div")},
}
"""What works in place, and what gives the same beside it."""
ACTIVATION_CALLS = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, "relu", "relu_"}
LARGEST_SLOPE = 0.3
"""A LeakyReLU up to this slope is taken for a ReLU, whose negative side a neuron without negative spikes lacks."""

TIMELESS = (
    *(
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Linear,
    ),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Flatten, nn.Unflatten, nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad2d),
    *(
        nn.ReplicationPad2d,
        nn.Upsample,
        nn.UpsamplingNearest2d,
        nn.UpsamplingBilinear2d,
        nn.PixelShuffle,
        nn.PixelUnshuffle,
    ),
)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
TIMELESS_CALLS = {
    *(
        torch.add,
        torch.sub,
        torch.mul,
        torch.div,
        torch.cat,
        torch.concat,
        torch.stack,
        torch.flatten,
        torch.mean,
        torch.sum,
    ),
    *(torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose, torch.chunk, torch.split),
    *(operator.add, operator.sub, operator.mul, operator.truediv),
    *(operator.getitem, operator.floordiv, operator.neg, getattr),
    *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.avg_pool2d, F.adaptive_avg_pool2d, F.pad, F.interpolate),
    *(F.max_pool2d, F.adaptive_max_pool2d, F.avg_pool1d, F.max_pool1d, F.adaptive_avg_pool1d),
    *(F.pixel_shuffle, F.pixel_unshuffle),
}
TIMELESS_METHODS = {
    *(
        "add",
        "sub",
        "mul",
        "div",
        "mean",
        "sum",
        "view",
        "reshape",
        "flatten",
        "squeeze",
    ),
    *("unsqueeze", "permute", "transpose", "contiguous", "size", "dim", "chunk", "split", "expand", "to", "float"),
    *("unflatten", "type_as", "clone", "detach"),
}
PRODUCTS = {torch.mul, torch.div, operator.mul, operator.truediv, "mul", "div"}
MACHINERY = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(str(jaxtyping.__file__)) + os.sep, __file__)
QUOTIENTS = {torch.div, operator.truediv, "div"}

REMEDIES = (
    (
        r"sigmoid",
        "exchange it for nn.ReLU, or leave it out with its product where it is a gate (squeeze and excitation),"
        " and train the ANN on for a few epochs",
    ),
    (
        r"gelu|silu|swish|mish|elu|softplus|tanh|prelu|rrelu",
        "exchange it for nn.ReLU and train the ANN on for a few epochs",
    ),
    (
        r"attention|softmax|bmm|matmul|einsum|transformer",
        "attention multiplies and normalises real numbers; use a convolutional network",
    ),
    (
        r"layer_?norm|group_?norm|instance_?norm|local_response|rms_?norm",
        "it measures each input anew; use batch norm, which folds into the weights",
    ),
    (r"lstm|gru|rnn", "recurrent layers have their own time; use a feed-forward network"),
)


@dataclass(frozen=True)
class Place:
    """Where an activation stands: its node in the graph, a readable name, its kind and its source line."""

    node: str
    name: str
    kind: str
    source: str
    note: str = ""


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


def repeat_time(x: Any, repeats: Any) -> Any:
    """``[B, ...]`` to ``[repeats*B, ...]``, the same at every step, in the memory order that came."""
    if isinstance(x, fx.Proxy):  # a student that comes out of pickle is traced anew
        return x.tracer.create_proxy("call_function", repeat_time, (x, repeats), {})
    return x if repeats == 1 else torch.cat([x] * repeats)


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
    moved = {**_functional_dropout(network, graph), **_functional_norm(network, graph)}
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
        layer = DROPOUT_CALLS[node.target](_argument(node, 1, "p", 0.5), bool(_argument(node, 3, "inplace", 0.0)))
        name = _free_name(network, f"dropout_{number}")
        network.add_module(name, layer)
        moved[node] = _call_instead(graph, node, name)
    return moved


def _functional_norm(network: nn.Module, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Tracing freezes ``F.batch_norm(training=...)`` too; a module with the same weights and statistics goes on."""
    moved = {}
    for node in [node for node in graph.nodes if node.op == "call_function" and node.target is F.batch_norm]:
        given = {**dict(zip(NORM_ARGUMENTS, node.args)), **node.kwargs}
        tensors = [given.get(name) for name in NORM_ARGUMENTS[1:5]]
        own = all(value is None or (isinstance(value, fx.Node) and value.op == "get_attr") for value in tensors)
        if not own or tensors[0] is None or given.get("training"):
            raise _refusal("A batch norm without running statistics of its own", "instance_norm", node)
        found: Any = [None if v is None else operator.attrgetter(str(v.target))(network) for v in tensors]
        mean, var, weight, bias = found
        path = str(tensors[0].target).rpartition(".")[0]
        owner = network.get_submodule(path)
        kinds = (nn.BatchNorm1d, nn.BatchNorm3d, nn.BatchNorm2d)
        kind: Any = next((kind for kind in kinds if isinstance(owner, kind)), nn.BatchNorm2d)
        momentum = getattr(owner, "momentum", given.get("momentum", 0.1))
        layer = kind(mean.numel(), given.get("eps", 1e-5), momentum, affine=weight is not None or bias is not None)
        layer.running_mean, layer.running_var, layer.weight, layer.bias = mean, var, weight, bias
        name = _free_name(owner, "norm")
        owner.add_module(name, layer)
        moved[node] = _call_instead(graph, node, f"{path}.{name}" if path else name)
    return moved


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
    asked = position is not None and bool(_argument(node, position, "inplace", 0.0))
    return asked or node.target in (F.relu_, torch.relu_, "relu_", *IN_PLACE_CALLS)


def _free_name(module: nn.Module, name: str) -> str:
    """The name, with as many underscores as it takes to be new."""
    while hasattr(module, name):
        name += "_"
    return name


def find_places(module: fx.GraphModule) -> list[Place]:
    """All activations in order of execution.

    Raises:
        ConversionError: if a part has no spiking meaning, or there is no activation at all.
    """
    _single_input(module.graph)
    constants = _constants(module.graph)
    places: list[Place] = []
    for node in module.graph.nodes:
        kind = _kind(module, node)
        if kind:
            base = node.target if node.op == "call_module" else node.name
            count = sum(place.name.split("#")[0] == base for place in places)
            name = str(base) if not count else f"{base}#{count + 1}"
            places.append(Place(node.name, name, kind, source_of(node), _slope_note(module, node)))
        else:
            _refuse_meaningless(module, node, constants)
    if not places:
        raise ConversionError(
            "The network has no ReLU, ReLU6 or LeakyReLU, so nothing would spike: give a network with activations."
        )
    return places


def _kind(module: fx.GraphModule, node: fx.Node) -> str:
    """The name of the activation, or nothing."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return type(layer).__name__ if isinstance(layer, ACTIVATIONS) else ""
    if node.op in ("call_function", "call_method") and node.target in ACTIVATION_CALLS:
        return node.target if isinstance(node.target, str) else node.target.__name__
    return ""


def _slope_note(module: fx.GraphModule, node: fx.Node) -> str:
    slope = 0.0
    if node.op == "call_module":
        slope = getattr(module.get_submodule(str(node.target)), "negative_slope", 0.0)
    elif node.target is F.leaky_relu:
        slope = _argument(node, 1, "negative_slope", 0.01)
    if abs(slope) > LARGEST_SLOPE:
        raise ConversionError(
            f"'{node.target}' at {source_of(node)} has a negative slope of {slope}, above {LARGEST_SLOPE}: a neuron"
            " that only spikes upwards cannot stand for it; train the ANN with ReLU."
        )
    return f"negative slope {slope} dropped" if slope else ""


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Weights, and what is made of them alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (sources and node.op != "output" and all(source in found for source in sources)):
            found.add(node)
    return found


def _refuse_meaningless(module: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> None:
    if node.op in ("placeholder", "get_attr", "output"):
        return
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if isinstance(layer, (*TIMELESS, *MAX_POOLS)):
            return
        raise _refusal(f"'{node.target}' ({type(layer).__name__})", type(layer).__name__, node)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    known = node.target in TIMELESS_METHODS if isinstance(node.target, str) else node.target in TIMELESS_CALLS
    if not known:
        raise _refusal(f"'{name}' (node {node.name})", name, node)
    signals = [
        position
        for position, value in enumerate((*node.args, *node.kwargs.values()))
        if isinstance(value, fx.Node) and value not in constants and not _is_size(value)
    ]
    if node.target in PRODUCTS and len(signals) > 1:
        raise _refusal(f"the product '{name}' of two signals (node {node.name})", "gate", node)
    if node.target in QUOTIENTS and any(signals):
        raise _refusal(f"the division '{name}' by a signal (node {node.name})", "gate", node)
    if node.target is operator.floordiv and not _is_size(node):
        raise _refusal(f"'{name}' (node {node.name})", name, node)


def _is_size(node: Any) -> bool:
    """Whether a node is a number taken from a shape."""
    if node.target in ("size", "dim") or (node.target is getattr and node.args[1] in ("shape", "ndim")):
        return True
    arithmetic = (operator.getitem, operator.mul, operator.floordiv, operator.add, operator.sub)
    sources = [source for source in getattr(node, "args", ()) if isinstance(source, fx.Node)]
    return node.target in arithmetic and bool(sources) and all(map(_is_size, sources))


def _refusal(what: str, name: str, node: fx.Node) -> ConversionError:
    remedy = next((text for pattern, text in REMEDIES if re.search(pattern, name.lower())), None)
    remedy = remedy or "use convolutions, linear layers, batch norm, pooling, additions and ReLU"
    return ConversionError(f"{what} at {source_of(node)} has no spiking meaning: {remedy}.")


def source_of(node: fx.Node) -> str:
    """``file:line`` of the call, as far as torch.fx recorded it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    own = [frame for frame in frames if not frame[0].startswith(MACHINERY)]
    return ":".join(own[-1]) if own else "an unknown line"


def insert_neurons(module: fx.GraphModule, places: list[Place], neurons: dict[str, Spiking], max_pool: MaxPool) -> None:
    """Put the neurons into the graph, in place; its signature: the head of this file."""
    graph = module.graph
    given = _single_input(graph)
    with graph.inserting_before(given):
        inputs = graph.placeholder("images")  # the network's own name for it may be one of those below
    given.replace_all_uses_with(inputs)
    graph.erase_node(given)
    static = _static_nodes(graph, {place.node for place in places})
    with graph.inserting_after(inputs):
        names = ("keep", "states", "repeats", "timesteps")
        keep, states, repeats, timesteps = (graph.placeholder(name) for name in names)
    by_name = {node.name: node for node in graph.nodes}
    if inputs not in static:
        _spread(graph, inputs, repeats, list(inputs.users), after=keep)
    for node in list(static):
        users = [
            user for user in node.users if user not in static and user.name not in {place.node for place in places}
        ]
        if users:
            _spread(graph, node, repeats, users, after=max(node, keep))
    module.meta["neurons"] = group = _free_name(module, "neurons")
    module.add_module(group, nn.ModuleDict())
    after: list[fx.Node] = []
    for index, place in enumerate(places):
        old = by_name[place.node]
        key = _free_name(module.get_submodule(group), re.sub(r"\W", "_", place.name))
        module.get_submodule(group).add_module(key, neurons[place.name])
        current = old.args[0]
        with graph.inserting_before(old):
            state = graph.call_function(operator.getitem, (states, index))
            used = repeats if current in static else 1
            both = graph.call_module(f"{group}.{key}", (current, timesteps, used, state, keep))
            spikes = graph.call_function(operator.getitem, (both, 0))
            after.append(graph.call_function(operator.getitem, (both, 1)))
        old.replace_all_uses_with(spikes)
        spikes.meta["replaces"] = old.name
        graph.erase_node(old)
    if max_pool == "average":
        _average_pools(module)
    result = next(node for node in graph.nodes if node.op == "output")
    result.args = ((result.args[0], tuple(after), {}),)
    graph.lint()
    module.recompile()


def _single_input(graph: fx.Graph) -> fx.Node:
    tensors = [node for node in graph.nodes if node.op == "placeholder" and (node.users or not node.args)]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(tensors) != 1 or not isinstance(result, fx.Node):
        raise ConversionError(
            f"The network takes {len(tensors)} inputs and returns"
            f" {type(result).__name__ if not isinstance(result, fx.Node) else 'a tensor'}: expected one tensor in and"
            " one tensor of logits out; wrap it in a module that says which."
        )
    return tensors[0]


def _static_nodes(graph: fx.Graph, places: set[str]) -> dict[fx.Node, None]:
    """Nodes that depend on the input but on no neuron, in order; none where a size of theirs is used later in time."""
    static: dict[fx.Node, None] = {}
    constants = _constants(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            static[node] = None
        elif node.op != "output" and node.name not in places and node.all_input_nodes:
            fixed = [source for source in node.all_input_nodes if source not in constants]
            if fixed and all(source in static for source in fixed):
                static[node] = None
    for node in static:
        if _is_size(node) and any(user not in static for user in node.users):
            return {}
    return static


def _spread(graph: fx.Graph, node: fx.Node, repeats: fx.Node, users: list[fx.Node], after: fx.Node) -> None:
    with graph.inserting_after(after):
        spread = graph.call_function(repeat_time, (node, repeats))
    for user in users:
        if user is not spread:
            user.replace_input_with(node, spread)


def _average_pools(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), MAX_POOLS):
            _exchange(module, str(node.target))
        elif node.target in (F.max_pool2d, F.max_pool1d, F.adaptive_max_pool2d):
            raise ConversionError(
                f"The functional max pooling at {source_of(node)} cannot be exchanged: write it as nn.MaxPool2d, or"
                " keep it."
            )


def _exchange(module: fx.GraphModule, target: str) -> None:
    pool = module.get_submodule(target)
    name = type(pool).__name__.replace("Max", "Avg")
    if name.startswith("Adaptive"):
        new = getattr(nn, name)(pool.output_size)
    else:
        if pool.dilation not in (1, (1,), (1, 1), (1, 1, 1)):
            raise ConversionError(f"'{target}' has a dilation of {pool.dilation}, average pooling has none: keep it.")
        options = {"ceil_mode": pool.ceil_mode, "count_include_pad": False}
        new = getattr(nn, name)(pool.kernel_size, pool.stride, pool.padding, **options)
    parent, _, child = target.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


def _argument(node: fx.Node, position: int, name: str, default: float) -> float:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return float(value)  # type: ignore[arg-type]


def _line_of(error: Exception) -> str:
    """``file:line`` of the user's code that raised."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(MACHINERY)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown line"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
