"""Mathematics on inner features that methods share: distances, transforms, adapters, and the pairs by default."""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.answer import Learner
from spikedistill.errors import ConfigError
from spikedistill.objective.terms import NO_TEACHER, Batch, Pairs
from spikedistill.shapes import over_time

STAGE = re.compile(r"(layer|stage)\D?\d+")
"""Module paths that are the ends of stages: layer1, stage2, ..."""


def feature_distance(student: Tensor, teacher: Tensor, partial: bool = False) -> Tensor:
    """Squared difference over the teacher's own mean square: 0 where equal, 1 for a silent student.

    Args:
        student: features ``[B, ...]`` averaged over time, of the teacher's shape.
        teacher: the teacher's features ``[B, ...]``.
        partial: leave out places where the teacher is not positive and the student lies below it (Heo et al.).
    """
    return _distance(student[None], teacher, partial)


def _distance(feature: Tensor, teacher: Tensor, partial: bool) -> Tensor:
    """``feature_distance`` of the mean over time of ``[T, B, ...]``."""
    size = torch.linalg.vector_norm(teacher).square() / teacher.numel()
    wanted = teacher
    if partial:
        mean = over_time(feature.detach())
        wanted = torch.where((mean <= teacher) & (teacher <= 0), mean, teacher)
    return _MeanSquare.apply(feature, wanted) / size.clamp_min(1e-12)


class _MeanSquare(torch.autograd.Function):
    """The mean squared difference of the mean over time of ``[T, B, ...]`` from what is fixed, ``[B, ...]``.

    As ``mse_loss`` of the mean, in fewer passes over memory: one for the mean, two for its distance, one back.
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


def margin_relu(teacher: Tensor) -> Tensor:
    """``max(x, m)`` with m a channel's mean negative response, here of the batch (Heo et al.).

    Features must be those before an activation; after one there is nothing below 0 and nothing changes.
    """
    negative = teacher.clamp_max(0)
    dims = [0, *range(2, teacher.ndim)]
    count = (teacher < 0).sum(dims, keepdim=True).clamp_min(1)
    return torch.maximum(teacher, negative.sum(dims, keepdim=True) / count)


def match_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both feature maps at the smaller of their sizes, by average pooling; vectors stay as they are."""
    if student.ndim < 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def make_adapter(student: Tensor, teacher: Tensor, always: bool) -> nn.Module:
    """A 1 x 1 convolution (for vectors: a linear layer) where channel counts differ or ``always``, else nothing."""
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
    """The mean ``feature_distance`` over all pairs, features of both networks averaged over time.

    Raises:
        ConfigError: if there is no teacher, or no pair.
    """
    known = batch.asked_teacher().features
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
        distances.append(_distance(feature, margin_relu(teacher) if margin else teacher, partial))
    return torch.stack(distances).mean()


def make_adapters(probe: Batch, pairs: Pairs, always: bool) -> nn.ModuleDict:
    """One adapter per pair, under its number.

    Raises:
        ConfigError: if there is no teacher, or the features of a pair cannot be compared.
    """
    known, ours_seen = probe.asked_teacher().features, probe.student.features
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
    """The ends of both networks' stages (layer1, stage1, ...), matched from the last backwards.

    Raises:
        ConfigError: if there is no teacher, or no stage in one of the networks.
    """
    if teacher is None:
        raise ConfigError(NO_TEACHER)
    theirs, ours = ([path for path in network.paths() if STAGE.fullmatch(path)] for network in (teacher, student))
    pairs = tuple(zip(reversed(theirs), reversed(ours)))[::-1]
    if not pairs:
        raise ConfigError(
            "No stages named layer1, layer2, ... were found in both networks: say which features to compare by --pairs "
            "TEACHER-PATH STUDENT-PATH, or take --method kdsnn-response."
        )
    return pairs


def _line(dense: Tensor) -> Tensor:
    """A tensor without holes as a vector, in the order of its memory."""
    return dense.as_strided((dense.numel(),), (1,))
