import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.errors import ConfigError, ShapeError
from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron, run, run_with_slope
from spikedistill.neuron.layer import SMALLEST, Spiking

LEARNING = replace(PLIF, learn_threshold=True)


def reference(neuron: Neuron = IF, threshold: float | torch.Tensor | None = None) -> Spiking:
    return Spiking(neuron, threshold, "reference")


class TestFoldedTime:
    def test_rows_are_time_by_batch(self):
        # two samples of one neuron over three steps; rows are t0a, t0b, t1a, t1b, t2a, t2b
        current = torch.tensor([0.5, 1.0, 0.5, 0.0, 0.25, 1.5])[:, None]
        spikes, state = reference()(current, 3, keep=True)
        assert spikes[:, 0].tolist() == [0, 1, 1, 0, 0, 1]
        assert state[:, 0].tolist() == [0.25, 0.5]

    @settings(max_examples=30)
    @given(timesteps=st.integers(1, 4), batch=st.integers(1, 3), inner=st.lists(st.integers(1, 3), max_size=3))
    def test_is_the_reference_on_time_unfolded(self, timesteps, batch, inner):
        current = torch.randn(timesteps, batch, *inner, dtype=torch.float64)
        expected, last = run(current, None, LIF, torch.tensor(0.5), torch.tensor(0.7), timesteps)
        spikes, state = reference(LIF, 0.7).double()(current.flatten(0, 1), timesteps, keep=True)
        torch.testing.assert_close(spikes, expected.flatten(0, 1), rtol=1e-6, atol=0)
        torch.testing.assert_close(state, last)

    def test_a_repeated_current_is_the_same_as_its_copies(self):
        current = torch.randn(2, 3, 4)
        once = reference()(current, 5, repeats=5, keep=True)
        torch.testing.assert_close(once, reference()(current.repeat(5, 1, 1), 5, keep=True), rtol=0, atol=0)

    @pytest.mark.parametrize("repeats", [1, 3])
    def test_measuring_is_the_reference_on_time_unfolded(self, repeats):
        current = torch.rand(6 // repeats, 3, 2, 2).contiguous(memory_format=torch.channels_last) * 2
        spikes, rate, slope = reference(LIF, 0.7).with_slope(current, 3, repeats)
        unfolded = current.unflatten(0, (-1, 2))
        expected = run_with_slope(unfolded, None, LIF, torch.tensor(0.5), torch.tensor(0.7), 3)
        torch.testing.assert_close((spikes.unflatten(0, (3, 2)), rate, slope), expected)

    def test_the_state_is_returned_only_when_asked_for(self):
        assert reference()(torch.randn(4, 3), 2)[1] is None

    def test_nothing_is_remembered_between_calls(self):
        layer, current = reference(LIF), torch.rand(6, 3)
        first = layer(current, 3)[0]
        layer(torch.rand(4, 7), 2)
        assert torch.equal(layer(current, 3)[0], first)

    def test_one_call_equals_two_with_the_state_carried(self):
        layer, current = reference(LIF), torch.rand(8, 3)
        whole, last = layer(current, 4, keep=True)
        first, state = layer(current[:4], 2, keep=True)
        second, end = layer(current[4:], 2, state=state, keep=True)
        assert torch.equal(torch.cat([first, second]), whole) and torch.equal(end, last)


class TestMemoryOrder:
    last = torch.channels_last

    def test_is_kept(self):
        current = torch.rand(4, 3, 2, 5).contiguous(memory_format=self.last)
        spikes, state = reference()(current, 2, keep=True)
        assert spikes.is_contiguous(memory_format=self.last) and state.is_contiguous(memory_format=self.last)
        spikes, state = reference()(current.contiguous(), 2, keep=True)
        assert spikes.is_contiguous() and state.is_contiguous()

    @pytest.mark.parametrize("of_current", [True, False])
    @pytest.mark.parametrize("of_state", [True, False])
    def test_does_not_change_the_answer(self, of_current, of_state):
        current, state = torch.rand(4, 3, 2, 5), torch.rand(2, 3, 2, 5)
        expected = reference()(current, 2, state=state, keep=True)
        current = current.contiguous(memory_format=self.last) if of_current else current
        state = state.contiguous(memory_format=self.last) if of_state else state
        torch.testing.assert_close(reference()(current, 2, state=state, keep=True), expected, rtol=0, atol=0)

    def test_of_a_transposed_current_does_not_matter(self):
        current = torch.rand(3, 4).T
        expected = reference()(current.contiguous(), 2)[0]
        assert torch.equal(reference()(current, 2)[0], expected)


class TestAThresholdAChannel:
    """A layer with thresholds [C] is C layers with one threshold each, in every result and gradient."""

    shapes = st.sampled_from([(6, 3), (6, 3, 5), (6, 3, 2, 4), (6, 1, 2, 2)])

    @settings(max_examples=40)
    @given(
        shape=shapes,
        last=st.booleans(),
        repeats=st.sampled_from([1, 3]),
        neuron=st.sampled_from([IF, LIF, replace(IF, learn_threshold=True), LEARNING]),
        backend=st.sampled_from(["reference", "fused"]),
    )
    def test_is_one_layer_a_channel(self, shape, last, repeats, neuron, backend):
        generator = torch.Generator().manual_seed(0)
        rows, channels = shape[0] // repeats, shape[1]
        current = torch.randn(rows, *shape[1:], generator=generator) * 2
        state = torch.rand(2, *shape[1:], generator=generator)
        if last and current.ndim == 4:
            current = current.contiguous(memory_format=torch.channels_last)
        weights = torch.randn(shape, generator=generator), torch.randn(state.shape, generator=generator)
        values = torch.rand(channels, generator=generator) + 0.5

        def results(layer, part):
            given, before = current[:, part].clone().requires_grad_(), state[:, part].clone().requires_grad_()
            given = given.contiguous(memory_format=torch.channels_last) if last and given.ndim == 4 else given
            given.retain_grad()
            spikes, after = layer(given, 3, repeats, before, keep=True)
            ((spikes * weights[0][:, part]).sum() + (after * weights[1][:, part]).sum()).backward()
            learned = layer.threshold.grad if neuron.learn_threshold else torch.zeros(())
            return [spikes.detach(), after.detach(), given.grad, before.grad], learned

        found, learned = results(Spiking(neuron, values, backend), slice(None))
        parts = [results(reference(neuron, float(values[c])), slice(c, c + 1)) for c in range(channels)]
        for number, value in enumerate(found):
            expected = torch.cat([results_[number] for results_, _ in parts], dim=1)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        if neuron.learn_threshold:
            torch.testing.assert_close(learned, torch.stack([one for _, one in parts]), rtol=1e-4, atol=1e-4)

    def test_has_the_slopes_of_one_layer_per_channel(self):
        current, values = torch.rand(6, 3, 2, 2) * 2, torch.tensor([0.3, 0.7, 1.5])
        found = reference(LIF, values).with_slope(current, 3)
        parts = [reference(LIF, float(value)).with_slope(current[:, c : c + 1], 3) for c, value in enumerate(values)]
        for one, expected in zip(found, zip(*parts)):
            torch.testing.assert_close(one, torch.cat(expected, dim=1))

    @settings(max_examples=40)
    @given(
        shape=shapes,
        last=st.booleans(),
        channels=st.booleans(),
        repeats=st.sampled_from([1, 3]),
        backend=st.sampled_from(["reference", "fused"]),
    )
    def test_a_learned_initial_potential_is_the_first_state(self, shape, last, channels, repeats, backend):
        generator = torch.Generator().manual_seed(0)
        current = torch.randn(shape[0] // repeats, *shape[1:], generator=generator) * 2
        if last and current.ndim == 4:
            current = current.contiguous(memory_format=torch.channels_last)
        threshold = torch.rand(shape[1] if channels else (), generator=generator) + 0.5
        layer = Spiking(replace(IF, learn_initial=True), threshold, backend)
        torch.nn.init.uniform_(layer.initial, generator=generator)
        weights = torch.randn(shape, generator=generator)
        spread = layer.initial.detach().view(-1, *[1] * (len(shape) - 2)).expand(2, *shape[1:])
        state = spread.clone().requires_grad_()

        spikes, _ = layer(current, 3, repeats)
        (spikes * weights).sum().backward()
        expected, _ = reference(IF, threshold)(current, 3, repeats, state)
        (expected * weights).sum().backward()
        assert torch.equal(spikes, expected)
        summed = state.grad.transpose(0, 1).flatten(1).sum(1) if channels else state.grad.sum()
        torch.testing.assert_close(layer.initial.grad, summed, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.with_slope(current, 3, repeats)[0], spikes)

    def test_a_learned_initial_potential_has_the_shape_of_the_thresholds(self):
        layer = reference(replace(IF, initial=0.5, learn_initial=True), 0.7)
        assert layer.initial.shape == ()
        layer.set_threshold(torch.ones(3))
        assert layer.initial.tolist() == [0.5] * 3
        torch.nn.init.constant_(layer.initial, 0.2)
        layer.set_threshold(torch.full((3,), 2.0))
        assert torch.equal(layer.initial, torch.full((3,), 0.2))

    def test_its_heights_go_with_a_current(self):
        layer = reference(IF, torch.tensor([0.3, 0.7]))
        for shape in ((4, 2), (4, 2, 3), (4, 2, 3, 3)):
            spikes, _ = layer(torch.full(shape, 9.0), 2)
            assert torch.equal(spikes, layer.heights(spikes).expand(shape))

    def test_repeats_are_one_or_all(self):
        with pytest.raises(ShapeError, match="4 time steps with 2 repeats"):
            reference(IF)(torch.rand(4, 3), 4, repeats=2)

    @pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2), (4,)])
    def test_refuses_another_number_of_channels(self, shape):
        with pytest.raises(
            ShapeError, match=r"to a layer with 2 thresholds, one per channel: expected \[rows, 2, \.\.\.\]"
        ):
            reference(IF, torch.ones(2))(torch.rand(shape), 2)

    @pytest.mark.parametrize("values", [torch.ones(2, 2), torch.ones(0)])
    def test_refuses_thresholds_of_another_shape(self, values):
        with pytest.raises(ConfigError, match=r"give one number, or \[C\] per channel"):
            Spiking(IF, values)

    def test_is_printed_as_their_mean(self):
        assert "threshold=0.5 (mean of 2 channels)" in repr(Spiking(IF, torch.tensor([0.25, 0.75])))


class TestLearning:
    def test_parameters_are_those_that_the_neuron_learns(self):
        names = {
            neuron: {name for name, _ in Spiking(neuron).named_parameters()} for neuron in (IF, LIF, PLIF, LEARNING)
        }
        assert names == {IF: set(), LIF: set(), PLIF: {"leak_logit"}, LEARNING: {"leak_logit", "threshold"}}

    @pytest.mark.parametrize("leak", [0.1, 0.5, 0.9])
    def test_the_leak_begins_where_the_neuron_says(self, leak):
        assert float(Spiking(replace(PLIF, leak=leak)).leak.detach()) == pytest.approx(leak)
        assert float(Spiking(IF).leak) == 1.0

    def test_the_gradient_of_the_threshold_is_divided_by_the_root_of_the_layer_size(self):
        current = torch.rand(6, 4, 4) * 2
        layer = reference(replace(IF, learn_threshold=True), 0.7)
        layer(current, 3)[0].sum().backward()
        threshold = torch.tensor(0.7, requires_grad=True)
        run(current.view(3, 2, 4, 4), None, IF, torch.tensor(1.0), threshold, 3)[0].sum().backward()
        assert threshold.grad != 0
        torch.testing.assert_close(layer.threshold.grad, threshold.grad / math.sqrt(4 * 4))

    def test_the_leak_learns_as_its_logit(self):
        current = torch.rand(6, 4) * 3
        layer = reference(PLIF, 0.7)
        layer(current, 3)[0].sum().backward()
        leak = torch.tensor(0.5, requires_grad=True)
        run(current.view(3, 2, 4), None, PLIF, leak, torch.tensor(0.7), 3)[0].sum().backward()
        assert leak.grad != 0
        torch.testing.assert_close(layer.leak_logit.grad, leak.grad * 0.25)

    def test_a_threshold_driven_below_the_smallest_stays_there(self):
        layer = reference(replace(IF, learn_threshold=True))
        with torch.no_grad():
            layer.threshold.fill_(-1.0)
        spikes, _ = layer(torch.ones(2, 3), 2)
        torch.testing.assert_close(spikes, torch.full((2, 3), SMALLEST))

    def test_a_raised_threshold_spikes_as_before_and_learns_again(self):
        current = torch.rand(6, 3, 2, 2)
        layer = reference(replace(IF, learn_threshold=True), torch.tensor([0.5, 1.0, 2.0]))
        with torch.no_grad():
            layer.threshold[1] = -0.1
        before, _ = layer(current, 2)
        (grad,) = torch.autograd.grad(before.sum(), layer.threshold)
        assert grad[1] == 0
        layer.raise_threshold()
        torch.testing.assert_close(layer.threshold.detach(), torch.tensor([0.5, SMALLEST, 2.0]), rtol=0, atol=0)
        after, _ = layer(current, 2)
        (grad,) = torch.autograd.grad(after.sum(), layer.threshold)
        assert torch.equal(before, after) and grad[1] != 0

    def test_a_fixed_threshold_is_not_raised(self):
        layer = reference(IF, SMALLEST / 10)
        layer.raise_threshold()
        assert float(layer.threshold) == pytest.approx(SMALLEST / 10)


class TestAsAModule:
    def test_the_threshold_given_wins_over_the_neuron(self):
        assert float(Spiking(Neuron(threshold=0.3)).threshold) == pytest.approx(0.3)
        assert float(Spiking(Neuron(threshold=0.3), 2.0).threshold) == 2.0

    @pytest.mark.parametrize("neuron", [IF, LEARNING], ids=["fixed", "learned"])
    def test_a_new_threshold_lies_where_the_old_one_did(self, neuron):
        layer = Spiking(neuron).to("meta", torch.float64)
        layer.set_threshold(0.5)
        assert layer.threshold.device.type == "meta" and layer.threshold.dtype == torch.float64

    def test_a_backend_that_is_none_is_refused(self):
        layer = Spiking(IF)
        layer.backend = "fuse"
        with pytest.raises(ConfigError, match=r"There is no backend 'fuse'\. Did you mean 'fused'"):
            layer(torch.rand(2, 3), 1)

    @pytest.mark.parametrize("neuron", [IF, LIF, LEARNING], ids=["if", "lif", "plif"])
    def test_its_state_dict_carries_everything_that_was_learned(self, neuron):
        source, target = reference(neuron, 0.6), reference(replace(neuron, threshold=3.0))
        with torch.no_grad():
            for value in source.state_dict().values():
                value.mul_(1.1).add_(0.1)
        target.load_state_dict(source.state_dict())
        current = torch.rand(6, 5) * 2
        assert torch.equal(source(current, 3)[0], target(current, 3)[0])
        assert float(target.threshold.detach()) == pytest.approx(0.76)

    def test_a_copy_after_training_is_independent(self):
        layer = reference(LEARNING)
        layer(torch.rand(6, 5, requires_grad=True), 3, keep=True)[0].sum().backward()
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            layer.threshold.add_(1.0)
        assert float(twin.threshold.detach()) == 1.0
        assert twin.neuron == layer.neuron and twin.backend == layer.backend

    def test_double_precision_is_not_rounded_to_single(self):
        current = torch.full((1, 1), 1 - 1e-12, dtype=torch.float64)
        spikes, state = Spiking(IF).double()(current, 1, keep=True)
        assert float(spikes) == 0 and float(state) == 1 - 1e-12

    def test_printing_shows_threshold_leak_and_reset(self):
        assert repr(Spiking(LIF, 0.25)) == "Spiking(threshold=0.25, leak=0.5, reset=subtract)"

    def test_printing_what_is_learned_does_not_warn(self):
        torch.set_warn_always(True)
        try:
            assert repr(Spiking(LEARNING)) == "Spiking(threshold=1, leak=0.5, reset=zero)"
        finally:
            torch.set_warn_always(False)


class TestRefusals:
    @pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
    def test_a_threshold_that_cannot_be_reached_or_passed(self, threshold):
        with pytest.raises(ConfigError, match=r"threshold \(=.*must be above 0 and finite"):
            Spiking(IF, threshold)

    def test_rows_that_are_no_multiple_of_time(self):
        with pytest.raises(ShapeError, match="5 rows cannot be 2 time steps with 1 repeats: expected T x B rows"):
            reference()(torch.rand(5, 3), 2)

    def test_repeats_that_do_not_divide_time(self):
        with pytest.raises(ShapeError, match="4 rows cannot be 3 time steps with 2 repeats"):
            reference()(torch.rand(4, 3), 3, repeats=2)

    @pytest.mark.parametrize("shape", [(3, 3), (2, 4), (2, 3, 1)])
    def test_a_state_of_another_shape(self, shape):
        with pytest.raises(ShapeError, match=r"state has shape .*needs \(2, 3\): pass a state only between calls"):
            reference()(torch.rand(4, 3), 2, state=torch.zeros(shape))
