"""The choices of a distillation about teacher and student, as frozen values that check themselves."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from spikedistill.neuron.dynamics import NEURONS, Neuron
from spikedistill.student.coding import CODINGS
from spikedistill.student.conversion import Conversion, Correct, neuron_from
from spikedistill.student.pool import MaxPool


@dataclass(frozen=True)
class TeacherChoice:
    """The teacher."""

    source: Annotated[str, arg(name="teacher")] = "runs/digits-teacher"
    """A run directory of 'teach', or of 'distill' for a spiking teacher; a weights file (.safetensors, .npz, .pt);
    torchvision/NAME or timm/NAME with its published weights; or 'none' for methods without a teacher."""
    network: Annotated[str | None, arg(name="teacher-network")] = None
    """The network of a weights file that does not name it: a zoo name (resnet18, vgg9 ...), torchvision/NAME,
    timm/NAME, or FILE.py:FUNCTION, which is called with classes=K and returns the module."""
    width: Annotated[int | None, arg(name="teacher-width")] = None
    """Channels of the teacher's first stage, for a zoo network (default: its own)."""
    mean: Annotated[tuple[float, ...] | None, arg(name="teacher-mean")] = None
    """Mean per channel that the inputs of that network are normalised by, for images in 0..1."""
    std: Annotated[tuple[float, ...] | None, arg(name="teacher-std")] = None
    """Standard deviation per channel, likewise."""


@dataclass(frozen=True)
class StudentChoice:
    """The spiking student: its network, its neurons, and how the ANN is converted."""

    network: Annotated[str, arg(name="student")] = "same"
    """'same' for the teacher's network, or a zoo name, torchvision/NAME, timm/NAME or FILE.py:FUNCTION."""
    width: Annotated[int | None, arg(name="student-width")] = None
    """Channels of the student's first stage, for a zoo network that is not 'same' (default: its own)."""
    inherit: bool | None = None
    """Start from the teacher's weights (default: True if the student is the 'same' network)."""
    start: str | None = None
    """A run of 'distill' with the same student network. Training starts from its weights and thresholds, for instance
    with another T, method or gradient. With other levels D thresholds change so that threshold x D stays."""
    timesteps: int = 4
    """Number of time steps T."""
    neuron: Literal["if", "lif", "plif"] = "if"
    """Integrate-and-fire (if), leaky (lif), or leaky with a learned leak (plif)."""
    leak: float | None = None
    """Decay factor: the fraction of the membrane potential that is left after a step, for lif and plif (default:
    0.5)."""
    decay_input: bool | None = None
    """Multiply the input current by 1 - leak, as SpikingJelly's LIF does (default: True for plif, else False)."""
    reset: Literal["subtract", "zero"] | None = None
    """What a spike does to the potential: subtract the threshold, or set it to zero (default: subtract, for plif
    zero)."""
    detach_reset: bool | None = None
    """Leave the reset out of the gradient (default: True for fresh weights, unless the gradient is rate)."""
    initial: float = 0.5
    """Initial potential in units of the threshold; at 0.5 firing rates round the ANN's activations to T levels."""
    learn_initial: bool = False
    """Train the initial potential; there is one for each threshold."""
    threshold: float | None = None
    """Initial threshold of a student with fresh weights (default: 1.5, for lif and plif 1). With inherited weights
    thresholds are calibrated."""
    learn_threshold: bool = False
    """Train the thresholds."""
    levels: int = 1
    """Number of levels D: spikes that a neuron may fire within a time step. Above 1 they are graded, and run as D
    binary sub-steps."""
    gradient: Literal["exact", "rate", "quantised"] = "exact"
    """How training computes the gradient. exact: through every time step. rate: through firing rates, in half the time
    at T=4; it suits leaky neurons and costs accuracy with others. quantised: train the T steps of D levels as one step
    of T D levels (1 x T for D=1), at the cost of an ANN, and run T steps."""
    recompute: Literal["nothing", "neurons", "stages"] = "nothing"
    """Save memory with the exact gradient by computing activations again instead of keeping them: all but the
    convolutions (neurons), for up to a third more time, or everything in a stage (stages), for one more forward
    pass."""
    surrogate: Literal["atan", "rectangle", "sigmoid", "triangle"] | None = None
    """Surrogate gradient: what replaces the derivative of a spike (default: triangle for fresh weights, else
    rectangle)."""
    rule: Literal["least-squares", "max", "percentile"] = "least-squares"
    """How thresholds are calibrated on the teacher's activations. A method conversion-RULE sets it."""
    percentile: float = 99.9
    """The percentile of --rule percentile, above 0 to 100."""
    per_channel: bool = True
    """One threshold per channel, otherwise one per layer. Fresh weights start with one per layer."""
    calibration: int = 512
    """Number of training images on which thresholds are calibrated."""
    correct: Correct = "nothing"
    """What is corrected after conversion, without training: nothing, biases so that each channel has the ANN's mean
    activation, or weights, biases and thresholds layer by layer (layers). Seconds to a minute. With --start, layers
    brings a student of another T, levels or neuron near to the one that it starts from."""
    max_pool: MaxPool = "cumulative"
    """What max pooling becomes: max pooling of the cumulative input (cumulative) or of each step alone (or), or average
    pooling (average)."""
    coding: Literal["direct", "frames", "latency", "rate"] = "direct"
    """What the student sees at each step: the image itself (direct), spikes that encode it (latency, rate), or one of T
    frames of event data (frames)."""

    @property
    def inherits(self) -> bool:
        """Whether the student starts from the teacher's weights."""
        return self.network == "same" if self.inherit is None else self.inherit

    @property
    def steps_name(self) -> str:
        """T and D in the names of run directories: ``t4``, or ``t1d4`` for graded spikes."""
        return f"t{self.timesteps}" + (f"d{self.levels}" if self.levels > 1 else "")

    @property
    def rounds(self) -> bool:
        """Whether its neurons round to T levels, so that all steps can be trained as one (gradient=quantised)."""
        subtracts = self.neuron == "if" and self.reset in (None, "subtract")
        return subtracts and self.initial == 0.5 and not self.learn_initial and self.coding == "direct"

    def make_reset(self) -> str:
        """The reset, or the default one of the neuron."""
        return self.reset or NEURONS[self.neuron].reset.value

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
            levels=self.levels,
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
            correct="nothing"
            if self.start
            else self.correct,  # what is corrected then is the student that it starts from
            max_pool=self.max_pool,
            coding=CODINGS[self.coding](),
        )

    def problems(self) -> list[str]:
        """What cannot work, one sentence for each problem."""
        problems = []
        if self.timesteps < 1:
            problems.append(f"timesteps (={self.timesteps}) must be 1 or more")
        if self.levels < 1:
            problems.append(f"levels (={self.levels}) must be 1 or more")
        if self.levels > 1 and self.make_reset() != "subtract":
            problems.append(
                f"levels (={self.levels}) above 1 need reset=subtract, as each spike takes its own part away, but the"
                f" reset of {self.neuron} is {self.make_reset()}"
            )
        if self.levels > 1 and self.surrogate is not None:
            problems.append(
                f"surrogate (={self.surrogate}) is for levels=1: the gradient of graded spikes passes straight through"
            )
        if self.calibration < 1:
            problems.append(f"calibration (={self.calibration}) must be 1 image or more")
        if not 0 < self.percentile <= 100:
            problems.append(f"percentile (={self.percentile}) must be above 0 and at most 100")
        if self.neuron == "if" and self.leak is not None:
            problems.append(f"leak (={self.leak}) is for lif and plif, but the neuron is 'if'")
        if self.neuron == "if" and self.decay_input:
            problems.append("decay_input is for lif and plif, but the neuron is 'if'")
        if self.threshold is not None and self.inherits:
            problems.append(
                f"threshold (={self.threshold}) is for fresh weights, but the student inherits weights and its"
                " thresholds are calibrated"
            )
        if self.network == "same" and self.width is not None:
            problems.append(f"student_width (={self.width}) needs a network other than 'same': name one by student")
        if self.correct != "nothing" and not self.inherits and self.start is None:
            problems.append(f"correct (={self.correct!r}) needs inherited weights: omit it, or set inherit=True")
        if self.correct == "biases" and self.start is not None:
            problems.append(
                "correct (='biases') is for the ANN's own weights, not for those of start: give layers or nothing"
            )
        if self.gradient == "rate" and (self.learn_threshold or self.learn_initial or self.neuron == "plif"):
            problems.append(
                "the rate-based gradient does not train thresholds, initial potentials and leaks: use gradient=exact"
            )
        if self.inherit and self.network != "same":
            problems.append(f"inherit needs the teacher's network, but the student is '{self.network}', not 'same'")
        return problems
