import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.student.winograd import WinogradConv2d
from spikedistill.train import device as module
from spikedistill.train.device import choose_device, choose_layout, choose_precision, settle
from spikedistill.train.recipe import Training

CPU = torch.device("cpu")


class TestDevice:
    def test_a_name_is_taken_at_its_word(self):
        assert choose_device("cpu") == CPU

    @pytest.mark.parametrize(
        "cuda, mps, expected",
        [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
    )
    def test_auto_takes_the_best_there_is(self, monkeypatch, cuda, mps, expected):
        tried = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch, "empty", lambda *size, device: tried.append(device))
        assert choose_device("auto") == torch.device(expected)
        assert tried == [torch.device(expected)]

    def test_a_name_that_no_device_has_is_refused(self):
        with pytest.raises(ConfigError, match=r"The device 'gpu' cannot be used here .*--device cpu"):
            choose_device("gpu")

    def test_a_device_that_is_not_here_is_refused(self, monkeypatch):
        def missing(*_, device):
            raise AssertionError("Torch not compiled with CUDA enabled")

        monkeypatch.setattr(torch, "empty", missing)
        with pytest.raises(ConfigError, match=r"'cuda:7' cannot be used here \(Torch not compiled with CUDA enabled"):
            choose_device("cuda:7")


class TestPrecision:
    @pytest.mark.parametrize(
        "asked, dtype, reason",
        [("fp32", torch.float32, "float32 was asked for"), ("bf16", torch.bfloat16, "bfloat16 was asked for")],
    )
    def test_what_is_asked_for_is_taken_whatever_the_processor(self, monkeypatch, asked, dtype, reason):
        for flags in (set(), {"amx_bf16"}):
            monkeypatch.setattr(module, "_processor_flags", lambda flags=flags: flags)
            chosen = choose_precision(Training(precision=asked), CPU)
            assert (chosen.dtype, chosen.reason) == (dtype, reason)

    @pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16"])
    def test_auto_takes_bfloat16_where_the_processor_has_it_and_says_by_what(self, monkeypatch, flag):
        monkeypatch.setattr(module, "_processor_flags", lambda: {"sse", flag})
        chosen = choose_precision(Training(), CPU)
        assert chosen.dtype == torch.bfloat16
        assert chosen.reason == f"the processor ({flag}) computes bfloat16"

    @pytest.mark.parametrize("flags", [set(), {"sse", "avx2", "avx512f", "bf16x"}])
    def test_auto_takes_float32_elsewhere_and_says_why(self, monkeypatch, flags):
        monkeypatch.setattr(module, "_processor_flags", lambda: flags)
        chosen = choose_precision(Training(), CPU)
        assert chosen.dtype == torch.float32
        assert chosen.reason == "the processor (no bfloat16 instructions) does not compute bfloat16"

    @pytest.mark.parametrize(
        "supported, dtype, verb", [(True, torch.bfloat16, "computes"), (False, torch.float32, "does not compute")]
    )
    def test_auto_asks_the_graphics_card(self, monkeypatch, supported, dtype, verb):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 9")
        chosen = choose_precision(Training(), torch.device("cuda"))
        assert (chosen.dtype, chosen.reason) == (dtype, f"Card 9 {verb} bfloat16")

    def test_auto_does_not_try_it_on_other_devices(self):
        chosen = choose_precision(Training(), torch.device("mps"))
        assert (chosen.dtype, chosen.reason) == (torch.float32, "bfloat16 is not tried on mps")


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
    def test_channels_last_is_left_out_where_gradients_would_be_wrong(self, monkeypatch, layer, narrow, wide):
        for flags, last in (({"avx2"}, narrow), ({"avx2", "avx512f"}, wide), ({"asimd"}, wide)):
            monkeypatch.setattr(module, "_processor_flags", lambda flags=flags: flags)
            expected = torch.channels_last if last else torch.contiguous_format
            assert choose_layout(Training(), CPU, nn.Sequential(layer)) is expected
            assert choose_layout(Training(), torch.device("cuda"), nn.Sequential(layer)) is torch.channels_last
            assert choose_layout(Training(channels_last=False), CPU, layer) is torch.contiguous_format

    @pytest.mark.parametrize("channels", [8, 12, 16, 24])
    def test_gradients_are_those_of_the_usual_memory_order(self, channels):
        torch.manual_seed(0)
        layer = nn.Conv2d(channels, 16, 1, stride=2, bias=False).double()
        images, grad = torch.randn(4, channels, 10, 10).double(), torch.randn(4, 16, 5, 5).double()
        layer(images).backward(grad)
        expected = layer.weight.grad.float()
        used = nn.Conv2d(channels, 16, 1, stride=2, bias=False)
        layout = choose_layout(Training(), CPU, used)
        used.load_state_dict(layer.state_dict())
        used.to(memory_format=layout)(images.float().contiguous(memory_format=layout)).backward(grad.float())
        torch.testing.assert_close(used.weight.grad, expected, rtol=1e-4, atol=1e-4)


class TestConvolutions:
    @pytest.mark.parametrize(
        "asked, flags, layout, compiled, reason",
        [
            ("auto", {"avx2"}, torch.channels_last, False, ""),
            ("winograd", {"avx2"}, torch.channels_last, False, ""),
            ("torch", {"avx2"}, torch.channels_last, False, "PyTorch's were asked for"),
            ("auto", {"avx2", "avx512f"}, torch.channels_last, False, "auto takes them on processors with AVX2"),
            ("auto", {"asimd"}, torch.channels_last, False, "auto takes them on processors with AVX2"),
            ("winograd", {"avx2", "avx512f"}, torch.channels_last, False, ""),
            ("winograd", {"avx2", "avx512_bf16"}, torch.channels_last, False, "they are for float32"),
            ("winograd", {"avx2"}, torch.contiguous_format, False, "channels last"),
            ("winograd", {"avx2"}, torch.channels_last, True, "a step that is not compiled"),
        ],
    )
    def test_are_winograd_s_where_they_are_asked_for_or_known_to_be_faster(
        self, monkeypatch, asked, flags, layout, compiled, reason
    ):
        monkeypatch.setattr(module, "_processor_flags", lambda: flags)
        network = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
        found = settle(network, CPU, layout, Training(convolutions=asked, compile=compiled))
        assert reason in found and bool(reason) == bool(found)
        assert type(network[0]) is (nn.Conv2d if reason else WinogradConv2d)
        assert network[0].weight.is_contiguous(memory_format=layout)

    def test_other_devices_keep_pytorch_s(self):
        network = nn.Conv2d(32, 32, 3, padding=1)
        reason = settle(network, torch.device("meta"), torch.channels_last, Training(convolutions="winograd"))
        assert "for a CPU" in reason and type(network) is nn.Conv2d and network.weight.is_meta


class TestProcessorFlags:
    @pytest.mark.parametrize(
        "text, flags",
        [
            ("processor\t: 0\nflags\t\t: fpu amx_bf16 avx2\n\nflags\t\t: other\n", {"fpu", "amx_bf16", "avx2"}),
            ("processor\t: 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
            ("model name\t: Something\n", set()),
            (None, set()),
        ],
    )
    def test_are_read_from_the_first_processor(self, monkeypatch, text, flags):
        file = SimpleNamespace(exists=lambda: text is not None, read_text=lambda encoding: text)
        monkeypatch.setattr(module, "Path", lambda name: file)
        assert module._processor_flags() == flags


FAULTS = """
import resource, sys, torch
from spikedistill.train.device import keep_freed_memory, return_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
elif sys.argv[1] == "pages":
    print(return_freed_memory())
for _ in range(3):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


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
from spikedistill.train.device import return_freed_memory
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
