"""A network without batch norm and an objective that can end its process, as ``FILE.py:NAME`` names them."""

import os
import signal
from dataclasses import dataclass

from torch import nn

from spikedistill.objective.direct import Direct


def small(classes: int) -> nn.Module:
    stem = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4)]
    return nn.Sequential(*stem, nn.Flatten(), nn.Linear(24, classes))


@dataclass(frozen=True)
class Mortal(Direct):
    """Cross-entropy only; in the process that $DIES names it ends with SIGKILL after half of training."""

    def __call__(self, batch, modules):
        if batch.progress > 0.5 and os.environ.get("DIES", "none") == os.environ.get("RANK"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch, modules)
