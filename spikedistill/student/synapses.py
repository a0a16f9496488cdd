"""Synaptic operations of a student with a gradient, counted where they happen: at the inputs of layers with weights.

An operation is one non-zero input times one non-zero weight, as in ``evaluate/operations.py``, which measures them.
Here each value in the graph has a train beside it: in how many sub-steps of its time step it is not zero. For a layer
of neurons that is its count of spikes. What is summed, pooled or padded is not zero where one of its parts is not.
Trains of spikes are left-aligned, so each level is looked at alone. A layer with weights takes its train times the
connections of each input.

Backward, trains count as if they added up. What has no train, for instance batch norm of spikes, counts where it is not
zero and has no gradient.
"""

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spikedistill.neuron.layer import Spiking
from spikedistill.student.biases import PASSING
from spikedistill.student.graph import PotentialRecorder, behind, neuron_nodes
from spikedistill.student.pool import CumulativeMaxPool

WEIGHTED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
"""Layers whose operations are counted."""
WEIGHTED_CALLS = {F.conv1d, F.conv2d, F.conv3d, F.linear}
SIGNED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.AlphaDropout)
"""Layers that do not keep zeros."""
SIGNED_CALLS = {torch.sub, operator.sub, "sub"}
"""Functions that do not keep zeros."""
SCALED_CALLS = {
    *(torch.mul, torch.div, operator.mul, operator.truediv, operator.neg),
    *("mul", "div"),
}
"""Functions that keep zeros if the only tensor is their first or only factor."""
Fans = dict[tuple[str, tuple[int, ...]], tuple[bytes, Tensor]]
"""Where the weights are zero (``zeros_of``) and the connections of each input value, by node and shape of the input."""


class Synapses(PotentialRecorder):
    """Runs a student's graph and counts its synaptic operations.

    Args:
        core: the graph.
        keep: names of nodes.
        layers: paths of the layers whose potentials are kept.
        fans: connections that are known; others are added.
        done: gets the operations per time step and image, ``[T, B]``. Those before the first neurons happen once, and
            are spread over the steps.
    """

    def __init__(
        self, core: fx.GraphModule, keep: Collection[str], layers: Collection[str], fans: Fans, done: list[Tensor]
    ) -> None:
        super().__init__(core, keep, layers)
        self.fans, self.done, self.behind = fans, done, behind(core.graph, neuron_nodes(core))
        self.levels = max((layer.neuron.levels for layer in core.modules() if isinstance(layer, Spiking)), default=1)

    def run(self, rows: Any, timesteps: int, repeats: int, states: Any, keep: bool) -> Any:  # type: ignore[override]
        """The graph's results."""
        self.timesteps, self.batch = timesteps, len(rows) * repeats // timesteps
        self.operations = torch.zeros(timesteps, self.batch, device=rows.device)
        self.trains: dict[fx.Node, Tensor] = {}
        results = super().run(rows, timesteps, repeats, states, keep)
        self.done.append(self.operations)
        return results

    def run_node(self, n: fx.Node) -> Any:
        """The output of a node, whose operations are counted, or whose train is kept."""
        value = super().run_node(n)
        layer = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, WEIGHTED) or n.target in WEIGHTED_CALLS:
            self._count(n)
        elif isinstance(layer, CumulativeMaxPool):
            if (source := n.all_input_nodes[0]) in self.trains:
                self.trains[n] = self._again(n, [self.trains[source]])[0]
        elif isinstance(value, Tensor) and (train := self._train(n, layer, value)) is not None:
            self.trains[n] = train
        return value

    def _count(self, node: fx.Node) -> None:
        """Add the operations of a layer with weights."""
        source, inputs = node.all_input_nodes[0], self.env[node.all_input_nodes[0]]
        train = self.trains.get(source)
        if train is None:
            train = (inputs.detach() != 0).float() * (self.levels if source in self.behind else 1)
        each = (train.float() * self._fan(node, inputs)).flatten(1).sum(1)
        once = len(inputs) == self.batch and self.timesteps > 1
        self.operations = self.operations + (
            each / self.timesteps if once else each.unflatten(0, (self.timesteps, self.batch))
        )

    def _fan(self, node: fx.Node, inputs: Tensor) -> Tensor:
        """The connections of each input value of a layer with weights."""
        key = node.name, tuple(inputs.shape[1:])
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        layer: Any = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        weight = layer.weight if layer is not None else kwargs["weight"] if "weight" in kwargs else args[1]
        zeros = zeros_of(weight)
        if key not in self.fans or self.fans[key][0] != zeros:
            if layer is not None:
                fan = fan_out(layer, key[1])
            else:
                function: Any = node.target
                rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
                fan = fan_of(lambda x, w: function(x, w, None, *args[3:], **rest), weight.detach(), key[1])
            self.fans[key] = zeros, fan.float().to(inputs.device)
        return self.fans[key][1]

    def _train(self, node: fx.Node, layer: Any, value: Tensor) -> Tensor | None:
        """In how many sub-steps each value is not zero; None if it is no train."""
        if node.target is operator.getitem and node.args[1] == 0:
            return self._fired(node.args[0], value)
        sources = [one for one in node.all_input_nodes if isinstance(self.env[one], Tensor)]
        if not sources or any(one not in self.trains for one in sources):
            return None
        if isinstance(layer, SIGNED) or node.target in SIGNED_CALLS:
            return None
        if node.target in SCALED_CALLS:  # by a constant
            return self.trains[sources[0]] if len(node.all_input_nodes) == 1 and node.args[0] is sources[0] else None
        if isinstance(layer, PASSING):  # dropout
            return self.trains[sources[0]] * (value.detach() != 0)
        counts = self._again(node, [self.trains[one] for one in sources])
        with torch.no_grad():
            whole = [self.trains[one].round() for one in sources]
            exact = torch.zeros_like(counts)
            for level in range(1, self.levels + 1):
                exact += self._again(node, [(one >= level).to(one) for one in whole]) != 0
            scale = exact.sum() / counts.sum().clamp_min(1e-12)
        scaled = counts * scale
        return scaled + (exact - scaled).detach()

    def _fired(self, node: Any, value: Tensor) -> Tensor | None:
        """The train of a layer of neurons, or of a max pooling over time."""
        layer = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, Spiking):
            return value / layer.heights(value).detach().to(value)
        return self.trains.get(node)

    def _again(self, node: fx.Node, trains: Sequence[Tensor]) -> Any:
        """What a node makes of trains in place of its inputs."""
        sources = [one for one in node.all_input_nodes if one in self.trains]
        given = dict(zip(sources, trains))
        args, kwargs = (
            fx.node.map_arg(part, lambda one: given.get(one, self.env.get(one))) for part in (node.args, node.kwargs)
        )
        return getattr(self, node.op)(node.target, args, kwargs)


def fan_out(layer: nn.Module, shape: Sequence[int]) -> Tensor:
    """``fan_of`` for a convolution or linear layer.

    >>> fan_out(nn.Conv2d(1, 2, 3, padding=1), (1, 2, 3))[0].int().tolist()
    [[8, 12, 8], [8, 12, 8]]
    """
    held = {name: value.detach().to("cpu", torch.float64) for name, value in layer.named_parameters()}

    def function(inputs: Tensor, weight: Tensor) -> Any:
        return torch.func.functional_call(layer, {**held, "weight": weight}, inputs)

    return fan_of(function, held["weight"], shape)


def zeros_of(weight: Tensor) -> bytes:
    """Where a weight is zero, as bytes that are empty if it is nowhere. Connections depend on it and on the shape."""
    zeros = weight.detach() == 0
    if not zeros.any():
        return b""
    return np.packbits(zeros.cpu().numpy()).tobytes()


def fan_of(function: Callable[..., Tensor], weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The number of connections with a non-zero weight from each value of an input ``[...]``, as float64.

    Args:
        function: of input and weight, linear in the input.
        weight: its weight.
        shape: the shape of one input.

    >>> fan_of(F.linear, torch.tensor([[0.5, 0.0], [0.1, 2.0]]), (2,)).tolist()
    [2.0, 1.0]
    """
    there = (weight != 0).to("cpu", torch.float64)
    with torch.enable_grad(), torch.inference_mode(False):
        inputs = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
        (fan,) = torch.autograd.grad(function(inputs, there.clone()).sum(), inputs)
    return fan[0]
