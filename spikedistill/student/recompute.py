"""Activation checkpointing: a stage of the graph keeps only its input, and runs again when its gradient is computed.

A stage is a few layers of neurons. The graph is cut where the fewest signals cross; in a residual network these are the
ends of its blocks. State is an argument and a result of the graph, so a stage that runs again gives the same result.
Two side effects happen in the first run only: batch norms update their running statistics, and hooks on neurons
(``evaluate.operations``) are called. The last stage keeps its activations, since its gradient is computed at once.

A stage may also keep the outputs of its convolutions. Then only batch norms, additions and neurons run again, which
takes less time. Of the three tensors between two convolutions (output, after batch norm, spikes) one is kept.

This is for the exact gradient. The rate-based gradient keeps three tensors ``[B, ...]`` per layer, which are results of
the T steps. To compute them again from the spikes ``[T*B, ...]`` at a stage's input would save nothing.
"""

import contextlib
from collections.abc import Collection, Iterator
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from spikedistill.neuron.layer import Spiking
from spikedistill.student.graph import GraphInterpreter
from spikedistill.student.rate import is_plain, known_convolution

Recompute = Literal["nothing", "neurons", "stages"]
"""What is computed again for the gradient: nothing, all but convolutions, or everything in a stage."""
FEWEST, MOST = 2, 4
"""Fewest and most layers of neurons in a stage. It ends where the fewest signals cross, at the first such place."""


def recomputed_run(
    core: fx.GraphModule, convolutions: bool, keep: Collection[str], *given: Any
) -> tuple[Any, dict[str, Tensor]]:
    """The results of ``core(*given)``, and outputs of nodes by name, with the same gradients from less memory.

    A network with three layers of neurons or fewer cannot be cut; it keeps all its activations.

    Args:
        core: a student's graph.
        convolutions: whether convolutions are computed again too.
        keep: names of the nodes.
        given: the arguments of the graph.
    """
    nodes = list(core.graph.nodes)
    values: dict[fx.Node, Any] = dict(zip(nodes, given))
    kept: dict[str, Tensor] = {}
    *before, last = stages(core)
    for part in before:
        stage = _Stage(core, part, convolutions, keep)
        results = checkpoint(stage, *(values[node] for node in stage.reads), use_reentrant=False)
        returned = dict(zip(stage.returns, results))
        kept |= {node.name: value for node, value in returned.items() if node.name in keep}
        values |= returned
        values = {node: value for node, value in values.items() if stage.end < max(node.users, default=node)}
    stage = _Stage(core, last, True, keep)
    *inner, (_, result) = zip(stage.returns, stage(*(values[node] for node in stage.reads)))
    return result, kept | {node.name: value for node, value in inner}


def stages(core: fx.GraphModule) -> list[list[fx.Node]]:
    """The nodes of the graph in order, without its inputs, cut into stages; one stage if the graph cannot be cut."""
    nodes = list(core.graph.nodes)
    neurons = [0, *accumulate(isinstance(_layer(core, node), Spiking) for node in nodes)]
    crossing, closed = _crossings(core, nodes)
    places = [place for place, node in enumerate(nodes) if _weighs(core, node) and place not in closed]
    cuts = [sum(node.op == "placeholder" for node in nodes)]
    while True:
        passed = neurons[cuts[-1]]
        near = [p for p in places if FEWEST <= neurons[p] - passed <= MOST and neurons[-1] - neurons[p] >= FEWEST]
        if not near:
            break
        cuts.append(min(near, key=crossing.__getitem__))
    return [nodes[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(nodes)])]


def _crossings(core: fx.GraphModule, nodes: list[fx.Node]) -> tuple[list[int], set[int]]:
    """The number of signals that cross before each node; and where no cut is allowed, as one is changed in place."""
    index = {node: place for place, node in enumerate(nodes)}
    crossing = [0] * len(nodes)
    closed: set[int] = set()
    for node in nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        for user in node.users:
            if _changes(core, user, node):
                closed.update(range(index[node] + 1, index[user] + 1))
        readers = (index[user] for user in node.users if user.op != "output")
        for place in range(index[node] + 1, max(readers, default=0) + 1):
            crossing[place] += 1
    return crossing, closed


def _layer(core: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return core.get_submodule(str(node.target)) if node.op == "call_module" else None


def _weighs(core: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node has weights. A stage may begin before such a node: any pooling of spikes is done by then."""
    layer = _layer(core, node)
    if layer is None:
        return node.op == "call_function" and any(source.op == "get_attr" for source in node.all_input_nodes)
    return not isinstance(layer, Spiking) and any(True for _ in layer.parameters())


def _changes(core: fx.GraphModule, user: fx.Node, node: fx.Node) -> bool:
    """Whether the user overwrites the node's output with its own."""
    if not user.args or user.args[0] is not node:
        return False
    return bool(getattr(_layer(core, user), "inplace", False))


class _Stage(GraphInterpreter):
    """Some nodes of the graph as a function of their inputs. It returns outputs that are read later or kept."""

    def __init__(self, core: fx.GraphModule, nodes: list[fx.Node], convolutions: bool, wanted: Collection[str]) -> None:
        super().__init__(core, garbage_collect_values=False)
        own = set(nodes)
        self.nodes, self.end = nodes, nodes[-1]
        self.reads = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own))
        self.returns = [
            node
            for node in nodes
            if node.op == "output" or node.name in wanted or any(user not in own for user in node.users)
        ]
        self.again, self.convolutions = False, convolutions
        self.convolved: dict[str, tuple[Tensor, int]] = {}

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        self.env = dict(zip(self.reads, values))
        try:
            for node in self.nodes:
                self.env[node] = self.run_node(node)
                for source in node.all_input_nodes:
                    if max(source.users) is node and source not in self.returns:
                        del self.env[source]
            return tuple(self.env[node] for node in self.returns)
        finally:
            self.env, self.again = {}, True

    def fire(self, layer: Spiking, current: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        run = layer.forward if self.again else layer
        return run(current, timesteps, repeats, state, keep)

    def apply(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.convolutions and is_plain(layer):
            return self._convolution(layer, *args, **kwargs)
        with unmoved(layer) if self.again and isinstance(layer, _BatchNorm) else contextlib.nullcontext():
            return layer(*args, **kwargs)

    def _convolution(self, layer: Any, x: Tensor) -> Tensor:
        """Its output; that of the first run if it was kept and nothing has overwritten it."""
        result, version = self.convolved.pop(self.current.name, (None, 0))
        if result is None or result._version != version:
            with torch.no_grad():
                result = layer(x)
        if not self.again:
            self.convolved[self.current.name] = result, result._version
        return known_convolution(layer, x, result)


@contextlib.contextmanager
def unmoved(layer: nn.Module) -> Iterator[None]:
    """Let a layer write to copies of its buffers, so that the buffers themselves stay as they are."""
    kept = dict(layer._buffers)
    layer._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in kept.items()})
    try:
        yield
    finally:
        layer._buffers.update(kept)
