"""The quantised stand-in of a student: each layer of neurons as its answer to a constant current, without time.

Under a constant current ``x`` for L steps, an IF neuron that starts at half of its threshold and resets by subtraction
fires ``clip(floor(x L / threshold + 1/2), 0, L)`` times. Networks with that activation, floor passed straight through
backwards (QCFS: Bu et al., ICLR 2022, arXiv 2303.04347), cost no more than an ANN to train; run with neurons they
differ from themselves only where spikes arrive unevenly. As a baseline it is called conversion: nothing is trained on
spikes.
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
    """``threshold * clip(floor(x L / threshold + 1/2) / L, 0, 1)``, its floor handing gradients straight through.

    NaN where a current is not finite, as neurons have it.

    Args:
        x: currents of any shape.
        threshold: above 0; a scalar, or per channel, shaped to spread over the currents.
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
            f"The quantised stand-in is that of IF with a fixed initial 0.5 and subtractive reset, not of leak"
            f" {neuron.leak}, initial {neuron.initial}{' (learned)' if neuron.learn_initial else ''} and reset"
            f" '{neuron.reset.value}': take ROUNDING, or another gradient."
        )


class _Quantised(Walk):
    """Runs a student's graph once, its neurons exchanged for their closed form."""

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
    """Logits ``[B, K]`` of the stand-in with L levels, and what nodes returned, ``[B, ...]`` by name, with graph.

    Args:
        core: a student's graph.
        rows: normalised images ``[B, ...]``.
        levels: L.
        layers: how many layers of neurons there are.
        keep: names of those nodes.

    Raises:
        ConfigError: if its neurons have another answer.
    """
    walk = _Quantised(core, levels, keep)
    logits, _ = walk.run(rows, 1, 1, (None,) * layers, False)
    return logits, walk.kept
