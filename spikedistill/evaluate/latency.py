"""After how many sub-steps a student has answered, and which spikes wait for others meanwhile.

Layer by layer, a layer of neurons takes in all D sub-steps of a time step and then fires its own D. Layers work side by
side on different time steps, as in a pipeline. So the last spike of T steps leaves the last layer after
``(L + T - 1) D`` sub-steps, with L the longest path in layers of neurons. Where paths of different length meet, as on a
skip connection, the spikes of the shorter one wait in a buffer: one bit for each neuron and sub-step.

Step by step, every layer answers within the same step, so all is over after ``T D`` steps and nothing waits. Simulators
assume this. A chip on which a spike takes a step from layer to layer needs L - 1 steps more.
"""

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from spikedistill.neuron.layer import Spiking
from spikedistill.student.pool import CumulativeMaxPool
from spikedistill.student.student import Student
from spikedistill.student.substeps import LAYERS, RunSchedule


@dataclass(frozen=True)
class Buffer:
    """Spikes that wait for those of a longer path, layer by layer.

    Args:
        layer: the layer that fires them, by its path in the ANN.
        where: the node of the student's graph at which the paths meet; that of the longest wait.
        before: the layer of neurons that this node leads to, likewise by its path, or ``logits``.
        sub_steps: how long they wait.
        bits: the size of the buffer for one image: sub-steps times neurons.
    """

    layer: str
    where: str
    before: str
    sub_steps: int
    bits: int


def longest_path(student: Student) -> int:
    """L, the largest number of layers of neurons on a path from the input to the logits."""
    return _Paths(student).longest()


def latency(student: Student, schedule: RunSchedule) -> int:
    """Sub-steps until the last logits are there; see the head of this file."""
    return _latency(student, schedule, longest_path(student))


def _latency(student: Student, schedule: RunSchedule, longest: int) -> int:
    timesteps, levels = student.timesteps, student.conversion.neuron_model.levels
    return timesteps * levels if schedule == "step-by-step" else (longest + timesteps - 1) * levels


def latency_in_words(found: Mapping[str, int]) -> list[str]:
    """The ``latency`` of results.json in words, one piece for each schedule.

    >>> latency_in_words({"layer-by-layer": 32, "step-by-step": 4})
    ['32 layer by layer', '4 step by step']
    """
    return [f"{count} {name.replace('-', ' ')}" for name, count in found.items()]


def buffers_of(student: Student, neurons: Mapping[str, int]) -> list[Buffer]:
    """The buffers that layer by layer needs, for each layer whose spikes wait, in order of execution.

    Args:
        student: the network.
        neurons: by name from ``student.neurons`` the number of a layer's neurons.
    """
    return _buffers_of(student, neurons, _Paths(student))


def _buffers_of(student: Student, neurons: Mapping[str, int], paths: "_Paths") -> list[Buffer]:
    levels = student.conversion.neuron_model.levels
    found: dict[str, tuple[int, fx.Node]] = {}
    for node in student.core.graph.nodes:
        arriving = paths.into(node)
        deepest = max((depth for depth, _ in arriving), default=0)
        for depth, layer in arriving:
            if layer is not None and deepest - depth > (found[layer][0] if layer in found else 0):
                found[layer] = deepest - depth, node
    named = dict(zip(student.neurons, student.layers()))
    made = []
    for name in (name for name in student.neurons if name in found):
        count, node = found[name]
        before = named.get(paths.after(node), "logits")
        made.append(Buffer(named[name], node.name, before, count * levels, count * levels * neurons[name]))
    return made


def latency_facts(student: Student, schedule: RunSchedule, neurons: Mapping[str, int]) -> dict[str, Any]:
    """What ``results.json`` holds: ``longest_path``, ``latency`` in sub-steps by schedule, and ``buffers``.

    With D = 1 both schedules are the same network, so both are given.
    """
    both: tuple[RunSchedule, ...] = ("layer-by-layer", "step-by-step")
    single = student.conversion.neuron_model.levels == 1
    paths = _Paths(student)
    longest = paths.longest()
    return {
        "longest_path": longest,
        "latency": {one: _latency(student, one, longest) for one in both if single or one == schedule},
        "buffers": [asdict(one) for one in _buffers_of(student, neurons, paths)] if schedule == LAYERS else [],
    }


class _Paths:
    """For each node of a student's graph the spikes that reach it without passing another layer of neurons."""

    def __init__(self, student: Student) -> None:
        self.layers = {layer: name for name, layer in student.neurons.items()}
        self.core = student.core
        self.given: dict[fx.Node, frozenset[tuple[int, str | None]]] = {}
        for node in student.core.graph.nodes:
            self.given[node] = self._gives(node)

    def longest(self) -> int:
        """The largest number of layers of neurons on a path from the input to the logits."""
        output = next(node for node in self.core.graph.nodes if node.op == "output")
        return max((depth for depth, _ in self.into(output)), default=0)

    def into(self, node: fx.Node) -> frozenset[tuple[int, str | None]]:
        """Pairs of depth, in layers of neurons, and the layer that fired; (0, None) for what comes from the image."""
        return frozenset(pair for source in node.all_input_nodes for pair in self.given[source])

    def after(self, node: fx.Node) -> str:
        """The layer of neurons that a node leads to, itself included; empty if none."""
        waiting = [node]
        for one in waiting:
            if isinstance(layer := self._module(one), Spiking):
                return self.layers[layer]
            waiting += [user for user in one.users if not self._is_state(user) and user not in waiting]
        return ""

    def _gives(self, node: fx.Node) -> frozenset[tuple[int, str | None]]:
        arriving = self.into(node)
        if self._is_state(node):
            return frozenset()
        if node is next(iter(self.core.graph.nodes)):
            return frozenset({(0, None)})
        layer = self._module(node)
        if isinstance(layer, Spiking):
            return frozenset({(1 + max((depth for depth, _ in arriving), default=0), self.layers[layer])})
        return arriving

    def _module(self, node: Any) -> Any:
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return self.core.get_submodule(str(node.target)) if called else None

    def _is_state(self, node: fx.Node) -> bool:
        """Whether a node is the state after the last step: the second result of neurons, and of pooling over time."""
        if node.target is not operator.getitem or node.args[1] != 1:
            return False
        return isinstance(self._module(node.args[0]), Spiking | CumulativeMaxPool)
