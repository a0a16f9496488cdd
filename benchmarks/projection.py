"""What a training step should cost on a card that we do not have, by counting; and ImageNet on eight of them.

    python benchmarks/projection.py                              # the card of docs/gpu.md
    python benchmarks/projection.py --tflops 0.56 --terabytes 0.03 --batch 64 --link 0    # a processor, to check it

Operations are counted by torch's FlopCounterMode without computing anything; an addition and a multiplication are two.
The backward pass costs twice the forward pass. Bytes are those of bfloat16 activations that pass memory in batch norm
and neuron, as this package computes them: 10 per value forward (batch norm reads twice and writes, the neuron reads and
writes) and 16 backward (the neuron reads its input and a gradient and writes one; batch norm reads both twice and
writes one). Additions of skip connections, pooling, evaluation and the host are not counted. Convolutions, memory and
communication do not overlap.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from rivals import show
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spikedistill import Architecture

BYTES_FORWARD, BYTES_BACKWARD = 10, 16
IMAGENET = 1_281_167
"""Training images."""
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-18, CIFAR-10": (lambda: Architecture("resnet18", 10, 3, 64).build(), 32),
    "ResNet-18, ImageNet": (torchvision.models.resnet18, 224),
    "ResNet-34, ImageNet": (torchvision.models.resnet34, 224),
    "ResNet-50, ImageNet": (torchvision.models.resnet50, 224),
}


@dataclass(frozen=True)
class Network:
    """What one image costs in one forward pass, and the number of parameters."""

    operations: float
    neurons: float
    parameters: float

    @classmethod
    def counted(cls, build: Callable[[], nn.Module], size: int) -> "Network":
        with torch.device("meta"):
            network, image = build(), torch.empty(1, 3, size, size)
        neurons: list[int] = []
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda _, __, out: neurons.append(out.numel()))
        with FlopCounterMode(display=False) as counted:
            network(image)
        return cls(counted.get_total_flops(), sum(neurons), sum(p.numel() for p in network.parameters()))


@dataclass(frozen=True)
class Machine:
    """Operations and bytes per second of a card, and of the link between cards (0: one card)."""

    operations: float
    memory: float
    link: float


def step(network: Network, machine: Machine, way: str, timesteps: int, batch: int) -> dict[str, float]:
    """Seconds of a step by part, and gigabytes of a card.

    ``way``: exact (T steps forward and back), rate (T forward, one back) or graded (one of each).
    """
    forward = {"exact": timesteps, "rate": timesteps, "graded": 1}[way]
    backward = timesteps if way == "exact" else 1
    operations = network.operations * batch
    values = network.neurons * batch
    kept = 6 if way == "exact" else 8  # per value: results of convolution, batch norm and neuron; rates and slopes
    return {
        "convolutions": operations * (forward + 2 * backward) / machine.operations,
        "memory": values * (BYTES_FORWARD * forward + BYTES_BACKWARD * backward) / machine.memory,
        "teacher": operations / machine.operations + values * BYTES_FORWARD / machine.memory,
        "communication": 2 * 4 * network.parameters / machine.link if machine.link else 0.0,
        "gigabytes": (values * backward * kept + 16 * network.parameters) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400.0, help="sustained by convolutions in bfloat16 (TFLOP/s)")
    parser.add_argument("--terabytes", type=float, default=3.0, help="of memory per second, sustained (TB/s)")
    parser.add_argument("--link", type=float, default=0.3, help="between cards, in each direction (TB/s); 0: one card")
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128, help="per card")
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)
    given = parser.parse_args()
    machine = Machine(given.tflops * 1e12, given.terabytes * 1e12, given.link * 1e12)
    rows = []
    for name, (build, size) in NETWORKS.items():
        network = Network.counted(build, size)
        for way in ("exact", "rate", "graded"):
            parts = step(network, machine, way, given.timesteps, given.batch)
            seconds = sum(value for key, value in parts.items() if key != "gigabytes")
            cards = given.cards if machine.link else 1
            hours = IMAGENET / (given.batch * cards) * seconds * given.epochs / 3600
            shown = {f"{key} (ms)": 1000 * value for key, value in parts.items() if key != "gigabytes"}
            rows.append(
                {
                    "network": name,
                    "gradient": way,
                    **shown,
                    "step (ms)": 1000 * seconds,
                    "GB": parts["gigabytes"],
                    "hours": f"{hours:.1f}" if size == 224 else "",
                }
            )
    show(rows)


if __name__ == "__main__":
    main()
