"""Where and in which number format a run computes, with the reason, so that it can be said."""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.student.winograd import quicken
from spikedistill.train.recipe import Training

FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Processor flags (x86, then ARM) under which bfloat16 convolutions beat float32."""


@dataclass(frozen=True)
class Precision:
    """A number format and why it was chosen."""

    dtype: torch.dtype
    reason: str


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        ConfigError: if it does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The device '{name}' cannot be used here ({reason}): give --device cpu, or auto.") from error
    return device


TRIM_THRESHOLD, MMAP_THRESHOLD, LARGEST_MAPS = -1, -3, -4
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of <malloc.h>."""


def keep_freed_memory() -> bool:
    """Have the C library reuse freed memory instead of handing it back to the system; whether it understood.

    Without it glibc maps every tensor above 32 MiB anew, and the system clears its pages one by one: a third of a
    student's training step on two cores, and up to half of the time it answers in. The price is memory: before version
    2.38 glibc leaves holes where it aligns (``benchmarks/memory.py`` shows how much).
    """
    return _tell_glibc({LARGEST_MAPS: 0, TRIM_THRESHOLD: -1})


def return_freed_memory() -> bool:
    """Have the C library hand every tensor from 1 MiB on back to the system at once; whether it understood.

    PyTorch then asks for it in pages of 2 MiB, so that it comes back in a few of them. PyTorch looks at this once, so
    call it before the first tensor. Left alone, glibc keeps freed tensors below 32 MiB, and holes among them.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return _tell_glibc({MMAP_THRESHOLD: 2**20})


def _tell_glibc(options: Mapping[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all([mallopt(option, value) for option, value in options.items()])


def choose_precision(config: Training, device: torch.device) -> Precision:
    """bfloat16 where it is asked for, or where ``auto`` finds hardware for it."""
    if config.precision == "fp32":
        return Precision(torch.float32, "float32 was asked for")
    if config.precision == "bf16":
        return Precision(torch.bfloat16, "bfloat16 was asked for")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return _precision(fast, torch.cuda.get_device_name(device))
    if device.type == "cpu":
        flags = _processor_flags()
        found = [flag for flag in FAST_BF16 if flag in flags]
        return _precision(bool(found), f"the processor ({found[0] if found else 'no bfloat16 instructions'})")
    return Precision(torch.float32, f"bfloat16 is not tried on {device.type}")


def choose_layout(config: Training, device: torch.device, network: nn.Module) -> torch.memory_format:
    """Channels last where the configuration asks for it, unless a network would learn from wrong gradients so.

    With channels last oneDNN writes past its workspace in the gradient of the weights of a strided 1 x 1 convolution
    whose input channels do not fill a vector of the processor: wrong values, or the process dies (oneDNN issue 6035;
    seen here with torch 2.14.1).
    """
    if not config.channels_last:
        return torch.contiguous_format
    vector = 8 if _has_avx2_alone(_processor_flags()) else 16
    broken = device.type == "cpu" and any(
        set(layer.kernel_size) == {1} and max(layer.stride) > 1 and layer.in_channels // layer.groups < vector
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d)
    )
    return torch.contiguous_format if broken else torch.channels_last


def settle(network: nn.Module, device: torch.device, layout: torch.memory_format, config: Training) -> str:
    """Move a network to its device and memory order, and let Winograd's algorithm compute its convolutions.

    On a CPU memory is kept from here on, unless the recipe forbids it (``keep_freed_memory``).

    Returns:
        Why they stay PyTorch's; empty where they do not.
    """
    if device.type == "cpu" and config.keep_memory:
        keep_freed_memory()
    network.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if config.convolutions == "torch":
        return "PyTorch's were asked for"
    if device.type != "cpu" or layout is not torch.channels_last or config.compile:
        return "they are for a CPU, channels last, and a step that is not compiled"
    if choose_precision(config, device).dtype is not torch.float32:
        return "they are for float32"
    if config.convolutions == "auto" and not _has_avx2_alone(_processor_flags()):
        return "auto takes them on processors with AVX2 and no AVX-512"
    return quicken(network)


def _has_avx2_alone(flags: set[str]) -> bool:
    return "avx2" in flags and "avx512f" not in flags


def _precision(fast: bool, who: str) -> Precision:
    if fast:
        return Precision(torch.bfloat16, f"{who} computes bfloat16")
    return Precision(torch.float32, f"{who} does not compute bfloat16")


def _processor_flags() -> set[str]:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return set()
    for line in information.read_text(encoding="utf-8").splitlines():
        if line.lower().startswith(("flags", "features")):
            return set(line.partition(":")[2].split())
    return set()
