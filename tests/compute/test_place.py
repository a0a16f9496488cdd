import functools
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spikedistill.compute import place as module
from spikedistill.compute.place import Place, choose_place
from spikedistill.compute.winograd import WinogradConv2d
from spikedistill.errors import ConfigError

CPU = torch.device("cpu")


def at(device="cpu", layout=torch.channels_last, **fields):
    """A place of which only these matter."""
    return Place(torch.device(device), torch.float32, layout, "float32 was asked for", **fields)


@pytest.fixture
def processor(monkeypatch):
    """Sets the flags of the processor."""
    return lambda *flags: monkeypatch.setattr(module, "processor_flags", lambda: set(flags))


@pytest.fixture
def anywhere(monkeypatch):
    """Every device that has a name exists; returns those that were tried."""
    tried = []
    monkeypatch.setattr(torch, "empty", lambda *size, device: tried.append(device))
    return tried


class TestDevice:
    def test_a_name_is_taken_at_its_word(self):
        assert choose_place("cpu").device == CPU

    @pytest.mark.parametrize(
        "cuda, mps, expected",
        [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
    )
    def test_auto_takes_the_best_there_is(self, monkeypatch, anywhere, cuda, mps, expected):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert choose_place("auto", "fp32").device == torch.device(expected)
        assert anywhere == [torch.device(expected)]

    def test_a_name_that_no_device_has_is_refused(self):
        with pytest.raises(ConfigError, match=r"The device 'gpu' cannot be used here .*--device cpu"):
            choose_place("gpu")

    def test_a_device_that_is_not_here_is_refused(self, monkeypatch):
        def missing(*_, device):
            raise AssertionError("Torch not compiled with CUDA enabled")

        monkeypatch.setattr(torch, "empty", missing)
        with pytest.raises(ConfigError, match=r"'cuda:7' cannot be used here \(Torch not compiled with CUDA enabled"):
            choose_place("cuda:7")


class TestPrecision:
    @pytest.mark.parametrize(
        "asked, dtype, reason",
        [("fp32", torch.float32, "float32 was asked for"), ("bf16", torch.bfloat16, "bfloat16 was asked for")],
    )
    def test_what_is_asked_for_is_taken_whatever_the_processor(self, processor, asked, dtype, reason):
        for flags in ((), ("amx_bf16",)):
            processor(*flags)
            chosen = choose_place("cpu", asked)
            assert (chosen.dtype, chosen.reason) == (dtype, reason)

    @pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16"])
    def test_auto_takes_bfloat16_where_the_processor_has_it_and_says_by_what(self, processor, flag):
        processor("sse", flag)
        chosen = choose_place("cpu")
        assert chosen.dtype == torch.bfloat16
        assert chosen.reason == f"the processor ({flag}) computes bfloat16"

    @pytest.mark.parametrize("flags", [(), ("sse", "avx2", "avx512f", "bf16x")])
    def test_auto_takes_float32_elsewhere_and_says_why(self, processor, flags):
        processor(*flags)
        chosen = choose_place("cpu")
        assert chosen.dtype == torch.float32
        assert chosen.reason == "the processor (no bfloat16 instructions) does not compute bfloat16"

    @pytest.mark.parametrize(
        "supported, dtype, verb", [(True, torch.bfloat16, "computes"), (False, torch.float32, "does not compute")]
    )
    def test_auto_asks_the_graphics_card(self, monkeypatch, anywhere, supported, dtype, verb):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 9")
        chosen = choose_place("cuda")
        assert (chosen.dtype, chosen.reason) == (dtype, f"Card 9 {verb} bfloat16")

    def test_auto_does_not_try_it_on_other_devices(self, anywhere):
        chosen = choose_place("mps")
        assert (chosen.dtype, chosen.reason) == (torch.float32, "bfloat16 is not tried on mps")

    @pytest.mark.parametrize("asked, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
    def test_large_operations_compute_in_it(self, asked, dtype):
        with choose_place("cpu", asked).autocast():
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


class TestLayout:
    """oneDNN issue 6035: a strided 1 x 1 convolution of few channels, with channels last, corrupts memory."""

    @pytest.mark.parametrize(
        "layer, narrow, wide",
        [
            (nn.Conv2d(15, 8, 1, stride=2), True, False),
            (nn.Conv2d(7, 8, 1, stride=2), False, False),
            (nn.Conv2d(32, 32, 1, stride=(1, 2), groups=4), True, False),
            (nn.Conv2d(16, 8, 1, stride=2), True, True),
            (nn.Conv2d(4, 8, 1), True, True),
            (nn.Conv2d(4, 8, 3, stride=2), True, True),
        ],
    )
    def test_channels_last_is_left_out_where_gradients_would_be_wrong(self, processor, layer, narrow, wide):
        for flags, last in ((["avx2"], narrow), (["avx2", "avx512f"], wide), (["asimd"], wide)):
            processor(*flags)
            expected = torch.channels_last if last else torch.contiguous_format
            assert at().for_training(nn.Sequential(layer)).layout is expected
            assert at("cuda").for_training(nn.Sequential(layer)).layout is torch.channels_last
            assert at(layout=torch.contiguous_format).for_training(layer).layout is torch.contiguous_format

    def test_a_place_that_trains_rightly_is_handed_on(self):
        place = at(torch_convolutions="")
        assert place.for_training(nn.Conv2d(32, 32, 3)) is place

    @pytest.mark.parametrize(
        "before, after", [("", "they are for a CPU and channels last"), ("asked for", "asked for")]
    )
    def test_without_channels_last_convolutions_are_pytorch_s(self, processor, before, after):
        processor("avx2")
        place = at(torch_convolutions=before).for_training(nn.Conv2d(4, 8, 1, stride=2))
        assert (place.device, place.dtype, place.reason) == (CPU, torch.float32, "float32 was asked for")
        assert place.torch_convolutions.startswith(after)
        network = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(32, 32, 3, padding=1))
        assert place.prepare(network) == place.torch_convolutions
        assert not any(isinstance(layer, WinogradConv2d) for layer in network)

    @pytest.mark.parametrize("last, layout", [(True, torch.channels_last), (False, torch.contiguous_format)])
    def test_the_order_of_memory_is_the_one_asked_for(self, last, layout):
        assert choose_place("cpu", channels_last=last).layout is layout

    @pytest.mark.parametrize("channels", [8, 12, 16, 24])
    def test_gradients_are_those_of_the_usual_memory_order(self, channels):
        torch.manual_seed(0)
        layer = nn.Conv2d(channels, 16, 1, stride=2, bias=False).double()
        images, grad = torch.randn(4, channels, 10, 10).double(), torch.randn(4, 16, 5, 5).double()
        layer(images).backward(grad)
        expected = layer.weight.grad.float()
        used = nn.Conv2d(channels, 16, 1, stride=2, bias=False)
        layout = choose_place("cpu").for_training(used).layout
        used.load_state_dict(layer.state_dict())
        used.to(memory_format=layout)(images.float().contiguous(memory_format=layout)).backward(grad.float())
        torch.testing.assert_close(used.weight.grad, expected, rtol=1e-4, atol=1e-4)


class TestConvolutions:
    @pytest.mark.parametrize(
        "asked, flags, last, reason",
        [
            ("auto", ["avx2"], True, ""),
            ("winograd", ["avx2"], True, ""),
            ("torch", ["avx2"], True, "PyTorch's were asked for"),
            ("auto", ["avx2", "avx512f"], True, "auto takes them with AVX2 alone"),
            ("auto", ["avx2", "avx512f", "avx512_bf16"], True, ""),
            ("auto", ["avx2", "avx512f", "avx512_bf16", "amx_bf16"], True, "auto takes them with AVX2 alone"),
            ("auto", ["asimd"], True, "auto takes them with AVX2 alone"),
            ("winograd", ["avx2", "avx512f"], True, ""),
            ("winograd", ["avx2", "avx512_bf16", "amx_bf16"], True, ""),
            ("winograd", ["avx2"], False, "channels last"),
        ],
    )
    def test_are_winograd_s_where_they_are_asked_for_or_known_to_be_faster(self, processor, asked, flags, last, reason):
        processor(*flags)
        network = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
        place = choose_place("cpu", channels_last=last, convolutions=asked)
        found = place.prepare(network)
        assert reason in found and bool(reason) == bool(found)
        assert type(network[0]) is (nn.Conv2d if reason else WinogradConv2d)
        assert network[0].weight.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert found == place.torch_convolutions

    def test_other_devices_keep_pytorch_s(self):
        network = nn.Conv2d(32, 32, 3, padding=1)
        reason = choose_place("meta", convolutions="winograd").prepare(network)
        assert "for a CPU" in reason and type(network) is nn.Conv2d and network.weight.is_meta


class TestMemory:
    @pytest.mark.parametrize("device, keep, told", [("cpu", True, 1), ("cpu", False, 0), ("meta", True, 0)])
    def test_of_a_cpu_is_kept_when_networks_are_prepared_unless_it_is_not_wanted(self, monkeypatch, device, keep, told):
        calls = []
        monkeypatch.setattr(module, "keep_freed_memory", lambda: calls.append(1))
        place = choose_place(device, keep_memory=keep)
        assert calls == []
        place.prepare(nn.Linear(2, 2))
        assert len(calls) == told


FAULTS = """
import resource, sys, torch
from spikedistill.compute.place import keep_freed_memory, return_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
elif sys.argv[1] == "pages":
    print(return_freed_memory())
for _ in range(10):  # until the heap has settled
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@functools.cache
def faults(how, script=FAULTS):
    said = subprocess.run([sys.executable, "-c", script, how], check=True, capture_output=True, text=True).stdout
    return said.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_used_again_without_the_system_clearing_it():
    (lost,), (understood, kept) = faults("lose"), faults("keep")
    assert understood == "True"
    assert int(kept) < int(lost) / 10


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not PAGES.exists() or "[never]" in PAGES.read_text(), reason="the system has no large pages")
def test_returned_memory_comes_back_in_large_pages():
    (lost,), (_, taken) = faults("lose"), faults("pages")
    assert int(taken) < int(lost) / 10


HOLES = """
import resource, sys, torch
from pathlib import Path
from spikedistill.compute.place import return_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
if sys.argv[1] == "pages":
    print(return_freed_memory())
torch.ones(7_500_000)  # from here on glibc takes what is smaller from its heap, if left alone
before = resident()
tensors = [torch.ones(1_000_000 if number % 2 else 100_000) for number in range(200)]
del tensors[1::2]
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_returned_memory_leaves_no_holes_between_what_is_in_use():
    (lost,), (understood, taken) = faults("lose", HOLES), faults("pages", HOLES)
    assert understood == "True"
    assert int(lost) > 400e6 and int(taken) < 100e6  # 40 MB are in use


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: SimpleNamespace())
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert module.keep_freed_memory() is False and module.return_freed_memory() is False
