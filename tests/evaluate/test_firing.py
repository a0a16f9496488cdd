import pytest
import torch
from students import PIXELS, two_neurons
from torch import nn

from spikedistill.evaluate.firing import FiringRates, firing_rates


@pytest.fixture
def student():
    return two_neurons(nn.Flatten(), nn.Linear(2, 3))


def hooks(student):
    return sum(len(layer._forward_hooks) for layer in student.neurons.values())


def test_spikes_are_counted_as_by_hand(student):
    with firing_rates(student) as rates:
        student(PIXELS)
    # currents 1 and 0.5, 0.5 and 0.25, 0 and 0: in four steps 4 + 2, 2 + 1, 0 + 0 spikes of 3 x 2 neurons
    (name,) = student.neurons
    assert rates.spikes == {name: 9.0}
    assert rates.possible_spikes == {name: 24}
    assert rates.by_layer() == {name: 9 / 24}
    assert rates.mean() == 9 / 24


def test_a_second_layer_is_counted_on_its_own():
    student = two_neurons(nn.Conv2d(2, 1, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(1, 3))
    student.core.get_submodule("2").weight.data = torch.tensor([0.5, 0.0]).view(1, 2, 1, 1)
    with firing_rates(student) as rates:
        student(PIXELS)
    # half of the first neuron's 4, 2 and 0 spikes: 2, 1 and 0 of 3 x 1 neurons in four steps
    assert list(rates.by_layer()) == list(student.neurons)
    assert list(rates.by_layer().values()) == [9 / 24, 3 / 12]
    assert rates.mean() == 12 / 36


def test_the_height_of_a_spike_does_not_count(student):
    for layer in student.neurons.values():
        layer.threshold.fill_(0.25)
    with firing_rates(student) as rates:
        student(PIXELS)
    assert list(rates.by_layer().values()) == [16 / 24]


def test_calls_add_up(student):
    with firing_rates(student) as rates:
        student(PIXELS[:1])
        student(PIXELS[1:])
    assert list(rates.by_layer().values()) == [9 / 24]


def test_steps_of_a_stream_are_counted_too(student):
    with firing_rates(student) as rates:
        state = None
        for _ in range(4):
            _, state = student.step(PIXELS, state)
    assert list(rates.by_layer().values()) == [9 / 24]


def test_nobody_listens_once_the_context_is_closed(student):
    with firing_rates(student) as rates:
        assert hooks(student) == 1
    assert hooks(student) == 0
    student(PIXELS)
    assert rates.by_layer() == {}
    assert rates.mean() == 0


def test_nobody_listens_after_an_error_inside_the_context(student):
    with pytest.raises(ValueError, match="inside"), firing_rates(student):
        raise ValueError("inside")
    assert hooks(student) == 0


def test_counting_changes_no_answer(student):
    expected = student(PIXELS)
    with firing_rates(student):
        torch.testing.assert_close(student(PIXELS), expected, rtol=0, atol=0)


def test_a_mean_weighs_layers_by_their_neurons():
    rates = FiringRates()
    rates.add("large", torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    rates.add("small", torch.tensor([3.0, -3.0]))
    assert rates.by_layer() == {"large": 1 / 6, "small": 1.0}
    assert rates.mean() == 3 / 8
