"""``to_spiking``: an ANN goes in, a spiking student and a report come out. Conversion is read whole on this page."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from spikedistill.errors import ConfigError, ConversionError, ShapeError, one_of
from spikedistill.neuron.dynamics import Neuron
from spikedistill.neuron.layer import Spiking
from spikedistill.neuron.surrogate import Rectangle, Triangle
from spikedistill.shapes import ClassLogits, Image, Logits
from spikedistill.student.calibrate import Rule, channel_means, correct_biases, record, thresholds
from spikedistill.student.coding import Coding, Direct
from spikedistill.student.quantised import quantised_run
from spikedistill.student.rate import rate_run
from spikedistill.student.recompute import Recompute, recomputed_run
from spikedistill.student.surgery import MaxPool, Place, find_places, insert_neurons, trace
from spikedistill.teacher.load import Normalised
from spikedistill.teacher.zoo import initialise

Gradient = Literal["exact", "rate", "quantised"]
"""How a student in training hands gradients back: through every step and its state, through rates alone, or not as a
spiking network at all but as its quantised stand-in (``student/quantised.py``), whose logits have one time step."""
State = tuple[Tensor, ...]
"""The potentials of all layers after a step, ``[B, ...]`` each, in units of their thresholds."""

ROWS = 1000
"""Time steps times images in one call: more would leave the processor's caches."""

ROUNDING = Neuron(initial=0.5, surrogate=Rectangle())
"""The neuron of an inheriting student where none is named: IF that starts at half its threshold, so T steps round. In
pilots (LOG.md) its students learnt most with the rectangle."""
FRESH = replace(ROUNDING, threshold=1.5, detach_reset=True, surrogate=Triangle())
"""The same where weights are fresh: in pilots (LOG.md) its students learnt fastest on currents from batch norm."""


@dataclass(frozen=True)
class Site:
    """One activation of the ANN and the neurons that took its place.

    Where thresholds differ by channel, ``threshold`` is their mean; ``expected_rate`` is in spikes a step, 0..1.
    """

    name: str
    kind: str
    source: str
    threshold: float
    expected_rate: float | None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a conversion did, activation by activation."""

    sites: tuple[Site, ...]
    timesteps: int
    inherited: bool

    def __str__(self) -> str:
        """A table for people."""
        kind = "inherited" if self.inherited else "fresh"
        lines = [f"{len(self.sites)} layers of neurons, {kind} weights, T={self.timesteps}"]
        width = max(len(site.name) for site in self.sites)
        for site in self.sites:
            rate = "" if site.expected_rate is None else f"  rate {site.expected_rate:.3f}"
            note = f"  ({site.note})" if site.note else ""
            lines.append(
                f"  {site.name:{width}}  {site.kind:10}  threshold {site.threshold:8.4g}{rate}  {site.source}{note}"
            )
        return "\n".join(lines)


class Student(nn.Module):
    """A spiking network: raw images in, logits of every time step out, no state inside.

    Made by ``to_spiking``. Ordinary in every other way: ``deepcopy``, ``state_dict``, ``SyncBatchNorm`` conversion and
    ``DistributedDataParallel`` treat it like any module.

    Attributes:
        gradient: how gradients are handed back in training.
        ends: for each module path of the ANN the node of ``core`` that carries its output, in order of execution.
        recompute: what is computed again for the exact gradient instead of kept: the same gradient from less memory.
            ``"nothing"``; ``"neurons"``, all but convolutions, for less time; ``"stages"``, all, for one more forward
            pass. The rate-based gradient keeps little and stays as it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        core: fx.GraphModule,
        ends: dict[str, str],
        timesteps: int,
        coding: Coding,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.core = core
        self.coding = coding
        self.timesteps = timesteps
        self.gradient: Gradient = "exact"
        self.recompute: Recompute = "nothing"
        self.tapped: tuple[str, ...] = ()
        self.ends = ends
        self._group: str = core.meta["neurons"]
        self._takes = _first_convolution(core)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def neurons(self) -> dict[str, Spiking]:
        """The layers of neurons by name, in order of execution."""
        return dict(self.core.get_submodule(self._group).named_children())  # type: ignore[arg-type]

    def paths(self) -> list[str]:
        """The module paths of the ANN at which ``observe`` finds a feature, in order of execution."""
        return list(self.ends)

    @property
    def at_once(self) -> int:
        """How many images to give in one call where no gradient is wanted: 250, fewer above four time steps."""
        return max(1, ROWS // max(4, self.timesteps))

    def set_timesteps(self, timesteps: int) -> None:
        """Answer after another number of steps from now on.

        Raises:
            ConfigError: if it is below 1.
        """
        if timesteps < 1:
            raise ConfigError(f"timesteps (={timesteps}) must be 1 or more.")
        self.timesteps = timesteps

    def forward(self, images: Tensor) -> Logits:
        """Images ``[B, C, H, W]`` in 0..1 (or frames ``[T, B, C, H, W]``) to logits ``[T, B, K]``; begins afresh.

        In training with ``gradient="quantised"`` there is no time: ``[1, B, K]``.

        Raises:
            ShapeError: if the images are of another shape.
            ConfigError: if the gradient cannot be had of this network.
        """
        logits, _, _ = self._run(images, self.timesteps)
        return logits

    def observe(self, images: Tensor, paths: Sequence[str]) -> tuple[Logits, dict[str, Tensor]]:
        """Logits ``[T, B, K]`` and the features ``[T, B, ...]`` that the ANN's modules at these paths became.

        In training with ``gradient="rate"`` every step of a feature is their mean.

        Raises:
            ConfigError: if the ANN had no module at a path.
        """
        if tuple(paths) != self.tapped:
            self.tap(paths)
        logits, _, features = self._run(images, self.timesteps)
        shaped = {}
        for path, rows in features.items():
            once = rows.shape[0] == logits.shape[1]
            shaped[path] = rows.expand(len(logits), *rows.shape) if once else rows.unflatten(0, (len(logits), -1))
        return logits, shaped

    def step(self, images: Tensor, state: State | None = None) -> tuple[ClassLogits, State]:
        """One time step of a stream.

        Args:
            images: what this step sees, ``[B, C, H, W]``; ``coding.frame`` makes it from a whole input.
            state: what the last step returned; None begins afresh.

        Returns:
            This step's logits ``[B, K]``, and the state after it.

        Raises:
            ShapeError: if the state is another network's, or another batch's.
        """
        layers = len(self.neurons)
        if state is not None and len(state) != layers:
            raise ShapeError(
                f"The state has {len(state)} layers, the student has {layers}: carry a state only between steps of one"
                " student."
            )
        before = (None,) * layers if state is None else state
        logits, after, _ = self._through(self._normalised(images), 1, 1, before, True)
        return logits, after

    def tap(self, paths: Sequence[str]) -> None:
        """Choose the module paths whose features ``observe`` returns."""
        nodes = {node.name: node for node in self.core.graph.nodes}
        for path in paths:
            one_of("module with a feature", path, self.ends)
        result = nodes["output"]
        logits, states, _ = result.args[0]
        result.args = ((logits, states, {path: nodes[self.ends[path]] for path in paths}),)
        self.core.recompile()
        self.tapped = tuple(paths)

    def _run(self, images: Tensor, timesteps: int) -> tuple[Logits, Any, dict[str, Tensor]]:
        one_of("gradient", self.gradient, get_args(Gradient))
        rows, repeats = self.coding.encode(images, timesteps)
        learns = self.training and torch.is_grad_enabled()
        if self.gradient == "quantised" and learns:
            if repeats != timesteps:
                raise ConfigError("The quantised stand-in has no time: give images (no frames) and direct coding.")
            logits, features = quantised_run(self.core, self._normalised(rows), timesteps, len(self.neurons))
            return logits[None], None, features
        if self.gradient == "rate" and learns:
            logits, features = rate_run(self.core, self._normalised(rows), timesteps, repeats, len(self.neurons))
            return logits.unflatten(0, (timesteps, -1)), None, features
        states = (None,) * len(self.neurons)
        logits, after, features = self._through(self._normalised(rows), timesteps, repeats, states, False)
        return logits.unflatten(0, (timesteps, -1)), after, features

    def _through(self, *given: Any) -> Any:
        """The graph's results, with what ``recompute`` asks for."""
        one_of("recompute", self.recompute, get_args(Recompute))
        if self.recompute == "nothing" or not torch.is_grad_enabled():
            return self.core(*given)
        return recomputed_run(self.core, self.recompute == "stages", *given)

    def _normalised(self, images: Tensor) -> Tensor:
        dims, channels = self._takes
        own = len(self.mean)
        fits = images.ndim > 1 and len(images) > 0 and dims in (None, images.ndim)
        if fits and (own == 1 or (images.ndim > 3 and images.shape[-3] in (1, own))):
            normalised = (images - self.mean) / self.std
            if channels in (None, normalised.shape[1]):
                return normalised
        axes = ", ".join(["B", str(channels), *"DHW"[5 - dims :]]) if dims else "B, ..."
        raise ShapeError(
            f"Images of shape {tuple(images.shape)} were given to a network that takes [{axes}] with B of 1 or more;"
            " frames [T, B, ...] need a student made with coding=Frames()."
        )


def to_spiking(
    ann: nn.Module,
    *,
    timesteps: int = 4,
    neuron: Neuron | None = None,
    calibrate: Image | None = None,
    inherit: bool = True,
    rule: Rule = "least-squares",
    percentile: float = 99.9,
    per_channel: bool = True,
    correct_bias: bool = False,
    max_pool: MaxPool = "keep",
    coding: Coding | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Student, Report]:
    """Turn a trained ANN into a spiking student that starts from what the ANN knows.

    Args:
        ann: a ``Teacher``, or any network that torch.fx can trace, from images ``[B, C, H, W]`` to logits ``[B, K]``;
            it is not changed.
        timesteps: T, 1 or more.
        neuron: the model; ``ROUNDING`` by default, ``FRESH`` for fresh weights.
        calibrate: some hundred raw images in 0..1; thresholds are set from the ANN's activations on them.
        inherit: keep the ANN's weights and batch norm; False gives a network with fresh weights and thresholds
            ``neuron.threshold``, for which no calibration is needed.
        rule: how a threshold is chosen from activations; see ``calibrate.choose_threshold``.
        percentile: for the rule of that name.
        per_channel: choose a threshold for every channel, as channels differ in range; else one for each layer. Fresh
            weights begin with one for each layer.
        correct_bias: shift biases so that every layer's channels have the ANN's means over the calibration images (see
            ``calibrate.correct_biases``): for a student that is not trained.
        max_pool: keep max pooling (over spikes it is a logical or), or exchange it for average pooling.
        coding: what the student sees at each step; the image itself by default.
        mean: input normalisation of a network that is no ``Teacher``; none by default.
        std: likewise.

    Returns:
        The student, and the report of what became of each activation.

    Raises:
        ConversionError: if a part of the network has no spiking meaning; the message names it, its line and a remedy.
        ConfigError: if an argument is outside its range, or calibration images are missing.
    """
    if timesteps < 1:
        raise ConfigError(f"timesteps (={timesteps}) must be 1 or more.")
    one_of("rule", rule, get_args(Rule))
    one_of("max_pool", max_pool, get_args(MaxPool))
    if inherit and (calibrate is None or not len(calibrate)):
        raise ConfigError(
            "Inherited weights need thresholds: give some hundred images as calibrate=..., or inherit=False."
        )
    if correct_bias and not inherit:
        raise ConfigError("correct_bias is for inherited weights: leave it away, or inherit=True.")
    if not 0 <= percentile <= 100:
        raise ConfigError(f"percentile (={percentile}) must be between 0 and 100.")
    if isinstance(ann, Normalised):
        mean, std, ann = ann.mean.flatten().tolist(), ann.std.flatten().tolist(), ann.network
    mean, std = mean or (0.0,), std or (1.0,)
    neuron = neuron or (ROUNDING if inherit else FRESH)

    copied = copy.deepcopy(ann).requires_grad_(True)
    copied.train(True)
    module, ends = trace(copied)
    places = find_places(module)
    chosen: Mapping[str, tuple[Tensor, float | None]]
    wanted: dict[str, Tensor] = {}
    if inherit and calibrate is not None:
        inputs = _normalised(calibrate, mean, std, module)
        chosen = _calibrated(module, places, inputs, neuron, timesteps, rule, percentile, per_channel)
        if correct_bias:
            wanted = channel_means(module, {place.node for place in places}, inputs)
    else:
        initialise_fresh(module)
        chosen = dict.fromkeys((place.node for place in places), (torch.tensor(neuron.threshold), None))
    neurons = {place.name: Spiking(neuron, chosen[place.node][0]) for place in places}
    insert_neurons(module, places, neurons, max_pool)
    student = Student(module, _feature_nodes(module, ends), timesteps, coding or Direct(), mean, std)
    student.to(next(ann.parameters()).device)
    if wanted and calibrate is not None:
        ordered = {name: wanted[place.node] for name, place in zip(student.neurons, places)}
        correct_biases(student, module, student.neurons, ordered, calibrate, student.at_once)
    sites = tuple(
        Site(p.name, p.kind, p.source, float(chosen[p.node][0].mean()), chosen[p.node][1], p.note) for p in places
    )
    return student, Report(sites, timesteps, inherit)


@torch.no_grad()
def _normalised(images: Image, mean: Sequence[float], std: Sequence[float], module: nn.Module) -> Image:
    device = next(module.parameters()).device
    return Normalised(nn.Identity(), mean, std).to(device).normalise(images.to(device))


def _calibrated(
    module: fx.GraphModule,
    places: list[Place],
    inputs: Image,
    neuron: Neuron,
    timesteps: int,
    rule: Rule,
    percentile: float,
    per_channel: bool,
) -> dict[str, tuple[Tensor, float]]:
    try:
        activations = record(module, {place.node for place in places}, inputs, per_channel)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"The network does not accept the calibration images of shape {tuple(inputs.shape)} ({reason}): give images"
            " as it was trained on."
        ) from error
    return thresholds(activations, neuron, timesteps, rule, percentile)


def initialise_fresh(module: nn.Module) -> None:
    """New weights for every layer that has a rule for them."""
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
    initialise(module)


def _first_convolution(core: fx.GraphModule) -> tuple[int | None, int | None]:
    """How many dimensions and channels the input has, where a convolution reads it; else None."""
    readers = (user for user in next(iter(core.graph.nodes)).users if user.op == "call_module")
    for layer in (core.get_submodule(str(user.target)) for user in readers):
        for dims, kind in ((3, nn.Conv1d), (4, nn.Conv2d), (5, nn.Conv3d)):
            if isinstance(layer, kind):
                return dims, layer.in_channels
    return None, None


def _feature_nodes(module: fx.GraphModule, ends: dict[str, fx.Node]) -> dict[str, str]:
    """For each module path the node that now carries its output."""
    present = {node.name for node in module.graph.nodes}
    replaced = {node.meta["replaces"]: node.name for node in module.graph.nodes if "replaces" in node.meta}
    named = {path: replaced.get(node.name, node.name) for path, node in ends.items()}
    return {path: name for path, name in named.items() if name in present}
