import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from spikedistill.neuron import layer as neuron_layer
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import INHERITED_NEURON, Conversion
from spikedistill.student.graph import GraphInterpreter, PotentialRecorder, repeat_time, spike_nodes, tap
from spikedistill.teacher.zoo import ZOO


def student_of(name="resnet20", timesteps=3, **fields):
    images = torch.rand(4, 3, 16, 16)
    student, _ = to_spiking(ZOO[name](width=4), Conversion(timesteps=timesteps, **fields), calibration_images=images)
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student.eval()


def given_to(student, batch=2):
    return torch.rand(batch, 3, 16, 16), student.timesteps, student.timesteps, (None,) * student.states, True


@pytest.mark.parametrize("name", ["resnet20", "preact-resnet18", "vgg9"])
def test_a_walk_is_the_graph(name):
    student = student_of(name)
    given = given_to(student)
    output, states = student.core(*given)
    walked, after = GraphInterpreter(student.core).run(*given)
    assert torch.equal(walked, output) and all(map(torch.equal, after, states))


def test_a_walk_keeps_what_it_was_asked_for():
    student = student_of()
    names = list(spike_nodes(student.core).values())
    walk = GraphInterpreter(student.core, names)
    walk.run(*given_to(student))
    assert set(walk.kept) == set(names) and all(value.shape[0] == 6 for value in walk.kept.values())


def test_a_walk_reads_as_its_three_methods():
    seen = []

    class Told(GraphInterpreter):
        def fire(self, layer, current, timesteps, repeats, state, keep):
            seen.append(("fire", self.current.target))
            return super().fire(layer, current, timesteps, repeats, state, keep)

        def apply(self, layer, args, kwargs):
            seen.append(("apply", self.current.target))
            return super().apply(layer, args, kwargs)

        def spread(self, x, repeats):
            seen.append(("spread", repeats))
            return super().spread(x, repeats)

    student = student_of("preact-resnet18")
    Told(student.core).run(*given_to(student))
    calls = [str(node.target) for node in student.core.graph.nodes if node.op == "call_module"]
    fired = [target for kind, target in seen if kind == "fire"]
    assert fired == list(spike_nodes(student.core)) and len(fired) == len(student.neurons)
    assert sorted(fired + [target for kind, target in seen if kind == "apply"]) == sorted(calls)
    spreads = sum(node.target is repeat_time for node in student.core.graph.nodes)
    assert [kind for kind, _ in seen].count("spread") == spreads > 0


def test_an_error_inside_a_walk_is_said_once():
    student = student_of()
    with pytest.raises(RuntimeError) as caught:
        GraphInterpreter(student.core).run(torch.rand(2, 5, 16, 16), 3, 3, (None,) * student.states, False)
    assert "While executing" not in str(caught.value)


def test_charges_run_the_reference_for_the_layers_named_and_no_others(monkeypatch):
    runs = []
    original = neuron_layer.run

    def counted(*given):
        runs.append(given[-1] is not None)
        return original(*given)

    student = student_of()
    monkeypatch.setattr(neuron_layer, "run", counted)
    paths = list(spike_nodes(student.core))
    walk = PotentialRecorder(student.core, (), paths[1:3])
    output, _ = walk.run(*given_to(student))
    assert list(walk.potentials) == paths[1:3]
    assert runs == [False, True, True] + [False] * (len(paths) - 3) and output.shape == (6, 10)


def test_hooks_on_layers_of_neurons_fire_in_every_walk():
    student = student_of()
    calls = []
    for layer in student.neurons.values():
        layer.register_forward_hook(lambda *_: calls.append(1))
    images = torch.rand(2, 3, 16, 16)
    for asked in ({}, {"spikes": student.layers()[:1]}, {"potentials": student.layers()[:2]}):
        calls.clear()
        student.observe(images, **asked)
        assert len(calls) == len(student.neurons)


class TestRepeatTime:
    def test_repeats_in_blocks_of_time(self):
        x = torch.rand(2, 3)
        assert torch.equal(repeat_time(x, 4).view(4, 2, 3), x.expand(4, 2, 3)) and repeat_time(x, 1) is x

    def test_spike_nodes_of_a_copy_are_the_same(self):
        student = student_of()
        assert spike_nodes(copy.deepcopy(student).core) == spike_nodes(student.core)

    def test_a_network_without_neurons_has_no_spike_nodes(self):
        assert spike_nodes(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))) == {}


COMPILED = """
import dataclasses
import torch
from spikedistill import Conversion, to_spiking
from spikedistill.student.conversion import INHERITED_NEURON
from spikedistill.teacher.zoo import ZOO

torch.manual_seed(0)
neuron, images = dataclasses.replace(INHERITED_NEURON, levels=4, learn_threshold=True), torch.rand(6, 1, 8, 8)
network = ZOO["resnet20"](classes=3, channels=1, width=4)
student, _ = to_spiking(network, Conversion(timesteps=1, neuron=neuron), calibration_images=images)
path = student.paths()[-3]
for layer in student.neurons.values():
    layer.backend = "reference"

def loss(images):
    answer = student.observe(images, (path,))
    return answer.logits.square().sum() + answer.features[path].sum()

def gradients(function):
    student.zero_grad()
    function(images).backward()
    return {name: value.grad.clone() for name, value in student.named_parameters()}

expected = gradients(loss)
found = gradients(torch.compile(loss, backend="eager", fullgraph=True))
assert any("threshold" in name for name in found)
for name, value in found.items():
    torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
"""


class TestTap:
    """The graph that also returns outputs of nodes."""

    def made(self, **changes):
        torch.manual_seed(0)
        network = ZOO["resnet20"](classes=3, channels=1, width=4)
        neuron = dataclasses.replace(INHERITED_NEURON, levels=4, learn_threshold=True, **changes)
        images = torch.rand(6, 1, 8, 8)
        student, _ = to_spiking(network, Conversion(timesteps=1, neuron=neuron), calibration_images=images)
        for layer in student.neurons.values():
            layer.backend = "reference"
        return student, images

    def test_returns_what_a_walk_keeps(self):
        student, images = self.made()
        student.eval()
        paths = student.paths()[::3]
        keep = {student.output_nodes[path] for path in paths}
        given = images, 1, 1, (None,) * student.states, False
        walk = GraphInterpreter(student.core, keep)
        (logits, _), kept = tap(student.core, keep)(*given)
        torch.testing.assert_close(logits, walk.run(*given)[0], rtol=0, atol=0)
        assert kept.keys() == walk.kept.keys() == keep
        for name, value in kept.items():
            torch.testing.assert_close(value, walk.kept[name], rtol=0, atol=0)

    def test_is_made_anew_where_a_layer_was_exchanged_and_in_copies(self):
        student, images = self.made()
        student.eval()
        path = student.paths()[-1]
        for layer in student.core.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.data.fill_(1.5)
        before = student.observe(images, (path,)).features[path]
        twin = copy.deepcopy(student)
        for one in (twin, student):
            name = next(name for name, layer in one.core.named_modules() if isinstance(layer, nn.BatchNorm2d))
            one.core.set_submodule(name, nn.Identity())
            assert not torch.equal(one.observe(images, (path,)).features[path], before)
        assert not any("_taps" in name for name in student.state_dict())

    def test_of_a_graded_student_compiles_without_a_break(self):
        """In a process of its own: torch.compile cannot trace the checks of shapes that tests install."""
        done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
