"""Accuracy after every time step, and the logits of a whole set."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from spikedistill.data.augment import to_inputs
from spikedistill.errors import ConfigError
from spikedistill.inputs import AnyLayout, evaluating
from spikedistill.shapes import Labels, Logits
from spikedistill.student.student import Student

Result = TypeVar("Result")
USUAL_PIXELS = 64 * 64
"""Above this size of an image, fewer are evaluated at a time."""


def predict(
    network: nn.Module,
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Logits:
    """The logits of a network for a whole set, in evaluation mode, on the CPU.

    Args:
        network: from images in 0..1 ``[B, C, H, W]``, or event counts ``[T, B, 2, H, W]``, to logits ``[T, B, K]`` or
            ``[B, K]``. It is left in its own mode, training or evaluation.
        images: bytes ``[N, C, H, W]``, or event frames ``[N, T, 2, H, W]``.
        dtype: number format of the large operations.
        batch_size: images at a time (default: see ``eval_batch_size``).
        on_batch: called after each batch with the number of its images.

    Returns:
        Logits ``[T, N, K]``; T = 1 for a network without time. They are NaN if an image or the network holds NaN.
    """

    def forward(batch: Tensor) -> Tensor:
        logits = network(batch)
        return (logits if logits.ndim == 3 else logits[None]).float().cpu()

    size = eval_batch_size(network, images) if batch_size is None else batch_size
    return torch.cat(in_batches(network, forward, images, dtype, size, on_batch), dim=1)


def eval_batch_size(network: nn.Module, images: Tensor) -> int:
    """How many images to evaluate in one call: 250, fewer with more than four time steps or 64 x 64 pixels.

    >>> eval_batch_size(nn.Identity(), torch.empty(1, 3, 224, 224))
    20
    """
    rows = network.eval_batch_size if isinstance(network, Student) else 250
    return max(1, rows * USUAL_PIXELS // max(USUAL_PIXELS, images.shape[-2] * images.shape[-1]))


@torch.no_grad()
def in_batches(
    network: nn.Module,
    work: Callable[[Tensor], Result],
    images: Tensor,
    dtype: torch.dtype,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> list[Result]:
    """The results of ``work`` for each batch of a whole set, with the network in evaluation mode; see ``predict``."""
    first = next(network.parameters())
    layout = _layout(network)
    results = []
    with evaluating(network):
        for pixels in images.split(batch_size):
            with AnyLayout(), torch.autocast(first.device.type, dtype, enabled=dtype != torch.float32):
                given = to_inputs(pixels)
                order = layout if given.ndim == 4 else torch.preserve_format
                results.append(work(given.to(first.device, memory_format=order)))
            on_batch(len(pixels))
    return results


def _layout(network: nn.Module) -> torch.memory_format:
    """The memory format of the network's convolution weights."""
    last = any(p.ndim == 4 and not p.is_contiguous() for p in network.parameters())
    return torch.channels_last if last else torch.contiguous_format


def cumulative(logits: Logits) -> Logits:
    """The mean logits over steps 1..t, for every t.

    >>> cumulative(torch.tensor([[[2.0]], [[4.0]]])).flatten().tolist()
    [2.0, 3.0]
    """
    steps = torch.arange(1, len(logits) + 1, device=logits.device, dtype=logits.dtype)
    return logits.cumsum(0) / steps[:, None, None]


def check_finite(logits: Tensor) -> None:
    """Refuse logits ``[..., N, K]`` that are not finite: an accuracy computed from them would look valid.

    Raises:
        ConfigError: if any are not; the message gives the number of samples.
    """
    samples = ~torch.isfinite(logits).all(-1).reshape(-1, logits.shape[-2]).all(0)
    if samples.any():
        raise ConfigError(
            f"The logits of {int(samples.sum())} of {len(samples)} samples hold NaN or infinity, the first at sample"
            f" {int(samples.nonzero()[0])}: check the images, the normalisation, and the weights of the network."
        )


def accuracy_by_step(logits: Logits, labels: Labels) -> list[float]:
    """Top-1 accuracy in percent after each of 1..T steps; the last is the accuracy of the network.

    Raises:
        ConfigError: if logits are not finite, so that there is no largest one.

    >>> accuracy_by_step(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), torch.tensor([1, 0]))
    [50.0]
    """
    check_finite(logits)
    right = (cumulative(logits).argmax(-1) == labels).double().mean(1)
    return (100.0 * right).tolist()


def standard_error(accuracy: float, images: int) -> float:
    """The standard error, in points, of an accuracy in percent on n images drawn at random; NaN for no images.

    ``sqrt(p (1 - p) / n)``, where p counts one more correct and one more wrong image (Laplace). So the error is not
    zero if all of a few images are correct. A mean of accuracies on the same images has at most this error.

    >>> round(standard_error(90.0, 900), 2), round(standard_error(100.0, 20), 2)
    (1.0, 4.66)
    """
    if not images:
        return math.nan
    share = (accuracy / 100 * images + 1) / (images + 2)
    return 100 * math.sqrt(share * (1 - share) / images)
