"""Optimiser, learning rate, clipping and averaged weights."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spikedistill.train.recipe import Training


def learning_rate(step: int, steps: int, config: Training) -> float:
    """The learning rate of step 0..steps-1: a linear rise over ``warmup``, then half a cosine or a line to 0.

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
    """Use this learning rate in the next step."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def make_optimiser(module: nn.Module, config: Training) -> torch.optim.Optimizer:
    """SGD or AdamW. Matrices and kernels have weight decay; biases, norms, thresholds and leaks have none."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak)
    return torch.optim.SGD(groups, lr=config.peak, momentum=config.momentum, nesterov=config.momentum > 0)


def clip(parameters: Iterable[nn.Parameter], norm: float) -> float:
    """Scale the gradient down to at most this norm; 0 leaves it as it is. Returns the norm before."""
    learned = list(parameters)
    if norm:
        return float(nn.utils.clip_grad_norm_(learned, norm))
    return float(nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None]))


def make_averaged(network: nn.Module, config: Training) -> AveragedModel | None:
    """The exponential moving average of the network over steps, if the configuration has one."""
    if not config.ema:
        return None
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
