"""A large teacher as a small file: weights as int8 with a scale per output channel, and back as float32.

    python benchmarks/teachers.py pack RUN benchmarks/teachers/NAME.safetensors
    python benchmarks/teachers.py unpack benchmarks/teachers/NAME.safetensors runs/NAME.safetensors
    spikedistill distill cifar10-strong --teacher runs/NAME.safetensors

So a student can be trained without training its teacher first. Kernels and matrices are rounded to 255 levels; norms,
biases and buffers stay as they are. The file keeps what that of ``teach`` says of its network.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from spikedistill.deliver.onnx import to_int8
from spikedistill.files import read_tensors, weights_file, write_tensors

SCALE = ".scale"
"""What the name of a scale ends with."""


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of two and more dimensions as int8, each with its scales ``[K, 1, ...]`` beside it."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            packed[name] = tensor
            continue
        rounded, scales = map(torch.from_numpy, to_int8(tensor.float().numpy(), 0))
        packed[name], packed[name + SCALE] = rounded, scales.reshape(-1, *[1] * (tensor.ndim - 1))
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float32."""
    scales = {name.removesuffix(SCALE): scale for name, scale in packed.items() if name.endswith(SCALE)}
    return {
        name: tensor * scales[name] if name in scales else tensor
        for name, tensor in packed.items()
        if not name.endswith(SCALE)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path, help="a run of teach or its weights; to unpack: a packed file")
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    given = parser.parse_args()
    tensors, facts = read_tensors(weights_file(given.source))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(given.out, {"pack": pack, "unpack": unpack}[given.action](tensors), facts)
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
