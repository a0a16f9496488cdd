"""Mathematics on inner features: distances, transforms, adapters, and the default pairs."""

import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.answer import Learner
from spikedistill.errors import ConfigError
from spikedistill.objective.terms import NO_TEACHER, Batch, Pairs, identity
from spikedistill.shapes import over_time

STAGE = re.compile(r"(layer|stage)\D?\d+")
"""Module paths of stages: layer1, stage2, ... Their outputs are the ends of the stages."""


def feature_distance(student: Tensor, teacher: Tensor, partial: bool = False) -> Tensor:
    """Mean squared difference divided by the teacher's mean square: 0 if equal, 1 for a silent student.

    The division is this project's choice.

    Args:
        student: the student's features ``[B, ...]``, averaged over time, in the teacher's shape.
        teacher: the teacher's features ``[B, ...]``.
        partial: leave out elements where the teacher is not positive and the student is not above it (partial L2, Heo
            et al., arXiv 1904.01866).

    Returns:
        A scalar, 0 or more.
    """
    return _distance(student[None], teacher, partial, identity)


def _distance(feature: Tensor, teacher: Tensor, partial: bool, whole: Callable[[Tensor], Tensor]) -> Tensor:
    """``feature_distance`` of the mean over time of ``[T, B, ...]``; ``whole`` is ``Batch.mean_over_processes``."""
    size = whole(torch.linalg.vector_norm(teacher).square() / teacher.numel())
    wanted = teacher
    if partial:
        mean = over_time(feature.detach())
        wanted = torch.where((mean <= teacher) & (teacher <= 0), mean, teacher)
    return _MeanSquare.apply(feature, wanted) / size.clamp_min(1e-12)


class _MeanSquare(torch.autograd.Function):
    """``mse_loss`` between the mean over time of ``[T, B, ...]`` and a constant ``[B, ...]``, in fewer memory passes.

    There is one pass for the mean, two for the distance, and one backward.
    """

    @staticmethod
    def forward(ctx, feature: Tensor, wanted: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        difference = over_time(feature).to(wanted.dtype) - wanted
        ctx.save_for_backward(difference)
        ctx.shape, ctx.dtype = feature.shape, feature.dtype
        return torch.dot(_line(difference), _line(difference)) / difference.numel()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (difference,) = ctx.saved_tensors
        scale = grad * (2 / (ctx.shape[0] * difference.numel()))
        return (difference * scale).to(ctx.dtype).expand(ctx.shape), None


def margin_relu(teacher: Tensor, whole: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """``max(x, m)``, where m is the mean of a channel's negative values (Heo et al., arXiv 1904.01866).

    m is the mean over this batch; that is this project's choice. Take features before an activation. After a ReLU no
    value is negative and nothing changes.

    Args:
        teacher: the teacher's features ``[B, C, ...]``.
        whole: ``Batch.mean_over_processes``.
    """
    negative = teacher.clamp_max(0)
    dims = [0, *range(2, teacher.ndim)]
    below = whole(negative.sum(dims, keepdim=True))
    count = whole((teacher < 0).sum(dims, keepdim=True).to(teacher.dtype))
    return torch.maximum(teacher, torch.where(count > 0, below / count, 0.0))


def match_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pool two feature maps ``[B, C, H, W]`` to the smaller of their sizes. Vectors ``[B, C]`` do not change."""
    if student.ndim < 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def make_adapter(student: Tensor, teacher: Tensor, always: bool) -> nn.Module:
    """A 1 x 1 convolution (for vectors: a linear layer) if channels differ in number or ``always``; else the identity.

    Raises:
        ConfigError: if the features are not two maps ``[B, C, H, W]`` or two vectors ``[B, C]``.
    """
    inputs, outputs = student.shape[1], teacher.shape[1]
    if student.ndim != teacher.ndim or student.ndim not in (2, 4):
        raise ConfigError(
            f"Features of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared: pair maps [B, C,"
            " H, W] with maps, or vectors [B, C] with vectors."
        )
    if inputs == outputs and not always:
        return nn.Identity()
    return nn.Conv2d(inputs, outputs, 1, bias=False) if student.ndim == 4 else nn.Linear(inputs, outputs, bias=False)


def compare_features(batch: Batch, pairs: Pairs, adapters: nn.ModuleDict, margin: bool, partial: bool) -> Tensor:
    """The mean ``feature_distance`` over all pairs. Features of both networks are averaged over time.

    Raises:
        ConfigError: if there is no teacher or no pair, or a feature of a pair was not observed.
    """
    known = batch.require_teacher().features
    if not pairs:
        raise ConfigError("pairs of features are left open: give (teacher path, student path), or call settled first.")
    distances = []
    for number, (theirs, ours) in enumerate(pairs):
        feature, teacher = _seen(batch.student.features, ours), over_time(_seen(known, theirs))
        adapter = adapters[str(number)]
        if not isinstance(adapter, nn.Identity) or feature.shape[1:] != teacher.shape:
            student, teacher = match_size(adapter(over_time(feature)), teacher)
            feature = student[None]
        teacher = teacher.float()
        wanted = margin_relu(teacher, batch.mean_over_processes) if margin else teacher
        distances.append(_distance(feature, wanted, partial, batch.mean_over_processes))
    return torch.stack(distances).mean()


def make_adapters(probe: Batch, pairs: Pairs, always: bool) -> nn.ModuleDict:
    """One adapter per pair, by the pair's number as text.

    Raises:
        ConfigError: if there is no teacher, or the features of a pair cannot be compared.
    """
    known, ours_seen = probe.require_teacher().features, probe.student.features
    return nn.ModuleDict(
        {
            str(number): make_adapter(over_time(_seen(ours_seen, ours)), over_time(_seen(known, theirs)), always)
            for number, (theirs, ours) in enumerate(pairs)
        }
    )


def _seen(features: Mapping[str, Tensor], path: str) -> Tensor:
    if path not in features:
        raise ConfigError(f"No feature at '{path}' was observed: give this path to observe(inputs, paths).")
    return features[path]


def stage_pairs(teacher: Learner | None, student: Learner) -> Pairs:
    """Pair the ends of both networks' stages (layer1, stage1, ...), from the last stage backwards.

    This is this project's choice.

    Raises:
        ConfigError: if there is no teacher, or one of the networks has no stage.
    """
    if teacher is None:
        raise ConfigError(NO_TEACHER)
    theirs, ours = ([path for path in network.paths() if STAGE.fullmatch(path)] for network in (teacher, student))
    pairs = tuple(zip(reversed(theirs), reversed(ours)))[::-1]
    if not pairs:
        raise ConfigError(
            "No stages named layer1, layer2, ... were found in both networks: give --pairs TEACHER-PATH "
            "STUDENT-PATH, or take --method kdsnn-response."
        )
    return pairs


def _line(dense: Tensor) -> Tensor:
    """A dense tensor as a vector, in the order of its memory."""
    return dense.as_strided((dense.numel(),), (1,))
