"""Small fast networks for images of 32 x 32 pixels, after Jordan's airbench (arXiv 2404.00498).

The first layer whitens patches of 2 x 2 pixels. Its kernels are the eigenvectors of the patches' covariance, divided by
the root of their eigenvalues, and the negatives of these. ``start_from_images`` computes and freezes them. Only the
bias is trained. Three groups of convolutions follow, each with max pooling before its first norm. Convolutions begin as
the identity (Dirac), norms have a bias and no scale, and logits are divided by 9.

What differs from airbench is this project's choice. The activation is ReLU where airbench has GELU, since ReLU has a
spiking meaning. Norms have PyTorch's own eps and momentum, since spiking students inherit them, train on smaller
batches and may have silent channels. The bias of the first layer is trained throughout.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2
"""Side in pixels of the patches that are whitened."""
EPS = 5e-4
"""Added to the eigenvalues of the patches' covariance."""
LOGIT_SCALE = 1 / 9


@runtime_checkable
class StartsFromImages(Protocol):
    """A network some of whose first weights are computed from training images. ``teach`` calls this method."""

    def start_from_images(self, images: Tensor) -> None:
        """Compute those weights from normalised images ``[N, C, H, W]``."""


class Group(nn.Module):
    """Convolution, max pooling, norm, activation; then convolution, norm, activation, once or twice.

    With ``residual`` there are three convolutions, and the output of the first is added before the last activation.
    """

    def __init__(self, inputs: int, outputs: int, residual: bool) -> None:
        super().__init__()
        self.conv1, self.pool = _conv(inputs, outputs), nn.MaxPool2d(2)
        self.bn1, self.relu1 = _norm(outputs), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = _conv(outputs, outputs), _norm(outputs), nn.ReLU()
        self.residual = residual
        if residual:
            self.conv3, self.bn3, self.relu3 = _conv(outputs, outputs), _norm(outputs), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, inputs, H, W]`` to ``[B, outputs, H // 2, W // 2]``."""
        first = self.relu1(self.bn1(self.pool(self.conv1(x))))
        second = self.relu2(self.bn2(self.conv2(first)))
        return self.relu3(self.bn3(self.conv3(second)) + first) if self.residual else second


class Airbench(nn.Module):
    """A whitening convolution, three groups, global max pooling and a classifier without bias.

    Images need 9 x 9 pixels or more.

    Args:
        widths: output channels of the three groups.
        classes: outputs of the classifier.
        channels: input channels C.
        residual: whether groups have three convolutions and a skip connection.
    """

    def __init__(self, widths: tuple[int, int, int], classes: int, channels: int, residual: bool = False) -> None:
        super().__init__()
        stem = 2 * channels * PATCH**2
        self.white, self.relu = nn.Conv2d(channels, stem, PATCH), nn.ReLU()
        self.layer1 = Group(stem, widths[0], residual)
        self.layer2 = Group(widths[0], widths[1], residual)
        self.layer3 = Group(widths[1], widths[2], residual)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.classifier = nn.Linear(widths[2], classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, K]``."""
        x = self.layer3(self.layer2(self.layer1(self.relu(self.white(x)))))
        return self.classifier(torch.flatten(self.pool(x), 1)) * LOGIT_SCALE

    def start_from_images(self, images: Tensor) -> None:
        """Set and freeze the kernels of the first layer, and set its bias to 0, from images ``[N, C, H, W]``."""
        kernels = whitening(images)
        with torch.no_grad():
            self.white.weight.copy_(torch.cat([kernels, -kernels]))
            nn.init.zeros_(self.white.bias)  # type: ignore[arg-type]
        self.white.weight.requires_grad_(False)


def whitening(images: Tensor, eps: float = EPS) -> Tensor:
    """Kernels whose outputs over all 2 x 2 patches have covariance 1 for eps = 0, else ``l / (l + eps)`` each.

    Args:
        images: ``[N, C, H, W]``.
        eps: added to each eigenvalue l of the covariance of the patches.

    Returns:
        ``[4 C, C, 2, 2]``, the largest eigenvalue first. Signs are fixed: the largest entry is positive.
    """
    values, vectors = torch.linalg.eigh(_covariance(images))
    vectors = vectors.T.flip(0)
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    kernels = signs * vectors / (values.flip(0).clamp_min(0) + eps).sqrt()[:, None]
    return kernels.unflatten(1, (images.shape[1], PATCH, PATCH)).to(images.dtype)


def _covariance(images: Tensor) -> Tensor:
    """The covariance ``[4 C, 4 C]`` of all patches in float64, from some images at a time, which spares memory."""
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for some in images.split(250):
        patches = F.unfold(some.double(), PATCH).transpose(1, 2).flatten(0, 1)
        count, total, square = count + len(patches), total + patches.sum(0), square + patches.T @ patches
    return (square - torch.outer(total, total) / count) / (count - 1)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3 x 3 convolution whose first ``inputs`` output channels are the identity; the rest is PyTorch's own."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.detach()[:inputs])
    return layer


def _norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm whose scale stays 1."""
    layer = nn.BatchNorm2d(channels)
    layer.weight.requires_grad_(False)
    return layer


def airbench94(classes: int = 10, channels: int = 3, width: int = 64) -> Airbench:
    """Airbench94: two convolutions a group, width, 4 and 4 times width."""
    return Airbench((width, 4 * width, 4 * width), classes, channels)


def airbench95(classes: int = 10, channels: int = 3, width: int = 128) -> Airbench:
    """Airbench95: two convolutions a group, width, 3 and 3 times width."""
    return Airbench((width, 3 * width, 3 * width), classes, channels)


def airbench96(classes: int = 10, channels: int = 3, width: int = 128) -> Airbench:
    """Airbench96: three convolutions and a skip connection a group, width, 3 and 4 times width."""
    return Airbench((width, 3 * width, 4 * width), classes, channels, residual=True)
