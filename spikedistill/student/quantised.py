"""The quantised stand-in of a student: an ANN whose activations equal the neurons' response to a constant current.

Under a constant current ``x`` for L steps, an IF neuron that starts at half its threshold and resets by subtraction
fires ``clip(floor(x L / threshold + 1/2), 0, L)`` times. This is the activation of the stand-in. Its gradient passes
straight through the floor (QCFS: Bu et al., ICLR 2022, arXiv 2303.04347). It costs no more to train than an ANN. The
spiking network differs from it only if spikes arrive unevenly over time. As a baseline it counts as a conversion,
since nothing is trained on spikes.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx

from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import Neuron, Reset
from spikedistill.neuron.layer import Spiking
from spikedistill.student.graph import Walk
from spikedistill.student.pool import CumulativeMaxPool


def clip_floor_shift(x: Tensor, threshold: Tensor, levels: int) -> Tensor:
    """``threshold * clip(floor(x L / threshold + 1/2) / L, 0, 1)``, with a straight-through gradient for the floor.

    The result is NaN for a current that is not finite, as for neurons.

    Args:
        x: currents of any shape.
        threshold: above 0; a scalar, or per channel in a shape that broadcasts over the currents.
        levels: L, 1 or more.

    >>> import torch
    >>> clip_floor_shift(torch.tensor([-1.0, 0.2, 0.9, 5.0]), torch.tensor(2.0), 4).tolist()
    [0.0, 0.0, 1.0, 2.0]
    """
    counts = (x / threshold).clamp(0, 1) * levels
    whole = counts + ((counts + 0.5).floor() - counts + 0.0 * x).detach()
    return (whole * (threshold / levels)).to(x.dtype)


def _check(neuron: Neuron) -> None:
    if neuron.leak < 1 or neuron.reset is not Reset.SUBTRACT or neuron.initial != 0.5 or neuron.learn_initial:
        raise ConfigError(
            "The quantised stand-in needs IF neurons with a fixed initial potential of 0.5 and reset by subtraction,"
            f" but the neuron has leak {neuron.leak}, initial {neuron.initial}"
            f"{' (learned)' if neuron.learn_initial else ''} and reset '{neuron.reset.value}': use ROUNDING, or another"
            " gradient."
        )


class _Quantised(Walk):
    """Runs a student's graph once, with the closed form in place of its neurons."""

    def __init__(self, core: fx.GraphModule, levels: int, keep: Collection[str]) -> None:
        super().__init__(core, keep)
        self.levels = levels

    def fire(self, layer: Spiking, current: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        _check(layer.neuron)
        return clip_floor_shift(current, layer.heights(current), self.levels), None

    def pool(self, layer: CumulativeMaxPool, x: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        return layer.of_means(x), None

    def spread(self, x: Tensor, repeats: int) -> Tensor:
        return x


def quantised_run(
    core: fx.GraphModule, rows: Tensor, levels: int, layers: int, keep: Collection[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits ``[B, K]`` of the stand-in with L levels, and outputs of nodes ``[B, ...]`` by name, with gradients.

    Args:
        core: a student's graph.
        rows: normalised images ``[B, ...]``.
        levels: L.
        layers: the number of tensors in the state.
        keep: names of the nodes.

    Raises:
        ConfigError: if its neurons have another response.
    """
    walk = _Quantised(core, levels, keep)
    logits, _ = walk.run(rows, 1, 1, (None,) * layers, False)
    return logits, walk.kept
