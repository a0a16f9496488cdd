"""Optimiser, learning rate, and averaged weights."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spikedistill.train.recipe import Training


def learning_rate(step: int, steps: int, config: Training) -> float:
    """The rate of step 0..steps-1: a straight rise over ``warmup``, then half a cosine or a straight line to 0.

    >>> config = Training(lr=1.0, warmup=0.5, schedule="one-cycle")
    >>> [round(learning_rate(step, 4, config), 2) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rise = config.warmup * steps
    if step < rise:
        return config.peak * min(1.0, (step + 1) / rise)
    gone = (step - rise) / max(1.0, steps - rise)
    return config.peak * (0.5 * (1 + math.cos(math.pi * gone)) if config.schedule == "cosine" else 1 - gone)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Take the next step with this rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def make_optimiser(module: nn.Module, config: Training) -> torch.optim.Optimizer:
    """SGD or AdamW; matrices and kernels decay, vectors (biases, norms) and scalars (thresholds, leaks) do not."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak)
    return torch.optim.SGD(groups, lr=config.peak, momentum=config.momentum, nesterov=config.momentum > 0)


def make_averaged(network: nn.Module, config: Training) -> AveragedModel | None:
    """An average of the network over steps that follows it, if the configuration wants one."""
    if not config.ema:
        return None
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
