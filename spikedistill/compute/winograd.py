"""3 x 3 convolutions on a CPU in less time than PyTorch's: ``use_winograd(network)``.

Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308) computes 4 x 4 results with 36 products instead of 144. The
transforms are in ``winograd.c``. The system's C compiler builds it at the first use.

Sums are formed in another order, so results in float32 differ from PyTorch's by about 1e-5 of the largest one. Under
autocast to bfloat16, images and results are bfloat16, while weights, their gradients and all sums are float32. So only
results are rounded. Nothing depends on the number of threads.

torch.compile takes each of them as one operation. PyTorch's convolution is used everywhere else: for other shapes,
devices, number formats and memory orders, in exported networks, and with too few channels or pixels for the transforms
to pay.
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

from spikedistill.compute.processor import has_long_vectors
from spikedistill.files import note

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
BLOCK, LONG_BLOCK = 24, 96
"""Tiles that one thread takes through all three stages at a time; the second for the gradient of weights."""
LEAST_CHANNELS = 32
"""With fewer channels, the transforms cost what they save."""
LEAST_TILES = 32
"""With fewer tiles of 4 x 4 results per batch, the transform of the weights does not pay."""
LEAST_SIDE, LEAST_WIDE = 8, 64
"""Smallest images and fewest channels in bfloat16, whose products PyTorch computes in half of the time of float32's. In
smaller images it also leaves out many products with the zeros around them."""


class WinogradConv2d(nn.Conv2d):
    """A ``Conv2d`` of 3 x 3, stride 1 and padding 1, computed by Winograd's algorithm where it applies."""

    def _get_name(self) -> str:
        """Its name in print and in fingerprints: it is the same network as with a ``Conv2d``."""
        return "Conv2d"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if applies(input, weight):
            given = input.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else input
            return _convolve(given, weight, bias)
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
    if not _is_built():
        return str(_library())
    for layer in fitting:
        layer.__class__ = WinogradConv2d
    return ""


@functools.cache
def lanes() -> int:
    """Numbers in a vector of this processor. Channels must be a multiple of it."""
    return 16 if has_long_vectors() else 8


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether images ``[N, C, H, W]`` and kernels ``[K, C, 3, 3]`` can be convolved here, in less time.

    Both are float32; under autocast to bfloat16 the images are either.
    """
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") is torch.bfloat16 and known_to_fit(x, weight)
    return x.dtype is torch.float32 and known_to_fit(x, weight)


def known_to_fit(x: Tensor, weight: Tensor) -> bool:
    """``applies`` outside of autocast too, for the gradients of a convolution of bfloat16 images."""
    if type(x) is not Tensor or x.ndim != 4 or not _may_be_used():
        return False
    plain = x.device.type == weight.device.type == "cpu" and weight.dtype == torch.float32
    if not plain or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    n, c, h, w = x.shape
    half = x.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu")
    pays = not half or (min(h, w) >= LEAST_SIDE and min(weight.shape[:2]) >= LEAST_WIDE)
    return pays and c == weight.shape[1] and _tiles(n, h, w) >= LEAST_TILES


def winograd_backward(
    x: Tensor, weight: Tensor, grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The needed gradients of input, weights and bias, from the gradient ``grad`` of the results."""
    grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)  # winograd.c takes one format for both
    return (
        _to_input(grad, weight) if needed[0] else None,
        _to_weight(x, grad, weight) if needed[1] else None,
        grad.sum((0, 2, 3), dtype=torch.float32) if needed[2] else None,
    )


@torch.library.custom_op("spikedistill::convolve", mutates_args=(), schema="(Tensor x, Tensor w, Tensor? b) -> Tensor")
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _convolved(x, weight, bias, list(weight.stride()), weight.data_ptr(), weight.shape[0])


@torch.library.custom_op("spikedistill::to_input", mutates_args=(), schema="(Tensor grad, Tensor w) -> Tensor")
def _to_input(grad: Tensor, weight: Tensor) -> Tensor:
    """The convolution with the weights turned by half a circle and the channels exchanged."""
    k, c, down, right = weight.stride()
    last = weight.data_ptr() + weight.element_size() * 2 * (down + right)
    return _convolved(grad, weight, None, [c, k, -down, -right], last, weight.shape[1])


@torch.library.custom_op("spikedistill::to_weight", mutates_args=(), schema="(Tensor x, Tensor g, Tensor w) -> Tensor")
def _to_weight(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    x, grad = (given.contiguous(memory_format=torch.channels_last) for given in (x, grad))
    to_weight, k = torch.empty_like(weight), grad.shape[1]
    places = (_at(x), _at(grad), _at(to_weight), _strides(to_weight.stride()))
    _compute("weight_gradient", places, x, k, LONG_BLOCK)
    return to_weight


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _images(x, weight.shape[0])


@_to_input.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return _images(grad, weight.shape[1])


@_to_weight.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return winograd_backward(x, weight, grad, ctx.needs_input_grad)


_convolve.register_autograd(_backward, setup_context=_remember)


class _Shape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("n", "h", "w", "c", "k", "block", "half"))


def _fits(layer: nn.Conv2d) -> bool:
    square = (layer.kernel_size, layer.stride, layer.dilation) == ((3, 3), (1, 1), (1, 1))
    padded = layer.padding in ((1, 1), "same") and layer.padding_mode == "zeros"
    wide = all(c >= LEAST_CHANNELS and c % lanes() == 0 for c in (layer.in_channels, layer.out_channels))
    return square and padded and wide and layer.groups == 1


def _tiles(n: int, h: int, w: int) -> int:
    return n * -(-h // 4) * -(-w // 4)


def _images(x: Tensor, channels: int) -> Tensor:
    n, _, h, w = x.shape
    return torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, strides: list[int], first: int, k: int) -> Tensor:
    """The convolution with ``k`` kernels whose elements lie at ``first`` and at ``strides`` from there."""
    x = x.contiguous(memory_format=torch.channels_last)
    n, _, h, w = x.shape
    bias = None if bias is None else bias.contiguous()
    block = min(BLOCK, -(-_tiles(n, h, w) // torch.get_num_threads()))
    y = _images(x, k)
    _compute("convolve", (_at(x), first, _strides(strides), _at(bias), _at(y)), x, k, block)
    return y


def _compute(name: str, places: tuple[Any, ...], x: Tensor, k: int, block: int) -> None:
    """Call a function of ``winograd.c`` for images and ``k`` other channels, with the memory that it works in."""
    library, threads = _library(), torch.get_num_threads()
    n, c, h, w = x.shape
    transformed = torch.empty(library.weight_floats(c, k), dtype=torch.float32)
    space = torch.empty(threads * library.space_floats(c, k, block), dtype=torch.float32)
    shape = _Shape(n, h, w, c, k, block, x.dtype == torch.bfloat16)
    getattr(library, name)(*places, _at(transformed), _at(space), ctypes.byref(shape), threads)


def _strides(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * 4)(*values)


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _may_be_used() -> bool:
    """Not in a network that is exported, which runs elsewhere, nor where the functions cannot be built."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 cannot tell them apart
    return not exporting() and _is_built()


BUILT: list[bool] = []
"""Whether the functions could be built, once known. torch.compile reads this, since it cannot follow the build."""


def _is_built() -> bool:
    if not torch.compiler.is_compiling():
        BUILT[:] = [not isinstance(_library(), str)]
    return BUILT == [True]


@functools.cache
def _library() -> Any:
    """The compiled functions of ``winograd.c``, or a text that says why there are none."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        return f"no C compiler ({', '.join(COMPILERS)}) was found"
    note("building fast convolutions (winograd.c), about 2 s")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "winograd.so"
        flags = ["-O3", "-march=native", f"-DLANES={lanes()}", "-fopenmp", "-shared", "-fPIC"]
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
