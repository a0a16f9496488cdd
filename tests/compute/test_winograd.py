import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikedistill.compute import winograd
from spikedistill.compute.winograd import (
    LEAST_CHANNELS,
    LEAST_SIDE,
    LEAST_TILES,
    LEAST_WIDE,
    WinogradConv2d,
    applies,
    use_winograd,
)
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


def close(found, expected, share=1e-4):
    torch.testing.assert_close(found.detach().double(), expected, rtol=0, atol=share * float(expected.abs().max()))


@given(
    st.integers(32, 34),
    st.sampled_from([32, 48, 144]),
    st.sampled_from([32, 48, 80]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.integers(1, 3),
    st.booleans(),
)
def test_results_and_gradients_are_the_convolution_s(n, into, out, h, w, bias, threads, half):
    torch.set_num_threads(threads)
    kind = torch.bfloat16 if half else torch.float32
    if half:
        h, w, into, out = h + LEAST_SIDE - 1, w + LEAST_SIDE - 1, into + LEAST_WIDE - 32, out + LEAST_WIDE - 32
    conv, x = layer(into, out, bias), images(n, into, h, w).to(kind).requires_grad_()
    arriving = images(n, out, h, w).to(kind)
    expected = exactly(conv, x, arriving)
    assert use_winograd(conv) == ""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert applies(x, conv.weight)
        y = conv(x)
    y.backward(arriving)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype is x.grad.dtype is kind and conv.weight.grad.dtype is torch.float32
    rounded = 2**-8 if half else 1e-4  # a bfloat16 is rounded in its ninth digit
    for found, wanted, share in zip((y, x.grad, conv.weight.grad), expected, (rounded, rounded, 1e-4)):
        close(found, wanted, share)
    if bias:
        close(conv.bias.grad, expected[3])


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_bfloat16_is_rounded_as_by_pytorch(patterns):
    # the middle of a kernel is 1 for one channel and 0 else, so a convolution of the bias alone is the bias, rounded
    conv = layer(LEAST_WIDE, LEAST_WIDE)
    bias = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32).repeat(64)[:LEAST_WIDE]
    bias = torch.where(bias.abs() < 1e-30, torch.ones(()), bias)  # a processor may flush the smallest ones to zero
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.copy_(bias)
    use_winograd(conv)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = conv(torch.zeros(2, LEAST_WIDE, 16, 16).to(memory_format=torch.channels_last))
    torch.testing.assert_close(found[0, :, 0, 0], bias.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


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


def test_autocast_decides_the_number_format_as_for_pytorch_s():
    conv, x = layer(LEAST_WIDE, LEAST_WIDE), images(4, LEAST_WIDE, 16, 16)
    plain = copy.deepcopy(conv)
    use_winograd(conv)
    for given_images in (x, x.to(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            assert applies(given_images, conv.weight)
            close(conv(given_images), plain(given_images).detach().double(), 2**-6)
            assert conv(given_images).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert not applies(x, conv.weight)
        assert torch.equal(conv(x), plain(x))
    with pytest.raises(RuntimeError, match="type"):
        conv(x.to(torch.bfloat16))


def test_it_does_not_load_torch_compile():
    program = "import sys, torch; before = 'torch._dynamo' in sys.modules; import spikedistill.compute.winograd;"
    program += "sys.exit('torch._dynamo' in sys.modules and not before)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_second_gradient_is_refused():
    conv, x = layer(), images(4, 32, 16, 16).requires_grad_()
    use_winograd(conv)
    (grad,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="to_input"):
        grad.sum().backward()


@pytest.fixture
def unwrapped(monkeypatch):
    """Without checks of arguments, since torch 2.6 compiles no wrapper."""
    for place, name in (
        (WinogradConv2d, "_conv_forward"),
        (winograd, "applies"),
        (winograd, "known_to_fit"),
        (winograd, "_may_be_used"),
    ):
        monkeypatch.setattr(place, name, inspect.unwrap(getattr(place, name)))


@pytest.mark.parametrize("half", [False, True])
def test_a_compiled_step_has_it_as_one_operation(unwrapped, half):
    conv, x = layer(LEAST_WIDE, LEAST_WIDE), images(4, LEAST_WIDE, 16, 16).requires_grad_()
    use_winograd(conv)
    seen = []

    def backend(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(conv, backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found, expected = compiled(x), conv(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ours = hasattr(torch.compiler, "is_exporting")  # torch 2.7 and newer
    assert any(("spikedistill.convolve" if ours else "conv2d") in name for name in seen)


def test_a_compiled_step_has_the_gradients(unwrapped):
    torch.manual_seed(0)
    network = nn.Sequential(layer(32, 48), nn.ReLU(), layer(48, 32, bias=False))
    use_winograd(network)
    x, arriving = images(4, 32, 16, 16).requires_grad_(), images(4, 32, 16, 16)
    leaves = (x, *network.parameters())
    expected = torch.autograd.grad(network(x), leaves, arriving)
    found = torch.autograd.grad(torch.compile(network, backend="aot_eager")(x), leaves, arriving)
    for one, other in zip(found, expected):
        close(one, other.double())


def test_an_exported_network_has_pytorch_s(unwrapped):
    conv, x = layer(), images(4, 32, 16, 16)
    use_winograd(conv)
    graph = torch.export.export(conv, (x,)).graph
    assert any("conv2d" in str(node.target) for node in graph.nodes)
    assert not any("spikedistill" in str(node.target) for node in graph.nodes)


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
    with torch.autocast("cpu", torch.bfloat16):
        weight = torch.zeros(LEAST_WIDE, LEAST_WIDE, 3, 3)
        assert applies(images(9, LEAST_WIDE, LEAST_SIDE, LEAST_SIDE), weight)
        assert not applies(images(99, LEAST_WIDE, LEAST_SIDE, LEAST_SIDE - 1), weight)
        for kernels in (torch.zeros(48, LEAST_WIDE, 3, 3), torch.zeros(LEAST_WIDE, 48, 3, 3)):
            assert not applies(images(99, kernels.shape[1], LEAST_SIDE, LEAST_SIDE), kernels)


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
    layers = *part(3, 32), *part(32, 32), *part(32, 48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
    network = nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)
    plain, _ = to_spiking(network, calibration_images=torch.rand(8, 3, 16, 16))
    use_winograd(network)
    student, _ = to_spiking(network, calibration_images=torch.rand(8, 3, 16, 16))
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
