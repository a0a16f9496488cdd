"""KDSNN: what the ANN answers and what it sees inside, taught to the SNN (Xu et al., CVPR 2023, arXiv 2304.05627).

The paper describes a response-based form (soft labels with a temperature, section 3.2) and a feature-based form (inner
layers of both networks), each joined with the labels in one loss. Its weights, temperature, layers and distances were
not available to us: the response form below is that of Hinton et al. (arXiv 1503.02531), the feature form takes
margin ReLU and partial L2 from Heo et al. (arXiv 1904.01866) as options. Comparing the ends of stages, dividing by the
teacher's mean square, equal weights of pairs and every constant are this project's choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedistill.errors import ConfigError
from spikedistill.objective.direct import cross_entropy_of_mean
from spikedistill.objective.terms import Batch, Objective, Terms, positive, share
from spikedistill.shapes import ClassLogits, time_mean

NO_TEACHER = "This objective asks the teacher, and no teacher was given: pass teacher=..., or use Direct."
Pairs = tuple[tuple[str, str], ...]


def soft_labels(student: ClassLogits, teacher: ClassLogits, temperature: float) -> Tensor:
    """``tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau))``, averaged over the batch (Hinton et al., section 2).

    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> float(soft_labels(logits, logits, temperature=4.0))
    0.0
    """
    target = F.log_softmax(teacher / temperature, dim=-1)
    answer = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(answer, target, reduction="batchmean", log_target=True)


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


def compare(batch: Batch, pairs: Pairs, adapters: nn.ModuleDict, margin: bool, partial: bool) -> Tensor:
    """The mean ``feature_distance`` over all pairs, students averaged over time."""
    distances = []
    for number, (theirs, ours) in enumerate(pairs):
        if theirs not in batch.teacher_features:
            raise ConfigError(NO_TEACHER)
        feature, teacher, adapter = batch.features[ours], batch.teacher_features[theirs], adapters[str(number)]
        if not isinstance(adapter, nn.Identity) or feature.shape[1:] != teacher.shape:
            student, teacher = match_size(adapter(over_time(feature)), teacher)
            feature = student[None]
        teacher = teacher.float()
        distances.append(_distance(feature, margin_relu(teacher) if margin else teacher, partial))
    return torch.stack(distances).mean()


def over_time(feature: Tensor) -> Tensor:
    """The mean over time of ``[T, B, ...]`` in the order of memory that ``[B, ...]`` has.

    What is the same at every step (a view with stride 0) is not summed.
    """
    if feature.stride(0) == 0 or len(feature) == 1:
        return feature[0]
    return _Mean.apply(feature)


class _Mean(torch.autograd.Function):
    """``time_mean`` of any shape, with a gradient; what it is given and what comes out have one order of memory."""

    @staticmethod
    def forward(ctx, feature: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        one = torch.empty_like(feature[0])
        ctx.shape, strides = feature.shape, (one.numel(), *one.stride())
        if feature.stride() != strides:
            feature = feature.new_empty_strided(feature.shape, strides).copy_(feature)
        rows = feature.as_strided((len(feature), one.numel()), (one.numel(), 1))
        return time_mean(rows).as_strided(one.shape, one.stride())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return (grad / ctx.shape[0]).expand(ctx.shape)


def _line(dense: Tensor) -> Tensor:
    """A tensor without holes as a vector, in the order of its memory."""
    return dense.as_strided((dense.numel(),), (1,))


def make_adapters(batch: Batch, pairs: Pairs, always: bool) -> nn.ModuleDict:
    """One adapter a pair, under its number.

    Raises:
        ConfigError: if there is no teacher, or the features of a pair cannot be compared.
    """
    if any(theirs not in batch.teacher_features for theirs, _ in pairs):
        raise ConfigError(NO_TEACHER)
    return nn.ModuleDict(
        {
            str(number): make_adapter(over_time(batch.features[ours]), batch.teacher_features[theirs], always)
            for number, (theirs, ours) in enumerate(pairs)
        }
    )


def _asked(teacher_logits: Tensor | None) -> Tensor:
    if teacher_logits is None:
        raise ConfigError(NO_TEACHER)
    return teacher_logits


@dataclass(frozen=True)
class KDSNNResponse(Objective):
    """Response-based KDSNN: ``(1 - alpha) CE(mean_t z, y) + alpha tau^2 KL(teacher || student)``.

    Args:
        temperature: tau, above 0.
        alpha: the teacher's share, 0..1.
        label_smoothing: of the labels' share, 0..1.
    """

    temperature: float = 2.0
    alpha: float = 0.7
    label_smoothing: float = 0.0
    teacher = True

    def __post_init__(self) -> None:
        positive("temperature", self.temperature)
        share("alpha", self.alpha)
        share("label_smoothing", self.label_smoothing)

    def __call__(self, batch: Batch, adapters: nn.ModuleDict) -> Terms:
        """Two terms, ``labels`` and ``soft``."""
        hard = cross_entropy_of_mean(batch.logits, batch.labels, self.label_smoothing)
        soft = soft_labels(batch.logits.mean(0), _asked(batch.teacher_logits), self.temperature)
        return {"labels": (1 - self.alpha) * hard, "soft": self.alpha * soft}


@dataclass(frozen=True)
class KDSNNFeature(Objective):
    """Feature-based KDSNN: ``CE(mean_t z, y) + weight x`` the distance of inner features, averaged over pairs.

    Args:
        pairs: (teacher path, student path) of modules whose outputs are compared.
        weight: of the distance, 0 or more.
        adapt: a 1 x 1 convolution for every pair, not only where channel counts differ; a student with fresh weights
            has no reason to use the teacher's channels and scale.
        margin: pass the teacher's features through ``margin_relu``.
        partial: see ``feature_distance``.
        label_smoothing: of the labels, 0..1.
    """

    pairs: Pairs = ()
    weight: float = 1.0
    adapt: bool = False
    margin: bool = False
    partial: bool = False
    label_smoothing: float = 0.0
    teacher = True

    def __post_init__(self) -> None:
        share("label_smoothing", self.label_smoothing)
        _check_features(self.pairs, self.weight)

    def adapters(self, batch: Batch) -> nn.ModuleDict:
        """1 x 1 convolutions."""
        return make_adapters(batch, self.pairs, self.adapt)

    def __call__(self, batch: Batch, adapters: nn.ModuleDict) -> Terms:
        """Two terms, ``labels`` and ``features``."""
        distance = compare(batch, self.pairs, adapters, self.margin, self.partial)
        hard = cross_entropy_of_mean(batch.logits, batch.labels, self.label_smoothing)
        return {"labels": hard, "features": self.weight * distance}


@dataclass(frozen=True)
class KDSNN(Objective):
    """Both forms at once, this project's combination.

    ``(1 - alpha) CE + alpha tau^2 KL + weight x`` the distance of inner features.

    Args: those of ``KDSNNResponse`` and ``KDSNNFeature``.
    """

    pairs: Pairs = ()
    temperature: float = 2.0
    alpha: float = 0.7
    weight: float = 1.0
    adapt: bool = False
    margin: bool = False
    partial: bool = False
    label_smoothing: float = 0.0
    teacher = True

    def __post_init__(self) -> None:
        positive("temperature", self.temperature)
        share("alpha", self.alpha)
        share("label_smoothing", self.label_smoothing)
        _check_features(self.pairs, self.weight)

    def adapters(self, batch: Batch) -> nn.ModuleDict:
        """1 x 1 convolutions."""
        return make_adapters(batch, self.pairs, self.adapt)

    def __call__(self, batch: Batch, adapters: nn.ModuleDict) -> Terms:
        """Three terms, ``labels``, ``soft`` and ``features``."""
        response = KDSNNResponse(self.temperature, self.alpha, self.label_smoothing)(batch, adapters)
        distance = compare(batch, self.pairs, adapters, self.margin, self.partial)
        return {**response, "features": self.weight * distance}


def _check_features(pairs: Sequence[tuple[str, str]], weight: float) -> None:
    if not pairs:
        raise ConfigError("Feature-based distillation needs at least one pair (teacher path, student path).")
    if not 0 <= weight < math.inf:
        raise ConfigError(f"weight (={weight}) of the features must be 0 or more.")
