"""Several processes that train one network: the only file that asks for ranks. One process is several of one."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class Processes:
    """The processes of this training, and what they do together.

    Args:
        device: where this process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator = Accelerator(cpu=device.type == "cpu")

    @property
    def rank(self) -> int:
        """The number of this process, 0, 1, ..."""
        return self._accelerator.process_index

    @property
    def count(self) -> int:
        """How many processes there are."""
        return self._accelerator.num_processes

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self._accelerator.is_main_process

    def joined(self, module: nn.Module) -> Any:
        """The module with gradients averaged over processes; itself where there is one process."""
        return self._accelerator.prepare(module) if self.count > 1 else module

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], norm: float) -> float:
        """Shorten the gradient to this norm, 0 leaves it as it is; the norm that it had."""
        learned = list(parameters)
        if norm:
            return float(self._accelerator.clip_grad_norm_(learned, norm))
        return float(nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None]))
