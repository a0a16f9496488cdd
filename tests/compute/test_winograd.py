import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikedistill.compute import winograd
from spikedistill.compute.winograd import LEAST_CHANNELS, LEAST_TILES, WinogradConv2d, applies, use_winograd
from spikedistill.neuron.dynamics import Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.fold import fold
from spikedistill.teacher.zoo import ZOO

pytestmark = pytest.mark.usefixtures("without_compiler")


def layer(into=32, out=32, bias=True, **other):
    made = nn.Conv2d(into, out, **{"kernel_size": 3, "padding": 1, **other}, bias=bias)
    return made.to(memory_format=torch.channels_last)


def images(n, c, h, w):
    return torch.randn(n, c, h, w).to(memory_format=torch.channels_last)


def exactly(conv, x, arriving):
    """Result and gradients in float64, by PyTorch."""
    conv, x = copy.deepcopy(conv).double(), x.detach().double().requires_grad_()
    y = F.conv2d(x, conv.weight, conv.bias, padding=1)
    y.backward(arriving.double())
    return y.detach(), x.grad, conv.weight.grad, *(() if conv.bias is None else (conv.bias.grad,))


def close(found, expected):
    torch.testing.assert_close(found.detach().double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@given(
    st.integers(32, 34),
    st.sampled_from([32, 40, 48]),
    st.sampled_from([32, 40, 56]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.integers(1, 3),
)
def test_results_and_gradients_are_the_convolution_s(n, into, out, h, w, bias, threads):
    torch.set_num_threads(threads)
    conv, x = layer(into, out, bias), images(n, into, h, w).requires_grad_()
    expected = exactly(conv, x, arriving := images(n, out, h, w))
    assert use_winograd(conv) == ""
    assert applies(x, conv.weight)
    y = conv(x)
    y.backward(arriving)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for found, wanted in zip((y, x.grad, conv.weight.grad, *([conv.bias.grad] if bias else [])), expected):
        close(found, wanted)


def test_weights_and_gradients_may_lie_in_the_usual_order():
    conv, x = layer(), images(4, 32, 16, 16).requires_grad_()
    conv.to(memory_format=torch.contiguous_format)
    arriving = torch.randn(4, 32, 16, 16)
    expected = exactly(conv, x, arriving)
    use_winograd(conv)
    conv(x).backward(arriving)
    for found, wanted in zip((x.grad, conv.weight.grad, conv.bias.grad), expected[1:]):
        close(found, wanted)


def test_the_number_of_threads_does_not_matter():
    conv, x, arriving = layer(64, 48), images(5, 64, 13, 17).requires_grad_(), images(5, 48, 13, 17)
    use_winograd(conv)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = conv(x)
        found.append((y, *torch.autograd.grad(y, (x, conv.weight, conv.bias), arriving)))
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0][:3], other[:3]))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_gradients_that_are_needed_are_computed(needed):
    conv, x = layer(), images(4, 32, 16, 16)
    leaves = (x, conv.weight, conv.bias)
    for leaf, wanted in zip(leaves, needed):
        leaf.requires_grad_(wanted)
    arriving = images(4, 32, 16, 16)
    expected = torch.autograd.grad(conv(x), [leaf for leaf in leaves if leaf.requires_grad], arriving)
    use_winograd(conv)
    conv(x).backward(arriving)
    assert [leaf.grad is not None for leaf in leaves] == list(needed)
    (found,) = (leaf.grad for leaf in leaves if leaf.grad is not None)
    close(found, expected[0].double())


@pytest.mark.parametrize(
    "other",
    [
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 5, "padding": 2},
        {"padding_mode": "reflect"},
    ],
    ids=str,
)
def test_other_convolutions_stay_pytorch_s(other):
    conv = layer(**other)
    assert "no convolution of 3 x 3" in use_winograd(conv)
    assert type(conv) is nn.Conv2d


@pytest.mark.parametrize("into, out", [(24, 32), (32, 24), (36, 32), (32, 36)])
def test_channels_that_are_too_few_or_do_not_fill_vectors_stay_pytorch_s(into, out):
    assert "no convolution" in use_winograd(layer(into, out))


def test_padding_by_name_is_padding():
    conv = layer(padding="same")
    assert use_winograd(conv) == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda conv, x: (conv.double(), x.double()),
        lambda conv, x: (conv.to(torch.bfloat16), x.to(torch.bfloat16)),
        lambda conv, x: (conv, x.contiguous()),
        lambda conv, x: (conv, x[0]),
        lambda conv, x: (conv, x[:1, :, :8, :8].contiguous(memory_format=torch.channels_last)),
    ],
    ids=["float64", "bfloat16", "usual memory order", "no batch", "few pixels"],
)
def test_where_it_does_not_apply_results_are_pytorch_s_to_the_bit(change):
    conv, x = change(layer(), images(4, 32, 16, 16))
    expected = conv(x)
    use_winograd(conv)
    assert not applies(x, conv.weight)
    assert torch.equal(conv(x), expected)


def test_under_autocast_and_in_a_compiled_step_it_is_pytorch_s(monkeypatch):
    for place, name in ((WinogradConv2d, "_conv_forward"), (winograd, "applies")):  # torch 2.6 compiles no wrapper
        monkeypatch.setattr(place, name, inspect.unwrap(getattr(place, name)))
    conv, x = layer(), images(4, 32, 16, 16)
    use_winograd(conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    seen = []

    def backend(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(conv, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-4)
    assert any("conv2d" in name for name in seen)


def test_wrong_channels_are_refused_as_by_pytorch():
    conv = layer()
    use_winograd(conv)
    with pytest.raises(RuntimeError, match="expected input"):
        conv(images(4, 40, 16, 16))


def test_it_begins_where_there_are_enough_tiles():
    weight = torch.zeros(LEAST_CHANNELS, LEAST_CHANNELS, 3, 3)
    assert applies(images(LEAST_TILES, LEAST_CHANNELS, 1, 1), weight)
    assert not applies(images(LEAST_TILES - 1, LEAST_CHANNELS, 4, 4), weight)
    assert applies(images(LEAST_TILES // 2, LEAST_CHANNELS, 1, 5), weight)


def test_a_network_keeps_names_weights_and_kinds_and_survives_copies_and_files():
    network = ZOO["resnet18"](width=32).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert use_winograd(network) == ""
    after = network.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    kinds = [type(module) for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert WinogradConv2d in kinds and nn.Conv2d in kinds
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert [type(module) for module in copied.modules() if isinstance(module, nn.Conv2d)] == kinds
    assert use_winograd(network) == ""


def part(into, out):
    return nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()


def test_a_network_with_it_folds_and_becomes_a_student_with_the_same_layers():
    layers = *part(3, 32), *part(32, 32), *part(32, 40), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10)
    network = nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)
    plain, _ = to_spiking(network, calibrate=torch.rand(8, 3, 16, 16))
    use_winograd(network)
    student, _ = to_spiking(network, calibrate=torch.rand(8, 3, 16, 16))
    assert list(student.state_dict()) == list(plain.state_dict())
    x = images(8, 3, 16, 16)
    torch.testing.assert_close(fold(network)(x), network(x), rtol=1e-3, atol=1e-4)
    assert any(isinstance(module, WinogradConv2d) for module in fold(network).modules())


@pytest.mark.parametrize("gradient, recompute", [("exact", "nothing"), ("exact", "neurons"), ("rate", "nothing")])
def test_a_student_has_the_gradients_of_pytorch_s_convolutions(gradient, recompute):
    # thresholds far above and a flat surrogate: no spike can tip, so what differs are the convolutions alone
    class Flat:
        def gradient(self, u):
            return torch.ones_like(u)

    x = images(8, 3, 16, 16).abs()
    neuron = Neuron(threshold=1e3, surrogate=Flat())
    student, _ = to_spiking(
        ZOO["vgg9"](width=32), Conversion(timesteps=2, inherit=False, neuron=neuron, max_pool="average")
    )
    student.to(memory_format=torch.channels_last)
    for neurons in student.neurons.values():
        neurons.backend = "reference"
    student.gradient, student.recompute = gradient, recompute
    quick = copy.deepcopy(student)
    assert use_winograd(quick) == ""
    for network in (student, quick):
        network(x).square().mean().backward()
    for (name, expected), (_, found) in zip(student.named_parameters(), quick.named_parameters()):
        limit = 1e-3 * float(expected.grad.abs().max()) + 1e-12
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=limit, msg=name)


@pytest.fixture
def unbuilt(monkeypatch):
    """The functions are built again at their next use, and afresh after the test."""
    winograd._library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    winograd._library.cache_clear()


@pytest.mark.parametrize("compiler, reason", [("/nowhere/cc", "nowhere"), ("false", "failed"), ("true", "winograd.so")])
def test_without_a_working_compiler_nothing_changes_and_it_says_why(unbuilt, compiler, reason):
    unbuilt.setenv("CC", compiler)
    conv = layer()
    assert reason in use_winograd(conv)
    assert type(conv) is nn.Conv2d
    conv.__class__ = WinogradConv2d  # as in a file from a machine that has one
    x = images(4, 32, 16, 16)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))


def test_without_any_compiler_it_says_so(unbuilt):
    unbuilt.delenv("CC", raising=False)
    unbuilt.setattr(winograd.shutil, "which", lambda name: None)
    assert use_winograd(layer()) == "no C compiler (cc, gcc, clang) was found"
