"""Graph surgery: every call of an activation becomes its own layer of neurons.

``trace.py`` turns the network into a graph of operations. Each activation in it becomes its own ``Spiking`` layer,
whether it is a module, a function or a method. A module that is called twice becomes two layers. Each max pooling over
time becomes a layer too (``pool.py``). Besides the images the graph then takes ``timesteps``, ``repeats``, ``states``
and ``keep``. It returns ``(output, states)``: state is an argument and a result, and is stored nowhere.

The part before the first neurons does not depend on time. It keeps the batch ``[B, ...]`` and runs once. If an
operation that depends on time reads it, as a skip connection does, ``repeat_time`` repeats it to ``[T*B, ...]``.
"""

import operator
import re
from collections.abc import Collection, Sequence

from torch import fx, nn

from spikedistill.errors import ConversionError
from spikedistill.neuron.layer import Spiking
from spikedistill.student.graph import repeat_time
from spikedistill.student.pool import CumulativeMaxPool, MaxPool
from spikedistill.student.report import PoolSite
from spikedistill.student.rules import CallSite, find_pools, is_size, single_input
from spikedistill.student.trace import constants_of, free_name


def insert_layers(
    module: fx.GraphModule, layers: Sequence[tuple[CallSite, Spiking | CumulativeMaxPool]]
) -> dict[str, str]:
    """Put layers with state into the graph, in place. The top of this file gives the new signature.

    Args:
        module: the traced network.
        layers: the neurons in order of execution, then the max poolings. The state has the same order.

    Returns:
        For the name of each old node the name of the node that replaced it.
    """
    graph = module.graph
    inputs = _own_placeholder(graph)
    fired = {site.node for site, _ in layers}
    static = static_nodes(graph, fired)
    with graph.inserting_after(inputs):
        names = ("keep", "states", "repeats", "timesteps")
        keep, states, repeats, timesteps = (graph.placeholder(name) for name in names)
    by_name = {node.name: node for node in graph.nodes}
    if inputs not in static:
        _spread(graph, inputs, repeats, list(inputs.users), after=keep)
    for node in list(static):
        users = [user for user in node.users if user not in static and user.name not in fired]
        if users:
            _spread(graph, node, repeats, users, after=max(node, keep))
    groups: dict[type, str] = {Spiking: free_name(module, "neurons"), CumulativeMaxPool: free_name(module, "pools")}
    for group in groups.values():
        module.add_module(group, nn.ModuleDict())
    module.meta["neurons"], module.meta["pools"] = groups.values()
    after: list[fx.Node] = []
    instead: dict[str, fx.Node] = {}
    for index, (site, layer) in enumerate(layers):
        old, group = by_name[site.node], groups[type(layer)]
        key = free_name(module.get_submodule(group), re.sub(r"\W", "_", site.name))
        module.get_submodule(group).add_module(key, layer)
        with graph.inserting_before(old):
            state = graph.call_function(operator.getitem, (states, index))
            used = repeats if old.args[0] in static else 1
            both = graph.call_module(f"{group}.{key}", (old.args[0], timesteps, used, state, keep))
            instead[old.name] = graph.call_function(operator.getitem, (both, 0))
            after.append(graph.call_function(operator.getitem, (both, 1)))
        old.replace_all_uses_with(instead[old.name])
        graph.erase_node(old)
    result = next(node for node in graph.nodes if node.op == "output")
    result.args = ((result.args[0], tuple(after)),)
    named = _name_in_order(module)
    return named | {old: named[node.name] for old, node in instead.items()}


def _own_placeholder(graph: fx.Graph) -> fx.Node:
    """Name the input ``images``: the network's own name for it may clash with another argument of the graph."""
    given = single_input(graph)
    with graph.inserting_before(given):
        inputs = graph.placeholder("images")
    given.replace_all_uses_with(inputs)
    graph.erase_node(given)
    return inputs


def _name_in_order(module: fx.GraphModule) -> dict[str, str]:
    """Name the nodes as tracing would: unpickling a student traces it anew and must give the same names.

    Returns:
        For each old name the new one.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        args, kwargs = (fx.map_arg(given, copies.__getitem__) for given in (node.args, node.kwargs))
        copies[node] = graph.create_node(node.op, node.target, args, kwargs)
        copies[node].stack_trace = node.stack_trace
    module.graph = graph
    graph.lint()
    return {node.name: copy.name for node, copy in copies.items()}


def static_nodes(graph: fx.Graph, fired: Collection[str]) -> dict[fx.Node, None]:
    """Nodes that depend on the input but on no neuron, in order; none if later nodes with time use their size."""
    static: dict[fx.Node, None] = {}
    constants = constants_of(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            static[node] = None
        elif node.op != "output" and node.name not in fired and node.all_input_nodes:
            fixed = [source for source in node.all_input_nodes if source not in constants]
            if fixed and all(source in static for source in fixed):
                static[node] = None
    for node in static:
        if is_size(node) and any(user not in static for user in node.users):
            return {}
    return static


def _spread(graph: fx.Graph, node: fx.Node, repeats: fx.Node, users: list[fx.Node], after: fx.Node) -> None:
    with graph.inserting_after(after):
        spread = graph.call_function(repeat_time, (node, repeats))
    for user in users:
        if user is not spread:
            user.replace_input_with(node, spread)


POOL_NOTES = {
    "cumulative": "cumulative: its mean is the maximum of the means",
    "or": "each step alone, over spikes a logical or: its error does not shrink as T grows",
    "average": "replaced by average pooling",
}
BEFORE = "before the first neuron: the same at every step"


def make_pools(
    module: fx.GraphModule, activations: Sequence[CallSite], max_pool: MaxPool, repeats: bool
) -> tuple[list[tuple[CallSite, CumulativeMaxPool]], tuple[PoolSite, ...]]:
    """The max poolings that become layers with a state, and the report on all of them.

    With ``average`` they are replaced in place.

    Args:
        module: the traced network.
        activations: the calls that will become layers of neurons.
        max_pool: see ``Conversion``.
        repeats: whether the input is the same at every step; then a maximum before the first neurons is too.
    """
    found = find_pools(module, max_pool)
    if max_pool == "average":
        average_pools(module, found)
    fixed: set[str] = set()
    if repeats and max_pool != "average":
        fixed = {node.name for node in static_nodes(module.graph, {one.node for one in activations})}
    timed = [pool for pool in found if max_pool == "cumulative" and pool.node not in fixed]
    targets = {node.name: str(node.target) for node in module.graph.nodes}
    layers = [(pool, CumulativeMaxPool(module.get_submodule(targets[pool.node]))) for pool in timed]
    notes = {pool.node: BEFORE if pool.node in fixed else POOL_NOTES[max_pool] for pool in found}
    return layers, tuple(PoolSite(pool.name, pool.kind, pool.source, notes[pool.node]) for pool in found)


def average_pools(module: fx.GraphModule, pools: Sequence[CallSite]) -> None:
    """Replace max pooling by average pooling, in place.

    Raises:
        ConversionError: if a max pooling has a dilation.
    """
    targets = {node.name: str(node.target) for node in module.graph.nodes}
    for target in dict.fromkeys(targets[pool.node] for pool in pools):
        _exchange(module, target)


def _exchange(module: fx.GraphModule, target: str) -> None:
    pool = module.get_submodule(target)
    name = type(pool).__name__.replace("Max", "Avg")
    if name.startswith("Adaptive"):
        new = getattr(nn, name)(pool.output_size)
    else:
        if pool.dilation not in (1, (1,), (1, 1), (1, 1, 1)):
            raise ConversionError(
                f"'{target}' has a dilation of {pool.dilation}, and average pooling has none: keep max pooling."
            )
        options = {"ceil_mode": pool.ceil_mode, "count_include_pad": False}
        new = getattr(nn, name)(pool.kernel_size, pool.stride, pool.padding, **options)
    parent, _, child = target.rpartition(".")
    setattr(module.get_submodule(parent), child, new)
