"""Adversarial attacks: small changes of images that make a network err, found by its own and its teacher's gradient.

A spiking network has only a surrogate gradient. A narrow surrogate is zero nearly everywhere, so the network looks
immune although it is not (gradient masking). Here every network is attacked through several surrogates, and with
images that fool its teacher (a transfer attack). An image counts as fooled if any of these fools the network, or if it
is misclassified without an attack. The list of surrogates is our choice.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import eval_batch_size, in_batches
from spikedistill.inputs import evaluating
from spikedistill.neuron.layer import Spiking
from spikedistill.neuron.surrogate import ATan, Sigmoid, Surrogate, Triangle
from spikedistill.shapes import Image, Labels
from spikedistill.student.coding import LatencyCoding, RateCoding
from spikedistill.student.student import Student

AT_ONCE = 100
"""Most images in a batch under attack."""
ATTACKS: dict[str, tuple[int, tuple[float, float, float, float, float]]] = {
    "fgsm": (1, (0.5, 1.0, 2.0, 4.0, 8.0)),
    "pgd": (10, (0.5, 1.0, 2.0, 4.0, 8.0)),
}
"""Attack -> number of gradient steps, and the largest change of a value (l-infinity) in 1/255 at five severities."""
SURROGATES: dict[str, Surrogate] = {
    "atan 1": ATan(1.0),
    "sigmoid 4": Sigmoid(4.0),
    "triangle 1": Triangle(1.0),
    "triangle 2": Triangle(2.0),
}
"""Surrogates besides the network's own, by name and alpha or width: those of eleven that fooled the example most."""
OWN, TEACHER = "own", "teacher"


def attack(
    network: nn.Module, images: Image, labels: Labels, *, epsilon: float, steps: int, generator: Generator
) -> Image:
    """Images whose values are changed by at most ``epsilon`` to raise the network's loss, by its surrogate gradient.

    One step is FGSM (Goodfellow et al., arXiv 1412.6572). More steps are PGD from a random start, each of size
    2.5 epsilon / steps (Madry et al., arXiv 1706.06083).
    """
    start = images
    if steps > 1:
        start = (images + epsilon * (2 * torch.rand(images.shape, generator=generator).to(images) - 1)).clamp(0, 1)
    size = epsilon if steps == 1 else 2.5 * epsilon / steps
    changed = start
    for _ in range(steps):
        changed = changed.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(_mean_logits(network, changed), labels), changed)
        moved = changed.detach() + size * slope.sign()
        changed = torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon).clamp(0, 1)
    return changed.detach()


def gradients(network: nn.Module, teacher: nn.Module | None) -> list[str]:
    """The gradients that a network is attacked by: its own, through each surrogate if it spikes, and its teacher's.

    The gradient of graded spikes passes straight through and uses no surrogate, so there is one of its own.

    A student whose coding turns pixels into spikes has no gradient with respect to pixels: it would be zero, and no
    image would be fooled. Such a student is attacked by its teacher's gradient only.

    Raises:
        ConfigError: if no gradient is left.
    """
    if isinstance(network, Student) and isinstance(network.coding, RateCoding | LatencyCoding):
        if teacher is None:
            raise ConfigError(
                f"No gradient reaches the pixels of a student with coding={network.coding}, so it cannot be attacked by"
                " its own: give its teacher, or omit the kind 'attack'."
            )
        return [TEACHER]
    owns = [layer.neuron.surrogate for layer in network.modules() if isinstance(layer, Spiking)]
    graded = any(layer.neuron.levels > 1 for layer in network.modules() if isinstance(layer, Spiking))
    others = [name for name, surrogate in SURROGATES.items() if not graded and any(own != surrogate for own in owns)]
    return [OWN, *others, *([] if teacher is None else [TEACHER])]


class Target:
    """A network under attack, and which images it still classifies correctly.

    Args:
        network: from images in 0..1 to logits; not changed.
        teacher: a network on the same device whose gradient is also used; None for no transfer attack.
        images: bytes ``[N, C, H, W]``.
        labels: ``[N]``.
        dtype: number format of the large operations.
        seed: seed of the random start of PGD.

    Attributes:
        gradients: names of the gradients it is attacked by: from ``OWN``, ``SURROGATES`` and ``TEACHER``.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module | None,
        images: Tensor,
        labels: Labels,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.network, self.teacher = network, teacher
        self.images, self.labels, self.dtype, self.seed = images, labels, dtype, seed
        self.gradients = gradients(network, teacher)
        self._right: dict[tuple[str, int, str], Tensor] = {}

    def clean(self) -> float:
        """Accuracy (percent) on the images as they are."""
        return self.accuracy("", 0, OWN)

    def accuracy(self, name: str, severity: int, gradient: str) -> float:
        """Accuracy (percent) under an attack by one gradient."""
        return 100.0 * float(self.right(name, severity, gradient).double().mean())

    def worst(self, name: str, severity: int) -> float:
        """Accuracy (percent) if an image counts only when it is correct without attack and no gradient fools it."""
        masks = [self.right("", 0, OWN), *(self.right(name, severity, gradient) for gradient in self.gradients)]
        return 100.0 * float(torch.stack(masks).all(0).double().mean())

    def right(self, name: str, severity: int, gradient: str) -> Tensor:
        """Which images are classified correctly under an attack, ``[N]`` booleans. Severity 0 is no attack. Cached."""
        if (name, severity, gradient) not in self._right:
            self._right[name, severity, gradient] = self._withstands(name, severity, gradient)
        return self._right[name, severity, gradient]

    def _withstands(self, name: str, severity: int, gradient: str) -> Tensor:
        size = min(AT_ONCE, eval_batch_size(self.network, self.images))
        generator, truths = Generator().manual_seed(self.seed), iter(self.labels.split(size))
        source = self.teacher if gradient == TEACHER and self.teacher is not None else self.network

        def work(batch: Tensor) -> Tensor:
            truth = next(truths).to(batch.device)
            if severity:
                steps, levels = ATTACKS[name]
                with torch.enable_grad(), _through(source, SURROGATES.get(gradient)):
                    epsilon = levels[severity - 1] / 255
                    batch = attack(source, batch, truth, epsilon=epsilon, steps=steps, generator=generator)
            return (_mean_logits(self.network, batch).argmax(-1) == truth).cpu()

        with evaluating(source):
            return torch.cat(in_batches(self.network, work, self.images, self.dtype, size))


def _mean_logits(network: nn.Module, images: Image) -> Tensor:
    """Logits ``[B, K]`` of any network, the mean over time if it has time steps."""
    logits = network(images).float()
    return logits.mean(0) if logits.ndim == 3 else logits


@contextmanager
def _through(network: nn.Module, surrogate: Surrogate | None) -> Iterator[None]:
    """The network with this surrogate in all its neurons; None leaves it as it is."""
    neurons = [(layer, layer.neuron) for layer in network.modules() if isinstance(layer, Spiking)]
    try:
        for layer, own in neurons:
            layer.neuron = own if surrogate is None else dataclasses.replace(own, surrogate=surrogate)
        yield
    finally:
        for layer, own in neurons:
            layer.neuron = own
