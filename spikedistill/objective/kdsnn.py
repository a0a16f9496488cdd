"""KDSNN: what the ANN answers and what it sees inside, taught to the SNN (Xu et al., CVPR 2023, arXiv 2304.05627).

The paper describes a response-based form (soft labels with a temperature, section 3.2) and a feature-based form (inner
layers of both networks), each joined with the labels in one loss. Its weights, temperature, layers and distances were
not available to us: the response form below is that of Hinton et al. (arXiv 1503.02531), the feature form takes
margin ReLU and partial L2 from Heo et al. (arXiv 1904.01866) as options. Comparing the ends of stages, dividing by the
teacher's mean square, equal weights of pairs and every constant are this project's choice.
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
    """Feature-based KDSNN: ``CE(mean_t z, y) + weight x`` the distance of inner features, averaged over pairs."""

    pairs: Pairs = ()
    """Module paths (teacher, student) whose outputs are compared; by default the ends of their stages."""
    weight: float = 1.0
    """Weight of the distance of features, 0 or more."""
    adapt: bool | None = None
    """Compare through 1 x 1 convolutions even where channels agree; by default just if weights are not inherited. A
    student with fresh weights has no reason to use the teacher's channels and scale."""
    margin: bool = False
    """Raise the teacher's negative features to their channel's mean below 0; after a ReLU there are none."""
    partial: bool = False
    """Leave out places where the teacher is not above 0 and the student lies below it; none after a ReLU."""
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
        """Pairs and adapters closed."""
        return replace(
            self,
            pairs=self.pairs or stage_pairs(teacher, student),
            adapt=not inherits if self.adapt is None else self.adapt,
        )

    def modules(self, probe: Batch, teacher: Learner | None) -> nn.ModuleDict:
        """1 x 1 convolutions (for vectors linear layers) where channels differ, or everywhere with ``adapt``."""
        return make_adapters(probe, self.pairs, bool(self.adapt))

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Two terms, ``labels`` and ``features``."""
        distance = compare_features(batch, self.pairs, modules, self.margin, self.partial)
        hard = cross_entropy_of_mean(batch.student.logits, batch.labels, self.label_smoothing)
        return {"labels": hard, "features": self.weight * distance}


@dataclass(frozen=True)
class KDSNN(KDSNNFeature):
    """Both forms at once, this project's combination.

    ``(1 - alpha) CE + alpha tau^2 KL + weight x`` the distance of inner features.
    """

    temperature: float = 2.0
    """Temperature tau of the soft targets, above 0."""
    alpha: float = 0.7
    """Weight of the soft targets against the labels, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.response  # whose checks are ours

    @property
    def response(self) -> KDSNNResponse:
        """The response-based form of the same choices."""
        return KDSNNResponse(self.temperature, self.alpha, self.label_smoothing)

    def __call__(self, batch: Batch, modules: nn.ModuleDict) -> Terms:
        """Three terms, ``labels``, ``soft`` and ``features``."""
        response = self.response(batch, modules)
        distance = compare_features(batch, self.pairs, modules, self.margin, self.partial)
        return {**response, "features": self.weight * distance}
