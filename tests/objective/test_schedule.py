import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikedistill.errors import ConfigError
from spikedistill.objective.schedule import Constant, Ramp, Schedule, Switch

weights = st.floats(0, 1000, width=32)
moments = st.floats(0, 1, width=32)


def at(schedule, progress):
    return float(schedule(torch.tensor(progress)))


def rounded(value):
    return float(torch.tensor(value))


class TestClosedForms:
    @given(value=weights, progress=moments)
    def test_a_constant_is_its_value(self, value, progress):
        assert at(Constant(value), progress) == value

    @given(start=weights, end=weights, power=st.floats(0.1, 10), progress=moments)
    def test_a_ramp_is_a_power_of_progress(self, start, end, power, progress):
        expected = start + (end - start) * progress**power
        assert at(Ramp(start, end, power), progress) == pytest.approx(expected, rel=1e-5, abs=1e-4)

    @given(before=weights, after=weights, point=moments, width=st.floats(0.01, 1), progress=moments)
    def test_a_switch_is_half_a_cosine_about_its_point(self, before, after, point, width, progress):
        gone = min(1.0, max(0.0, (progress - point) / width + 0.5))
        expected = before + (after - before) * (1 - math.cos(math.pi * gone)) / 2
        assert at(Switch(point, before, after, width), progress) == pytest.approx(expected, rel=1e-4, abs=0.05)

    @pytest.mark.parametrize("progress, weight", [(0.0, 2.0), (0.49, 2.0), (0.5, 5.0), (1.0, 5.0)])
    def test_a_switch_without_width_is_a_step(self, progress, weight):
        assert at(Switch(0.5, before=2.0, after=5.0, width=0.0), progress) == weight


class TestEndpoints:
    @given(start=st.floats(0, 1000), end=st.floats(0, 1000), power=st.floats(0.1, 10))
    def test_of_a_ramp_are_exact(self, start, end, power):
        ramp = Ramp(start, end, power)
        assert (at(ramp, 0.0), at(ramp, 1.0)) == (rounded(start), rounded(end))

    @given(before=st.floats(0, 1000), after=st.floats(0, 1000), width=st.floats(0, 0.5), point=st.floats(0.26, 0.74))
    def test_of_a_switch_are_exact_where_its_change_lies_inside(self, before, after, width, point):
        switch = Switch(point, before, after, width)
        assert (at(switch, 0.0), at(switch, 1.0)) == (rounded(before), rounded(after))

    @given(width=st.floats(0.01, 1), point=st.floats(0, 1))
    def test_at_its_point_a_switch_is_half_way(self, width, point):
        assert at(Switch(point, 1.0, 3.0, width), point) == pytest.approx(2.0, abs=1e-4)


@given(
    schedule=st.one_of(
        st.builds(Ramp, weights, weights, st.floats(0.1, 10)), st.builds(Switch, moments, weights, weights, moments)
    ),
    first=moments,
    second=moments,
)
def test_weights_go_one_way_alone_and_stay_between_their_ends(schedule, first, second):
    low, high = (schedule.start, schedule.end) if isinstance(schedule, Ramp) else (schedule.before, schedule.after)
    earlier, later = at(schedule, min(first, second)), at(schedule, max(first, second))
    slack = 1e-5 * max(low, high)
    assert (later - earlier) * (high - low) >= -slack * abs(high - low)
    assert min(low, high) - slack <= earlier <= max(low, high) + slack


@pytest.mark.parametrize("schedule", [Constant(2.0), Ramp(), Switch(), Switch(width=0.0)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_scalars_of_the_number_format_of_progress(schedule, dtype):
    weight = schedule(torch.tensor(0.25, dtype=dtype))
    assert (weight.shape, weight.dtype) == ((), dtype)


def test_a_schedule_says_what_it_is_at_every_moment_itself():
    with pytest.raises(NotImplementedError):
        Schedule()(torch.tensor(0.0))


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan"), float("inf")])
def test_a_power_that_is_no_ramp_is_refused(power):
    with pytest.raises(ConfigError, match=rf"power \(={power}\) of a ramp must be above 0 and finite"):
        Ramp(power=power)


@pytest.mark.parametrize("wrong", [{"at": -0.1}, {"at": 1.1}, {"width": -0.1}, {"width": 1.5}, {"at": float("nan")}])
def test_a_switch_outside_of_training_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"{name} \(={value}\).*fractions of training: give 0 to 1"):
        Switch(**wrong)
