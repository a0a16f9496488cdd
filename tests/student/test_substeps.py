import dataclasses

import pytest
import torch
import torch.nn.functional as F
from students import convert
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.evaluate.firing import firing_rates
from spikedistill.evaluate.operations import operations
from spikedistill.neuron.dynamics import Reset
from spikedistill.student.coding import DirectCoding, FrameCoding
from spikedistill.student.conversion import INHERITED_NEURON
from spikedistill.student.substeps import run_in_substeps, step_by_step
from spikedistill.teacher.load import Architecture

SPLITS = [(1, 4), (2, 2), (4, 1), (3, 2)]


class Mixed(nn.Module):
    """Biases, batch norm, a residual sum, max and average pooling, a constant, a method and a flatten."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.pool, self.fc1, self.fc2 = nn.MaxPool2d(2), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv2(x) + x + 0.125)
        x = self.pool(F.relu(self.conv3(x).mul(2.0)))
        x = F.avg_pool2d(x, 2).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


class PooledCurrents(nn.Module):
    """Max pooling of the image's currents and of those of spikes, before the neurons, and a learned scalar."""

    def __init__(self):
        super().__init__()
        self.conv1, self.pool1 = nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2)
        self.conv2, self.pool2 = nn.Conv2d(4, 8, 3, padding=1), nn.MaxPool2d(3, 2, 1)
        self.fc, self.scale = nn.Linear(32, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        x = F.relu(self.pool1(self.conv1(x)))
        x = F.relu(self.pool2(self.conv2(x) * self.scale))
        return self.fc(x.flatten(1))


class PreActivation(nn.Module):
    """What the first neurons see is also what a later sum sees."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 64, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv1(F.relu(x))
        return self.fc(F.relu(x).flatten(1))


class Joined(nn.Module):
    """Spikes meet constants: ``join`` makes what the last neurons see of the spikes and the image."""

    def __init__(self, join):
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(64, 32, 1), nn.Linear(32, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(32, 32, 1, 1) / 4), nn.Parameter(torch.randn(32))
        self.each, self.place = nn.Parameter(torch.randn(32, 1, 1)), nn.Parameter(torch.randn(1, 32, 8, 8))
        self.join = join

    def forward(self, x):
        return self.fc(F.relu(self.join(self, F.relu(self.conv(x)), x)).mean((2, 3)))


def placed(net, like):
    """A constant with a row for each image."""
    return net.place.expand(like.size(0), -1, -1, -1)


JOINS = {
    "a function's argument by name": lambda net, x, _: torch.add(x + 0.25, other=net.mix(torch.cat([x, x], 1))),
    "a method's argument by name": lambda net, x, _: x.add(other=net.mix(torch.cat([x, x], 1))),
    "a constant of as many rows": lambda net, x, _: x + placed(net, x),
    "the same of the image's rows": lambda net, x, images: x + placed(net, images),
    "a parameter as long as the rows": lambda net, x, _: x + net.each,
    "weights as long as the rows": lambda net, x, _: F.conv2d(x, net.weight, net.bias),
    "a constant in a list": lambda net, x, _: net.mix(torch.cat([x, placed(net, x)], 1)),
    "parts in a list": lambda net, x, _: net.mix(torch.cat([x, torch.cat((x + placed(net, x)).chunk(2, 1), 1)], 1)),
    "spikes of a constant": lambda net, x, _: x + F.relu(placed(net, x)),
}


def student(timesteps, levels, on_grid=True, network=Mixed, **options):
    torch.manual_seed(3)
    ann, images = network().eval(), torch.randint(0, 9, (12, 2, 8, 8)) / 8
    made = dataclasses.replace(INHERITED_NEURON, levels=levels)
    student, _ = convert(ann, images, timesteps, neuron=made, **options)
    if on_grid:
        for name, parameter in student.named_parameters():
            parameter.data = (parameter.data * 16).round() / 16 if "norm" not in name else parameter.data
        for layer in student.core.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_var.fill_(1.0 - layer.eps)
        for layer in student.neurons.values():
            layer.set_threshold(torch.exp2(layer.threshold.log2().round()))
    return student.eval(), images


def counts(found, timesteps):
    return {path: trains.unflatten(0, (timesteps, -1)).sum(1) for path, trains in found.spikes.items()}


def assert_hardly_differs(made, inputs, timesteps):
    """Fewer than one count in a thousand is not that of the graded neuron."""
    with torch.no_grad():
        graded = made.observe(inputs, spikes=made.layers())
    for path, found in counts(run_in_substeps(made, inputs, spikes=tuple(made.layers())), timesteps).items():
        assert (found != graded.spikes[path].round()).float().mean() < 1e-3


class TestBinarySubSteps:
    @pytest.mark.parametrize("timesteps, levels", SPLITS)
    @pytest.mark.parametrize("max_pool", ["cumulative", "or"])
    def test_count_what_the_graded_neurons_count(self, timesteps, levels, max_pool):
        made, images = student(timesteps, levels, max_pool=max_pool)
        with torch.no_grad():
            graded = made.observe(images, spikes=made.layers())
        binary = run_in_substeps(made, images, spikes=tuple(made.layers()))
        several = 0
        for path, found in counts(binary, timesteps).items():
            torch.testing.assert_close(found, graded.spikes[path], rtol=0, atol=0)
            assert set(binary.spikes[path].unique().tolist()) <= {0.0, 1.0} and found.any()
            several += int((found > 1).sum())
        assert (several > 0) is (levels > 1)
        torch.testing.assert_close(binary.logits, graded.logits)

    @pytest.mark.parametrize("timesteps, levels", SPLITS)
    @pytest.mark.parametrize("max_pool", ["cumulative", "or"])
    def test_count_the_same_where_currents_are_pooled(self, timesteps, levels, max_pool):
        made, images = student(timesteps, levels, network=PooledCurrents, max_pool=max_pool)
        with torch.no_grad():
            graded = made.observe(images, spikes=made.layers())
        for path, found in counts(run_in_substeps(made, images, spikes=tuple(made.layers())), timesteps).items():
            torch.testing.assert_close(found, graded.spikes[path], rtol=0, atol=0)
            assert found.any()

    @pytest.mark.parametrize("timesteps, levels", SPLITS)
    @pytest.mark.parametrize("network", [PooledCurrents, PreActivation])
    @pytest.mark.parametrize("max_pool", ["cumulative", "or"])
    def test_count_the_same_of_frames(self, timesteps, levels, network, max_pool):
        made, _ = student(timesteps, levels, network=network, max_pool=max_pool, coding=FrameCoding())
        frames = torch.randint(0, 9, (timesteps, 6, 2, 8, 8)) / 8
        with torch.no_grad():
            graded = made.observe(frames, spikes=made.layers())
        for path, found in counts(run_in_substeps(made, frames, spikes=tuple(made.layers())), timesteps).items():
            torch.testing.assert_close(found, graded.spikes[path], rtol=0, atol=0)
            assert found.any()

    @pytest.mark.parametrize("timesteps, levels", [(1, 4), (2, 2)])
    @pytest.mark.parametrize("coding", [DirectCoding(), FrameCoding()])
    @pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
    def test_count_the_same_where_spikes_meet_constants(self, join, coding, timesteps, levels):
        """The batch of 8 has 32 rows of sub-steps, as many as a weight has channels."""
        made, images = student(timesteps, levels, network=lambda: Joined(join), coding=coding)
        frames = isinstance(coding, FrameCoding)
        inputs = torch.randint(0, 9, (timesteps, 8, 2, 8, 8)) / 8 if frames else images[:8]
        with torch.no_grad():
            graded = made.observe(inputs, spikes=made.layers())
        binary = run_in_substeps(made, inputs, spikes=tuple(made.layers()))
        for path, found in counts(binary, timesteps).items():
            torch.testing.assert_close(found, graded.spikes[path], rtol=0, atol=0)
            assert found.any()
        torch.testing.assert_close(binary.logits, graded.logits)

    def test_a_stream_of_frames_is_counted_step_by_step(self):
        made, _ = student(3, 2, network=PooledCurrents, coding=FrameCoding())
        frames, state, streamed = torch.randint(0, 9, (3, 6, 2, 8, 8)) / 8, None, []
        with operations(made) as counted, torch.no_grad():
            for frame in frames:
                logits, state = made.step(frame, state)
                streamed.append(logits)
        with operations(made) as whole, torch.no_grad():
            logits = made(frames)
        torch.testing.assert_close(torch.stack(streamed), logits)
        assert counted.per_image()["acs"] == pytest.approx(whole.per_image()["acs"])

    @pytest.mark.parametrize("timesteps, levels", [(1, 4), (2, 2), (4, 1)])
    @pytest.mark.parametrize("name", ["resnet20", "vgg9"])
    def test_count_the_same_in_networks_of_the_zoo(self, name, timesteps, levels):
        def network():
            return Architecture(name, classes=3, channels=2, width=4).build()

        made, images = student(timesteps, levels, network=network)
        with torch.no_grad():
            graded = made.observe(images, spikes=made.layers())
        binary = run_in_substeps(made, images, spikes=tuple(made.layers()))
        found = counts(binary, timesteps)
        assert len(found) == {"resnet20": 19, "vgg9": 8}[name] and all(one.any() for one in found.values())
        for path, one in found.items():
            torch.testing.assert_close(one, graded.spikes[path], rtol=0, atol=0)
        assert torch.equal(binary.logits.mean(0).argmax(1), graded.logits.mean(0).argmax(1))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_keep_what_is_no_number_visible(self, value):
        made, images = student(2, 2)
        images[1, 0, 2, 2] = value
        logits = run_in_substeps(made, images).logits
        assert logits[:, 1].isnan().all() and logits[:, 2:].isfinite().all()

    def test_trains_are_left_aligned(self):
        made, images = student(2, 3)
        for trains in run_in_substeps(made, images, spikes=tuple(made.layers())).spikes.values():
            within = trains.unflatten(0, (2, 3))
            assert (within.diff(dim=1) <= 0).all()

    def test_of_leaky_neurons_leak_once_a_step(self):
        torch.manual_seed(3)
        images = torch.rand(6, 2, 8, 8)
        neuron = dataclasses.replace(INHERITED_NEURON, levels=3, leak=0.5)
        made, _ = convert(Mixed().eval(), images, 3, neuron=neuron)
        assert_hardly_differs(made.eval(), images, 3)

    def test_of_frames_take_each_frame_once(self):
        torch.manual_seed(3)
        made, _ = convert(
            Mixed().eval(), torch.rand(6, 2, 8, 8), 3, neuron=dataclasses.replace(INHERITED_NEURON, levels=2)
        )
        made.conversion = dataclasses.replace(made.conversion, coding=FrameCoding())
        frames = torch.rand(3, 5, 2, 8, 8)
        assert_hardly_differs(made.eval(), frames, 3)

    def test_need_the_subtractive_reset(self):
        made, images = student(2, 1)
        made.conversion = dataclasses.replace(
            made.conversion, neuron=dataclasses.replace(INHERITED_NEURON, reset=Reset.ZERO)
        )
        with pytest.raises(ConfigError, match="Sub-steps are of subtractive reset"):
            run_in_substeps(made, images)


class TestStepByStep:
    def test_one_layer_answers_as_it_does_layer_by_layer(self):
        class Single(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc1, self.fc2 = nn.Linear(128, 9), nn.Linear(9, 3)

            def forward(self, x):
                return self.fc2(F.relu(self.fc1(x.flatten(1))))

        made, images = student(2, 4, network=Single)
        single = step_by_step(made)
        with torch.no_grad():
            torch.testing.assert_close(single(images).mean(0), made(images).mean(0))
        assert (single.timesteps, single.conversion.neuron_model.levels) == (8, 1)

    def test_leaves_the_student_as_it_is(self):
        made, images = student(1, 4)
        with torch.no_grad():
            before = made(images)
            assert step_by_step(made)(images).shape[0] == 4
            torch.testing.assert_close(made(images), before, rtol=0, atol=0)

    @torch.no_grad()
    def test_of_one_spike_a_step_is_the_student_itself(self):
        neuron = dataclasses.replace(INHERITED_NEURON, leak=0.5)
        made, images = student(3, 1)
        made.conversion = dataclasses.replace(made.conversion, neuron=neuron)
        torch.testing.assert_close(step_by_step(made)(images), made(images), rtol=0, atol=0)

    def test_is_refused_with_a_leak_and_with_frames(self):
        made, _ = student(1, 2)
        leaky = dataclasses.replace(made.conversion, neuron=dataclasses.replace(INHERITED_NEURON, leak=0.5, levels=2))
        for other in (leaky, dataclasses.replace(made.conversion, coding=FrameCoding())):
            made.conversion = other
            with pytest.raises(ConfigError, match="Step by step is for neurons without leak"):
                step_by_step(made)


class TestCounts:
    def test_operations_of_graded_neurons_are_those_of_their_sub_steps(self):
        made, images = student(2, 3, max_pool="or")
        trains = run_in_substeps(made, images, spikes=tuple(made.layers())).spikes
        with operations(made) as counted, firing_rates(made) as rates:
            made(images)
        assert sum(rates.spikes.values()) == sum(float(one.sum()) for one in trains.values())
        assert sum(rates.possible_spikes.values()) == sum(one.numel() for one in trains.values())
        last = next(one for name, one in trains.items() if "relu_3" in name or name == made.layers()[-1])
        assert counted.acs["core.fc2"] == float(last.sum()) * 3 and counted.macs["core.fc2"] == 0
        assert counted.images == len(images)

    def test_operations_do_not_depend_on_how_many_rows_a_batch_has(self):
        """A weight with as many channels as the batch of 8 has rows of sub-steps is no signal."""
        made, images = student(1, 4, network=lambda: Joined(JOINS["weights as long as the rows"]))
        with torch.no_grad():
            first, last = made.observe(images[:8], spikes=made.layers()).spikes.values()
            with operations(made) as whole, firing_rates(made) as rates:
                logits = made(images[:8])
            with operations(made) as halves:
                made(images[:4]), made(images[4:8])
            torch.testing.assert_close(logits, made(images[:8]))
        fan = (dict(made.named_parameters())["core.weight"] != 0).sum((0, 2, 3))
        assert whole.acs["core.conv2d"] == (first.sum((0, 1, 3, 4)) * fan).sum() > 0
        assert (whole.acs, whole.macs, whole.images) == (halves.acs, halves.macs, halves.images)
        assert sum(rates.spikes.values()) == first.sum() + last.sum()

    def test_rates_alone_are_the_same(self):
        made, images = student(2, 3)
        with firing_rates(made) as alone:
            made(images)
        with operations(made), firing_rates(made) as beside:
            made(images)
        assert (alone.spikes, alone.possible_spikes) == (beside.spikes, beside.possible_spikes)
