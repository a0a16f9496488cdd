import copy

import pytest
import torch
from torch import nn

from spikedistill.neuron import layer as neuron_layer
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.graph import Charges, Walk, repeat_time, spike_nodes
from spikedistill.teacher.zoo import ZOO


def student_of(name="resnet20", timesteps=3, **fields):
    images = torch.rand(4, 3, 16, 16)
    student, _ = to_spiking(ZOO[name](width=4), Conversion(timesteps=timesteps, **fields), calibrate=images)
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
    walked, after = Walk(student.core).run(*given)
    assert torch.equal(walked, output) and all(map(torch.equal, after, states))


def test_a_walk_keeps_what_it_was_asked_for():
    student = student_of()
    names = list(spike_nodes(student.core).values())
    walk = Walk(student.core, names)
    walk.run(*given_to(student))
    assert set(walk.kept) == set(names) and all(value.shape[0] == 6 for value in walk.kept.values())


def test_a_walk_reads_as_its_three_methods():
    seen = []

    class Told(Walk):
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
        Walk(student.core).run(torch.rand(2, 5, 16, 16), 3, 3, (None,) * student.states, False)
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
    walk = Charges(student.core, (), paths[1:3])
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
