import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikedistill.evaluate.latency import buffers_of, latency, latency_facts, longest_path
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import INHERITED_NEURON, Conversion


class Branches(nn.Module):
    """A skip of two layers around which another skips three, and pooling over time, whose state is no path."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, 3)

    def forward(self, x):
        first = F.relu(self.a(x))  # 8 x 8 x 2
        second = F.relu(self.b(first))
        third = F.relu(self.c(second) + first)
        pooled = self.pool(torch.cat([third, first], 1))  # first waits for third
        return self.fc(F.avg_pool2d(pooled[:, :2], 2).flatten(1))


def made(network, timesteps, levels):
    torch.manual_seed(0)
    neuron = dataclasses.replace(INHERITED_NEURON, levels=levels)
    return to_spiking(network, Conversion(timesteps=timesteps, neuron=neuron, inherit=False))[0]


def chain(layers):
    parts = [part for _ in range(layers) for part in (nn.Conv2d(2, 2, 1), nn.ReLU())]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(2 * 16, 3))


@pytest.mark.parametrize("layers, timesteps, levels", [(1, 1, 4), (3, 2, 4), (5, 4, 1)])
def test_a_chain_is_a_pipeline(layers, timesteps, levels):
    student = made(chain(layers), timesteps, levels)
    # by hand: layer k fires for step t from (k + t) D to (k + t + 1) D, both counted from 0
    ends = [(k + t + 1) * levels for k in range(layers) for t in range(timesteps)]
    assert longest_path(student) == layers and latency(student, "layer-by-layer") == max(ends)
    assert latency(student, "step-by-step") == timesteps * levels
    assert buffers_of(student, dict.fromkeys(student.neurons, 32)) == []


def test_spikes_wait_for_the_longest_branch_that_they_meet():
    student = made(Branches(), 2, 3)
    names = student.layers()
    (buffer,) = buffers_of(student, dict.fromkeys(student.neurons, 128))
    # first meets second's branch one layer later, and third two layers later, before nothing but the logits
    assert longest_path(student) == 3
    assert (buffer.layer, buffer.before, buffer.sub_steps, buffer.bits) == (names[0], "logits", 6, 6 * 128)
    assert "cat" in buffer.where


def test_a_sum_names_the_layer_that_it_feeds():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.fc(F.relu(self.b(F.relu(x)) + x))

    student = made(Skip(), 1, 4)
    (buffer,) = buffers_of(student, dict.fromkeys(student.neurons, 5))
    assert (buffer.layer, buffer.before) == (student.layers()[0], student.layers()[-1]) and "add" in buffer.where
    assert (buffer.sub_steps, buffer.bits) == (4, 20)


def test_one_spike_a_step_has_both_schedules_and_more_its_own():
    one, more = made(chain(2), 4, 1), made(chain(2), 1, 4)
    neurons = dict.fromkeys(one.neurons, 32)
    assert latency_facts(one, "layer-by-layer", neurons)["latency"] == {"layer-by-layer": 5, "step-by-step": 4}
    assert latency_facts(more, "layer-by-layer", neurons)["latency"] == {"layer-by-layer": 8}
    assert latency_facts(made(Branches(), 4, 1), "step-by-step", {})["buffers"] == []
