import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import Neuron, fire
from spikedistill.neuron.surrogate import SURROGATES, ATan, Rectangle, Sigmoid, Triangle

ALL = [Sigmoid(), ATan(), Triangle(), Rectangle(), Sigmoid(2.0), ATan(3.0), Triangle(0.5), Rectangle(2.0)]


@pytest.mark.parametrize("surrogate", ALL, ids=repr)
class TestLaws:
    @given(u=st.floats(-20, 20))
    def test_is_non_negative_and_greatest_at_threshold(self, surrogate, u):
        there, peak = (surrogate.gradient(torch.tensor(value, dtype=torch.float64)) for value in (u, 0.0))
        assert 0 <= there <= peak

    @given(u=st.floats(0, 20))
    def test_is_symmetric(self, surrogate, u):
        left, right = (surrogate.gradient(torch.tensor(value, dtype=torch.float64)) for value in (-u, u))
        torch.testing.assert_close(left, right)

    def test_has_area_one(self, surrogate):
        u = torch.linspace(-2000, 2000, 8_000_001, dtype=torch.float64)
        area = torch.trapezoid(surrogate.gradient(u), u)
        assert area == pytest.approx(1.0, abs=1e-3)

    @given(u=st.floats(-3, 3), grad=st.floats(-5, 5))
    def test_spike_is_a_step_forward_and_the_formula_backward(self, surrogate, u, grad):
        potential = torch.tensor(u, dtype=torch.float64, requires_grad=True)
        spike = fire(potential, Neuron(surrogate=surrogate))
        assert spike == float(u >= 1)
        (spike * grad).backward()
        torch.testing.assert_close(potential.grad, grad * surrogate.gradient(potential.detach() - 1.0))


@given(u=st.floats(-3, 8), grad=st.floats(-5, 5), levels=st.integers(2, 6))
def test_graded_spikes_count_whole_thresholds_and_pass_gradients_straight_through(u, grad, levels):
    potential = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    spikes = fire(potential, Neuron(levels=levels))
    assert spikes == min(max(math.floor(u), 0), levels)
    (spikes * grad).backward()
    assert potential.grad == (grad if 0.5 <= u <= levels + 0.5 else 0.0)


def test_the_integral_of_the_sigmoid_is_the_logistic_function():
    u = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    torch.sigmoid(4.0 * u).sum().backward()
    torch.testing.assert_close(u.grad, Sigmoid(4.0).gradient(u.detach()))


def test_every_name_makes_a_surrogate():
    assert {type(surrogate) for surrogate in ALL} == set(SURROGATES.values())


@pytest.mark.parametrize("kind", SURROGATES.values())
def test_a_scale_of_zero_is_refused(kind):
    with pytest.raises(ConfigError, match="must be above 0"):
        kind(0.0)


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES.keys())
def test_a_potential_that_is_no_number_has_no_slope(surrogate):
    assert surrogate().gradient(torch.tensor(torch.nan)).isnan()
