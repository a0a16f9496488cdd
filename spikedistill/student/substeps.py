"""Graded spikes as a chip runs them: D binary sub-steps of a layer within each time step.

A layer of neurons first takes in all D sub-steps of the layers before it. Then it fires its own spikes, at most one per
sub-step, the first ones first: its train is left-aligned. Between layers of neurons everything is affine,
``f(x) = W x + b``, or a maximum. The constant part counts once per step, ``f(x_1) + (f(x_2) - b) + ...``, and so does
the leak. It is what a node gives if all its inputs that depend on the image are zero. Max pooling of a single step
pools what came in so far within the step, and passes on the growth: over left-aligned trains a logical or. Pooling of
the cumulative input adds up as over steps. So every count is that of the graded neuron, except for the rounding of
sums.
"""

import copy
import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import Reset, charge
from spikedistill.neuron.layer import Spiking
from spikedistill.neuron.surrogate import spike
from spikedistill.student.coding import DirectCoding
from spikedistill.student.graph import PotentialRecorder, behind, repeat_time, spike_nodes
from spikedistill.student.pool import MAX_POOLS, WIDER, CumulativeMaxPool
from spikedistill.student.student import Student
from spikedistill.student.trace import POOL_CALLS

RunSchedule = Literal["layer-by-layer", "step-by-step"]
"""In which order the D sub-steps run: each layer all of its own before the next layer begins, or every layer one after
the other at each of T D steps (``step_by_step``). With D = 1 both are the same network."""
LAYERS: RunSchedule = "layer-by-layer"
"""The schedule in which a student is trained and measured."""


class SubSteps(PotentialRecorder):
    """Runs a student's graph in binary sub-steps; after the first layer of neurons rows are ``[T*D*B, ...]``.

    It takes and returns what the graph does, so it may stand as a student's ``walk``. What nodes keep has sub-steps.
    """

    def run(self, rows: Any, timesteps: int, repeats: int, states: Any, keep: bool) -> Any:  # type: ignore[override]
        """The graph's results: output summed over the sub-steps of each step, ``[T*B, K]``, and states."""
        layers = [layer for layer in self.module.modules() if isinstance(layer, Spiking)]
        self.levels = layers[0].neuron.levels if layers else 1
        self.timesteps, self.batch = timesteps, len(rows) * repeats // timesteps
        self.rows = timesteps * self.levels * self.batch
        self.framed = repeats == 1 and timesteps > 1
        self.signals = behind(self.graph, [next(iter(self.graph.nodes))])
        logits, after = super().run(rows, timesteps, repeats, states, keep)
        return logits.unflatten(0, (timesteps, self.levels, self.batch)).sum(1).flatten(0, 1), after

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What goes in; an input that differs from step to step is there in the first sub-step."""
        value = super().placeholder(target, args, kwargs)
        first = self.current is next(iter(self.graph.nodes))
        return self.first_alone(value) if first and self.framed else value

    def spread(self, x: Tensor, repeats: int) -> Tensor:
        """What does not depend on time is there in the first sub-step of every step."""
        return x if self.framed else self.first_alone(repeat_time(x, repeats))

    def first_alone(self, x: Tensor) -> Tensor:
        """``[T*B, ...]`` as sub-steps: all of it in the first."""
        steps = x.unflatten(0, (self.timesteps, 1, self.batch))
        rest = torch.zeros_like(steps).expand(-1, self.levels - 1, *steps.shape[2:])
        return torch.cat([steps, rest], 1).flatten(0, 2)

    def fire(self, layer: Spiking, current: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        """Take in all sub-steps of a step, then fire, at most one spike per sub-step, the first ones first."""
        if len(current) == self.batch:  # before the first spikes: the same at every step
            steps = current.expand(self.timesteps, *current.shape)
        else:
            steps = current.unflatten(0, (self.timesteps, self.levels, self.batch)).sum(1)
        height, potential = layer.heights(steps[0]), layer.potential(steps[0]) if state is None else state
        trains = []
        for step in steps:
            potential = charge(step / height, potential, layer.neuron, layer.leak)
            for _ in range(self.levels):
                fired = spike(potential - 1.0)
                potential = potential - fired
                trains.append(height * fired)
        result = torch.cat(trains).to(current.dtype), potential if keep else None
        for hook in layer._forward_hooks.values():
            hook(layer, (current, timesteps, repeats, state, keep), result)
        return result

    def pool(self, layer: CumulativeMaxPool, x: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        """Every sub-step is a step to it. Before the first neurons there may be no sub-steps yet."""
        if len(x) == self.batch:
            return layer(x, timesteps, repeats, state, keep)
        return layer(x, self.timesteps * self.levels, 1, state, keep)

    def apply(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Any other layer, its constant part once per step."""
        if isinstance(layer, MAX_POOLS):
            return self.largest(super().apply, layer, args, kwargs)
        return self.once(super().apply, layer, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A function, its constant part once per step."""
        if target in (repeat_time, operator.getitem):  # nothing constant
            return super().call_function(target, args, kwargs)
        if target in POOL_CALLS:
            return self.largest(super().call_function, target, args, kwargs)
        return self.once(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A method, its constant part once per step."""
        return self.once(super().call_method, target, args, kwargs)

    def largest(self, call: Callable[..., Any], what: Any, args: Any, kwargs: Any) -> Any:
        """A max pooling of single steps: in each sub-step the growth of the maximum of what came in so far."""
        x, *rest = args
        if not self.is_signal(x):
            return call(what, args, kwargs)
        steps = x.to(WIDER.get(x.dtype, x.dtype)).unflatten(0, (self.timesteps, self.levels, self.batch))
        so_far = call(what, (steps.cumsum(1).flatten(0, 2), *rest), kwargs).unflatten(0, steps.shape[:3])
        return torch.cat([so_far[:, :1], so_far[:, 1:] - so_far[:, :-1]], 1).flatten(0, 2).to(x.dtype)

    def once(self, call: Callable[..., Any], what: Any, args: Any, kwargs: Any) -> Any:
        """A result, its constant part left out of all sub-steps but the first of each step."""
        result = call(what, args, kwargs)
        if not self.is_signal(result):
            return result
        given = (fx.node.map_arg(part, self.zero) for part in (self.current.args, self.current.kwargs))
        steps = result.unflatten(0, (self.timesteps, self.levels, self.batch))
        constant = self.constant(lambda: call(what, *given)).unflatten(0, steps.shape[:3])
        return torch.cat([steps[:, :1], steps[:, 1:] - constant[:, 1:]], 1).flatten(0, 2)

    def is_signal(self, value: Any) -> bool:
        """Whether the input or output of the current node depends on the image and has a row for each sub-step."""
        if self.levels == 1 or self.current not in self.signals:
            return False
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.rows

    def zero(self, node: fx.Node) -> Any:
        """The value of a node, zeros in place of tensors that depend on the image."""
        value = self.env[node]
        if node not in self.signals:
            return value
        return fx.node.map_aggregate(value, lambda one: torch.zeros_like(one) if isinstance(one, Tensor) else one)

    def constant(self, call: Callable[[], Tensor]) -> Tensor:
        """What a call gives of zeros."""
        return call()


@torch.no_grad()
def run_in_substeps(student: Student, inputs: Tensor, *, spikes: tuple[str, ...] = ()) -> Answer:
    """Run a student with binary spikes only: T time steps of D sub-steps each, layer by layer.

    Args:
        student: with ``levels`` D in its neuron; in evaluation mode.
        inputs: as for the student.
        spikes: paths of its layers, for trains of 0 and 1.

    Returns:
        Logits ``[T, B, K]``, summed over the sub-steps of each step, and spikes ``[T*D, B, ...]`` by path.

    Raises:
        ConfigError: if the neuron resets to zero, which has no sub-steps.
    """
    neuron, timesteps = student.conversion.neuron_model, student.timesteps
    if neuron.reset is not Reset.SUBTRACT:
        raise ConfigError("Sub-steps are of subtractive reset: give reset=Reset.SUBTRACT.")
    rows, repeats = student.coding.encode(inputs, timesteps)
    fired = {path: spike_nodes(student.core)[student._module(path)] for path in spikes}
    walk = SubSteps(student.core, set(fired.values()), ())
    logits, _ = walk.run(student._normalised(rows), timesteps, repeats, (None,) * student.states, False)
    trains = {path: (walk.kept[node] != 0).float().unflatten(0, (-1, walk.batch)) for path, node in fired.items()}
    return Answer(logits.unflatten(0, (timesteps, -1)), spikes=trains)


def step_by_step(student: Student) -> Student:
    """The same network run step by step: a copy with T D steps of one spike each.

    Weights, biases and the repeated image stay; thresholds, and with them the heights of spikes, are D times as large,
    as counts add within a step and are averaged over steps. Every layer then fires at each step, so spikes that arrive
    early or late change counts: it is not the graded student to the last count. With D = 1 it is the student itself.

    Raises:
        ConfigError: for D above 1, if the neuron leaks, which acts once per step and not per sub-step, or the student
            sees frames or another coding than the image itself, of which a step is one and a sub-step none.
    """
    conversion = student.conversion
    neuron = conversion.neuron_model
    if neuron.levels == 1:
        return copy.deepcopy(student)
    if neuron.leak < 1 or not isinstance(student.coding, DirectCoding):
        raise ConfigError(
            f"Step by step is for neurons without leak that see the image itself, not for leak {neuron.leak} and"
            f" {type(student.coding).__name__}: the leak, and a frame, belong to a step and not to a sub-step. Run it"
            " layer by layer."
        )
    copied = copy.deepcopy(student)
    single = dataclasses.replace(neuron, levels=1)
    copied.conversion = dataclasses.replace(conversion, neuron=single, timesteps=student.timesteps * neuron.levels)
    copied.set_timesteps(student.timesteps * neuron.levels)
    for layer in copied.neurons.values():
        layer.neuron = single
        layer.set_threshold(layer.threshold * neuron.levels)
    return copied
