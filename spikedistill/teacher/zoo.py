"""The architectures, defined once as ordinary ANNs. ``to_spiking`` makes spiking networks of them.

Every function takes ``classes``, ``channels`` (1 or 3 input channels) and ``width`` (channels of the first stage). The
networks accept images of 8 x 8 pixels or more, those of ``airbench.py`` 9 x 9. Stages are called ``layer1``,
``layer2``, ... as in torchvision. Convolutions before a batch norm have no bias.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.teacher.airbench import airbench94, airbench95, airbench96
from spikedistill.teacher.cifar_resnet import OPTION_A


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Convolution, norm, activation, convolution, norm, plus the shortcut, activation (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """Norm, activation, convolution, twice, plus the shortcut (He et al., arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.projection: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        active = self.relu1(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(active)
        return self.conv2(self.relu2(self.bn2(self.conv1(active)))) + shortcut


class PyramidBlock(nn.Module):
    """Norm, conv, norm, activation, conv, norm, plus a zero-padded shortcut (Han et al., arXiv 1610.02915)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.relu = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2, self.bn3 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.pool: nn.Module = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.extra = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        inner = self.bn3(self.conv2(self.relu(self.bn2(self.conv1(self.bn1(x))))))
        return inner + F.pad(self.pool(x), (0, 0, 0, 0, 0, self.extra))


Block = Callable[[int, int, int], nn.Module]


class ResidualNet(nn.Module):
    """A stem, stages of residual blocks, global average pooling and a classifier.

    Args:
        block: makes one block from input channels, output channels and stride.
        stages: for each stage the output channels of its blocks; each stage but the first halves the image.
        stem: channels of the first convolution.
        classes: outputs of the classifier.
        channels: input channels.
        normed_stem: norm and activation after the stem (post-activation), or else before the pooling (pre-activation).
        hidden: sizes of hidden layers in the classifier.
    """

    def __init__(
        self,
        block: Block,
        stages: Sequence[Sequence[int]],
        stem: int,
        classes: int,
        channels: int,
        normed_stem: bool = True,
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        post, final = (stem, None) if normed_stem else (None, stages[-1][-1])
        self.stem = nn.Sequential(conv3x3(channels, stem), *_norm_act(post))
        self.depth = len(stages)
        width = stem
        for number, outputs in enumerate(stages, start=1):
            blocks = []
            for position, size in enumerate(outputs):
                blocks.append(block(width, size, 2 if number > 1 and position == 0 else 1))
                width = size
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.last = nn.Sequential(*_norm_act(final))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = _classifier(width, hidden, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, K]``."""
        x = self.stem(x)
        for number in range(1, self.depth + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.classifier(torch.flatten(self.pool(self.last(x)), 1))


class VGG(nn.Module):
    """Stages of convolution, norm and activation, each ended by max pooling (Simonyan et al., arXiv 1409.1556)."""

    def __init__(
        self, stages: Sequence[Sequence[int]], classes: int, channels: int, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.depth = len(stages)
        width = channels
        for number, outputs in enumerate(stages, start=1):
            layers: list[nn.Module] = []
            for size in outputs:
                layers += [conv3x3(width, size), *_norm_act(size)]
                width = size
            self.add_module(f"layer{number}", nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = _classifier(width, hidden, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, K]``."""
        for number in range(1, self.depth + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.classifier(torch.flatten(self.pool(x), 1))


def _norm_act(width: int | None) -> list[nn.Module]:
    return [] if width is None else [nn.BatchNorm2d(width), nn.ReLU()]


def _classifier(width: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, classes))


def initialise(network: nn.Module) -> None:
    """Fresh weights: He's normal initialisation for convolutions, PyTorch's own for everything else."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()


def resnet18(classes: int = 10, channels: int = 3, width: int = 64) -> ResidualNet:
    """ResNet-18 with a 3 x 3 stem (He et al., arXiv 1512.03385): width, 2, 4 and 8 times width, two blocks each."""
    return ResidualNet(BasicBlock, _doubling(width, (2, 2, 2, 2)), width, classes, channels)


def resnet34(classes: int = 10, channels: int = 3, width: int = 64) -> ResidualNet:
    """ResNet-34 with a 3 x 3 stem: blocks 3, 4, 6, 3."""
    return ResidualNet(BasicBlock, _doubling(width, (3, 4, 6, 3)), width, classes, channels)


def resnet19(classes: int = 10, channels: int = 3, width: int = 128) -> ResidualNet:
    """The ResNet-19 of the SNN literature (Zheng et al., arXiv 2011.05280): blocks 3, 3, 2 and a hidden layer."""
    return ResidualNet(BasicBlock, _doubling(width, (3, 3, 2)), width, classes, channels, hidden=(2 * width,))


def resnet20(classes: int = 10, channels: int = 3, width: int = 16) -> ResidualNet:
    """ResNet-20 for CIFAR: three stages of three blocks, projection shortcuts."""
    return ResidualNet(BasicBlock, _doubling(width, (3, 3, 3)), width, classes, channels)


def preact_resnet18(classes: int = 10, channels: int = 3, width: int = 64) -> ResidualNet:
    """Pre-activation ResNet-18 (He et al., arXiv 1603.05027)."""
    return ResidualNet(PreActBlock, _doubling(width, (2, 2, 2, 2)), width, classes, channels, normed_stem=False)


def wrn16_2(classes: int = 10, channels: int = 3, width: int = 32) -> ResidualNet:
    """Wide ResNet 16-2 (Zagoruyko and Komodakis, arXiv 1605.07146); width is that of the first wide stage, 16 x 2."""
    return ResidualNet(
        PreActBlock, _doubling(width, (2, 2, 2)), max(1, width // 2), classes, channels, normed_stem=False
    )


def wrn28_4(classes: int = 10, channels: int = 3, width: int = 64) -> ResidualNet:
    """Wide ResNet 28-4 (arXiv 1605.07146); width is that of the first wide stage, 16 x 4."""
    return ResidualNet(
        PreActBlock, _doubling(width, (4, 4, 4)), max(1, width // 4), classes, channels, normed_stem=False
    )


def pyramidnet18(classes: int = 10, channels: int = 3, width: int = 64) -> ResidualNet:
    """PyramidNet of 18 layers (Han et al., arXiv 1610.02915): eight blocks, growing evenly from width to 8 x width.

    KDSNN names a "Pyramidnet18" and we do not know its widening. An increase by 7 x width is this project's choice.
    """
    sizes = [width + round(7 * width * step / 8) for step in range(1, 9)]
    stages = [sizes[0:2], sizes[2:4], sizes[4:6], sizes[6:8]]
    return ResidualNet(PyramidBlock, stages, width, classes, channels, normed_stem=False)


def vgg9(classes: int = 10, channels: int = 3, width: int = 64) -> VGG:
    """VGG of seven convolutions and two linear layers, with batch norm."""
    stages = [[width] * 2, [2 * width] * 2, [4 * width] * 3]
    return VGG(stages, classes, channels, hidden=(4 * width,))


def vgg11(classes: int = 10, channels: int = 3, width: int = 64) -> VGG:
    """VGG-11 (configuration A) with batch norm and one linear layer."""
    return VGG([[width], [2 * width], [4 * width] * 2, [8 * width] * 2, [8 * width] * 2], classes, channels)


def vgg16(classes: int = 10, channels: int = 3, width: int = 64) -> VGG:
    """VGG-16 (configuration D) with batch norm and one linear layer."""
    return VGG([[width] * 2, [2 * width] * 2, [4 * width] * 3, [8 * width] * 3, [8 * width] * 3], classes, channels)


def _doubling(width: int, blocks: Sequence[int]) -> list[list[int]]:
    return [[width * 2**stage] * count for stage, count in enumerate(blocks)]


ZOO: dict[str, Callable[..., nn.Module]] = {
    **OPTION_A,
    "airbench94": airbench94,
    "airbench95": airbench95,
    "airbench96": airbench96,
    "preact-resnet18": preact_resnet18,
    "pyramidnet18": pyramidnet18,
    "resnet18": resnet18,
    "resnet19": resnet19,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "vgg9": vgg9,
    "wrn16-2": wrn16_2,
    "wrn28-4": wrn28_4,
}
