"""Inputs of a network: raw pixels are checked, normalised per channel, and accepted in any memory order; its mode."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from spikedistill.errors import ShapeError

LARGEST = 32.0
"""Above this, values are not pixels in 0..1, even with noise. Bytes reach 255."""
POLARITIES = 2
"""Channels of event frames. Their values are counts of events and have no upper bound."""
IN_ANY_ORDER: dict[Any, Any] = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as}
NAMES = {"size": "shape"}
"""Argument names of a view, and their names in a reshape."""


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``(images - mean) / std``, one value per channel.

    Args:
        images: ``[B, C, ...]`` or features ``[B, F]``; pixels in 0..1, or counts of events with two channels.
        mean: one value, or one per channel.
        std: likewise, above 0.

    Raises:
        ShapeError: if the images are integers, far above 1, or have another number of channels.
    """
    check_pixels(images)
    own = mean.numel()
    if images.ndim < 2 or (own > 1 and images.shape[1] not in (1, own)):
        raise ShapeError(
            f"Images of shape {tuple(images.shape)} were given to a network with a mean for {own} channels: expected"
            f" [B, {own}, ...]."
        )
    shape = (own, *[1] * (images.ndim - 2))
    return (images - mean.view(shape)) / std.view(shape)


def check_pixels(images: Tensor) -> None:
    """Refuse images that are not pixels in 0..1.

    On a GPU the values are checked only without gradients, because the check would slow training down.

    Raises:
        ShapeError: if the images are not floats, or are far above 1.
    """
    if not images.is_floating_point():
        raise ShapeError(
            f"Images of {str(images.dtype).removeprefix('torch.')} were given: expected floats in 0..1; divide bytes by"
            " 255, and give event counts as floats."
        )
    valueless = images.is_meta or isinstance(images, FakeTensor) or torch.compiler.is_compiling()
    if valueless or not images.numel() or (images.is_cuda and torch.is_grad_enabled()):
        return
    far = (images > LARGEST) & (images < torch.inf)  # NaN and infinity give NaN logits, which are refused later
    if images.ndim > 3 and images.shape[1] != POLARITIES and bool(far.any()):
        raise ShapeError(
            f"Images with values up to {float(images[far].max()):.4g} were given: expected pixels in 0..1; divide bytes"
            " by 255."
        )


@contextlib.contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Networks in evaluation mode for a while. Then each of their modules is in its own mode again."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class AnyLayout(TorchFunctionMode):
    """A context in which ``view`` copies a tensor where its memory order would make the call fail.

    The common ``x.view(x.size(0), -1)`` after a convolution fails with channels last.

    >>> image = torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last)
    >>> with AnyLayout():
    ...     image.view(1, -1).shape
    torch.Size([1, 18])
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The call itself. A view becomes a reshape, which works in any memory order."""
        given = kwargs or {}
        if func not in IN_ANY_ORDER or any(isinstance(value, torch.dtype) for value in (*args, *given.values())):
            return func(*args, **given)
        return IN_ANY_ORDER[func](*args, **{NAMES.get(name, name): value for name, value in given.items()})
