"""The choices of a distillation, frozen, each of which knows its faults: who teaches, and who learns."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from spikedistill.neuron.dynamics import Neuron
from spikedistill.student.coding import CODINGS
from spikedistill.student.conversion import Conversion, neuron_from
from spikedistill.student.pool import MaxPool


@dataclass(frozen=True)
class TeacherChoice:
    """Who teaches."""

    source: Annotated[str, arg(name="teacher")] = "runs/digits-teacher"
    """A run directory of 'teach' or of 'distill' (a spiking teacher), a weights file (.safetensors, .npz, .pt),
    torchvision/NAME or timm/NAME: that network with its published weights; or 'none' for methods without a teacher."""
    network: Annotated[str | None, arg(name="teacher-network")] = None
    """The network that a bare weights file belongs to: a zoo name (resnet18, vgg9 ...), torchvision/NAME, timm/NAME or
    FILE.py:FUNCTION, which is called with classes=K and returns the module."""
    width: Annotated[int | None, arg(name="teacher-width")] = None
    """Channels of its first stage (zoo networks)."""
    mean: Annotated[tuple[float, ...] | None, arg(name="teacher-mean")] = None
    """Input mean per channel that a bare weights file was trained with (images in 0..1)."""
    std: Annotated[tuple[float, ...] | None, arg(name="teacher-std")] = None
    """Input deviation, likewise."""


@dataclass(frozen=True)
class StudentChoice:
    """Who learns."""

    network: Annotated[str, arg(name="student")] = "same"
    """'same' as the teacher's network, or a zoo name, torchvision/NAME, timm/NAME or FILE.py:FUNCTION."""
    width: Annotated[int | None, arg(name="student-width")] = None
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
    max_pool: MaxPool = "cumulative"
    """What max pooling becomes: pooling of the input so far (cumulative), of each step by itself (or), or average
    pooling (average)."""
    coding: Literal["direct", "frames", "latency", "rate"] = "direct"
    """What the student sees at each step: the image itself (direct), spikes made from it (latency, rate), or the frames
    of event data (frames), of which there must be T."""

    @property
    def inherits(self) -> bool:
        """Whether the student starts from the teacher's weights."""
        return self.network == "same" if self.inherit is None else self.inherit

    @property
    def rounds(self) -> bool:
        """Whether its neurons round, so that they have a quantised stand-in."""
        subtracts = self.neuron == "if" and self.reset in (None, "subtract")
        return subtracts and self.initial == 0.5 and not self.learn_initial and self.coding == "direct"

    def make_neuron(self) -> Neuron:
        """The neuron model that the fields describe."""
        return neuron_from(
            self.neuron,
            fresh=not self.inherits,
            gradient=self.gradient,
            leak=self.leak,
            decay_input=self.decay_input,
            reset=self.reset,
            detach_reset=self.detach_reset,
            initial=self.initial,
            learn_initial=self.learn_initial,
            threshold=self.threshold,
            learn_threshold=self.learn_threshold,
            surrogate=self.surrogate,
        )

    def conversion(self) -> Conversion:
        """How the ANN becomes this student."""
        return Conversion(
            timesteps=self.timesteps,
            neuron=self.make_neuron(),
            inherit=self.inherits,
            rule=self.rule,
            percentile=self.percentile,
            per_channel=self.per_channel,
            correct_bias=self.correct_bias,
            max_pool=self.max_pool,
            coding=CODINGS[self.coding](),
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
        if self.network == "same" and self.width is not None:
            faults.append(f"student_width (={self.width}) needs a student of its own: name one by student")
        if self.correct_bias and not self.inherits:
            faults.append("correct_bias needs inherited weights: leave it away, or inherit=True")
        if self.gradient == "rate" and (self.learn_threshold or self.learn_initial or self.neuron == "plif"):
            faults.append(
                "the rate-based gradient does not reach learned thresholds, initial potentials and leaks: take"
                " gradient=exact"
            )
        if self.inherit and self.network != "same":
            faults.append(f"inherit needs the teacher's own network; the student is '{self.network}', not 'same'")
        return faults
