"""Layers corrected in order after conversion, without gradients: each on what it really gets from those before it.

A layer of the student gets spikes in place of the ANN's activations, and errors add up from layer to layer. So ANN and
student run side by side, node by node, on the calibration images. In place of the ANN there may be another student of
the same network, for instance a graded one from which a student of more time steps starts.

- at each convolution or linear layer behind the first neurons, ridge regression finds the change of weights and bias
  that brings the layer's mean over time nearest to the ANN's, past batch norm and the sum with a skip connection;
- at each layer of neurons, thresholds are chosen for the currents that arrive, so that spikes come nearest to the ANN's
  activation. If a layer with a bias comes before, so is a shift of the current.

Means over time are compared, not single steps: the next layer adds up what it gets, so the noise of single spikes is no
variance of the signal. Labels are not needed.

Quantised ANNs are corrected in similar ways: biases (Nagel et al., arXiv 1906.04721), weights against the inputs that
quantised layers give (Lybrand and Saab, arXiv 2010.11258), converted SNNs layer by layer (Li et al., ICML 2021, arXiv
2106.06984). The regression past sums, and its strength chosen on images held out, are this project's choice.
"""

import operator
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spikedistill.inputs import evaluating
from spikedistill.neuron.dynamics import run
from spikedistill.neuron.layer import Spiking, by_reference
from spikedistill.student.biases import PASSING, SUMS, preceding_layer
from spikedistill.student.graph import GraphInterpreter, behind, neuron_nodes
from spikedistill.student.rate import NORMS
from spikedistill.student.report import Corrected
from spikedistill.student.ridge import CONVOLUTIONS, at, inputs_at, ridge, rows_of, sample

LARGEST = 2**27
"""Values of the largest tensor, over images and time steps. Of more images, evenly spaced ones are taken."""
ROWS, PER_INPUT = 8000, 8
"""Places of an output that a regression sees: the first, or the second times the inputs of one output if more."""
WIDEST = 2400
"""A layer with more inputs to each output keeps its weights, and its bias is corrected: the system is too large."""
PLACES = 4000
"""Places at which a layer of neurons tries other thresholds."""
FACTORS = tuple(1.13**-number for number in range(24))
"""Thresholds tried, in parts of the largest activation, or of its D-th part: down to 0.06."""
SHIFTS = (-0.3, -0.2, -0.1, 0.1, 0.2, 0.3)
"""Shifts of the current tried, in thresholds."""
FAINT = 0.01
"""A channel that batch norm scales by less than this part of the layer's mean scale keeps its weights."""


@torch.no_grad()
def correct_layers(
    core: fx.GraphModule,
    given: tuple[Any, ...],
    reference: fx.GraphModule,
    shown: tuple[Any, ...],
    named: Mapping[str, str],
    batch: int,
) -> tuple[tuple[Corrected, ...], dict[str, float]]:
    """Correct the layers of a student in place.

    Args:
        core: the student's graph, with thresholds that are the largest to be tried.
        given: what the graph takes; first the rows ``[T*B, ...]``, or ``[B, ...]`` if they repeat, then T.
        reference: the graph that it is brought near to: the ANN that it was made from, before neurons took the place of
            activations, or another student's.
        shown: what that graph takes.
        named: for each node of ``reference`` the node of ``core``.
        batch: B, the number of images.

    Returns:
        What was done, in order, and the mean firing rate of each layer of neurons by its path in the graph.
    """
    side_by_side = _SideBySide(_Stepwise(core, *given), _Stepwise(reference, *shown), named, batch, given[1])
    layers = [layer for graph in (core, reference) for layer in graph.modules() if isinstance(layer, Spiking)]
    with evaluating(core, reference), by_reference(*layers):
        side_by_side.run()
    return tuple(side_by_side.done), side_by_side.rates


@torch.no_grad()
def some_images(graph: fx.GraphModule, one: tuple[Any, ...], count: int, timesteps: int) -> Tensor:
    """As many images as the correction can hold: all, or evenly spaced ones.

    Args:
        graph: the ANN's, or another student's.
        one: what it takes for one image.
        count: the number of images.
        timesteps: of the student.
    """
    walk = _Largest(graph)
    walk.run(*one)
    most = max(1, LARGEST // (walk.largest * timesteps))
    return torch.arange(count)[:: -(-count // most)]


class _Largest(GraphInterpreter):
    """Finds the number of values of a graph's largest tensor."""

    largest = 1

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.largest = max(self.largest, value.numel() if isinstance(value, Tensor) else 1)
        return value


class _Stepwise(GraphInterpreter):
    """Runs a graph in parts, one node after the other. A value is dropped after its last reader."""

    def __init__(self, module: fx.GraphModule, *inputs: Any) -> None:
        super().__init__(module)
        self.core = module
        self.env: dict[Any, Any] = {}
        self.args_iter = iter(inputs)
        self.left = iter(module.graph.nodes)

    def advance(self, node: fx.Node) -> None:
        """Compute the next node."""
        self.env[node] = self.run_node(node)
        for done in self.user_to_last_uses.get(node, ()):
            del self.env[done]

    def up_to(self, name: str) -> Any:
        """The value of a node: it is still known, or all nodes up to it run now. None if it was dropped."""
        known = next((value for node, value in self.env.items() if node.name == name), None)
        while known is None and (node := next(self.left, None)) is not None:
            self.advance(node)
            known = self.env[node] if node.name == name else None
        return known


class _SideBySide:
    """The reference and the student, which is corrected as it runs, over all images at once."""

    def __init__(
        self, student: _Stepwise, reference: _Stepwise, named: Mapping[str, str], batch: int, timesteps: int
    ) -> None:
        self.student, self.reference, self.batch, self.timesteps = student, reference, batch, timesteps
        self.core = student.core
        self.old = {new: old for old, new in named.items()}
        self.calls = Counter(str(node.target) for node in self.core.graph.nodes if node.op == "call_module")
        self.generator = torch.Generator().manual_seed(0)
        self.done: list[Corrected] = []
        self.rates: dict[str, float] = {}

    def run(self) -> None:
        """Correct layer after layer, in order of execution."""
        after_neurons = behind(self.core.graph, neuron_nodes(self.core))
        fits = _with_own_weights(self.core, [path for path, count in self.calls.items() if count == 1])
        for node in self.core.graph.nodes:
            layer = self.core.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, Spiking):
                self.correct_neurons(node, layer)
            elif layer in fits and node.args[0] in after_neurons:
                self.correct_weights(node, layer)
            self.student.advance(node)

    def correct_weights(self, node: fx.Node, layer: Any) -> None:
        """Bring the mean output of a layer nearer to the reference's, where its chain ends."""
        end, norm, added = self.follow(node)
        target = self.wanted(end)
        sources = [self.mean(self.student.env[one]) for one in added]
        x = self.mean(self.student.env[node.args[0]])
        if target is None or any(one.shape != target.shape for one in sources) or (target.ndim > 2) != (x.ndim > 2):
            return
        count = layer.weight[0].numel()
        places = sample(target.shape, max(ROWS, PER_INPUT * count), self.generator)
        seen, wanted = inputs_at(layer, x, places), at(target, places)
        rest = wanted - sum(at(one, places) for one in sources)
        lacking = before = rest - _through(layer, norm, seen)
        shifted = norm if norm is not None and norm.bias is not None else layer
        if count <= WIDEST:
            change = ridge(seen, lacking.unflatten(1, (seen.shape[1], -1)), places[0], shifted.bias is not None)
            layer.weight += (change.mT.flatten(0, 1) / _scale(norm, change)[:, None]).view_as(layer.weight)
            lacking = rest - _through(layer, norm, seen)
        if shifted.bias is not None:
            shift = lacking.mean(0)
            shifted.bias += shift if shifted is norm else shift / _scale(norm, shift)
            lacking = rest - _through(layer, norm, seen)
        self.note(str(node.target), before, lacking, wanted)

    def correct_neurons(self, node: fx.Node, layer: Spiking) -> None:
        """Choose thresholds, and shifts of the current, for what a layer of neurons really gets."""
        spikes = next(one for one in node.users if one.target is operator.getitem and one.args[1] == 0)
        target, current = self.wanted(spikes), self.student.env[node.args[0]]
        if target is None:
            return
        places = sample(target.shape, PLACES, self.generator)
        wanted = at(target, places)
        steps = torch.stack([at(step, places) for step in current.unflatten(0, (-1, self.batch))])
        source = preceding_layer(self.core, node.args[0])
        threshold, shift = _best(layer, steps, wanted, self.timesteps, shifts=source is not None)
        before = wanted - _emitted(layer, steps, layer.threshold, self.timesteps)
        after = wanted - _emitted(layer, steps + shift, threshold, self.timesteps)
        layer.set_threshold(threshold)
        if source is not None:
            source.bias += shift
            self.student.env[node.args[0]] = current + shift.view(-1, *[1] * (current.ndim - 2))
        self.note(str(node.target), before, after, wanted)
        self.rates[str(node.target)] = float(((wanted - after) / threshold).mean())

    def wanted(self, node: fx.Node) -> Tensor | None:
        """The reference's mean over time at a node of the student; None if it was dropped."""
        found = self.reference.up_to(self.old[node.name])
        return None if found is None else self.mean(found)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over time ``[B, ...]``."""
        return x if len(x) == self.batch else x.unflatten(0, (-1, self.batch)).mean(0)

    def note(self, name: str, before: Tensor, after: Tensor, wanted: Tensor) -> None:
        """Keep what a correction did."""
        variance = (wanted - wanted.mean(0)).square().mean().clamp_min(1e-12)
        self.done.append(Corrected(name, *(float(error.square().mean() / variance) for error in (before, after))))

    def follow(self, node: fx.Node) -> tuple[fx.Node, Any, list[fx.Node]]:
        """What comes behind a layer without a branch: batch norm, then sums with what is already known.

        Returns:
            The last node of this chain, the batch norm or None, and what is added.
        """
        norm: Any = None
        added: list[fx.Node] = []
        while len(node.users) == 1:
            (reader,) = node.users
            layer = self.core.get_submodule(str(reader.target)) if reader.op == "call_module" else None
            if isinstance(layer, NORMS):
                if norm is not None or added or not layer.track_running_stats or self.calls[str(reader.target)] > 1:
                    break
                norm = layer
            elif layer is None and reader.target in SUMS:
                others = [one for one in reader.args if one is not node]
                if len(others) != 1 or others[0] not in self.student.env or reader.kwargs:
                    break
                added += others  # type: ignore[arg-type]
            elif not isinstance(layer, PASSING):
                break
            node = reader
        return node, norm, added


def _with_own_weights(core: fx.GraphModule, paths: Collection[str]) -> Collection[nn.Module]:
    """The convolutions and linear layers among these modules whose weights belong to no other layer."""
    shared = Counter(id(weight) for _, weight in core.named_parameters(remove_duplicate=False))
    layers: list[Any] = [core.get_submodule(path) for path in paths]
    kinds = (*CONVOLUTIONS, nn.Linear)
    own = [layer for layer in layers if isinstance(layer, kinds) and "weight" in layer._parameters]
    return [layer for layer in own if shared[id(layer.weight)] == 1]


def _through(layer: Any, norm: Any, seen: Tensor) -> Tensor:
    """The output ``[N, O]`` of a layer, past its batch norm, for what it sees at some places."""
    output = (seen.transpose(0, 1) @ rows_of(layer)).transpose(0, 1).flatten(1)
    output = output if layer.bias is None else output + layer.bias
    if norm is None:
        return output
    return F.batch_norm(output, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def _scale(norm: Any, like: Tensor) -> Tensor:
    """By what a batch norm multiplies each channel, ``[O]`` or one number; infinite for one that stays as it is."""
    if norm is None:
        return torch.ones(1).to(like)
    scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
    return torch.where(scale.abs() > FAINT * scale.abs().mean(), scale, torch.inf)


def _emitted(layer: Spiking, steps: Tensor, threshold: Tensor, timesteps: int) -> Tensor:
    """The mean output ``[N, C]`` of neurons for currents ``[T, N, C]``."""
    initial = layer.initial.expand_as(steps[0]) if layer.neuron.learn_initial else None
    return run(steps, initial, layer.neuron, layer.leak, threshold, timesteps)[0].mean(0)


def _best(layer: Spiking, steps: Tensor, wanted: Tensor, timesteps: int, shifts: bool) -> tuple[Tensor, Tensor]:
    """The thresholds, and shifts of the current ``[C]``, with the least squared error: per channel, or of the layer."""

    def error(threshold: Tensor, shift: Tensor) -> Tensor:
        errors = (_emitted(layer, steps + shift, threshold, timesteps) - wanted).square().mean(0)
        return errors if threshold.ndim else errors.mean()

    most = layer.threshold.detach()
    threshold, shift = most.clone(), torch.zeros_like(most)
    least = error(threshold, shift)
    for factor in FACTORS[1:]:
        now = error(factor * most, shift)
        threshold, least = torch.where(now < least, factor * most, threshold), torch.minimum(now, least)
    for part in SHIFTS if shifts else ():
        now = error(threshold, part * threshold)
        shift, least = torch.where(now < least, part * threshold, shift), torch.minimum(now, least)
    return threshold, shift.expand(wanted.shape[1])
