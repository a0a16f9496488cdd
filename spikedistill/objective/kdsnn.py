"""KDSNN: distillation of an ANN's logits and inner features into an SNN (Xu et al., CVPR 2023, arXiv 2304.05627).

The paper describes two forms. The response-based form uses soft targets with a temperature (section 3.2). The
feature-based form compares inner layers of both networks. Each adds its term to the cross-entropy of the labels.
Without labels that term is left out, and alpha is 1. This is this project's addition.

We do not know the paper's weights, temperature, layers and distances. The response-based form here follows Hinton et
al. (arXiv 1503.02531). The feature-based form has margin ReLU and partial L2 of Heo et al. (arXiv 1904.01866) as
options. These are this project's choices: to compare the ends of stages, to divide by the teacher's mean square, to
weight pairs equally, to average the teacher over mirror images, and every constant.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from spikedistill.answer import Learner
from spikedistill.errors import ConfigError
from spikedistill.objective.features import compare_features, make_adapters, stage_pairs
from spikedistill.objective.logits import cross_entropy_of_mean, soft_target_divergence
from spikedistill.objective.terms import (
    Batch,
    Needs,
    Objective,
    Pairs,
    Terms,
    check_fraction,
    check_positive,
    check_weight,
)
from spikedistill.shapes import ClassLogits


@dataclass(frozen=True)
class KDSNNResponse(Objective):
    """Response-based KDSNN: ``(1 - alpha) CE(mean_t z, y) + alpha tau^2 KL(teacher || student)``."""

    temperature: float = 2.0
    """Temperature tau of the soft targets, above 0."""
    alpha: float = 0.7
    """Weight of the soft targets against the labels, 0 to 1."""
    label_smoothing: float = 0.0
    """Share of probability of the labels spread over all classes, 0 to 1."""
    mirror: bool = False
    """Average the teacher's logits over each image and its mirror image. This doubles the teacher's work."""

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_fraction("alpha", self.alpha)
        check_fraction("label_smoothing", self.label_smoothing)

    @property
    def needs(self) -> Needs:
        """The teacher's logits."""
        return Needs(teacher=True, mirror=self.mirror)

    def without_labels(self) -> "KDSNNResponse":
        """The same objective with alpha = 1: soft targets only.

        Raises:
            ConfigError: if alpha or label_smoothing were chosen for labels.
        """
        _refuse_for_labels(self)
        return replace(self, alpha=1.0)

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Two terms, ``labels`` and ``soft``; without labels ``soft`` only."""
        soft = self.divergence(batch.student.logits.mean(0), batch.require_teacher().logits.mean(0))
        return {**self.hard(batch), "soft": self.alpha * soft}

    def hard(self, batch: Batch) -> Terms:
        """The term ``labels``; no term for images without labels."""
        return _weighted_labels(batch, 1 - self.alpha, self.label_smoothing)

    def divergence(self, student: ClassLogits, teacher: ClassLogits) -> Tensor:
        """The distance from the soft targets."""
        return soft_target_divergence(student, teacher, self.temperature)


@dataclass(frozen=True)
class KDSNNFeature(Objective):
    """Feature-based KDSNN: ``CE(mean_t z, y) + weight * distance``, the mean feature distance over all pairs."""

    pairs: Pairs = ()
    """Pairs of module paths (teacher, student) whose outputs are compared (default: the ends of the stages)."""
    weight: float = 1.0
    """Weight of the feature distance, 0 or more."""
    adapt: bool | None = None
    """Compare through 1 x 1 convolutions even if channels are equal in number (default: True unless weights are
    inherited). A student with fresh weights need not use the teacher's channels and scale."""
    margin: bool = False
    """Raise the teacher's negative features to at least the mean of their channel's negative values (margin ReLU).
    After a ReLU it has no effect."""
    partial: bool = False
    """Leave out elements where the teacher is at most 0 and the student is not above it (partial L2)."""
    label_smoothing: float = 0.0
    """Share of probability of the labels spread over all classes, 0 to 1."""

    def __post_init__(self) -> None:
        check_fraction("label_smoothing", self.label_smoothing)
        check_weight("weight", self.weight)

    @property
    def needs(self) -> Needs:
        """The teacher, and the features of all pairs."""
        return Needs(teacher=True, pairs=self.pairs)

    def settled(self, teacher: Learner | None, student: Learner, inherits: bool) -> "KDSNNFeature":
        """The same objective with ``pairs`` and ``adapt`` set."""
        return replace(
            self,
            pairs=self.pairs or stage_pairs(teacher, student),
            adapt=not inherits if self.adapt is None else self.adapt,
        )

    def modules(self, probe: Batch, teacher: Learner | None) -> nn.ModuleDict:
        """1 x 1 convolutions (for vectors linear layers) where channels differ, or for all pairs with ``adapt``."""
        return make_adapters(probe, self.pairs, bool(self.adapt))

    def without_labels(self) -> "KDSNNFeature":
        """The same objective, which leaves out the labels: the feature distance only.

        Raises:
            ConfigError: if label_smoothing was chosen for labels.
        """
        _refuse_for_labels(self)
        return self

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Two terms, ``labels`` and ``features``; without labels ``features`` only."""
        distance = compare_features(batch, self.pairs, modules, self.margin, self.partial)
        return {**_weighted_labels(batch, 1.0, self.label_smoothing), "features": self.weight * distance}


@dataclass(frozen=True)
class KDSNN(KDSNNFeature):
    """Both forms at once: ``(1 - alpha) CE + alpha tau^2 KL + weight * distance``.

    The combination is this project's choice.
    """

    temperature: float = 2.0
    """Temperature tau of the soft targets, above 0."""
    alpha: float = 0.7
    """Weight of the soft targets against the labels, 0 to 1."""
    mirror: bool = False
    """Average the teacher's logits over each image and its mirror image. This doubles the teacher's work."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.response  # checks temperature and alpha

    @property
    def needs(self) -> Needs:
        """The teacher's logits, and the features of all pairs."""
        return self.response.needs | super().needs

    @property
    def response(self) -> KDSNNResponse:
        """The response-based form with the same fields."""
        return KDSNNResponse(self.temperature, self.alpha, self.label_smoothing, self.mirror)

    def without_labels(self) -> "KDSNN":
        """The same objective with alpha = 1: soft targets and features.

        Raises:
            ConfigError: if alpha or label_smoothing were chosen for labels.
        """
        _refuse_for_labels(self)
        return replace(self, alpha=1.0)

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Three terms, ``labels``, ``soft`` and ``features``; without labels the last two."""
        response = self.response(batch, modules)
        distance = compare_features(batch, self.pairs, modules, self.margin, self.partial)
        return {**response, "features": self.weight * distance}


def _weighted_labels(batch: Batch, weight: float, label_smoothing: float) -> Terms:
    """The term ``labels``; no term for images without labels."""
    if batch.labels is None:
        return {}
    return {"labels": weight * cross_entropy_of_mean(batch.student.logits, batch.labels, label_smoothing)}


def _refuse_for_labels(method: KDSNNResponse | KDSNNFeature) -> None:
    """Refuse values that weight or smooth the labels, for images without labels.

    Raises:
        ConfigError: if alpha is neither its default nor 1, or label_smoothing is not 0.
    """
    alpha = getattr(method, "alpha", 1.0)
    if alpha not in (getattr(type(method), "alpha", 1.0), 1.0):
        raise ConfigError(f"alpha (={alpha}) weights labels, and the images have none: leave it out, it is then 1.")
    if method.label_smoothing:
        raise ConfigError(
            f"label_smoothing (={method.label_smoothing}) smooths labels, and the images have none: leave it out."
        )
