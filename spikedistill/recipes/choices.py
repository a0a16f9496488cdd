"""The choices of a distillation, frozen, each of which knows its faults: who teaches, who learns, what is taught."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spikedistill.neuron.dynamics import NEURONS, Neuron, Reset
from spikedistill.neuron.surrogate import SURROGATES
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse, Pairs
from spikedistill.objective.terms import Objective
from spikedistill.student.build import FRESH
from spikedistill.student.calibrate import Rule
from spikedistill.teacher.load import is_library_s

CONVERSIONS: dict[str, Rule] = {
    "conversion-max": "max",
    "conversion-percentile": "percentile",
    "conversion-least-squares": "least-squares",
}
"""Methods without training, and how they choose thresholds."""


@dataclass(frozen=True)
class TeacherChoice:
    """Who teaches."""

    teacher: str = "runs/digits-teacher"
    """A run directory of 'teach', a weights file (.safetensors, .npz, .pt), or torchvision/NAME or timm/NAME: that
    network with its published weights."""
    teacher_network: str | None = None
    """The network that a bare weights file belongs to: a zoo name (resnet18, vgg9 ...), torchvision/NAME, timm/NAME or
    FILE.py:FUNCTION, which is called with classes=K and returns the module."""
    teacher_width: int | None = None
    """Channels of its first stage (zoo networks)."""
    teacher_mean: tuple[float, ...] | None = None
    """Input mean, one value a channel, that a bare weights file was trained with (images in 0..1)."""
    teacher_std: tuple[float, ...] | None = None
    """Input deviation, likewise."""

    @property
    def published(self) -> bool:
        """Whether a library's network with its published weights is meant."""
        return self.teacher_network is None and is_library_s(self.teacher) and not Path(self.teacher).exists()


@dataclass(frozen=True)
class StudentChoice:
    """Who learns."""

    student: str = "same"
    """'same' as the teacher's network, or a zoo name, torchvision/NAME, timm/NAME or FILE.py:FUNCTION."""
    student_width: int | None = None
    """Channels of its first stage (zoo networks other than 'same')."""
    inherit: bool | None = None
    """Start from the teacher's weights; by default just if the student is the 'same'."""
    start: str | None = None
    """A run of 'distill' with the same student network, whose weights and thresholds training begins with: to go on
    with another T, method or gradient."""
    timesteps: int = 4
    """Time steps T."""
    neuron: Literal["if", "lif", "plif"] = "if"
    """Integrate-and-fire, leaky, or leaky with a learned leak."""
    leak: float | None = None
    """Share of the potential left after a step (lif, plif); 0.5 by default."""
    decay_input: bool | None = None
    """Multiply the current by 1 - leak, as SpikingJelly's LIF does; the neuron's own by default (plif does)."""
    reset: Literal["subtract", "zero"] | None = None
    """What a spike does to the potential; the neuron's own by default."""
    detach_reset: bool | None = None
    """Leave the reset out of the gradient; by default just if weights are fresh and the gradient is not rate, whose
    slopes then grow with T."""
    initial: float = 0.5
    """Potential at the first step in thresholds; at 0.5 the mean of T steps rounds the activation."""
    learn_initial: bool = False
    """Train that potential, one for each threshold."""
    threshold: float | None = None
    """Where thresholds begin in a student with fresh weights: 1.5 by default, 1 with a leak. Inherited weights are
    calibrated instead."""
    learn_threshold: bool = False
    """Train each layer's threshold."""
    gradient: Literal["exact", "rate", "quantised"] = "exact"
    """Through every time step; through rates alone, in half the time at T=4, for neurons that forget (lif: others learn
    less by it); or of the quantised stand-in of T levels, which has no time and costs what an ANN costs."""
    recompute: Literal["nothing", "neurons", "stages"] = "nothing"
    """Less memory (gradient=exact): compute again, instead of keeping, all but convolutions (neurons), for less time;
    or all of a stage (stages), for one more forward pass."""
    surrogate: Literal["atan", "rectangle", "sigmoid", "triangle"] | None = None
    """Stand-in for the derivative of a spike; by default rectangle, for fresh weights triangle."""
    rule: Literal["least-squares", "max", "percentile"] = "least-squares"
    """How thresholds are chosen from the teacher's activations; conversion methods have a rule of their own."""
    percentile: float = 99.9
    """For the rule of that name."""
    per_channel: bool = True
    """A threshold for every channel; else one for each layer. Fresh weights begin with one for each layer."""
    calibration: int = 512
    """Training images from which thresholds are chosen."""
    correct_bias: bool = False
    """Shift biases so that every layer's channels answer as the ANN's do on average (for methods without training)."""
    max_pool: Literal["keep", "average"] = "keep"
    """Keep max pooling, or exchange it for average pooling."""
    coding: Literal["direct", "latency", "rate"] = "direct"
    """What the student sees at each step."""

    @property
    def inherits(self) -> bool:
        """Whether the student starts from the teacher's weights."""
        return self.student == "same" if self.inherit is None else self.inherit

    @property
    def rounds(self) -> bool:
        """Whether its neurons round, so that they have a quantised stand-in."""
        subtracts = self.neuron == "if" and self.reset in (None, "subtract")
        return subtracts and self.initial == 0.5 and not self.learn_initial and self.coding == "direct"

    def make_neuron(self) -> Neuron:
        """The neuron model that the fields describe."""
        base, fresh = NEURONS[self.neuron], not self.inherits
        usual = FRESH.threshold if fresh and self.neuron == "if" else base.threshold
        given: dict[str, Any] = {"leak": self.leak, "decay_input": self.decay_input}
        given["reset"] = None if self.reset is None else Reset(self.reset)
        return dataclasses.replace(
            base,
            **{name: value for name, value in given.items() if value is not None},
            initial=self.initial,
            learn_initial=self.learn_initial,
            detach_reset=fresh and self.gradient != "rate" if self.detach_reset is None else self.detach_reset,
            threshold=usual if self.threshold is None else self.threshold,
            learn_threshold=self.learn_threshold,
            surrogate=SURROGATES[self.surrogate or ("triangle" if fresh else "rectangle")](),
        )

    def faults(self) -> list[str]:
        """What cannot work, one sentence each."""
        faults = []
        if self.timesteps < 1:
            faults.append(f"timesteps (={self.timesteps}) must be 1 or more")
        if self.calibration < 1:
            faults.append(f"calibration (={self.calibration}) must be 1 image or more")
        if not 0 < self.percentile <= 100:
            faults.append(f"percentile (={self.percentile}) must be above 0 and at most 100")
        if self.neuron == "if" and self.leak is not None:
            faults.append(f"leak (={self.leak}) is for lif and plif; the neuron is 'if'")
        if self.neuron == "if" and self.decay_input:
            faults.append("decay_input is for lif and plif; the neuron is 'if'")
        if self.threshold is not None and self.inherits:
            faults.append(f"threshold (={self.threshold}) is for fresh weights; inherited ones are calibrated")
        if self.student == "same" and self.student_width is not None:
            faults.append(f"student_width (={self.student_width}) needs a student of its own: name one by student")
        if self.correct_bias and not self.inherits:
            faults.append("correct_bias needs inherited weights: leave it away, or inherit=True")
        if self.gradient == "rate" and (self.learn_threshold or self.learn_initial or self.neuron == "plif"):
            faults.append(
                "the rate-based gradient does not reach learned thresholds, initial potentials and leaks: take"
                " gradient=exact"
            )
        if self.inherit and self.student != "same":
            faults.append(f"inherit needs the teacher's own network; the student is '{self.student}', not 'same'")
        return faults


@dataclass(frozen=True)
class Method:
    """What the student is taught."""

    method: Literal[
        "direct",
        "tet",
        "kdsnn-response",
        "kdsnn-feature",
        "kdsnn",
        "conversion-max",
        "conversion-percentile",
        "conversion-least-squares",
        "conversion-qcfs",
    ] = "kdsnn"
    """Labels alone (direct, tet), or with the teacher's answers, its inner features, or both (kdsnn). Conversion: no
    training, thresholds by that rule; or training of the quantised stand-in on labels, then conversion (qcfs)."""
    temperature: float = 2.0
    """Temperature of the soft labels."""
    alpha: float = 0.7
    """The teacher's share against the labels, 0..1."""
    feature_weight: float = 1.0
    """Weight of the distance of inner features."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Module paths (teacher, student) whose features are compared; by default the ends of their stages."""
    adapt: bool | None = None
    """Compare through 1 x 1 convolutions even where channels agree; by default just if weights are not inherited."""
    margin: bool = False
    """Raise the teacher's negative features to their channel's mean below 0; after a ReLU there are none."""
    partial: bool = False
    """Do not count places where the teacher is not above 0 and the student lies below it; none after a ReLU."""
    label_smoothing: float = 0.0
    """Share of probability spread over all classes."""
    lam: float = 1e-3
    """Weight of the term that keeps logits near 1, 0..1 (tet)."""

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.method not in CONVERSIONS

    def settle(self, student: "StudentChoice") -> "StudentChoice":
        """The student that the method is about: a conversion decides on the rule, or on the stand-in."""
        if self.method == "conversion-qcfs":
            return dataclasses.replace(student, gradient="quantised", learn_threshold=True)
        return dataclasses.replace(student, rule=CONVERSIONS[self.method]) if not self.trains else student

    def objective(self, pairs: Pairs, inherits: bool) -> Objective:
        """The objective that the fields describe."""
        smoothing = self.label_smoothing
        adapt = not inherits if self.adapt is None else self.adapt
        features = {"pairs": pairs, "weight": self.feature_weight, "adapt": adapt}
        features |= {"margin": self.margin, "partial": self.partial}
        soft = {"temperature": self.temperature, "alpha": self.alpha}
        methods: dict[str, Callable[[], Objective]] = {
            "direct": lambda: Direct(smoothing),
            "tet": lambda: TET(smoothing, self.lam),
            "conversion-qcfs": lambda: Direct(smoothing),
            "kdsnn-response": lambda: KDSNNResponse(**soft, label_smoothing=smoothing),
            "kdsnn-feature": lambda: KDSNNFeature(**features, label_smoothing=smoothing),  # type: ignore[arg-type]
            "kdsnn": lambda: KDSNN(**features, **soft, label_smoothing=smoothing),  # type: ignore[arg-type]
        }
        return methods[self.method]()
