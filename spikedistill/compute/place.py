"""The device, number format and memory order of a run, chosen once and kept with the reason."""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from spikedistill.compute.processor import processor_flags
from spikedistill.compute.winograd import use_winograd
from spikedistill.errors import ConfigError, one_of

Precision = Literal["auto", "bf16", "fp32"]
Convolutions = Literal["auto", "torch", "winograd"]
FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Processor flags (x86, then ARM) with which bfloat16 convolutions are faster than float32."""
ONLY_THERE = "they are for a CPU and channels last"


@dataclass(frozen=True)
class Place:
    """Where a network computes.

    Args:
        device: device of weights and batches.
        dtype: number format of the large operations.
        layout: memory order of images and kernels.
        reason: why this number format was chosen.
        torch_convolutions: why PyTorch's convolutions are used; empty if ours may be used (``compute/winograd.py``).
        keep_memory: whether to keep freed memory on a Linux CPU (``keep_freed_memory``).
    """

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format
    reason: str
    torch_convolutions: str = "PyTorch's were asked for"
    keep_memory: bool = True

    def autocast(self) -> torch.autocast:
        """The number format of the large operations, as a context."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, network: nn.Module) -> str:
        """Move a network to the device and memory order, in place, and use our convolutions where they are allowed.

        With ``keep_memory``, the process keeps freed CPU memory from here on.

        Returns:
            Why all convolutions are PyTorch's; empty if some are ours.
        """
        if self.device.type == "cpu" and self.keep_memory:
            keep_freed_memory()
        network.to(self.device)
        if not has_volumes(network):
            network.to(memory_format=self.layout)
        return self.torch_convolutions or use_winograd(network)

    def for_training(self, network: nn.Module) -> "Place":
        """The same place, without channels last where training this network does not allow it.

        There are two cases. Kernels of 3D convolutions have no channels-last order here. And oneDNN computes one
        gradient wrongly with channels last: that of the weights of a strided 1 x 1 convolution whose input channels do
        not fill a vector of the processor. It writes past its workspace, so values are wrong or the process dies
        (oneDNN issue 6035; seen here with torch 2.14.1).
        """
        broken = self.device.type == "cpu" and _has_broken_gradient(network)
        if self.layout is not torch.channels_last or not (broken or has_volumes(network)):
            return self
        return replace(self, layout=torch.contiguous_format, torch_convolutions=self.torch_convolutions or ONLY_THERE)


def choose_place(
    device: str = "auto",
    precision: Precision = "auto",
    channels_last: bool = True,
    convolutions: Convolutions = "auto",
    keep_memory: bool = True,
) -> Place:
    """Choose where and how to compute on this machine.

    Args:
        device: cpu, cuda, mps ...; ``auto`` takes CUDA, then Apple's MPS, then the CPU.
        precision: bfloat16 or float32; ``auto`` takes bfloat16 if the hardware computes it. On a CUDA card ``fp32``
            switches TF32 off for this process.
        channels_last: whether images have their channels last in memory.
        convolutions: PyTorch's, or ours by Winograd's algorithm; ``auto`` takes ours on processors where we measured
            them to be faster.
        keep_memory: see ``Place``.

    Raises:
        ConfigError: if the device cannot be used, or ``precision`` or ``convolutions`` is not a known choice.
    """
    one_of("precision", precision, get_args(Precision))
    one_of("choice of convolutions", convolutions, get_args(Convolutions))
    where = _device(device)
    if where.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision != "fp32"  # else float32 convolutions have 10 bits there
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dtype, reason = _precision(precision, where)
    why = _torch_convolutions(convolutions, where, layout, dtype)
    return Place(where, dtype, layout, reason, why, keep_memory)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # an empty one would not touch the card
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The device '{name}' cannot be used here ({reason}): give --device cpu, or auto.") from error
    return device


def _precision(asked: Precision, device: torch.device) -> tuple[torch.dtype, str]:
    if asked != "auto":
        dtype = torch.float32 if asked == "fp32" else torch.bfloat16
        return dtype, f"{str(dtype).removeprefix('torch.')} was asked for"
    if device.type not in ("cuda", "cpu"):
        return torch.float32, f"bfloat16 is not tried on {device.type}"
    if device.type == "cuda":
        fast, who = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    else:
        found = [flag for flag in FAST_BF16 if flag in processor_flags()]
        fast, who = bool(found), f"the processor ({found[0] if found else 'no bfloat16 instructions'})"
    return torch.bfloat16 if fast else torch.float32, f"{who} {'computes' if fast else 'does not compute'} bfloat16"


def _torch_convolutions(
    asked: Convolutions, device: torch.device, layout: torch.memory_format, dtype: torch.dtype
) -> str:
    """Why every network uses PyTorch's convolutions; empty if ours may be used."""
    if asked == "torch":
        return "PyTorch's were asked for"
    if device.type != "cpu" or layout is not torch.channels_last:
        return ONLY_THERE
    flags = processor_flags()
    short = _has_avx2_alone(flags) and dtype is torch.float32
    long = "avx512_bf16" in flags and "amx_bf16" not in flags
    if asked == "auto" and not (short or long):
        return "auto takes them with AVX2 alone in float32, and with AVX-512 and bfloat16 without AMX"
    return ""


def has_volumes(network: nn.Module) -> bool:
    """Whether a network has 3D convolutions, whose kernels have no channels-last order here."""
    return any(parameter.ndim == 5 for parameter in network.parameters())


def _has_broken_gradient(network: nn.Module) -> bool:
    """Whether oneDNN's weight gradient of some layer is wrong with channels last: see ``Place.for_training``."""
    vector = 8 if _has_avx2_alone(processor_flags()) else 16
    return any(
        set(layer.kernel_size) == {1} and max(layer.stride) > 1 and layer.in_channels // layer.groups < vector
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d)
    )


def _has_avx2_alone(flags: set[str]) -> bool:
    return "avx2" in flags and "avx512f" not in flags


TRIM_THRESHOLD, MMAP_THRESHOLD, LARGEST_MAPS = -1, -3, -4
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of <malloc.h>."""


def keep_freed_memory() -> bool:
    """Make the C library (glibc) reuse freed memory instead of returning it to the system.

    By default glibc maps every tensor above 32 MiB anew, and the system clears its pages one by one. That takes a third
    of a student's training step on two cores, and up to half of the time of inference. The price is memory: before
    version 2.38, alignment leaves holes (``benchmarks/memory.py`` shows how much).

    Returns:
        Whether the C library accepted the options; False for any other than glibc.
    """
    return _tell_glibc({LARGEST_MAPS: 0, TRIM_THRESHOLD: -1})


def return_freed_memory() -> bool:
    """Make the C library (glibc) return every freed tensor of 1 MiB or more to the system at once.

    Call it before the first tensor. PyTorch then asks for pages of 2 MiB, so that a new tensor needs few of them, and
    it reads this setting once. By default glibc keeps freed tensors below 32 MiB, with holes between them.

    Returns:
        Whether the C library accepted the options; False for any other than glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return _tell_glibc({MMAP_THRESHOLD: 2**20})


def _tell_glibc(options: Mapping[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all([mallopt(option, value) for option, value in options.items()])
