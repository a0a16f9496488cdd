"""KDSNN: distillation of an ANN's logits and inner features into an SNN (Xu et al., CVPR 2023, arXiv 2304.05627).

The paper describes two forms. The response-based form uses soft targets with a temperature (section 3.2). The
feature-based form compares inner layers of both networks. Each adds its term to the cross-entropy of the labels.

We do not know the paper's weights, temperature, layers and distances. The response-based form here follows Hinton et
al. (arXiv 1503.02531). The feature-based form has margin ReLU and partial L2 of Heo et al. (arXiv 1904.01866) as
options. These are this project's choices: to compare the ends of stages, to divide by the teacher's mean square, to
weight pairs equally, and every constant.
"""

from dataclasses import dataclass, replace

from torch import nn

from spikedistill.answer import Learner
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


@dataclass(frozen=True)
class KDSNNResponse(Objective):
    """Response-based KDSNN: ``(1 - alpha) CE(mean_t z, y) + alpha tau^2 KL(teacher || student)``."""

    temperature: float = 2.0
    """Temperature tau of the soft targets, above 0."""
    alpha: float = 0.7
    """Weight of the soft targets against the labels, 0 to 1."""
    label_smoothing: float = 0.0
    """Share of probability of the labels spread over all classes, 0 to 1."""

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_fraction("alpha", self.alpha)
        check_fraction("label_smoothing", self.label_smoothing)

    @property
    def needs(self) -> Needs:
        """The teacher's logits."""
        return Needs(teacher=True)

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Two terms, ``labels`` and ``soft``."""
        hard = cross_entropy_of_mean(batch.student.logits, batch.labels, self.label_smoothing)
        teacher = batch.asked_teacher().logits.mean(0)
        soft = soft_target_divergence(batch.student.logits.mean(0), teacher, self.temperature)
        return {"labels": (1 - self.alpha) * hard, "soft": self.alpha * soft}


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

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Two terms, ``labels`` and ``features``."""
        distance = compare_features(batch, self.pairs, modules, self.margin, self.partial)
        hard = cross_entropy_of_mean(batch.student.logits, batch.labels, self.label_smoothing)
        return {"labels": hard, "features": self.weight * distance}


@dataclass(frozen=True)
class KDSNN(KDSNNFeature):
    """Both forms at once: ``(1 - alpha) CE + alpha tau^2 KL + weight * distance``.

    The combination is this project's choice.
    """

    temperature: float = 2.0
    """Temperature tau of the soft targets, above 0."""
    alpha: float = 0.7
    """Weight of the soft targets against the labels, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.response  # checks temperature and alpha

    @property
    def response(self) -> KDSNNResponse:
        """The response-based form with the same fields."""
        return KDSNNResponse(self.temperature, self.alpha, self.label_smoothing)

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Three terms, ``labels``, ``soft`` and ``features``."""
        response = self.response(batch, modules)
        distance = compare_features(batch, self.pairs, modules, self.margin, self.partial)
        return {**response, "features": self.weight * distance}
