"""COS, a published baseline without training: spikes that came too early or too late are found and offset, per image.

Under a constant current, neurons that start at half of their threshold fire as often as the ANN's activation asks for,
rounded. Behind other neurons currents come in spikes, and a neuron may fire before an inhibition reaches it. Hao et al.
(ICLR 2023, "Bridging the gap between ANNs and SNNs by calibrating offset spikes") run each layer for rho steps first:

- A neuron that fired and whose potential ends below 0 has fired once too often. It starts again from a potential that
  is lower by a threshold, or by what keeps its weakest spike below the threshold if that is more.
- A neuron whose potential ends at a threshold or above has fired too seldom. It starts again from a potential that is
  higher by a threshold, or by what lifts its largest potential without a spike above the threshold.

Then it runs its T steps, and the next layer does the same on its output. The steps of calibration are steps of the
network: each image costs T + rho of them, and no layer begins before the one before it has ended both. The paper's T
does not count rho. The details are those of the authors' code (hzc1208/ANN2SNN_COS).
"""

from typing import Any

import torch
from torch import Tensor

from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import Reset
from spikedistill.neuron.layer import Spiking
from spikedistill.shapes import Logits
from spikedistill.student.graph import PotentialRecorder
from spikedistill.student.student import Student

BEYOND = 1e-3
"""How far beyond the threshold a shift carries a potential, in thresholds."""
MOST = 1000.0
"""The largest shift upwards, in thresholds: of a neuron that fired at every step."""


class _Offsets(PotentialRecorder):
    """Runs a student's graph; each layer of neurons first runs so many steps, then starts again."""

    steps = 1

    def fire(self, layer: Spiking, current: Tensor, timesteps: int, repeats: int, state: Any, keep: bool) -> Any:
        """The spikes after the calibration of the layer."""
        batch = len(current) * repeats // timesteps
        first, again = (current, self.steps) if repeats > 1 else (current[: self.steps * batch], 1)
        start = layer.potential(current[:batch]).expand(batch, *current.shape[1:])
        charged: list[Tensor] = []
        spikes, left = layer(first, self.steps, again, start, True, charged)
        height = layer.heights(spikes).to(spikes.dtype)
        fired = (spikes / height).unflatten(0, (self.steps, batch)) > 0.5
        (potentials,) = charged
        return layer(current, timesteps, repeats, start + _offset(potentials.view(fired.shape), fired, left), keep)


def _offset(potentials: Tensor, fired: Tensor, left: Tensor) -> Tensor:
    """The shift ``[B, ...]`` of the initial potential, from ``[rho, B, ...]`` and the potential after the last step."""
    weakest = torch.where(fired, potentials, torch.inf).amin(0)
    strongest = torch.where(fired, -torch.inf, potentials).amax(0)
    lower, higher = (weakest - 1 + BEYOND).clamp_min(1), (1 + BEYOND - strongest).clamp(1, MOST)
    down = torch.where((left < 0) & fired.any(0), -lower, 0.0)
    return torch.where(left >= 1, higher, down)


@torch.no_grad()
def run_with_offsets(student: Student, images: Tensor, steps: int) -> Logits:
    """Logits ``[T, B, K]`` of a student whose layers are calibrated on each image for ``steps`` (rho) steps first.

    Args:
        student: of neurons without leak that subtract the threshold and fire one spike a step; in evaluation mode.
        images: as for the student.
        steps: rho, 1 or more. Count T + rho steps for each image.

    Raises:
        ConfigError: if the neurons leak, reset to zero or are graded, or ``steps`` is below 1.
    """
    neuron, timesteps = student.conversion.neuron_model, student.timesteps
    if neuron.leak < 1 or neuron.reset is not Reset.SUBTRACT or neuron.levels > 1:
        raise ConfigError(
            f"Offsets are for neurons without leak that subtract the threshold and fire one spike a step, not for leak"
            f" {neuron.leak}, reset '{neuron.reset.value}' and levels {neuron.levels}: give neuron=IF."
        )
    if steps < 1:
        raise ConfigError(f"steps (={steps}) of calibration must be 1 or more.")
    longest = max(timesteps, steps)
    rows, repeats = student.coding.encode(images, longest)
    walk = _Offsets(student.core, (), ())
    walk.steps = steps
    logits, _ = walk.run(student._normalised(rows), longest, repeats, (None,) * student.states, False)
    return logits.unflatten(0, (longest, -1))[:timesteps]
