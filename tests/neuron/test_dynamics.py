import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import IF, LIF, NEURONS, PLIF, Neuron, Reset, run, run_with_slope, step
from spikedistill.neuron.surrogate import ATan, Rectangle, Sigmoid

DYADIC = st.integers(-2048, 4096).map(lambda k: k / 1024)
"""Currents that floating point adds and halves without rounding, so that laws hold to the last bit."""
TRAINS = st.lists(DYADIC, min_size=1, max_size=8)
ANY = st.lists(st.floats(-3, 4), min_size=1, max_size=20)
LENGTHS = st.integers(1, 32)
law = settings(max_examples=50)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def emit(neuron: Neuron, currents: list[float], timesteps: int | None = None, state: float | None = None):
    """Spikes (as numbers) and last potential of one neuron of threshold 1."""
    current = double(*currents)[:, None]
    start = None if state is None else double(state)
    leak, one = double(neuron.leak)[0], double(1.0)[0]
    spikes, potential = run(current, start, neuron, leak, one, timesteps or len(currents))
    return spikes[:, 0].tolist(), float(potential)


def rates(currents: list[float], timesteps: int, neuron: Neuron = IF) -> torch.Tensor:
    """The rate of one neuron for each constant current."""
    spikes, _ = run(double(*currents)[None], None, neuron, *double(neuron.leak, 1.0), timesteps)
    return spikes.mean(0)


def by_hand(neuron: Neuron, currents: list[float], v: float) -> tuple[list[float], float]:
    """The three equations for one neuron in plain Python."""
    spikes = []
    for x in currents:
        v = neuron.leak * v + (1 - neuron.leak if neuron.decay_input else 1.0) * x
        fired = min(max(math.floor(v), 0), neuron.levels)
        spikes.append(float(fired))
        if fired:
            v = v - fired if neuron.reset is Reset.SUBTRACT else 0.0
    return spikes, v


class TestIntegrateAndFire:
    @law
    @given(currents=ANY, timesteps=LENGTHS)
    def test_rate_from_rest_truncates_the_clipped_current(self, currents, timesteps):
        error = rates(currents, timesteps) - double(*currents).clamp(0, 1)
        assert error.abs().max() <= 1 / timesteps + 1e-12

    @law
    @given(currents=ANY, timesteps=LENGTHS)
    def test_rate_from_half_a_threshold_rounds_it(self, currents, timesteps):
        error = rates(currents, timesteps, Neuron(initial=0.5)) - double(*currents).clamp(0, 1)
        assert error.abs().max() <= 0.5 / timesteps + 1e-12

    @law
    @given(currents=TRAINS, timesteps=LENGTHS, initial=st.sampled_from([0.0, 0.25, 0.5, 0.75]))
    def test_spike_count_is_a_staircase(self, currents, timesteps, initial):
        counts = [min(max(math.floor(timesteps * x + initial), 0), timesteps) for x in currents]
        found = rates(currents, timesteps, Neuron(initial=initial)) * timesteps
        assert found.round(decimals=9).tolist() == counts

    @law
    @given(currents=TRAINS, timesteps=LENGTHS, neuron=st.sampled_from([IF, LIF, Neuron(initial=0.5)]))
    def test_rate_does_not_fall_with_the_current(self, currents, timesteps, neuron):
        answers = rates(sorted(currents), timesteps, neuron)
        assert (answers.diff() >= 0).all()

    @law
    @given(currents=TRAINS, initial=st.sampled_from([0.0, 0.5]))
    def test_charge_is_conserved(self, currents, initial):
        spikes, potential = emit(Neuron(initial=initial), currents)
        assert potential == initial + sum(currents) - sum(spikes)

    @law
    @given(currents=TRAINS)
    def test_is_lif_without_leak(self, currents):
        assert emit(dataclasses.replace(LIF, leak=1.0), currents) == emit(IF, currents)
        columns = double(*currents)[:, None]
        leaky, kept = (run(columns, None, neuron, *double(1.0, 1.0), len(currents)) for neuron in (LIF, IF))
        torch.testing.assert_close(leaky, kept, rtol=0, atol=0)


class TestGraded:
    """A neuron that fires up to D spikes within a step."""

    @law
    @given(currents=TRAINS, timesteps=LENGTHS, levels=st.integers(1, 5))
    def test_its_count_over_time_is_a_staircase_of_td_stairs(self, currents, timesteps, levels):
        neuron = Neuron(initial=0.5, levels=levels)
        counts = [min(max(math.floor(timesteps * x + 0.5), 0), timesteps * levels) for x in currents]
        assert (rates(currents, timesteps, neuron) * timesteps).round(decimals=9).tolist() == counts

    @law
    @given(currents=TRAINS, leak=st.sampled_from([0.25, 0.5, 1.0]), levels=st.integers(1, 5))
    def test_follows_the_three_equations(self, currents, leak, levels):
        neuron = Neuron(leak=leak, levels=levels)
        assert emit(neuron, currents, state=0.5) == by_hand(neuron, currents, 0.5)

    @law
    @given(currents=TRAINS, levels=st.integers(1, 5))
    def test_is_as_many_binary_steps_of_which_the_first_has_the_current(self, currents, levels):
        v, found = 0.5, []
        for x in currents:  # IF that is shown the current once and nothing in the other sub-steps
            spikes, v = emit(IF, [x] + [0.0] * (levels - 1), state=v)
            assert spikes == sorted(spikes, reverse=True)  # left-aligned
            found.append(sum(spikes))
        assert (found, v) == emit(Neuron(levels=levels), currents, state=0.5)

    @law
    @given(currents=TRAINS, levels=st.integers(2, 5))
    def test_of_one_step_has_the_gradient_of_a_clipped_ramp(self, currents, levels):
        current = double(*currents)[None].requires_grad_()
        neuron = Neuron(initial=0.5, levels=levels)
        spikes, _ = run(current, None, neuron, *double(1.0, 0.5), 1)
        spikes.sum().backward()
        inside = [0 <= x / 0.5 <= levels for x in currents]
        assert (current.grad[0] != 0).tolist() == inside and set(current.grad[0].tolist()) <= {0.0, 1.0}

    @pytest.mark.parametrize("levels", [0, -1, True])
    def test_levels_that_are_no_number_of_spikes_are_refused(self, levels):
        with pytest.raises(ConfigError, match=r"levels \(=.*give a whole number, 1 or more"):
            Neuron(levels=levels)

    def test_needs_the_subtractive_reset(self):
        with pytest.raises(ConfigError, match=r"levels \(=2\) above 1 need the subtractive reset"):
            Neuron(levels=2, reset=Reset.ZERO)


class TestTraces:
    def test_integrate_and_fire(self):
        # v: 0.75 | 1.5 fires, 0.5 | 1.25 fires, 0.25 | 0.25
        assert emit(IF, [0.75, 0.75, 0.75, 0.0]) == ([0, 1, 1, 0], 0.25)

    def test_a_potential_of_exactly_one_fires(self):
        assert emit(IF, [0.5, 0.5, 0.0]) == ([0, 1, 0], 0.0)

    def test_leaky_integrate_and_fire(self):
        # v: 0.75 | 0.375 + 0.75 = 1.125 fires, 0.125 | 0.0625 + 1 = 1.0625 fires, 0.0625 | 0.03125
        assert emit(LIF, [0.75, 0.75, 1.0, 0.0]) == ([0, 1, 1, 0], 0.03125)

    def test_reset_to_zero_drops_the_rest(self):
        # v: 0.75 | 1.5 fires, 0 | 0.75 | 2.75 fires once, 0 | 0
        assert emit(Neuron(reset=Reset.ZERO), [0.75, 0.75, 0.75, 2.0, 0.0]) == ([0, 1, 0, 1, 0], 0.0)

    def test_subtractive_reset_pays_a_large_current_out_over_later_steps(self):
        assert emit(IF, [2.5, 0.0, 0.0, 0.0]) == ([1, 1, 0, 0], 0.5)

    def test_decaying_input(self):
        # leak 0.75, so a quarter of the current: 0.5 | 0.375 + 0.5 = 0.875 | 0.65625 + 0.5 = 1.15625 fires | 0.1171875
        assert emit(Neuron(leak=0.75, decay_input=True), [2.0, 2.0, 2.0, 0.0]) == ([0, 0, 1, 0], 0.1171875)

    def test_a_given_state_replaces_the_initial_potential(self):
        assert emit(Neuron(initial=0.5), [0.25], state=0.75) == ([1], 0.0)
        assert emit(Neuron(initial=0.5), [0.25]) == ([0], 0.75)


@law
@given(
    currents=TRAINS,
    leak=st.sampled_from([0.25, 0.5, 0.75]),
    decay=st.booleans(),
    reset=st.sampled_from(Reset),
    v=st.sampled_from([-0.5, 0.0, 0.5]),
)
def test_every_model_follows_the_three_equations(currents, leak, decay, reset, v):
    neuron = Neuron(leak=leak, decay_input=decay, reset=reset)
    assert emit(neuron, currents, state=v) == by_hand(neuron, currents, v)


@law
@given(currents=TRAINS, tau=st.sampled_from([2.0, 4.0]))
def test_lif_of_spikingjelly_is_a_leak_with_decaying_input_and_reset_to_zero(currents, tau):
    v, expected = 0.0, []
    for x in currents:
        v += (x - v) / tau
        expected.append(1.0 if v >= 1 else 0.0)
        v = 0.0 if v >= 1 else v
    neuron = Neuron(leak=1 - 1 / tau, decay_input=True, reset=Reset.ZERO)
    assert emit(neuron, currents) == (expected, v)


@law
@given(x=st.floats(0, 0.4), leak=st.floats(0.1, 0.55), timesteps=st.integers(1, 12), decay=st.booleans())
def test_a_current_too_weak_to_fire_charges_geometrically(x, leak, timesteps, decay):
    spikes, potential = emit(Neuron(leak=leak, decay_input=decay), [x], timesteps)
    assert sum(spikes) == 0
    gain = 1.0 if decay else 1 / (1 - leak)
    assert potential == pytest.approx(x * gain * (1 - leak**timesteps), abs=1e-12)


@law
@given(currents=TRAINS, cut=st.integers(1, 8), neuron=st.sampled_from([IF, LIF, PLIF, Neuron(initial=0.5)]))
def test_one_call_equals_two_calls_with_the_state_carried(currents, cut, neuron):
    cut = min(cut, len(currents))
    first, state = emit(neuron, currents[:cut])
    second = ([], state) if cut == len(currents) else emit(neuron, currents[cut:], state=state)
    assert (first + second[0], second[1]) == emit(neuron, currents)


@pytest.mark.parametrize("neuron", [IF, LIF, PLIF, Neuron(initial=0.5, reset=Reset.ZERO)], ids=repr)
def test_a_constant_current_is_the_same_as_its_repetition(neuron):
    current, leak, threshold = torch.randn(1, 50), torch.tensor(neuron.leak), torch.tensor(0.7)
    once = run(current, None, neuron, leak, threshold, 5)
    torch.testing.assert_close(once, run(current.repeat(5, 1), None, neuron, leak, threshold, 5), rtol=0, atol=0)


class TestThreshold:
    def test_is_the_height_of_every_spike(self):
        spikes, _ = run(torch.randn(4, 50) * 3, None, IF, torch.tensor(1.0), torch.tensor(2.5), 4)
        assert spikes.unique().tolist() == [0.0, 2.5]

    @law
    @given(power=st.integers(-4, 4), currents=TRAINS, neuron=st.sampled_from([IF, LIF, PLIF]))
    def test_scales_with_the_current(self, power, currents, neuron):
        scale, leak = 2.0**power, double(neuron.leak)[0]
        column = double(*currents)[:, None].requires_grad_()
        bigger = (column.detach() * scale).requires_grad_()
        spikes, state = run(column, None, neuron, leak, double(0.5)[0], len(currents))
        scaled, same = run(bigger, None, neuron, leak, double(0.5 * scale)[0], len(currents))
        assert torch.equal(scaled, spikes * scale) and torch.equal(same, state)
        spikes.sum().backward()
        scaled.sum().backward()
        assert torch.equal(bigger.grad, column.grad)

    def test_the_mean_of_the_spikes_stands_where_the_activation_stood(self):
        current = torch.rand(1, 100, dtype=torch.float64) * 3
        spikes, _ = run(current, None, Neuron(initial=0.5), *double(1.0, 3.0), 60)
        assert (spikes.mean(0) - current[0]).abs().max() <= 3 * 0.5 / 60 + 1e-12


def test_half_precision_is_integrated_in_single():
    current = torch.full((1, 1), 1 / 256, dtype=torch.bfloat16)
    spikes, state = run(current, None, IF, torch.tensor(1.0), torch.tensor(1.0), 300)
    assert spikes.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert float(spikes.sum()) == 1 and float(state) == 300 / 256 - 1


MODELS = [
    Neuron(leak=leak, decay_input=decay and leak < 1, reset=reset, detach_reset=detach, surrogate=surrogate)
    for (leak, decay), reset, detach, surrogate in itertools.product(
        [(1.0, False), (0.6, False), (0.6, True)], Reset, [False, True], [Sigmoid(3.0), ATan()]
    )
]


def sensitivities(neuron: Neuron, current: np.ndarray, v: float, threshold: float) -> tuple[np.ndarray, float]:
    """The derivatives of the sum of t^2-weighted spikes, and of the last potential, carried forward in time by hand.

    Columns: each current, the first potential, the leak, the threshold.
    """
    steps = len(current)
    dv, answer = np.zeros(steps + 3), np.zeros(steps + 3)
    dv[steps] = 1.0
    for t, x in enumerate(current):
        dx = np.zeros(steps + 3)
        dx[t], dx[-1] = 1 / threshold, -x / threshold**2
        gain = 1 - neuron.leak if neuron.decay_input else 1.0
        u = neuron.leak * v + gain * x / threshold
        du = neuron.leak * dv + gain * dx
        du[-2] += v - (x / threshold if neuron.decay_input else 0.0)
        s = float(u >= 1)
        ds = float(neuron.surrogate.gradient(double(u - 1))) * du
        out = threshold * ds
        out[-1] += s
        answer += (t + 1) ** 2 * out
        seen = np.zeros_like(ds) if neuron.detach_reset else ds
        v, dv = (u - s, du - seen) if neuron.reset is Reset.SUBTRACT else (u * (1 - s), du * (1 - s) - u * seen)
    return answer, dv


@pytest.mark.parametrize("neuron", MODELS, ids=repr)
def test_gradients_equal_the_derivatives_carried_forward_by_hand(neuron):
    values, start = np.array([1.1, 0.5, 1.4, -0.2, 0.9]), 0.3
    current = double(*values)[:, None].requires_grad_()
    state, leak, threshold = double(start).requires_grad_(), *double(neuron.leak, 0.8)
    leak.requires_grad_(), threshold.requires_grad_()
    spikes, last = run(current, state, neuron, leak, threshold, 5)
    assert 0 < (spikes > 0).sum() < 5
    weights = double(1, 4, 9, 16, 25)[:, None]
    for result, expected in zip(((spikes * weights).sum(), last.sum()), sensitivities(neuron, values, start, 0.8)):
        gradients = torch.autograd.grad(result, (current, state, leak, threshold), retain_graph=True)
        found = torch.cat([gradient.flatten() for gradient in gradients])
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_gradient_of_three_steps_equals_backpropagation_unrolled_by_hand():
    x, g, leak = np.array([0.8, 0.9, 0.1]), np.array([1.0, -2.0, 3.0]), 0.5
    # u: 0.8 | 0.4 + 0.9 = 1.3 fires, 0.3 | 0.15 + 0.1 = 0.25; the triangle of width 1 at u - 1 is 1 - |u - 1|
    d1, d2, d3 = 1 - 0.2, 1 - 0.3, 1 - 0.75
    p3 = g[2] * d3
    p2 = g[1] * d2 + leak * p3 * (1 - d2)
    p1 = g[0] * d1 + leak * p2 * (1 - d1)
    current = double(*x)[:, None].requires_grad_()
    spikes, _ = run(current, None, LIF, *double(leak, 1.0), 3)
    assert spikes[:, 0].tolist() == [0, 1, 0]
    (spikes[:, 0] * torch.from_numpy(g)).sum().backward()
    np.testing.assert_allclose(current.grad[:, 0].numpy(), [p1, p2, p3], rtol=1e-12)


@pytest.mark.parametrize("reset", Reset)
def test_detaching_the_reset_changes_gradients_and_nothing_else(reset):
    answers = []
    for detach in (False, True):
        neuron = Neuron(leak=0.5, reset=reset, detach_reset=detach)
        current = torch.linspace(-1, 3, 40).view(4, 10).requires_grad_()
        spikes, state = run(current, None, neuron, torch.tensor(0.5), torch.tensor(1.0), 4)
        answers.append((spikes, state, torch.autograd.grad(spikes.sum(), current)[0]))
    assert torch.equal(answers[0][0], answers[1][0]) and torch.equal(answers[0][1], answers[1][1])
    assert not torch.allclose(answers[0][2], answers[1][2])


@pytest.mark.parametrize("neuron", MODELS, ids=repr)
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "varying"])
def test_measuring_gives_the_spikes_their_mean_and_the_derivative_by_a_shift_of_the_current(neuron, constant):
    current = torch.linspace(-1, 3, 8 if constant else 40, dtype=torch.float64).view(1 if constant else 5, 8)
    leak, threshold, shift = *double(neuron.leak, 0.8), torch.zeros(8, dtype=torch.float64, requires_grad=True)
    expected, _ = run(current + shift, None, neuron, leak, threshold, 5)
    spikes, rate, slope = run_with_slope(current, None, neuron, leak, threshold, 5)
    assert torch.equal(spikes, expected) and not slope.requires_grad
    torch.testing.assert_close(rate, expected.mean(0))
    torch.testing.assert_close(slope, torch.autograd.grad(expected.mean(0).sum(), shift)[0])


@law
@given(current=DYADIC, potential=DYADIC, reset=st.sampled_from(Reset))
def test_step_is_one_step_of_run(current, potential, reset):
    neuron = Neuron(leak=0.5, reset=reset)
    spikes, state = step(double(current), double(potential), neuron, double(0.5)[0])
    assert ([float(spikes)], float(state)) == emit(neuron, [current], state=potential)


@pytest.mark.parametrize("timesteps", [1, 2, 4, 8, 16])
def test_the_slope_is_that_of_a_rate_that_rises_from_nothing_to_all_unless_the_reset_is_left_out(timesteps):
    # a neuron that starts at half fires at a rate of round(T x) / T for a current x, so its slope is 1 on average
    current, one = torch.linspace(0, 1, 4001).expand(timesteps, -1), torch.tensor(1.0)
    through = Neuron(initial=0.5, surrogate=Rectangle())
    left_out = dataclasses.replace(through, detach_reset=True)
    (mean, other) = (
        float(run_with_slope(current, None, n, one, one, timesteps)[2].mean()) for n in (through, left_out)
    )
    assert mean == pytest.approx(1.0, abs=0.05)
    assert 1 + 0.3 * (timesteps - 1) - 0.05 < other < (timesteps + 1) / 2 + 0.05


class TestRefusals:
    @pytest.mark.parametrize("leak", [0.0, -0.1, 1.1, math.nan])
    def test_a_leak_outside_its_range(self, leak):
        with pytest.raises(ConfigError, match=r"leak \(=.*0 < leak <= 1"):
            Neuron(leak=leak)

    @pytest.mark.parametrize("options", [{"learn_leak": True}, {"decay_input": True}])
    def test_a_leak_of_one_that_is_learned_or_decays_the_input(self, options):
        with pytest.raises(ConfigError, match="need a leak below 1"):
            Neuron(leak=1.0, **options)

    @pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
    def test_a_threshold_that_is_not_above_zero(self, threshold):
        with pytest.raises(ConfigError, match=r"threshold \(=.*above 0"):
            Neuron(threshold=threshold)

    @pytest.mark.parametrize("initial", [-0.1, 1.0, math.nan])
    def test_an_initial_potential_outside_its_range(self, initial):
        with pytest.raises(ConfigError, match=r"initial \(=.*0 <= initial < 1"):
            Neuron(initial=initial)


def test_the_named_neurons_are_what_their_papers_say():
    assert NEURONS == {"if": IF, "lif": LIF, "plif": PLIF}
    assert Neuron(leak=1.0, reset=Reset.SUBTRACT, initial=0.0) == IF
    assert Neuron(leak=0.5) == LIF
    assert Neuron(leak=0.5, learn_leak=True, decay_input=True, reset=Reset.ZERO) == PLIF
