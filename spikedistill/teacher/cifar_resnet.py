"""The CIFAR ResNets of He et al. (arXiv 1512.03385, section 4.2) with shortcuts of option A, which have no parameters.

Modules are named as in many public checkpoints, for instance those of akamaster/pytorch_resnet_cifar10, so that such
weights load. ``resnet20`` of the zoo has projections (option B) and other names.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class PaddedBlock(nn.Module):
    """A basic block. Where it halves the image, its shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        out += x
        return F.relu(out)


class CifarResNet(nn.Module):
    """Three stages of ``blocks`` blocks each: 6 blocks + 2 layers with weights.

    Args:
        blocks: blocks per stage.
        classes: number of logits, K.
        channels: input channels.
        width: channels of the first stage; the second and third have two and four times as many. Even.
    """

    def __init__(self, blocks: int, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1)
        self.layer2 = _stage(blocks, width, 2 * width, 2)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, K]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = [PaddedBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(PaddedBlock(inputs, outputs, stride), *rest)


def resnet20_a(classes: int = 10, channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20 with shortcuts of option A, 0.27 million parameters."""
    return CifarResNet(3, classes, channels, width)


def resnet56_a(classes: int = 10, channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-56 with shortcuts of option A, 0.85 million parameters."""
    return CifarResNet(9, classes, channels, width)


OPTION_A: dict[str, Callable[..., nn.Module]] = {"resnet20-a": resnet20_a, "resnet56-a": resnet56_a}
"""The networks of this file, by their names in the zoo."""
