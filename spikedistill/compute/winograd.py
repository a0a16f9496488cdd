"""3 x 3 convolutions in float32 on a CPU, about twice as fast as PyTorch's: ``use_winograd(network)``.

Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308) computes 4 x 4 results with 36 products instead of 144. The
transforms are in ``winograd.c``. The system's C compiler builds it at the first use.

Sums are formed in another order, so results differ from PyTorch's by about 1e-5 of the largest one. They do not depend
on the number of threads.

PyTorch's convolution is used everywhere else: for other shapes, devices, number formats and memory orders, under
autocast and torch.compile, and with too few channels or pixels for the transforms to pay.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.files import note

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
BLOCK = 48
"""Tiles that one thread takes through all three stages at a time."""
LANES, LEAST_CHANNELS = 8, 32
"""Channels must be a multiple of the first and at least the second. With fewer, the transforms cost what they save."""
LEAST_TILES = 32
"""With fewer tiles of 4 x 4 results per batch, the transform of the weights does not pay."""


class WinogradConv2d(nn.Conv2d):
    """A ``Conv2d`` of 3 x 3, stride 1 and padding 1, computed by Winograd's algorithm where it applies."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if applies(input, weight):
            return _Convolution.apply(input, weight, bias)
        return super()._conv_forward(input, weight, bias)


def use_winograd(network: nn.Module) -> str:
    """Use Winograd's algorithm for a network's 3 x 3 convolutions wherever it applies, in place.

    Such a layer becomes a ``WinogradConv2d``, which is a ``Conv2d``. Weights, names and ``state_dict`` do not change.

    Args:
        network: any network, in any mode. The algorithm applies to images in channels-last order.

    Returns:
        Why no layer was changed; empty if one was.
    """
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    fitting = [layer for layer in convolutions if type(layer) in (nn.Conv2d, WinogradConv2d) and _fits(layer)]
    if not fitting:
        return f"no convolution of 3 x 3, stride 1 and padding 1 over {LEAST_CHANNELS} channels or more"
    if isinstance(built := _library(), str):
        return built
    for layer in fitting:
        layer.__class__ = WinogradConv2d
    return ""


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether images ``[N, C, H, W]`` and kernels ``[K, C, 3, 3]`` can be convolved here, in less time."""
    if type(x) is not Tensor or x.ndim != 4 or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    plain = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu") or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    n, c, h, w = x.shape
    return c == weight.shape[1] and _tiles(n, h, w) >= LEAST_TILES and not isinstance(_library(), str)


def winograd_backward(
    x: Tensor, weight: Tensor, grad: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The needed gradients of input, weights and bias, from the gradient ``grad`` of the results."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    return (
        _convolved(grad, weight, None, turned=True) if needed[0] else None,
        _to_weight(x, grad, weight) if needed[1] else None,
        grad.sum((0, 2, 3)) if needed[2] else None,
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        return winograd_backward(x, weight, grad, ctx.needs_input_grad)


class _Shape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("n", "h", "w", "c", "k", "block"))


def _fits(layer: nn.Conv2d) -> bool:
    square = (layer.kernel_size, layer.stride, layer.dilation) == ((3, 3), (1, 1), (1, 1))
    padded = layer.padding in ((1, 1), "same") and layer.padding_mode == "zeros"
    wide = all(c >= LEAST_CHANNELS and c % LANES == 0 for c in (layer.in_channels, layer.out_channels))
    return square and padded and wide and layer.groups == 1


def _tiles(n: int, h: int, w: int) -> int:
    return n * -(-h // 4) * -(-w // 4)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool = False) -> Tensor:
    """The convolution; or with ``turned`` the gradient of its input from that of its results ``[N, K, H, W]``."""
    library = _library()
    strides, first = list(weight.stride()), weight.data_ptr()
    if turned:
        first += weight.element_size() * 2 * (strides[2] + strides[3])
        strides = [strides[1], strides[0], -strides[2], -strides[3]]
    n, c, h, w = x.shape
    k = weight.shape[1 if turned else 0]
    bias = None if bias is None else bias.contiguous()
    threads = torch.get_num_threads()
    block = min(BLOCK, -(-_tiles(n, h, w) // threads))
    y = torch.empty((n, k, h, w), dtype=torch.float32, memory_format=torch.channels_last)
    transformed = torch.empty(library.weight_floats(c, k), dtype=torch.float32)
    space = torch.empty(threads * library.space_floats(c, k, block), dtype=torch.float32)
    library.convolve(
        *(_at(x), first, _strides(strides), _at(bias), _at(y)),
        *(_at(transformed), _at(space), ctypes.byref(_Shape(n, h, w, c, k, block)), threads),
    )
    return y


def _to_weight(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    library = _library()
    (n, c, h, w), k = x.shape, grad.shape[1]
    to_weight = torch.empty_like(weight)
    threads = torch.get_num_threads()
    transformed = torch.empty(library.weight_floats(c, k), dtype=torch.float32)
    space = torch.empty(threads * library.space_floats(c, k, BLOCK), dtype=torch.float32)
    shape = _Shape(n, h, w, c, k, BLOCK)
    library.weight_gradient(
        *(_at(x), _at(grad), _at(to_weight), _strides(to_weight.stride()), _at(transformed), _at(space)),
        ctypes.byref(shape),
        threads,
    )
    return to_weight


def _strides(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * 4)(*values)


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def _library() -> Any:
    """The compiled functions of ``winograd.c``, or a text that says why there are none."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        return f"no C compiler ({', '.join(COMPILERS)}) was found"
    note("building fast convolutions (winograd.c), about 2 s")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "winograd.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            command = [*compiler.split(), *flags, str(SOURCE), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                return f"{compiler}: {next(iter(done.stderr.strip().splitlines()), 'failed')}"
            library = ctypes.CDLL(str(built))
        except (OSError, subprocess.SubprocessError) as error:
            return f"{compiler}: {error}"
    _declare(library.weight_floats, ctypes.c_int64, [ctypes.c_int64] * 2)
    _declare(library.space_floats, ctypes.c_int64, [ctypes.c_int64] * 3)
    shape = ctypes.POINTER(_Shape)
    _declare(library.convolve, None, [*[ctypes.c_void_p] * 7, shape, ctypes.c_int])
    _declare(library.weight_gradient, None, [*[ctypes.c_void_p] * 6, shape, ctypes.c_int])
    return library


def _declare(function: Any, result: Any, arguments: list[Any]) -> None:
    function.restype, function.argtypes = result, arguments
