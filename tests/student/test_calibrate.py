import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from spikedistill.errors import ConfigError, ConversionError
from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron, Reset, run
from spikedistill.student.build import to_spiking
from spikedistill.student.calibrate import (
    CANDIDATES,
    GRID,
    REACH,
    choose_threshold,
    record,
    response,
    staircase,
    thresholds,
)
from spikedistill.student.coding import DirectCoding, FrameCoding
from spikedistill.student.conversion import Conversion

law = settings(max_examples=30)
GRIDDED = [REACH * number / (GRID - 1) for number in range(GRID)]


def squared_errors(activations: list[float], threshold: float, timesteps: int, initial: float) -> tuple[float, float]:
    """What a layer of IF neurons gets wrong, from the closed form of its staircase: at best, and at worst.

    The two differ where a current lies so near to a stair that the grid may take it for its neighbour.
    """
    blur = 0.51 * REACH / (GRID - 1)
    best = worst = 0.0
    for x in activations:
        counts = [math.floor(timesteps * (x / threshold + shift) + initial) for shift in (-blur, blur)]
        both = [(x - threshold * min(max(count, 0), timesteps) / timesteps) ** 2 for count in counts]
        best, worst = best + min(both), worst + max(both)
    return best / len(activations), worst / len(activations)


class TestStaircase:
    @pytest.mark.parametrize("initial", [0.0, 0.5, 0.75])
    @pytest.mark.parametrize("timesteps", [1, 3, 4])
    def test_of_integrate_and_fire_counts_whole_thresholds(self, timesteps, initial):
        counts = [min(max(math.floor(timesteps * x + initial), 0), timesteps) for x in GRIDDED]
        assert (staircase(Neuron(initial=initial), timesteps) * timesteps).round().tolist() == counts

    @pytest.mark.parametrize("timesteps", [1, 4, 16])
    def test_of_a_memoryless_reset_fires_every_nth_step(self, timesteps):
        # reset to zero without leak: the threshold is reached after ceil(1 / x) steps, again and again
        periods = [math.ceil(1 / x) if x else timesteps + 1 for x in GRIDDED]
        # within one grid point of a whole 1 / x, rounding decides
        clear = torch.tensor([x == 0 or abs(round(1 / x) * x - 1) > 1e-4 for x in GRIDDED])
        found = staircase(Neuron(reset=Reset.ZERO), timesteps) * timesteps
        expected = torch.tensor([float(timesteps // period) for period in periods])
        assert clear.float().mean() > 0.9
        torch.testing.assert_close(found[clear], expected[clear])

    @pytest.mark.parametrize("leak", [0.8, 0.99, 0.999])
    @pytest.mark.parametrize("timesteps", [1, 3])
    @pytest.mark.parametrize("reset", Reset)
    def test_of_decayed_input_ends_where_the_neuron_fires_at_every_step(self, leak, timesteps, reset):
        # from rest a current x charges x (1 - l^t) in t steps: the first spike comes at x = 1 / (1 - l^T)
        stairs = staircase(Neuron(leak=leak, decay_input=True, reset=reset), timesteps)
        space = REACH / (GRID - 1)
        first = int(stairs.nonzero()[0]) * space
        assert first == pytest.approx(1 / (1 - leak**timesteps), abs=2 * space, rel=1e-3)
        everything = math.ceil(1.0005 / (1 - leak) / space)
        assert float(stairs[everything]) == float(stairs[-1]) == 1.0 and float(stairs[everything // 2]) < 1.0

    def test_of_a_neuron_that_fires_at_every_step_within_reach_has_the_usual_grid(self):
        for neuron in (IF, LIF, Neuron(initial=0.5), PLIF, Neuron(leak=0.75, decay_input=True)):
            assert len(staircase(neuron, 4)) == GRID and float(staircase(neuron, 4)[-1]) == 1.0

    def test_of_a_neuron_that_hardly_takes_any_current_is_refused(self):
        with pytest.raises(ConversionError, match=r"leak 0\.99999 and decayed input .* Give a smaller leak"):
            staircase(Neuron(leak=0.99999, decay_input=True), 4)

    def test_of_a_leak_starts_where_the_current_outweighs_it(self):
        # LIF with leak 1/2 settles at 2 x, so that nothing below 1/2 ever fires
        stairs = staircase(LIF, 30)
        fires = torch.tensor(GRIDDED)[stairs > 0]
        assert float(fires.min()) == pytest.approx(0.5, abs=2 * REACH / GRID)


class TestResponse:
    def test_is_the_staircase_at_the_activation_in_thresholds(self):
        stairs = staircase(Neuron(initial=0.5), 4)
        activations = torch.tensor([-5.0, 0.0, 0.3, 0.9, 1.6, 2.0, 100.0])
        assert response(activations, 2.0, stairs).tolist() == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]

    def test_beyond_the_reach_of_the_grid_is_its_end(self):
        stairs = staircase(IF, 4)
        assert float(response(torch.tensor([REACH * 50]), 1.0, stairs)) == 1.0


class TestChooseThreshold:
    stairs = staircase(Neuron(initial=0.5), 4)

    def test_max_takes_the_largest(self):
        assert choose_threshold(torch.tensor([0.5, 3.25, 1.0, -7.0]), self.stairs, "max") == 3.25

    @law
    @given(values=st.lists(st.floats(-1, 10, width=32), min_size=1, max_size=40), percentile=st.floats(0, 100))
    def test_percentile_takes_a_share_of_the_positive(self, values, percentile):
        positive = sorted(value for value in values if value > 0)
        position = percentile / 100 * (len(positive) - 1)
        low, share = int(position), position - int(position)
        expected = 1.0
        if positive:
            expected = positive[low] + share * (positive[min(low + 1, len(positive) - 1)] - positive[low])
        found = choose_threshold(torch.tensor(values), self.stairs, "percentile", percentile)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)

    @law
    @given(values=st.lists(st.floats(0.01, 10), min_size=1, max_size=30), initial=st.sampled_from([0.0, 0.5]))
    def test_least_squares_is_as_good_as_the_best_of_a_brute_force_search(self, values, initial):
        chosen = choose_threshold(torch.tensor(values), staircase(Neuron(initial=initial), 4), "least-squares")
        top = max(values)
        errors = [squared_errors(values, top * k / CANDIDATES, 4, initial) for k in range(1, CANDIDATES + 1)]
        assert squared_errors(values, chosen, 4, initial)[0] <= min(worst for _, worst in errors) + 1e-6 * top**2

    def test_least_squares_finds_the_threshold_that_made_the_activations(self):
        # activations of a quantised network: multiples of a quarter of 2.0, with one outlier of 4.0 in 10000
        activations = torch.cat([torch.tensor([0.5, 1.0, 1.5, 2.0]).repeat(2500), torch.tensor([4.0])])
        assert choose_threshold(activations, self.stairs, "least-squares") == pytest.approx(2.0)

    def test_least_squares_scales_with_the_activations(self):
        activations = torch.rand(500).square()
        one, four = (choose_threshold(scale * activations, self.stairs, "least-squares") for scale in (1.0, 4.0))
        assert four == pytest.approx(4 * one)

    @pytest.mark.parametrize("rule", ["least-squares", "max", "percentile"])
    def test_a_layer_that_is_always_silent_gets_one(self, rule):
        assert choose_threshold(torch.zeros(10), self.stairs, rule) == 1.0

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_activations_that_are_not_finite_are_refused(self, value):
        with pytest.raises(ConversionError, match=r"NaN or infinity: check the weights and the calibration images"):
            choose_threshold(torch.tensor([0.5, value]), self.stairs, "max")


NEURONS = st.builds(
    lambda leak, decay, reset, initial: Neuron(leak=leak, decay_input=decay, reset=reset, initial=initial),
    *(st.floats(0.01, 0.99), st.booleans(), st.sampled_from(Reset), st.sampled_from([0.0, 0.5])),
)
GRADED = st.builds(
    lambda leak, levels, initial: Neuron(leak=leak, levels=levels, initial=initial),
    *(st.sampled_from([1.0, 0.9, 0.5]), st.sampled_from([2, 4, 8]), st.sampled_from([0.0, 0.5])),
)


def true_errors(neuron: Neuron, activations: torch.Tensor, tried: torch.Tensor, timesteps: int) -> torch.Tensor:
    """The mean squared difference of activations and what the neuron itself answers to them, by threshold."""
    one = torch.ones(())
    currents = (activations / tried[:, None]).view(1, -1)
    spikes, _ = run(currents, None, neuron, one * neuron.leak, one, timesteps)
    return (activations - tried[:, None] * spikes.mean(0).view(len(tried), -1)).square().mean(1)


class TestAnyNeuron:
    @law
    @given(
        neuron=NEURONS | GRADED,
        timesteps=st.integers(1, 8),
        skew=st.sampled_from([1.0, 2.0]),
        seed=st.integers(0, 99),
    )
    def test_least_squares_is_no_worse_than_a_fine_search_over_the_neuron_itself(self, neuron, timesteps, skew, seed):
        activations = torch.rand(300, generator=torch.Generator().manual_seed(seed)).pow(skew) + 1e-3
        stairs = staircase(neuron, timesteps)
        chosen = choose_threshold(activations, stairs, "least-squares", levels=neuron.levels)
        fine = torch.arange(1, 1001) / 1000 * activations.max()
        best = true_errors(neuron, activations, fine, timesteps).min()
        # a hundred thresholds are tried, not a thousand
        assert true_errors(neuron, activations, torch.tensor([chosen]), timesteps) <= 1.15 * best

    @law
    @given(neuron=GRADED, timesteps=st.integers(1, 4), rule=st.sampled_from(["least-squares", "max", "percentile"]))
    def test_the_expected_rate_of_graded_neurons_is_theirs(self, neuron, timesteps, rule):
        activations = torch.rand(500, generator=torch.Generator().manual_seed(1)) * 2
        chosen, rate = thresholds({"a": activations}, neuron, timesteps, rule, 99.0)["a"]
        one = torch.ones(())
        spikes, _ = run((activations / chosen)[None], None, neuron, one * neuron.leak, one, timesteps)
        assert rate == pytest.approx(float(spikes.mean()), rel=0.03)

    @pytest.mark.parametrize("levels", [1, 3, 8])
    def test_the_largest_activation_of_a_rule_is_worth_all_spikes_of_a_step(self, levels):
        neuron, activations = Neuron(initial=0.5, levels=levels), torch.rand(500) * 2
        stairs = staircase(neuron, 1)
        for rule, largest in (("max", activations.max()), ("percentile", activations.quantile(0.99))):
            found = choose_threshold(activations, stairs, rule, 99.0, levels)
            assert found == pytest.approx(float(largest) / levels, rel=1e-4)

    @pytest.mark.parametrize("leak", [0.8, 0.985])
    @pytest.mark.parametrize("timesteps", [1, 2, 8])
    @pytest.mark.parametrize("reset", Reset)
    def test_of_one_activation_the_optimum_answers_with_the_share_that_a_neuron_takes(self, leak, timesteps, reset):
        # from rest k of T steps are answered with k / T x threshold <= (1 - l) a, which every step reaches at (1 - l) a
        neuron, activations = Neuron(leak=leak, decay_input=True, reset=reset), torch.full((50,), 3.0)
        threshold, rate = thresholds({"a": activations}, neuron, timesteps, "least-squares", 99.9)["a"]
        candidate = 3.0 * (1 - leak**timesteps) / CANDIDATES
        assert 3 * (1 - leak) - candidate <= float(threshold) * rate <= 3 * (1 - leak)
        assert timesteps > 1 or rate == 1.0

    @law
    @given(neuron=NEURONS, timesteps=st.integers(1, 8), rule=st.sampled_from(["least-squares", "max", "percentile"]))
    def test_no_rule_leaves_a_layer_silent_that_has_activations(self, neuron, timesteps, rule):
        activations = torch.rand(300, generator=torch.Generator().manual_seed(0)) + 0.1
        chosen, rate = thresholds({"a": activations}, neuron, timesteps, rule, 99.0)["a"]
        one = torch.ones(())
        spikes, _ = run((activations / chosen)[None], None, neuron, one * neuron.leak, one, timesteps)
        assert rate > 0 and spikes.any()

    @pytest.mark.parametrize("leak", [0.5, 0.9])
    def test_max_is_where_the_largest_activation_fires_at_every_step(self, leak):
        neuron = Neuron(leak=leak, decay_input=True)
        (chosen, _) = thresholds({"a": torch.tensor([1.0, 4.0])}, neuron, 4, "max", 99.9)["a"]
        assert float(chosen) == pytest.approx(4 * (1 - leak), rel=2e-3)
        assert float(response(torch.tensor([4.0]), chosen, staircase(neuron, 4))) == 1.0


class TestSilentLayers:
    def network(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        for layer in (net[1], net[3], net[5]):
            nn.init.constant_(layer.weight, 0.2)
            nn.init.zeros_(layer.bias)
        return net

    def test_of_a_leak_that_lets_too_little_pass_are_said(self):
        # the second layer is made for activations that the first one answers with a tenth of itself at most
        neuron, images = Neuron(leak=0.9, decay_input=True), torch.rand(20, 1, 2, 2) + 0.1
        _, report = to_spiking(self.network(), Conversion(timesteps=1, neuron=neuron), calibration_images=images)
        assert [site.silent for site in report.sites] == [False, True]
        assert all(site.expected_rate > 0 for site in report.sites)
        first_line = str(report).splitlines()[0]
        assert "never firing on the calibration images: 4." in first_line and "decay_input=False" in first_line

    def test_are_none_where_every_layer_fires_and_the_student_stays_as_it_was(self):
        images = torch.rand(20, 1, 2, 2) + 0.1
        student, report = to_spiking(self.network(), Conversion(timesteps=4), calibration_images=images)
        assert not any(site.silent for site in report.sites) and "never firing" not in str(report)
        assert student.training and {layer.backend for layer in student.neurons.values()} == {"auto"}
        assert not any(layer._forward_hooks for layer in student.neurons.values())


class TestThresholds:
    def test_expected_rates_follow_from_the_closed_form(self):
        found = thresholds({"a": torch.tensor([0.0, 0.3, 0.9, 2.0])}, Neuron(initial=0.5), 4, "max", 99.9)
        # in thresholds of 2: 0, 0.15, 0.45, 1; times 4 and rounded: 0, 1, 2, 4 of 4 spikes
        assert found == {"a": (torch.tensor(2.0), pytest.approx(7 / 16))}

    def test_a_layer_of_channels_gets_one_per_channel(self):
        # 25 values up to 2 a channel; the second ten times the first; the third hardly active: it takes the layer's;
        # the fourth tiny: it takes a tenth of the layer's
        ramp = torch.linspace(0.08, 2.0, 25)
        channels = torch.stack([ramp, 10 * ramp, torch.zeros(25), 1e-3 * ramp])
        channels[2, 0] = 5.0
        (chosen, rate), (layer, _) = (
            thresholds({"a": values}, Neuron(initial=0.5), 4, "max", 99.9)["a"]
            for values in (channels, channels.flatten())
        )
        assert float(layer) == pytest.approx(20.0)
        assert chosen.tolist() == pytest.approx([2.0, 20.0, 20.0, 2.0])
        one = (4 * ramp / 2 + 0.5).floor() / 4
        assert rate == pytest.approx(float((2 * one.sum() + 0.25) / 100))

    def test_a_silent_layer_is_expected_to_stay_silent(self):
        assert thresholds({"a": torch.zeros(5)}, IF, 4, "least-squares", 99.9) == {"a": (torch.tensor(1.0), 0.0)}


class TestRecord:
    def network(self) -> fx.GraphModule:
        return fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))

    def test_sees_every_image_once_in_evaluation_mode(self):
        module, images = self.network(), torch.randn(7, 1, 2, 2)
        module.train()
        expected = images.flatten(1).relu().flatten() / math.sqrt(1 + 1e-5)
        found = record(module, {"_2"}, images, batch_size=3)
        torch.testing.assert_close(found, {"_2": expected})
        assert module.training and int(module.get_submodule("1").num_batches_tracked) == 0

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_one_activation_that_is_no_number_is_refused_wherever_it_stands(self, per_channel, monkeypatch):
        monkeypatch.setattr("spikedistill.student.calibrate.RESERVOIR", 10)
        monkeypatch.setattr("spikedistill.student.calibrate.CHANNEL_RESERVOIR", 2)
        images = torch.randn(40, 1, 2, 2)
        images[17, 0, 1, 0] = torch.nan
        with pytest.raises(ConversionError, match="NaN or infinity: check the weights and the calibration images"):
            record(self.network(), {"_2"}, images, per_channel)

    def test_thins_what_is_too_much(self, monkeypatch):
        monkeypatch.setattr("spikedistill.student.calibrate.RESERVOIR", 10)
        module, images = self.network(), torch.randn(40, 1, 2, 2)
        whole = set((images.flatten(1).relu().flatten() / math.sqrt(1 + 1e-5)).tolist())
        found = record(module, {"_2"}, images)["_2"]
        assert len(found) == 10
        assert all(min(abs(value - other) for other in whole) < 1e-6 for value in found.tolist())

    def test_the_last_images_weigh_no_more_than_others(self):
        module, images = self.network(), torch.zeros(101, 1, 2, 2)
        images[-1] = 1.0
        found = record(module, {"_2"}, images, per_channel=True, batch_size=100)["_2"]
        assert float((found > 0).float().mean()) < 0.03

    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize("size", [7, 14, 15])
    def test_comes_by_every_place_of_an_image(self, size, per_channel, monkeypatch):
        monkeypatch.setattr("spikedistill.student.calibrate.RESERVOIR", 300)
        monkeypatch.setattr("spikedistill.student.calibrate.CHANNEL_RESERVOIR", 300)
        module = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Flatten()))
        image = torch.arange(size * size).view(1, 1, size, size) + 1.0
        count = 300 * size // (size * size) + 1
        found = record(module, {"_0"}, image.repeat(count, 1, 1, 1), per_channel, batch_size=count)["_0"]
        assert len(found.unique()) > 0.5 * min(size * size, found.numel())
        assert len(((found.flatten() - 1) % size).unique()) == size


class TestBiases:
    """After the correction every channel's mean over time and images is the ANN's."""

    def lacking(self, ann, images, **options):
        """The largest difference of a channel's mean from the ANN's, over the layers of neurons."""
        student, _ = to_spiking(
            ann, Conversion(timesteps=3, neuron=IF, rule="max", **options), calibration_images=images
        )
        seen = []
        for layer in student.neurons.values():
            layer.backend = "reference"
            layer.register_forward_hook(lambda _, __, result: seen.append(result[0].transpose(0, 1).flatten(1).mean(1)))
        wanted = []
        handles = [
            layer.register_forward_hook(lambda _, __, result: wanted.append(result.transpose(0, 1).flatten(1).mean(1)))
            for layer in ann.modules()
            if isinstance(layer, nn.ReLU)
        ]
        with torch.no_grad():
            student.eval()(images)
            ann.eval()(images)
        for handle in handles:
            handle.remove()
        return [float((one - other).abs().max()) for one, other in zip(seen, wanted)], student

    def network(self, norm=True):
        norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(5)] if norm else [nn.Identity(), nn.Identity()]
        first, second = nn.Conv2d(1, 6, 3, bias=not norm), nn.Conv2d(6, 5, 3, bias=not norm)
        layers = first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3)
        return nn.Sequential(*layers)

    @pytest.mark.parametrize("norm", [True, False])
    def test_make_up_for_what_rounding_down_loses(self, norm):
        # no whole number of batches, of those that measure the ANN and of those that measure the student
        ann, images = self.network(norm), torch.rand(310, 1, 8, 8)
        plain, _ = self.lacking(ann, images)
        corrected, _ = self.lacking(ann, images, correct="biases")
        assert max(corrected) < 0.35 * max(plain)

    def test_do_not_depend_on_the_order_of_images(self):
        # they are cut into batches of unequal size, and those in the last are the brightest, or the darkest
        ann, images = self.network(), torch.rand(310, 1, 8, 8) * torch.linspace(0, 1, 310).view(-1, 1, 1, 1)
        options = {"correct": "biases", "per_channel": False}
        (_, one), (_, other) = (self.lacking(ann, given, **options) for given in (images, images.flip(0)))
        for name, bias in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], bias, rtol=1e-4, atol=1e-5, msg=name)

    def test_change_nothing_but_biases(self):
        ann, images = self.network(), torch.rand(64, 1, 8, 8)
        _, plain = self.lacking(ann, images)
        _, corrected = self.lacking(ann, images, correct="biases")
        before = plain.state_dict()
        changed = {name for name, value in corrected.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"core.1.bias", "core.4.bias"}

    def test_reach_the_last_norm_before_a_sum(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.conv = nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
                self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4 * 36, 3)

            def forward(self, x):
                x = torch.relu(self.stem(x))
                return self.head(torch.relu(self.norm(self.conv(x)) + x).flatten(1))

        images = torch.rand(32, 1, 8, 8)
        ann, options = Block(), {"neuron": IF, "rule": "max"}
        plain = to_spiking(ann, Conversion(**options), calibration_images=images)[0].state_dict()
        corrected = to_spiking(ann, Conversion(**options, correct="biases"), calibration_images=images)[0].state_dict()
        assert {name for name in plain if not torch.equal(plain[name], corrected[name])} == {"core.norm.bias"}

    def test_see_single_frames_as_images(self):
        ann, images = self.network(), torch.rand(32, 1, 8, 8)
        found = [
            to_spiking(ann, Conversion(3, coding=coding, correct="biases"), calibration_images=images)[0].state_dict()
            for coding in (DirectCoding(), FrameCoding())
        ]
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    def test_of_fresh_weights_are_refused(self):
        with pytest.raises(ConfigError, match=r"correct .* needs inherited weights"):
            to_spiking(self.network(), Conversion(inherit=False, correct="biases"))
