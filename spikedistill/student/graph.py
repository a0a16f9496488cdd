"""``GraphInterpreter``: runs a student's graph node by node, the base of every other way to run it.

A student's graph takes ``images``, ``timesteps``, ``repeats``, ``states`` and ``keep``. It returns
``(output, states)`` (``surgery.py``). ``core(...)`` runs it as a whole. A ``GraphInterpreter`` keeps the outputs of
given nodes, and a subclass may change what layers of neurons, other layers and ``repeat_time`` do.
"""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import Reset
from spikedistill.neuron.layer import Spiking
from spikedistill.student.pool import CumulativeMaxPool


def repeat_time(x: Any, repeats: Any) -> Any:
    """``[B, ...]`` to ``[repeats*B, ...]``, the same at every step; the memory format stays."""
    if isinstance(x, fx.Proxy):  # unpickling a student traces it anew
        return x.tracer.create_proxy("call_function", repeat_time, (x, repeats), {})
    return x if repeats == 1 else torch.cat([x] * repeats)


class GraphInterpreter(fx.Interpreter):
    """Runs a graph node by node, as ``core(...)`` would; a subclass changes what the nodes do.

    Args:
        core: a student's graph, or any traced network.
        keep: names of nodes.

    Attributes:
        kept: the outputs of the nodes in ``keep``, by name.
        current: the node that is running.
    """

    current: fx.Node

    def __init__(self, core: fx.GraphModule, keep: Collection[str] = (), garbage_collect_values: bool = True) -> None:
        super().__init__(core, garbage_collect_values)
        self.extra_traceback = False
        self.keep = frozenset(keep)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The output of a node, also kept if its name is in ``keep``."""
        self.current = n
        value = super().run_node(n)
        if n.name in self.keep:
            self.kept[n.name] = value
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Layers of neurons run ``fire``, max pooling over time ``pool``, other layers ``apply``."""
        layer = self.fetch_attr(target)
        if isinstance(layer, Spiking):
            return self.fire(layer, *args)
        return self.pool(layer, *args) if isinstance(layer, CumulativeMaxPool) else self.apply(layer, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """``repeat_time`` runs ``spread``, any other function is called."""
        return self.spread(*args) if target is repeat_time else super().call_function(target, args, kwargs)

    def fire(self, layer: Spiking, current: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        """Spikes and state of a layer of neurons; see ``Spiking.forward``."""
        return layer(current, timesteps, repeats, state, keep)

    def pool(self, layer: CumulativeMaxPool, x: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        """Output and state of a max pooling over time; see ``CumulativeMaxPool.forward``."""
        return layer(x, timesteps, repeats, state, keep)

    def apply(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Output of any other layer. torch.compile leaves it to PyTorch's own kernels."""
        return super().call_module(self.current.target, args, kwargs)

    def spread(self, x: Tensor, repeats: int) -> Tensor:
        """``[B, ...]`` repeated for every time step, for nodes that depend on time."""
        return repeat_time(x, repeats)


class PotentialRecorder(GraphInterpreter):
    """Also keeps the potentials ``[T*B, ...]`` after the charge, for the layers at these paths of the graph."""

    def __init__(self, core: fx.GraphModule, keep: Collection[str], layers: Collection[str]) -> None:
        super().__init__(core, keep)
        self.layers = frozenset(layers)
        self.potentials: dict[str, Tensor] = {}

    def fire(self, layer: Spiking, current: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        """As in ``GraphInterpreter``; the given layers run the reference implementation."""
        path = str(self.current.target)
        if path not in self.layers:
            return layer(current, timesteps, repeats, state, keep)
        charged: list[Tensor] = []
        result = layer(current, timesteps, repeats, state, keep, charged)
        (self.potentials[path],) = charged
        return result


class SingleStepInterpreter(GraphInterpreter):
    """Runs a student's graph once: T steps of D levels as one step of T D levels, on rows ``[B, ...]``.

    This is how ``gradient="quantised"`` trains, at the cost of an ANN. The student then runs at T steps of D levels,
    and differs only where spikes arrive unevenly over time. In the literature it is the ANN of QCFS (Bu et al., ICLR
    2022, arXiv 2303.04347), whose activations have ``L = T D`` levels above zero; one that is then run on spikes counts
    as a conversion.
    """

    def __init__(self, core: fx.GraphModule, timesteps: int, keep: Collection[str] = ()) -> None:
        super().__init__(core, keep)
        self.timesteps = timesteps

    def fire(self, layer: Spiking, current: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        """The mean output over all steps."""
        neuron = layer.neuron
        if neuron.leak < 1 or neuron.reset is not Reset.SUBTRACT or neuron.initial != 0.5 or neuron.learn_initial:
            raise ConfigError(
                "gradient (='quantised') trains all time steps as one, which needs IF neurons with a fixed initial"
                f" potential of 0.5 and reset by subtraction, but the neuron has leak {neuron.leak}, initial"
                f" {neuron.initial}{' (learned)' if neuron.learn_initial else ''} and reset '{neuron.reset.value}':"
                " use the default neuron, or another gradient."
            )
        return layer.in_one_step(current, self.timesteps), None

    def pool(self, layer: CumulativeMaxPool, x: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        """The maximum of the means, which is the mean of the growth."""
        return layer.of_means(x), None

    def spread(self, x: Tensor, repeats: int) -> Tensor:
        """As it is: there is one step."""
        return x


def tap(core: fx.GraphModule, keep: Collection[str]) -> fx.GraphModule:
    """A network with the layers of a student's graph that also returns outputs of nodes.

    It computes what a ``GraphInterpreter`` computes. torch.compile can make one kernel after the other of it, without a
    break.

    Args:
        core: the graph. Its layers are shared, not copied.
        keep: names of nodes.

    Returns:
        A module that takes what the graph takes and returns its results and the outputs by name.
    """
    graph, made = fx.Graph(), {}  # type: ignore[var-annotated]
    results = graph.graph_copy(core.graph, made)
    graph.output((results, {old.name: new for old, new in made.items() if old.name in keep}))
    return fx.GraphModule(core, graph)


def behind(graph: fx.Graph, starts: Collection[fx.Node]) -> set[fx.Node]:
    """These nodes, and all that depend on them, if only by their shape."""
    found = set(starts)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def neuron_nodes(core: fx.GraphModule) -> list[fx.Node]:
    """The nodes that run a layer of neurons, in order of execution."""
    calls = (node for node in core.graph.nodes if node.op == "call_module")
    return [node for node in calls if isinstance(core.get_submodule(str(node.target)), Spiking)]


def spike_nodes(core: fx.GraphModule) -> dict[str, str]:
    """For each layer of neurons, by its path in the graph, the name of the node that holds its spikes."""
    return {
        str(fired.target): node.name
        for fired in neuron_nodes(core)
        for node in fired.users
        if node.target is operator.getitem and node.args[1] == 0
    }


def first_convolution(core: fx.GraphModule) -> tuple[int | None, int | None]:
    """Numbers of dimensions and channels of the input if a convolution reads it, else None."""
    readers = (user for user in next(iter(core.graph.nodes)).users if user.op == "call_module")
    for layer in (core.get_submodule(str(user.target)) for user in readers):
        for dims, kind in ((3, nn.Conv1d), (4, nn.Conv2d), (5, nn.Conv3d)):
            if isinstance(layer, kind):
                return dims, layer.in_channels
    return None, None
