import dataclasses

import pytest
import torch
from torch import nn

from spikedistill.deliver.energy import estimate_energy, lines, table
from spikedistill.evaluate.energy import MODELS, Cost, ann_energies, cost_of, energies, verdicts
from spikedistill.evaluate.firing import firing_rates
from spikedistill.evaluate.operations import operations
from spikedistill.neuron.dynamics import IF
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion

COST = Cost(acs=100.0, macs=10.0, spikes=20.0, updates=40.0, dense=60.0, active=30.0, timesteps=4)
BIT, F32 = 10 / 64, torch.float32


def test_operations_alone_cost_what_horowitz_says():
    found = energies(COST)
    assert found["float32"]["student"] == pytest.approx((100 * 0.9 + 10 * 4.6) / 1e6)
    assert found["float32"]["quantised"] == pytest.approx(60 * 4.6 / 1e6)
    # four steps tell five values apart: three bits
    assert COST.bits == 3
    assert found["int8"]["student"] == pytest.approx((100 * 0.1 + 10 * 0.3) / 1e6)
    assert found["int8"]["quantised"] == pytest.approx(60 * (0.2 * 3 / 8 + 0.1) / 1e6)
    assert found["int8"]["quantised-sparse"] == pytest.approx(found["int8"]["quantised"] / 2)


def test_memory_is_paid_by_the_bit():
    found = energies(COST)["memory"]
    accumulate, multiply = 0.1 + BIT * (8 + 32), 0.3 + BIT * 16
    assert found["student"] == pytest.approx((100 * accumulate + 10 * multiply + 40 * 32 * BIT) / 1e6)
    one = 0.2 * 3 / 8 + 0.1 + BIT * 11
    # an activation is written once, not at every one of the four steps
    assert found["quantised"] == pytest.approx((60 * one + 40 / 4 * 3 * BIT) / 1e6)
    assert found["quantised-sparse"] == pytest.approx((30 * one + 40 / 4 * 3 * BIT) / 1e6)


def test_an_ann_is_paid_at_eight_bits():
    found = ann_energies(Cost(0.0, 60.0, 0.0, 40.0, 60.0, 60.0, 1))
    assert found["float32"] == pytest.approx(60 * 4.6 / 1e6)
    assert found["memory"] == pytest.approx((60 * (0.3 + BIT * 16) + 40 * 8 * BIT) / 1e6)


@pytest.mark.parametrize("timesteps, bits", [(1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (255, 8)])
def test_bits_tell_so_many_counts_apart(timesteps, bits):
    assert Cost(*[0.0] * 6, timesteps).bits == bits and 2**bits >= timesteps + 1 > 2 ** (bits - 1)


@pytest.mark.parametrize("timesteps, levels, bits", [(1, 4, 3), (2, 2, 3), (2, 4, 4), (3, 5, 4), (4, 4, 5)])
def test_bits_tell_the_counts_of_all_sub_steps_apart(timesteps, levels, bits):
    cost = dataclasses.replace(COST, timesteps=timesteps, levels=levels)
    assert cost.bits == bits and 2**bits >= timesteps * levels + 1 > 2 ** (bits - 1)
    # the ANN writes each activation once, of the T D updates of its neuron
    one, written = 0.2 * bits / 8 + 0.1 + BIT * (8 + bits), 40 / (timesteps * levels) * bits * BIT
    assert energies(cost)["memory"]["quantised"] == pytest.approx((60 * one + written) / 1e6)


def test_graded_spikes_are_counted_as_by_hand():
    """One pixel drives two neurons of three levels, which drive three classes; every spike and sub-step counts."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3))
    neuron = dataclasses.replace(IF, levels=3)
    student, _ = to_spiking(network, Conversion(timesteps=2, neuron=neuron, inherit=False))
    for layer in student.neurons.values():
        layer.backend = "reference"
    student.core.get_submodule("0").weight.data = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    student.core.get_submodule("3").weight.data.fill_(1.0)
    white = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    estimate = estimate_energy("graded", student.eval(), white, torch.zeros(1, dtype=torch.int64), F32)
    # A white pixel alone is like a spike: 2 accumulates. Currents of 1 and 1/2: counts 1, 1 and 0, 1. Then with 2.5
    # times the weights: 2, 3 and 1, 1.
    assert (estimate.cost.spikes, estimate.cost.acs, estimate.cost.updates) == (3, 2 + 9, 2 * 2 * 3)
    student.core.get_submodule("0").weight.data *= 2.5
    estimate = estimate_energy("graded", student, white, torch.zeros(1, dtype=torch.int64), F32)
    assert (estimate.cost.spikes, estimate.cost.acs, estimate.cost.macs) == (7, 2 + 21, 0)
    assert (estimate.cost.timesteps, estimate.cost.levels, estimate.cost.bits) == (2, 3, 3)
    columns, (row, *_) = table([estimate])
    assert dict(zip(columns, row))["T x D"] == "2x3"
    assert ("graded", "levels", 3) in lines([estimate])


def test_where_a_student_loses_it_is_said_with_both_figures():
    lines = verdicts("mine", energies(COST))
    assert [line[line.index("'") :].split("'")[1] for line in lines] == ["int8", "memory"]
    # by hand, in pJ: 100 x 6.35 + 10 x 2.8 + 40 x 5 against 60 (30) x 1.89375 + 10 x 0.46875
    assert lines[-1] == (
        "mine takes 0.000863 µJ per image under 'memory' (8-bit weights, with memory traffic of an 8 KiB cache): 7.29"
        " times that of its quantised ANN (0.000118 µJ), 14.03 times that of its quantised ANN with zeros skipped"
        " (6.15e-05 µJ)."
    )
    idle = Cost(acs=1.0, macs=0.0, spikes=1.0, updates=4.0, dense=1000.0, active=900.0, timesteps=4)
    assert verdicts("idle", energies(idle)) == []


def test_costs_are_counted_as_by_hand():
    """Two neurons that see one and a half of a pixel, then three classes."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3))
    student, _ = to_spiking(network, Conversion(timesteps=4, neuron=IF, inherit=False))
    for layer in student.neurons.values():
        layer.backend = "reference"
    student.core.get_submodule("0").weight.data = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    student.core.get_submodule("3").weight.data.fill_(1.0)
    images = torch.tensor([1.0, 0.25, 0.0]).view(3, 1, 1, 1)
    with torch.no_grad(), firing_rates(student.eval()) as rates, operations(student) as counted:
        student(images[:2])
        student(images[2:])
    cost = cost_of(counted, 4, sum(rates.spikes.values()), float(sum(rates.possible_spikes.values())))
    # spikes: 4 and 2; 1 and 0 (half a threshold after four steps); 0 and 0
    assert cost.spikes == 7 / 3 and cost.updates == 8
    assert cost.acs == pytest.approx(7 * 3 / 3)
    assert cost.macs == pytest.approx(2 * 2 / 3)  # two bright pixels meet two weights, once for all steps
    assert cost.dense == 2 + 6
    assert cost.active == pytest.approx((2 * 2 + 3 * 3) / 3)  # of the six neurons three ever fired


def test_every_model_says_what_it_is():
    assert len({model.name for model in MODELS}) == len(MODELS) and all("," in model.what for model in MODELS)
