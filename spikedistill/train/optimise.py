"""Optimiser, learning rate, clipping and averaged weights."""

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spikedistill.train.muon import Muon
from spikedistill.train.recipe import Training

Tensors = tuple[Tensor, ...] | list[Tensor]


def learning_rate(step: int, steps: int, config: Training) -> float:
    """The learning rate of step 0..steps-1: a linear rise over ``warmup``, then half a cosine or a line down.

    It rises from ``lr_first`` and falls to ``lr_last`` times the peak, 0 by default.

    >>> config = Training(lr=1.0, warmup=0.5, schedule="one-cycle")
    >>> [round(learning_rate(step, 4, config), 2) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rise = config.warmup * steps
    if step < rise:
        return config.peak * _between(config.lr_first, min(1.0, (step + 1) / rise))
    gone = (step - rise) / max(1.0, steps - rise)
    left = 0.5 * (1 + math.cos(math.pi * gone)) if config.schedule == "cosine" else 1 - gone
    return config.peak * _between(config.lr_last, left)


def _between(least: float, share: float) -> float:
    """From ``least`` at share 0 to 1 at share 1."""
    return least + (1 - least) * share


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate in the next step, times the factor of each group."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def make_optimiser(module: nn.Module, config: Training) -> torch.optim.Optimizer:
    """SGD, AdamW or Muon. Matrices and kernels have weight decay; biases, norms, thresholds and leaks have none.

    Kernels under Muon keep their norm and have none either. Biases of batch norm with a learning rate of their own
    shrink per step as much as the weights do, as in airbench (Jordan, arXiv 2404.00498).
    """
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    biases = _norm_biases(module) if config.norm_lr != 1 else set()
    kernels = {p for p in learned if p.ndim > 2} if config.optimizer == "muon" else set()
    rest = [p for p in learned if p not in biases | kernels]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {
            "params": [p for p in learned if p in biases],
            "weight_decay": config.weight_decay / (config.norm_lr or 1.0),
            "factor": config.norm_lr,
        },
    ]
    orthogonal = {"params": [p for p in learned if p in kernels], "factor": config.muon_lr / (config.peak or 1.0)}
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak)
    if config.optimizer == "muon":
        return Muon(orthogonal, groups, lr=config.peak, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=config.peak, momentum=config.momentum, nesterov=config.momentum > 0)


def _norm_biases(module: nn.Module) -> set[nn.Parameter]:
    return {layer.bias for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.bias is not None}


def clip(parameters: Iterable[nn.Parameter], norm: float) -> float:
    """Scale the gradient down to at most this norm; 0 leaves it as it is. Returns the norm before."""
    learned = list(parameters)
    if norm:
        return float(nn.utils.clip_grad_norm_(learned, norm))
    return float(nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None]))


def make_averaged(network: nn.Module, config: Training) -> AveragedModel | None:
    """The exponential moving average of the network over steps, if the configuration has one.

    After n steps the decay is at most ``(1 + n) / (10 + n)``, as in TensorFlow's ExponentialMovingAverage. So a short
    training is averaged over its last tenth, and never over weights that have hardly learned.
    """
    if not config.ema:
        return None

    def follow(slow: Tensors, fast: Tensors, _: Tensor | int) -> None:
        done = int(averaged.n_averaged)  # that on the CPU, so no GPU is waited for
        get_ema_multi_avg_fn(min(config.ema, (1 + done) / (10 + done)))(slow, fast, done)

    averaged = AveragedModel(network, multi_avg_fn=follow, use_buffers=True)
    return averaged


class Lookahead(nn.Module):
    """Slow weights, to which the fast ones return every k steps (Zhang et al., arXiv 1907.08610).

    After step t of T the slow weights keep the share ``0.95^k (t / T)^3`` of themselves and take the rest from the fast
    ones, as in airbench (Jordan, arXiv 2404.00498). So they hardly matter at first and average more and more. Buffers,
    such as running statistics, are treated alike. After the last step the fast weights are the slow ones.

    Args:
        network: the network with the fast weights, from which the slow ones start.
        every: k, 1 or more.
    """

    DECAY = 0.95

    def __init__(self, network: nn.Module, every: int) -> None:
        super().__init__()
        self.slow = copy.deepcopy(network).requires_grad_(False)
        self.every = every

    @torch.no_grad()
    def update(self, network: nn.Module, done: int, steps: int) -> None:
        """Follow the fast weights of ``network`` and set them back, if ``done`` of ``steps`` steps call for it."""
        due = done % self.every == 0
        kept = self.DECAY**self.every * (done / steps) ** 3 if due else 1.0
        if not due and done < steps:
            return
        fast = network.state_dict()
        for name, slow in self.slow.state_dict().items():
            if slow.is_floating_point():
                slow.lerp_(fast[name], 1 - kept)
                fast[name].copy_(slow)
            else:
                slow.copy_(fast[name])


def make_lookahead(network: nn.Module, config: Training) -> Lookahead | None:
    """The slow weights of the network, if the configuration has them."""
    return Lookahead(network, config.lookahead) if config.lookahead else None
