import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from spikedistill.errors import ConfigError, ConversionError, ShapeError
from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.calibrate import SMALLEST_SHARE
from spikedistill.student.coding import DirectCoding, FrameCoding, LatencyCoding, RateCoding
from spikedistill.student.conversion import INHERITED_NEURON, SCRATCH_NEURON, Conversion
from spikedistill.student.report import ConversionReport
from spikedistill.student.student import Student
from spikedistill.teacher.load import Teacher


class Net(nn.Module):
    """Two convolutions with a skip over the first neuron, so that a part without time meets a part with it."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn, self.act1 = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.act2 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv1(x))
        x = self.act2(self.conv2(self.act1(x)) + x)
        return self.fc(x.flatten(1))


def images(batch: int = 3, channels: int = 1) -> Tensor:
    return torch.rand(batch, channels, 4, 4, dtype=torch.float64)


def net(channels: int = 1) -> Net:
    """In double precision, where no rounding tips a spike, and with statistics that are not 0 and 1."""
    network = Net(channels).double()
    network(images(20, channels))
    return network.eval()


def convert(network: nn.Module, timesteps: int = 4, **options) -> tuple[Student, ConversionReport]:
    """A student in evaluation mode whose neurons run step by step, so that nothing is compiled."""
    if options.get("inherit", True):
        options.setdefault("calibration_images", images(8))
    given = {name: options.pop(name) for name in ("calibration_images", "mean", "std") if name in options}
    student, report = to_spiking(network, Conversion(timesteps=timesteps, **options), **given)
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student.eval(), report


def trained(**options) -> Student:
    """A student after a step of training, as users copy and wrap it; in single precision."""
    student, _ = convert(Net(), calibration_images=torch.rand(8, 1, 4, 4), **options)
    optimizer = torch.optim.SGD(student.train().parameters(), 0.01)
    student(torch.rand(4, 1, 4, 4)).mean(0).square().sum().backward()
    optimizer.step()
    return student


class TestTheTeacher:
    @pytest.mark.parametrize("options", [{}, {"inherit": False}], ids=["inherited", "fresh"])
    @pytest.mark.parametrize("training", [True, False])
    def test_stays_as_it_is(self, training, options):
        network = net().train(training)
        network.bn.eval()
        network.conv1.requires_grad_(False)
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        modes = [module.training for module in network.modules()]
        student, _ = convert(network, **options)
        student.train()(images()).sum().backward()
        assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
        assert [module.training for module in network.modules()] == modes
        frozen = [name for name, value in network.named_parameters() if not value.requires_grad]
        assert frozen == ["conv1.weight", "conv1.bias"]
        assert all(value.grad is None for value in network.parameters())

    def test_lends_its_normalisation(self):
        network, mean, std = net(3), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
        many = images(8, 3)
        student, report = convert(Teacher(network, mean, std), calibration_images=many)
        same, _ = convert(network, calibration_images=many, mean=mean, std=std)
        by_hand = (many - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        plain, other = convert(network, calibration_images=by_hand)
        assert torch.equal(student(many), same(many)) and torch.equal(student(many), plain(by_hand))
        assert not torch.equal(student(many), plain(many))
        assert [site.threshold for site in report.sites] == [site.threshold for site in other.sites]

    def test_that_is_frozen_has_a_student_that_learns(self):
        student, _ = convert(Teacher(net(), (0.5,), (0.5,)))
        assert all(parameter.requires_grad for parameter in student.parameters())


class TestTheConversionLimit:
    """A two-layer network with thresholds at the largest activations: the mean answer tends to the ANN's.

    In T steps of a constant current, a neuron of the first layer has at every moment spiked within 1/2 of what its
    activation asks for. A neuron of the second has so received, at every moment, within D = 1/2 sum |w| th1 / th2 of
    its activation's charge, and spikes within 1/2 + D of what it asks for (reset by subtraction loses nothing). So the
    logits are within sum |w| th2 (1/2 + D) / T.
    """

    def network(self) -> nn.Sequential:
        layers = (nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
        return nn.Sequential(nn.Flatten(), *layers).double()

    def test_is_reached_within_the_bound_and_ever_nearer(self):
        network, many = self.network(), images(16)
        means = []
        for timesteps in (8, 32, 128):
            student, report = convert(network, timesteps, rule="max", calibration_images=many)
            first, second = (site.threshold for site in report.sites)
            disturbance = 0.5 * network[3].weight.abs().sum(1) * first / second
            bound = network[5].weight.abs() @ (second * (0.5 + disturbance)) / timesteps
            error = (student(many).mean(0) - network(many)).abs().detach()
            assert (error <= bound + 1e-6).all()
            means.append(float(error.mean()))
        assert means[0] > 2 * means[1] > 4 * means[2]

    def test_expected_rate_is_the_rate_of_a_shallow_network(self):
        network, many = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 3)).double(), images(16)
        student, report = convert(network, 100, calibration_images=many)
        (site,) = report.sites
        features = student.observe(many, ["2"]).features
        rate = float((features["2"] > 0).double().mean())
        # expected from a grid of currents, 1/500 of the threshold apart
        assert rate == pytest.approx(site.expected_rate, abs=2e-3) and rate > 0.1


class TestTime:
    def rows(self, student: Student, given: Tensor) -> dict[str, int]:
        """How many rows each layer of weights computed in one call."""
        seen: dict[str, int] = {}
        layers = [
            (name, part) for name, part in student.core.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)
        ]
        hooks = [
            part.register_forward_hook(
                lambda _m, args, _o, name=name: seen.update({name: seen.get(name, 0) + len(args[0])})
            )
            for name, part in layers
        ]
        student(given)
        for hook in hooks:
            hook.remove()
        return seen

    def test_the_part_before_the_first_neuron_runs_once(self):
        student, _ = convert(net(), timesteps=5)
        assert self.rows(student, images(3)) == {"conv1": 3, "conv2": 15, "fc": 15}

    def test_frames_are_computed_each(self):
        student, _ = convert(net(), timesteps=5, coding=FrameCoding())
        frames = torch.rand(5, 3, 1, 4, 4, dtype=torch.float64)
        assert self.rows(student, frames) == {"conv1": 15, "conv2": 15, "fc": 15}

    def test_a_repeated_image_is_the_same_as_frames_of_it(self):
        network, many, given = net(), images(8), images()
        direct, _ = convert(network, calibration_images=many)
        frames, _ = convert(network, calibration_images=many, coding=FrameCoding())
        torch.testing.assert_close(direct(given), frames(given.expand(4, *given.shape)))

    @pytest.mark.parametrize("neuron", [INHERITED_NEURON, LIF, PLIF], ids=["rounding", "lif", "plif"])
    @pytest.mark.parametrize("coding", [DirectCoding(), FrameCoding(), RateCoding(seed=1), LatencyCoding()], ids=repr)
    def test_a_whole_call_equals_a_stream_of_steps(self, coding, neuron):
        student, _ = convert(net(), coding=coding, neuron=neuron)
        given = torch.rand(4, 3, 1, 4, 4, dtype=torch.float64) if isinstance(coding, FrameCoding) else images()
        state, stream = None, []
        for t in range(4):
            logits, state = student.step(student.coding.frame(given, t, 4), state)
            stream.append(logits)
        torch.testing.assert_close(torch.stack(stream), student(given))
        assert len(state) == len(student.neurons) and state[0].shape == (3, 4, 4, 4)

    def test_no_state_is_kept(self):
        student, _ = convert(net())
        given = images()
        first = student(given)
        student(images())
        student.step(given)
        assert torch.equal(student(given), first)

    def test_the_batch_may_change_and_its_samples_do_not_meet(self):
        student, _ = convert(net())
        given = images(5)
        whole = student(given)
        torch.testing.assert_close(torch.cat([student(given[:2]), student(given[2:])], 1), whole)

    def test_fewer_steps_are_the_beginning_of_more(self):
        student, _ = convert(net(), timesteps=6)
        given = images()
        whole = student(given)
        student.set_timesteps(2)
        assert student(given).shape == (2, 3, 3)
        torch.testing.assert_close(student(given), whole[:2])

    def test_below_one_step_is_refused(self):
        student, _ = convert(net())
        with pytest.raises(ConfigError, match=r"timesteps \(=0\) must be 1 or more"):
            student.set_timesteps(0)
        with pytest.raises(ConfigError, match=r"timesteps \(=0\) must be 1 or more"):
            to_spiking(net(), Conversion(timesteps=0, inherit=False))
        assert student.timesteps == 4


class TestObserve:
    paths = ("conv1", "bn", "act1", "conv2", "act2", "fc")

    def test_features_stand_where_the_modules_stood(self):
        student, _ = convert(net(), timesteps=5)
        assert student.paths() == list(self.paths)
        answer = student.observe(images(3), self.paths)
        logits, features = answer.logits, answer.features
        assert {path: tuple(feature.shape) for path, feature in features.items()} == {
            **dict.fromkeys(("conv1", "bn", "act1", "conv2", "act2"), (5, 3, 4, 4, 4)),
            "fc": (5, 3, 3),
        }
        assert torch.equal(features["fc"], logits)
        for path, layer in zip(("act1", "act2"), student.neurons.values()):
            spikes = features[path] / layer.threshold[:, None, None]
            assert set(spikes.round(decimals=5).unique().tolist()) == {0.0, 1.0}

    def test_a_feature_without_time_is_the_same_at_every_step_and_that_of_the_ann(self):
        network, given = net(), images()
        student, _ = convert(network)
        features = student.observe(given, ["bn"]).features
        torch.testing.assert_close(features["bn"], network.bn(network.conv1(given)).expand(4, 3, 4, 4, 4))

    def test_the_mean_of_a_spiking_feature_rounds_the_activation(self):
        network, given = net(), images()
        student, _ = convert(network, timesteps=10)
        features = student.observe(given, ["act1"]).features
        threshold = next(iter(student.neurons.values())).threshold[:, None, None]
        activation = network.bn(network.conv1(given)).clamp_min(0).minimum(threshold)
        assert ((features["act1"].mean(0) - activation).abs() <= threshold * 0.5 / 10 + 1e-6).all()

    def test_frames_have_features_of_their_own_at_every_step(self):
        student, _ = convert(net(), coding=FrameCoding())
        features = student.observe(torch.rand(4, 3, 1, 4, 4, dtype=torch.float64), ["bn", "act1"]).features
        assert features["bn"].shape == features["act1"].shape == (4, 3, 4, 4, 4)
        assert not torch.equal(features["bn"][0], features["bn"][1])

    def test_one_step_has_one_step_of_features(self):
        student, _ = convert(net(), timesteps=1)
        features = student.observe(images(), ["bn", "act1"]).features
        assert features["bn"].shape == features["act1"].shape == (1, 3, 4, 4, 4)

    def test_changes_no_answer_and_may_change_its_mind(self):
        student, _ = convert(net())
        given = images()
        before = student(given)
        for paths in (["act2"], [], ["bn", "act1"]):
            answer = student.observe(given, paths)
            logits, features = answer.logits, answer.features
            assert torch.equal(logits, before) and list(features) == paths
        assert torch.equal(student(given), before)
        stepped, _ = student.step(given)
        torch.testing.assert_close(stepped, before[0])

    def test_gradients_reach_the_weights_through_a_feature(self):
        student, _ = convert(net())
        student.observe(images(), ["act1"]).features["act1"].sum().backward()
        assert student.core.get_submodule("conv1").weight.grad.abs().sum() > 0

    def test_an_unknown_path_is_refused_with_the_nearest(self):
        student, _ = convert(net())
        with pytest.raises(ConfigError, match=r"no module with a feature 'act3'\. Did you mean 'act[12]'"):
            student.observe(images(), ["act3"])


class TestFreshWeights:
    def test_differ_and_thresholds_are_the_neuron_s(self):
        network = net()
        student, report = convert(network, inherit=False, neuron=replace(IF, threshold=0.75))
        assert not torch.equal(student.core.get_submodule("conv1").weight, network.conv1.weight)
        assert not torch.equal(student.core.get_submodule("fc").weight, network.fc.weight)
        bn = student.core.get_submodule("bn")
        assert bn.running_mean.abs().sum() == 0 and (bn.running_var == 1).all()
        assert [(site.threshold, site.expected_rate) for site in report.sites] == [(0.75, None)] * 2
        assert [float(layer.threshold) for layer in student.neurons.values()] == [0.75] * 2
        assert str(report).startswith("2 layers of neurons, fresh weights, T=4") and "rate" not in str(report)

    def test_are_those_of_the_ann_where_inherited(self):
        network = net()
        student, report = convert(network)
        core = student.core.state_dict()
        assert all(torch.equal(value, core[name]) for name, value in network.state_dict().items())
        assert report.inherited and str(report).startswith("2 layers of neurons, inherited weights, T=4")

    @pytest.mark.parametrize("inherit", [True, False])
    def test_and_inherited_ones_get_the_neuron_that_was_named_or_their_own_kind(self, inherit):
        for named, expected in ((None, INHERITED_NEURON if inherit else SCRATCH_NEURON), (LIF, LIF)):
            student, _ = convert(net(), inherit=inherit, neuron=named)
            assert {layer.neuron for layer in student.neurons.values()} == {expected}


class TestRules:
    def test_percentile_lies_below_max(self):
        network, many = net(), images(50)
        tops = convert(network, calibration_images=many, rule="max", per_channel=False)[1]
        shares = convert(network, calibration_images=many, rule="percentile", percentile=90.0, per_channel=False)[1]
        activations = network.bn(network.conv1(many)).clamp_min(0).flatten().detach()
        assert tops.sites[0].threshold == pytest.approx(float(activations.max()))
        positive = activations[activations > 0]
        assert shares.sites[0].threshold == pytest.approx(float(positive.quantile(0.9)), rel=1e-5)

    def test_each_channel_has_a_threshold_of_its_own(self):
        network, many = net(), images(50)
        student, report = convert(network, calibration_images=many, rule="max")
        largest = network.bn(network.conv1(many)).amax((0, 2, 3)).detach().float()
        first = next(iter(student.neurons.values())).threshold
        torch.testing.assert_close(first, largest.clamp_min(SMALLEST_SHARE * largest.max()))
        assert report.sites[0].threshold == pytest.approx(float(first.mean()))

    def test_a_channel_s_range_does_not_matter(self):
        # Scaling a channel up before its neurons and down behind them changes nothing, as its threshold goes along.
        given, scale = images(20), torch.tensor([0.5, 1.0, 1.5, 3.0], dtype=torch.float64)
        first, second, last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(64, 3)
        network = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), last).double().eval()
        other = copy.deepcopy(network)
        with torch.no_grad():
            other[0].weight.mul_(scale[:, None, None, None])
            other[0].bias.mul_(scale)
            other[2].weight.div_(scale[:, None, None])
        expected, found = (convert(one, calibration_images=given)[0](given) for one in (network, other))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        expected, found = (
            convert(one, calibration_images=given, per_channel=False)[0](given) for one in (network, other)
        )
        assert (found - expected).abs().max() > 0.01

    @pytest.mark.parametrize("percentile", [-1.0, 100.5, float("nan")])
    def test_a_percentile_outside_its_range_is_refused(self, percentile):
        with pytest.raises(ConfigError, match=r"percentile \(="):
            convert(net(), rule="percentile", percentile=percentile)

    def test_inheriting_without_images_is_refused(self):
        with pytest.raises(
            ConfigError, match=r"give a few hundred images as calibration_images=\.\.\., or set inherit=False"
        ):
            to_spiking(net())

    def test_images_that_are_not_finite_are_refused(self):
        with pytest.raises(ConversionError, match="NaN or infinity: check the weights and the calibration images"):
            convert(net(), calibration_images=torch.full((2, 1, 4, 4), torch.nan, dtype=torch.float64))

    def test_an_ann_that_is_always_silent_has_a_silent_student(self):
        network = net()
        with torch.no_grad():
            network.bn.bias.fill_(-1e3)
            network.conv2.bias.fill_(0.0)
        student, report = convert(network)
        assert [(site.threshold, site.expected_rate) for site in report.sites] == [(1.0, 0.0)] * 2
        assert torch.equal(student(images()), network.fc.bias.expand(4, 3, 3))


def test_images_of_the_wrong_number_of_channels_are_refused():
    student, _ = convert(Teacher(net(3), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)), calibration_images=images(4, 3))
    with pytest.raises(
        ShapeError, match=r"\(3, 2, 4, 4\) were given to a network that takes \[B, 3, H, W\] with B of 1"
    ):
        student(images(3, 2))


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 3, 1, 4, 4), (3, 2, 4, 4), (0, 1, 4, 4), (4,)])
def test_images_of_another_shape_are_refused(shape):
    student, _ = convert(net())
    message = rf"{re.escape(str(shape))} were given to a network that takes \[B, 1, H, W\] .* coding=FrameCoding\(\)"
    with pytest.raises(ShapeError, match=message):
        student(torch.rand(shape))


def test_a_normalisation_of_more_channels_than_the_network_takes_is_refused():
    student, _ = convert(net(), inherit=False, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    with pytest.raises(ShapeError, match=r"a network that takes \[B, 1, H, W\]"):
        student(images())


def test_the_state_of_another_student_is_refused():
    student, _ = convert(net())
    _, state = student.step(images())
    with pytest.raises(ShapeError, match="The state has 1 layers, the student has 2"):
        student.step(images(), state[:1])


def test_no_image_at_all_is_refused_as_calibration():
    with pytest.raises(ConfigError, match="need calibrated thresholds: give a few hundred images"):
        convert(net(), calibration_images=torch.rand(0, 1, 4, 4))


def test_a_gradient_that_is_none_is_refused():
    student, _ = convert(net())
    student.gradient = "rates"
    with pytest.raises(ConfigError, match=r"There is no gradient 'rates'\. Did you mean 'rate'"):
        student(images())


def test_what_cannot_be_computed_again_is_refused():
    student, _ = convert(net())
    student.recompute = True
    with pytest.raises(ConfigError, match=r"There is no recompute 'True'\. Known: neurons, nothing, stages"):
        student(images())


@pytest.mark.parametrize("neuron", [INHERITED_NEURON, replace(PLIF, learn_threshold=True)], ids=["rounding", "plif"])
class TestAsAnyModule:
    given = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def test_is_copied(self, neuron):
        student = trained(neuron=neuron)
        student.observe(self.given, ["act1"])
        twin = copy.deepcopy(student)
        expected = student.eval()(self.given)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1.0)
        assert torch.equal(twin.eval()(self.given), expected)
        assert not torch.equal(student(self.given), expected)
        assert list(twin.observe(self.given, ["act2"]).features) == ["act2"]
        assert list(student.observe(self.given, ["act1"]).features) == ["act1"]

    def test_is_pickled(self, neuron):
        student = trained(neuron=neuron)
        student.observe(self.given, ["act1"])
        twin = pickle.loads(pickle.dumps(student.eval()))
        assert torch.equal(twin(self.given), student(self.given))
        found, expected = (each.observe(self.given, ["act2"]).features["act2"] for each in (twin, student))
        assert torch.equal(found, expected)

    def test_is_averaged(self, neuron):
        student = trained(neuron=neuron)
        average = AveragedModel(student, use_buffers=True)
        average.update_parameters(student)
        torch.testing.assert_close(average.eval()(self.given), student.eval()(self.given))

    def test_its_state_dict_fills_a_second_student(self, neuron):
        student, second = trained(neuron=neuron), trained(neuron=neuron)
        assert not torch.equal(student.eval()(self.given), second.eval()(self.given))
        second.load_state_dict(student.state_dict())
        assert torch.equal(student(self.given), second(self.given))

    def test_its_batch_norm_is_synchronised(self, neuron):
        student = trained(neuron=neuron).eval()
        expected = student(self.given)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        assert any(isinstance(part, nn.SyncBatchNorm) for part in converted.modules())
        torch.testing.assert_close(converted.eval()(self.given), expected)

    def test_is_trained_in_parallel(self, neuron, tmp_path):
        student = trained(neuron=neuron)
        twin = copy.deepcopy(student)
        store = distributed.FileStore(str(tmp_path / "store"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            wrapped = DistributedDataParallel(student)
            for network in (wrapped, twin):
                network.zero_grad()
                F.cross_entropy(network(self.given).mean(0), torch.tensor([0, 1, 2, 0])).backward()
        finally:
            distributed.destroy_process_group()
        for found, expected in zip(student.parameters(), twin.parameters()):
            torch.testing.assert_close(found.grad, expected.grad)
            assert found.grad is not None


@pytest.mark.parametrize("initial, inherits, said", [(0.0, True, True), (0.5, True, False), (0.0, False, False)])
def test_the_report_says_when_spikes_round_down(initial, inherits, said):
    ann = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))
    conversion = Conversion(timesteps=2, neuron=Neuron(initial=initial), inherit=inherits)
    _, report = to_spiking(ann, conversion, calibration_images=torch.rand(8, 1, 4, 4))
    assert report.rounds_down == said == ("give initial=0.5 to round" in str(report))
