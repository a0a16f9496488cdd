"""Weights of teachers as int8 (``benchmarks/teachers.py``)."""

import runpy
from pathlib import Path

import torch

from spikedistill import Architecture

PACKED = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "teachers.py"))


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_weights_differ_by_half_a_level_and_all_else_by_nothing():
    network = Architecture("airbench94", 10, 3, 16).build()
    with torch.no_grad():
        next(p for p in network.parameters() if p.ndim == 4)[0] = 0.0  # a channel without a scale
    tensors = network.state_dict()
    packed = PACKED["pack"](tensors)
    back = PACKED["unpack"](packed)
    assert back.keys() == tensors.keys()
    assert size(packed) < 0.3 * size(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            assert torch.equal(back[name], tensor)
        else:
            largest = tensor.abs().amax(tuple(range(1, tensor.ndim)), keepdim=True)
            assert back[name].dtype == torch.float32
            assert ((back[name] - tensor).abs() <= 0.501 * largest / 127).all()
