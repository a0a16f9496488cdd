import warnings

import pytest
import torch
import torch.nn.functional as F
from students import PIXELS, two_neurons
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from spikedistill.compute.winograd import WinogradConv2d, use_winograd
from spikedistill.errors import ConfigError, ShapeError
from spikedistill.evaluate.firing import firing_rates
from spikedistill.evaluate.operations import operations
from spikedistill.neuron.dynamics import Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import Conversion
from spikedistill.student.synapses import fan_out


@pytest.fixture
def student():
    return two_neurons(nn.Flatten(), nn.Linear(2, 3))


class TestOperations:
    def test_a_two_by_two_convolution_by_hand(self):
        # 3 x 3 pixels, one 2 x 2 kernel, no padding: corners are used once, edges twice, the middle four times
        layer = nn.Conv2d(1, 1, 2)
        assert fan_out(layer, (1, 3, 3))[0].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
        assert fan_out(nn.Conv2d(1, 3, 2, stride=2), (1, 3, 3))[0].tolist() == [[3, 3, 0], [3, 3, 0], [0, 0, 0]]
        assert fan_out(nn.Conv2d(2, 4, 1, groups=2), (2, 1, 1)).flatten().tolist() == [2, 2]
        layer.weight.data[0, 0, 0, 0] = 0.0
        assert fan_out(layer, (1, 3, 3))[0].tolist() == [[0, 1, 1], [1, 3, 2], [1, 2, 1]]

    def test_a_network_by_hand(self):
        network = nn.Sequential(nn.Conv2d(1, 1, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5))
        network[0].weight.data.fill_(1.0)
        images = torch.tensor([[0.0, 0.3, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]).view(1, 1, 3, 3)
        with operations(network) as counts:
            network(images)
        # pixels (0, 1) and (1, 1) are used 2 and 4 times; windows see .8, .8, .5, .5: four values, five weights each
        assert counts.macs == {"0": 6.0, "3": 20.0}
        assert counts.dense == {"0": 16.0, "3": 20.0}
        assert counts.per_image() == {"acs": 0.0, "macs": 26.0, "dense": 36.0}

    def test_spikes_accumulate_and_the_image_is_seen_once(self):
        student = two_neurons(nn.Conv2d(2, 3, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(3, 4))
        with operations(student) as counts:
            student(PIXELS)
        # as above: 4 + 2, 2 + 1 and 0 spikes of three images, three connections each; the image itself once
        assert counts.acs["core.2"] == 9 * 3
        assert counts.macs["core.0"] == 2 * 2
        assert counts.dense["core.2"] == 3 * 4 * 2 * 3
        assert counts.images == 3

    def test_a_mean_of_spikes_is_multiplied(self):
        student = two_neurons(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
        student.core.get_submodule("2").weight.data.fill_(0.3)
        with operations(student) as counts:
            student(torch.rand(4, 1, 5, 5) + 0.5)
        assert counts.acs["core.2"] > 0 and counts.macs["core.2"] == 0
        assert counts.acs["core.6"] == 0 and counts.macs["core.6"] > 0

    def test_spikes_of_another_height_in_every_channel_accumulate(self):
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Flatten())
        network.append(nn.Linear(2 * 4, 3))
        images = torch.rand(64, 1, 6, 6)
        student, _ = to_spiking(network, Conversion(per_channel=True), calibration_images=images)
        with operations(student) as counts:
            student.eval()(images)
        assert len({float(height) for height in next(iter(student.neurons.values())).threshold.flatten()}) > 1
        assert counts.acs["core.2"] > 0 and counts.acs["core.5"] > 0
        assert counts.macs["core.2"] == 0 and counts.macs["core.5"] == 0

    def test_a_layer_that_is_called_twice_counts_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(1, 1, 1)

            def forward(self, x):
                return self.conv(self.conv(x).relu()).flatten(1)

        network = Twice()
        with operations(network) as counts:
            network(torch.rand(5, 1, 2, 2))
            network(torch.rand(3, 1, 2, 2))
        assert counts.once == {"conv": 2 * 4 * 8} and counts.dense == {"conv": 2 * 4 * 8}


class Written(nn.Module):
    """One layer, an activation and a linear layer, as modules or in another way of writing them."""

    def __init__(self, layer, call, features, activate=F.relu, head=None):
        super().__init__()
        self.layer, self.relu, self.head = layer, nn.ReLU(), nn.Linear(features, 3)
        self.call, self.activate = call, activate
        self.last = head or (lambda self, x: self.head(x))

    def forward(self, x):
        x = self.call(self.layer, x)
        x = self.relu(x) if self.activate is None else self.activate(x)
        return self.last(self, x.flatten(1))


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 9), 12, lambda m, x: F.conv1d(x, m.weight, m.bias, 2)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3), (2, 6, 6), 64, lambda m, x: torch.conv2d(x, m.weight, m.bias)),
    "by name": (
        *(lambda: nn.Conv2d(2, 4, 3, stride=2, bias=False), (2, 7, 7), 36),
        lambda m, x: F.conv2d(input=x, weight=m.weight, stride=2),
    ),
    "groups": (
        *(lambda: nn.Conv2d(4, 4, 3, dilation=2, groups=2), (4, 7, 7), 36),
        lambda m, x: F.conv2d(x, m.weight, m.bias, 1, 0, 2, 2),
    ),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 4, 4), 36, lambda m, x: F.conv3d(x, m.weight, m.bias)),
    "transposed": (
        *(lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), (2, 3, 3), 192),
        lambda m, x: F.conv_transpose2d(x, m.weight, m.bias, 2, 0, 1),
    ),
    "linear": (lambda: nn.Linear(7, 5), (7,), 5, lambda m, x: F.linear(x, m.weight, m.bias)),
    "ATen": (
        *(lambda: nn.Conv2d(2, 4, 3), (2, 6, 6), 64),
        lambda m, x: torch.ops.aten.conv2d.default(x, m.weight, m.bias),
    ),
}


def counted(network, *inputs):
    with torch.no_grad(), operations(network) as counts, firing_rates(network) as rates:
        for given in inputs:
            network(given)
    return counts, rates


def sums(counts):
    kinds = (counts.acs, counts.macs, counts.dense, counts.once, counts.active)
    return [sum(kind.values()) for kind in kinds] + [counts.images]


def student_like(ann, **options):
    """A student with the weights of an ANN, whatever dimensions its images have."""
    neuron = Neuron(threshold=0.1)
    student, _ = to_spiking(ann, Conversion(timesteps=4, neuron=neuron, inherit=False, **options))
    student.core.load_state_dict(ann.state_dict(), strict=False)
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student.eval()


class TestWhoeverCalls:
    @pytest.mark.parametrize("name", LAYERS)
    def test_a_layer_counts_the_same_as_a_module_and_as_a_function(self, name):
        make, shape, features, function = LAYERS[name]
        torch.manual_seed(1)
        module = Written(make(), lambda m, x: m(x), features, None).eval()
        other = Written(module.layer, function, features, head=lambda s, x: F.linear(x, s.head.weight, s.head.bias))
        other.eval().load_state_dict(module.state_dict())
        images = (torch.rand(6, *shape) - 0.2).relu()
        expected, found = counted(module, images), counted(other, images)
        assert sums(found[0]) == sums(expected[0]) and sums(found[0])[2] > 0
        assert found[1].spikes == expected[1].spikes and found[1].possible_spikes == {"relu": 6 * features}
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            other(images)
        assert found[0].per_image()["dense"] == flops.get_total_flops() / 2 / 6
        if name in (
            "transposed",
            "ATen",
            "linear",
        ):  # as functions they have no spiking equivalent, or no axis of channels
            return
        students = [student_like(one) for one in (module, other)]
        (first, _), (second, _) = counted(students[0], images), counted(students[1], images)
        assert sums(second) == sums(first) and sums(first)[0] > 0 and first.images == 6

    @pytest.mark.parametrize(
        "head",
        [
            lambda s, x: x @ s.head.weight.t() + s.head.bias,
            lambda s, x: x.matmul(s.head.weight.t()),
            lambda s, x: torch.mm(x, s.head.weight.t()),
            lambda s, x: torch.addmm(s.head.bias, x, s.head.weight.t()),
            lambda s, x: torch.bmm(x[None], s.head.weight.t()[None])[0],
            lambda s, x: torch.einsum("bi,ki->bk", x, s.head.weight),
            lambda s, x: torch.stack([torch.mv(s.head.weight, one) for one in x]),
            lambda s, x: torch.stack([F.linear(one, s.head.weight) for one in x]),
            lambda s, x: torch.linalg.matmul(x, s.head.weight.t()),
            lambda s, x: x.matmul(other=s.head.weight.t()),
            lambda s, x: torch.mm(input=x, mat2=s.head.weight.t()),
            lambda s, x: torch.addmm(input=s.head.bias, mat1=x, mat2=s.head.weight.t()),
            lambda s, x: torch.addmm(s.head.bias, x, mat2=s.head.weight.t()),
            lambda s, x: torch.stack([torch.addmv(s.head.bias, mat=s.head.weight, vec=one) for one in x]),
        ],
    )
    def test_a_product_counts_as_the_linear_layer_that_it_is(self, head):
        network = Written(nn.Linear(7, 5), lambda m, x: m(x), 5).eval()
        images = torch.randn(6, 7)
        expected, _ = counted(network, images)
        network.last = head
        assert sums(counted(network, images)[0]) == sums(expected)

    @pytest.mark.parametrize("given", [weight_norm, spectral_norm, orthogonal])
    def test_weights_that_are_made_of_others_cost_no_image_anything(self, given):
        counts, _ = counted(nn.Sequential(given(nn.Linear(7, 5))).eval(), torch.randn(6, 7))
        assert counts.per_image()["dense"] == 35

    @pytest.mark.parametrize(
        "product",
        [
            lambda x, w: torch.linalg.multi_dot([x, w.t()]),
            lambda x, w: torch.linalg.vecdot(x[:, None], w),
            lambda x, w: torch.sparse.mm(w.detach().to_sparse(), x.t()).t(),
        ],
    )
    def test_products_by_other_names_are_refused(self, product):
        network = Written(nn.Linear(7, 5), lambda m, x: product(x, m.weight), 5).eval()
        with pytest.raises(ConfigError, match="multiplies"):
            counted(network, torch.randn(6, 7))

    @pytest.mark.parametrize(
        "activate", [nn.ReLU(), F.relu, torch.relu, lambda x: x.relu(), lambda x: x.clamp(min=0), lambda x: x.relu_()]
    )
    def test_an_activation_counts_whoever_calls_it(self, activate):
        network = Written(nn.Linear(7, 5), lambda m, x: m(x), 5, activate)
        _, rates = counted(network, torch.randn(6, 7))
        assert sum(rates.possible_spikes.values()) == 30 and 0 < rates.mean() < 1

    def test_attention_counts_both_of_its_products(self):
        class Attention(nn.Module):
            def forward(self, x):
                return F.scaled_dot_product_attention(x, x, x).mean(1)

        tokens = torch.randn(2, 1, 5, 4)
        counts, _ = counted(Attention(), tokens)
        assert counts.per_image() == {"acs": 0.0, "macs": 2 * 5 * 5 * 4, "dense": 2 * 5 * 5 * 4}

    def test_a_convolution_of_our_own_counts_as_torchs(self):
        network = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 2))
        images = torch.rand(16, 32, 8, 8).to(memory_format=torch.channels_last)
        expected, _ = counted(network, images)
        assert use_winograd(network.to(memory_format=torch.channels_last)) == ""
        assert isinstance(network[0], WinogradConv2d)
        for given in (images, images.contiguous()):  # ours, and torch's in its place
            assert sums(counted(network, given)[0]) == sums(expected)
        student, _ = to_spiking(network, Conversion(timesteps=2, inherit=False))
        use_winograd(student.to(memory_format=torch.channels_last))
        with torch.no_grad(), operations(student.eval()) as counts:
            student(images)
        assert counts.dense["core.0"] == expected.dense["0"]

    @pytest.mark.parametrize(
        "network, given, what",
        [
            (nn.MultiheadAttention(4, 2, batch_first=True), torch.rand(2, 3, 4), "multi_head_attention_forward"),
            (nn.LSTM(4, 4, batch_first=True), torch.rand(2, 3, 4), "lstm"),
            (nn.Bilinear(4, 4, 2), torch.rand(2, 4), "bilinear"),
        ],
    )
    def test_what_multiplies_and_cannot_be_counted_is_refused(self, network, given, what):
        class Around(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = network

            def forward(self, x):
                return self.inner(x) if what == "lstm" else self.inner(*[x] * (3 if "head" in what else 2))

        around = Around().eval()
        with pytest.raises(ConfigError, match=f"'{what}' at 'inner.*' multiplies"), operations(around):
            around(given)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in around.modules())
        assert torch.overrides._len_torch_function_stack() == 0

    def test_a_network_whose_calls_cannot_be_heard_is_refused(self, student):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2))
        for compiled in (scripted, torch.compile(nn.Linear(2, 2))):
            with pytest.raises(ConfigError, match="compiled, so its calls cannot be seen"), operations(compiled):
                pass
        around = nn.ModuleList([student])
        with pytest.raises(ConfigError, match=r"holds neurons at .* but is not a Student"), operations(around):
            pass

    def test_where_nothing_was_called_nothing_is_said(self, student):
        with operations(student) as counts:
            pass
        with pytest.raises(ConfigError, match="No image was counted: call the network while the context is open"):
            counts.per_image()

    def test_counting_changes_no_answer_and_ends_with_the_context(self, student):
        expected = student(PIXELS)
        with operations(student):
            assert torch.equal(student(PIXELS), expected)
        with operations(student) as counts:
            student(PIXELS)
        student(PIXELS)
        assert counts.images == 3


class TestImages:
    """Six samples, whatever their dimensions and however they are shown."""

    def networks(self):
        clips = nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 12, 3))
        lines = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 3))
        return (clips, torch.rand(6, 1, 3, 4, 3)), (lines, torch.rand(6, 2, 6))

    def test_of_an_ann_are_its_rows(self):
        for network, images in self.networks():
            assert counted(network, images)[0].images == 6
            assert counted(network, images[:4], images[4:])[0].images == 6

    def test_of_a_student_are_what_its_coding_says(self):
        for network, images in self.networks():
            direct, framed, frames = (
                student_like(network),
                student_like(network, coding=FrameCoding()),
                images.expand(4, *images.shape),
            )
            with torch.no_grad(), operations(direct) as one, operations(framed) as other:
                direct(images), framed(frames)
            assert one.images == other.images == 6
            # frames are seen by the first layer at every step, an image once
            assert other.dense["core.0"] == 4 * one.dense["core.0"] and other.once == one.once

    def test_a_stream_counts_as_the_whole_run_but_that_its_first_layers_run_at_every_step(self, student):
        student = two_neurons(nn.Conv2d(2, 3, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(3, 4))
        with torch.no_grad(), operations(student) as whole:
            student(PIXELS)
        with torch.no_grad(), operations(student) as stream:
            state = None
            for _ in range(4):
                _, state = student.step(PIXELS, state)
        assert stream.images == whole.images == 3
        assert (stream.acs, stream.once, stream.active) == (whole.acs, whole.once, whole.active)
        assert stream.macs["core.0"] == 4 * whole.macs["core.0"] and stream.dense["core.2"] == whole.dense["core.2"]

    def test_asking_for_features_and_potentials_counts_too(self, student):
        with operations(student) as plain:
            student(PIXELS)
        with operations(student) as asked:
            student.observe(PIXELS, student.paths()[:1], potentials=student.layers())
        assert sums(asked) == sums(plain)

    def test_a_stream_whose_batch_shrinks_is_refused(self, student):
        _, state = student.step(PIXELS)
        with operations(student), pytest.raises(ShapeError, match="begin and end a stream inside the context"):
            student.step(PIXELS, state)
        with operations(student), pytest.raises(ShapeError, match="A stream of 3 samples goes on with 1 while"):
            _, state = student.step(PIXELS)
            student.step(PIXELS[:1], tuple(part[:1] for part in state))
