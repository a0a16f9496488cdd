import itertools
import runpy
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from spikedistill.teacher.capture import capture_features
from spikedistill.teacher.zoo import ZOO

PUBLISHED = {
    "airbench94": 1.97e6,
    "airbench95": 4.60e6,
    "airbench96": 9.91e6,
    "preact-resnet18": 11.17e6,
    "resnet18": 11.17e6,
    "resnet19": 12.63e6,
    "resnet20": 0.27e6,
    "resnet20-a": 0.27e6,
    "resnet56-a": 0.85e6,
    "resnet34": 21.28e6,
    "vgg11": 9.23e6,
    "vgg16": 14.73e6,
    "wrn16-2": 0.69e6,
    "wrn28-4": 5.85e6,
}

DEPTH = {
    "airbench94": 1 + 3 * 2 + 1,
    "airbench95": 1 + 3 * 2 + 1,
    "airbench96": 1 + 3 * 3 + 1,
    "preact-resnet18": 18,
    "pyramidnet18": 18,
    "resnet18": 18,
    "resnet19": 19,
    "resnet20": 20,
    "resnet20-a": 20,
    "resnet56-a": 56,
    "resnet34": 34,
    "vgg9": 9,
    "vgg11": 11 - 2,  # two of configuration A's three linear layers are left out, as is usual on CIFAR
    "vgg16": 16 - 2,
    "wrn16-2": 16 - 3 + 1,  # the name counts the three projections, which lie beside the path, and not the classifier
    "wrn28-4": 28 - 3 + 1,
}

STAGES = {
    "resnet20-a": 3,
    "resnet56-a": 3,
    "airbench94": 3,
    "airbench95": 3,
    "airbench96": 3,
    "resnet19": 3,
    "resnet20": 3,
    "vgg9": 3,
    "vgg11": 5,
    "vgg16": 5,
    "wrn16-2": 3,
    "wrn28-4": 3,
}

SMALLEST = {"airbench94": 9, "airbench95": 9, "airbench96": 9}
"""Side of the smallest images, where it is not 8."""


def longest_path(network):
    """The most convolutions and linear layers that lie one behind the other between image and logits."""
    layers = dict(network.named_modules())
    length = {}
    for node in fx.symbolic_trace(network).graph.nodes:
        weighs = node.op == "call_module" and isinstance(layers[node.target], nn.Conv2d | nn.Linear)
        length[node] = weighs + max((length[before] for before in node.all_input_nodes), default=0)
    return max(length.values())


@pytest.mark.parametrize("name, parameters", PUBLISHED.items())
def test_parameters_are_as_many_as_published(name, parameters):
    with torch.device("meta"):
        network = ZOO[name]()
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(parameters, rel=0.01)


def test_every_depth_is_listed():
    assert DEPTH.keys() == ZOO.keys()


@pytest.mark.parametrize("name", ZOO)
class TestEvery:
    def test_is_as_deep_as_its_name_says(self, name):
        with torch.device("meta"):
            network = ZOO[name](width=8)
        assert longest_path(network) == DEPTH[name]

    @pytest.mark.parametrize("channels, side, classes", [(1, None, 3), (3, 32, 10)])
    def test_answers_for_small_grey_and_larger_coloured_images(self, name, channels, side, classes):
        side = side or SMALLEST.get(name, 8)
        network = ZOO[name](classes=classes, channels=channels, width=8).eval()
        with torch.no_grad():
            logits = network(torch.rand(2, channels, side, side))
        assert logits.shape == (2, classes)
        assert torch.isfinite(logits).all()
        assert not torch.equal(logits[0], logits[1])

    def test_the_traced_network_answers_alike(self, name):
        network = ZOO[name](channels=1, width=8).eval()
        images = torch.rand(2, 1, 9, 9)
        with torch.no_grad():
            torch.testing.assert_close(fx.symbolic_trace(network)(images), network(images))

    def test_a_finite_gradient_reaches_every_weight(self, name):
        network = ZOO[name](channels=1, width=8)
        network(torch.rand(3, 1, 9, 9)).square().sum().backward()
        for path, weight in network.named_parameters():
            if not weight.requires_grad:  # the scale of airbench's norms
                assert path.endswith(("bn1.weight", "bn2.weight", "bn3.weight")) and name.startswith("airbench")
                continue
            assert torch.isfinite(weight.grad).all(), path
            assert weight.grad.abs().sum() > 0, path

    def test_its_stages_begin_at_the_given_width_and_shrink_the_image_one_after_another(self, name):
        network = ZOO[name](width=8).eval()
        paths = [path for path, _ in network.named_children() if path.startswith("layer")]
        assert paths == [f"layer{number}" for number in range(1, STAGES.get(name, 4) + 1)]
        with torch.no_grad(), capture_features(network, paths) as seen:
            network(torch.rand(1, 3, 32, 32))
        sides = [seen[path].shape[-1] for path in paths]
        assert all(after == before // 2 for before, after in itertools.pairwise(sides))
        first = next(layer for layer in network.get_submodule("layer1").modules() if isinstance(layer, nn.Conv2d))
        assert first.out_channels == (15 if name == "pyramidnet18" else 8)  # its first block has already grown

    def test_the_default_weights_differ_from_seed_to_seed_only(self, name):
        def made(seed):
            torch.manual_seed(seed)
            return next(ZOO[name](channels=1, width=8).parameters())

        torch.testing.assert_close(made(1), made(1), rtol=0, atol=0)
        assert not torch.equal(made(1), made(2))


def test_the_pyramid_grows_evenly_to_eight_times_its_width():
    with torch.device("meta"):
        network = ZOO["pyramidnet18"](width=16)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions[::2]] == [16, 30, 44, 58, 72, 86, 100, 114, 128]


@pytest.mark.parametrize("depth", [20, 56])
def test_the_resnets_of_option_a_are_the_third_party_networks_of_the_example(depth):
    """``examples/resnet20_cifar.py`` is how others wrote them. Weights and modules have the same names."""
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "resnet20_cifar.py"))
    theirs, ours = example[f"resnet{depth}"](7).eval(), ZOO[f"resnet{depth}-a"](7).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "preact-resnet18", "wrn16-2"])
def test_no_convolution_before_a_norm_carries_a_bias(name):
    with torch.device("meta"):
        network = ZOO[name]()
    assert all(layer.bias is None for layer in network.modules() if isinstance(layer, nn.Conv2d))
