"""The spiking student: a network without state inside, from images to the logits of every time step."""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError, ShapeError, one_of
from spikedistill.inputs import normalise
from spikedistill.neuron.layer import Spiking
from spikedistill.shapes import ClassLogits, Logits
from spikedistill.student.coding import Coding, DirectCoding, FrameCoding
from spikedistill.student.conversion import Conversion
from spikedistill.student.graph import PotentialRecorder, SingleStepInterpreter, first_convolution, spike_nodes, tap
from spikedistill.student.rate import rate_run
from spikedistill.student.recompute import Recompute, recomputed_run
from spikedistill.student.synapses import Fans, Synapses

Gradient = Literal["exact", "rate", "quantised"]
"""How a student computes gradients in training: through every time step and its state (exact), through firing rates
(``student/rate.py``), or with all T steps of D levels trained as one step of T D levels (quantised;
``SingleStepInterpreter``)."""
State = tuple[Tensor, ...]
"""The state after a step, ``[B, ...]`` each: first the potentials of all layers of neurons in units of their
thresholds, then the cumulative input of every max pooling over time."""

ROWS = 1000
"""Time steps times images in one call. More would no longer fit into the processor's caches."""


class Student(nn.Module):
    """A spiking network: raw images in, logits of every time step out, no state inside.

    Made by ``to_spiking``. Ordinary in every other way: ``deepcopy``, ``state_dict``, ``SyncBatchNorm`` conversion and
    ``DistributedDataParallel`` treat it like any module.

    Attributes:
        conversion: how it was made, with every field filled in.
        origin: what its ANN is built from, as written to a saved file.
        timesteps: T of the next call.
        gradient: how gradients are computed in training.
        output_nodes: for each module path of the ANN the node of ``core`` that holds its output, in order of execution.
        states: the number of tensors in a ``State``.
        recompute: what the exact gradient computes again instead of keeping: the same gradient in less memory. See
            ``recompute.Recompute``. The rate-based gradient keeps little and ignores this.
        walk: what runs the graph node by node where outputs of single nodes are needed. ``evaluate/operations.py``
            exchanges it to count operations.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        core: fx.GraphModule,
        output_nodes: Mapping[str, str],
        layers: Sequence[str],
        conversion: Conversion,
        origin: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.core = core
        self.conversion, self.origin = conversion, origin
        self.timesteps = conversion.timesteps
        self.gradient: Gradient = "exact"
        self.recompute: Recompute = "nothing"
        self._taps: dict[frozenset[str], tuple[fx.GraphModule, list[nn.Module]]] = {}
        self._fans: Fans = {}
        self.walk: Callable[[fx.GraphModule, Collection[str], Collection[str]], PotentialRecorder] = PotentialRecorder
        self.output_nodes = dict(output_nodes)
        self._group: str = core.meta["neurons"]
        self._keys = dict(zip(layers, self.neurons))
        self._takes = first_convolution(core)
        self.states = len(self._keys) + len(core.get_submodule(core.meta["pools"]))  # type: ignore[arg-type]
        self.set_normalisation(mean, std)

    @property
    def coding(self) -> Coding:
        """What the student sees at each step."""
        return self.conversion.coding

    @property
    def neurons(self) -> dict[str, Spiking]:
        """The layers of neurons by name in the module, in order of execution."""
        return dict(self.core.get_submodule(self._group).named_children())  # type: ignore[arg-type]

    def paths(self) -> list[str]:
        """The module paths of the ANN at which ``observe`` finds a feature, in order of execution."""
        return list(self.output_nodes)

    def layers(self) -> list[str]:
        """The paths of the layers of neurons, in order of execution. They are named after the ANN's activations."""
        return list(self._keys)

    @property
    def eval_batch_size(self) -> int:
        """How many images to give in one call without gradients: 250, fewer for more than four time steps."""
        return max(1, ROWS // max(4, self.timesteps))

    def set_timesteps(self, timesteps: int) -> None:
        """Run another number of time steps from now on; thresholds stay as they are.

        Raises:
            ConfigError: if it is below 1.
        """
        if timesteps < 1:
            raise ConfigError(f"timesteps (={timesteps}) must be 1 or more.")
        self.timesteps = timesteps

    def forward(self, images: Tensor) -> Logits:
        """Logits ``[T, B, K]`` for images ``[B, C, H, W]`` in 0..1, or for frames ``[T, B, C, H, W]``.

        Every call begins with a fresh state. In training with ``gradient="quantised"`` logits are ``[1, B, K]``.

        Raises:
            ShapeError: if the images have another shape.
            ConfigError: if this network does not support the gradient.
        """
        return self._run(images)[0]

    def observe(
        self,
        inputs: Tensor,
        paths: Sequence[str] = (),
        *,
        spikes: Sequence[str] = (),
        potentials: Sequence[str] = (),
        operations: bool = False,
    ) -> Answer:
        """Logits ``[T, B, K]``, with the features, spikes and potentials at these paths. The student is not changed.

        In training with ``gradient="rate"`` every step of features and spikes holds their mean over time. With
        ``"quantised"`` there is one step.

        Args:
            inputs: as for ``forward``.
            paths: module paths of the ANN whose outputs are wanted: features ``[T, B, ...]``.
            spikes: paths from ``layers`` whose spike counts ``[T, B, ...]`` are wanted: output divided by threshold.
            potentials: paths from ``layers`` whose potentials ``[T, B, ...]`` are wanted, after the charge and before
                the reset, in units of the threshold. These layers run the reference implementation.
            operations: whether synaptic operations ``[T, B]`` are wanted, with gradient (``student/synapses.py``).

        Raises:
            ShapeError: if the images have another shape.
            ConfigError: if a path does not exist, or the gradient does not compute what is wanted.
        """
        self._check_asked(paths, spikes, potentials, operations)
        if not (paths or spikes or potentials or operations):
            return Answer(self.forward(inputs))
        fired = spike_nodes(self.core) if spikes else {}
        nodes = {path: fired[self._module(path)] for path in spikes}
        keep = {*(self.output_nodes[path] for path in paths), *nodes.values()}
        done: list[Tensor] = []
        walk = partial(Synapses, fans=self._fans, done=done) if operations else self.walk
        logits, kept, charged = self._run(inputs, keep, [self._module(path) for path in potentials], walk)
        return Answer(
            logits,
            {path: _over_time(kept[self.output_nodes[path]], logits) for path in paths},
            {path: _over_time(self._counts(path, kept[node]), logits) for path, node in nodes.items()},
            {path: _over_time(charged[self._module(path)], logits) for path in potentials},
            done[0] if operations else None,
        )

    def refusal(
        self, *, every_step: bool, spikes: bool, features: bool, potentials: bool, operations: bool = False
    ) -> str:
        """Why training with this gradient cannot give what an objective needs; empty if it can.

        Args:
            every_step: whether it needs the logits of every time step, each with its own gradient.
            spikes: whether it needs spike counts.
            features: whether it needs outputs of modules.
            potentials: whether it needs potentials before the reset.
            operations: whether it needs synaptic operations.
        """
        exact = "use gradient='exact', or an objective that needs less."
        if self.gradient != "exact" and operations:
            return f"gradient (={self.gradient!r}) does not compute single spikes, so no operations: {exact}"
        if self.gradient == "quantised" and (every_step or spikes or potentials):
            return f"gradient (='quantised') trains all steps as one, so no spikes, potentials, steps: {exact}"
        if self.gradient == "rate" and potentials:
            return f"gradient (='rate') computes firing rates only, no potentials: {exact}"
        if self.gradient == "rate" and every_step and (spikes or features):
            return f"gradient (='rate') gives the mean of spikes and features over time, not every step: {exact}"
        if self.gradient == "exact" and (potentials or operations) and self.recompute != "nothing":
            return f"recompute (={self.recompute!r}) keeps no potentials and no operations: use recompute='nothing'."
        return ""

    def step(self, images: Tensor, state: State | None = None) -> tuple[ClassLogits, State]:
        """One time step of a stream.

        Args:
            images: what this step sees, ``[B, C, H, W]``. ``coding.frame`` makes it from a whole input.
            state: the state that the previous step returned; None begins with a fresh state.

        Returns:
            The logits of this step ``[B, K]``, and the state after it.

        Raises:
            ShapeError: if the state belongs to another network or another batch.
        """
        if state is not None and len(state) != self.states:
            raise ShapeError(
                f"The state has {len(state)} layers, the student has {self.states}: carry a state only between steps"
                " of one student."
            )
        before = (None,) * self.states if state is None else state
        result, _, _ = self._through((), (), self.walk, self._normalised(images), 1, 1, before, True)
        return result

    @torch.no_grad()
    def initial_state(self, images: Tensor) -> State:
        """The state before the first step, with which a stream begins. It costs one step, which tells the shapes.

        ``step(images, initial_state(images))`` equals ``step(images)``.

        Args:
            images: what the first step sees, ``[B, C, H, W]``; their number, shape, format and device count, not their
                values.

        Raises:
            ShapeError: if the images have another shape.
        """
        _, after = self.step(images)
        layers = [*self.neurons.values()]
        potentials = [layer.potential(one).contiguous() for layer, one in zip(layers, after)]
        return (*potentials, *(torch.zeros_like(one) for one in after[len(layers) :]))

    def shown(self, images: Tensor) -> tuple[Tensor, int]:
        """Calibration images ``[B, C, H, W]`` as the graph takes them: normalised rows, and at how many steps each is.

        Single event frames are shown as images, the same at every step.
        """
        coding = DirectCoding() if isinstance(self.coding, FrameCoding) else self.coding
        rows, repeats = coding.encode(images, self.timesteps)
        return self._normalised(rows), repeats

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take mean and standard deviation per channel as the normalisation of the inputs."""
        device = next(self.core.parameters(), torch.empty(0)).device
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(-1, 1, 1), persistent=False)

    def extra_repr(self) -> str:
        """Time steps, conversion and normalisation, for printing."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return f"timesteps={self.timesteps}, {self.conversion}, mean={mean}, std={std}"

    def _check_asked(
        self, paths: Sequence[str], spikes: Sequence[str], potentials: Sequence[str], operations: bool
    ) -> None:
        for path in paths:
            one_of("module with a feature", path, self.output_nodes)
        for path in (*spikes, *potentials):
            one_of("layer of neurons", path, self._keys)
        if self._learns():
            asked = {"spikes": bool(spikes), "potentials": bool(potentials), "operations": operations}
            refused = self.refusal(every_step=False, features=False, **asked)
            if refused:
                raise ConfigError(refused)

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _module(self, path: str) -> str:
        """The path of a layer of neurons in the graph."""
        return f"{self._group}.{self._keys[path]}"

    def _counts(self, path: str, emitted: Tensor) -> Tensor:
        """A layer's output divided by the height of its spikes. The rate-based gradient does not train thresholds."""
        layer: Any = self.core.get_submodule(self._module(path))
        heights = layer.heights(emitted).to(emitted.dtype)
        return emitted / (heights.detach() if self._learns() and self.gradient == "rate" else heights)

    def _run(
        self,
        images: Tensor,
        keep: Collection[str] = (),
        charges: Collection[str] = (),
        walk: Callable[..., PotentialRecorder] | None = None,
    ) -> tuple[Logits, dict[str, Tensor], dict[str, Tensor]]:
        """Logits ``[T, B, K]``; outputs of nodes and potentials of layers by name, ``[B, ...]`` or ``[T*B, ...]``."""
        one_of("gradient", self.gradient, get_args(Gradient))
        timesteps, layers = self.timesteps, self.states
        rows, repeats = self.coding.encode(images, timesteps)
        if self.gradient == "quantised" and self._learns():
            if repeats != timesteps:
                raise ConfigError(
                    "gradient (='quantised') trains all time steps as one: give images (no frames), direct coding."
                )
            once = SingleStepInterpreter(self.core, timesteps, keep)
            logits, _ = once.run(self._normalised(rows), 1, 1, (None,) * layers, False)
            return logits[None], once.kept, {}
        if self.gradient == "rate" and self._learns():
            logits, kept = rate_run(self.core, self._normalised(rows), timesteps, repeats, layers, keep)
            return logits.unflatten(0, (timesteps, -1)), kept, {}
        given = (self._normalised(rows), timesteps, repeats, (None,) * layers, False)
        (logits, _), kept, charged = self._through(keep, charges, walk or self.walk, *given)
        return logits.unflatten(0, (timesteps, -1)), kept, charged

    def _through(
        self, keep: Collection[str], charges: Collection[str], walk: Callable[..., PotentialRecorder], *given: Any
    ) -> Any:
        """The graph's results, computed as ``recompute`` says; outputs of nodes; potentials of layers."""
        one_of("recompute", self.recompute, get_args(Recompute))
        counted = walk is not PotentialRecorder
        if self.recompute != "nothing" and torch.is_grad_enabled() and not charges and not counted:
            return *recomputed_run(self.core, self.recompute == "stages", keep, *given), {}
        if not keep and not charges and not counted:
            return self.core(*given), {}, {}
        if not charges and not counted:
            return *self._tapped(frozenset(keep))(*given), {}
        run = walk(self.core, keep, charges)
        return run.run(*given), run.kept, run.potentials

    def _tapped(self, keep: frozenset[str]) -> fx.GraphModule:
        """The graph that also returns these nodes, made anew where a layer has been exchanged since."""
        if torch.compiler.is_compiling() and keep in self._taps:
            return self._taps[keep][0]
        layers = [*self.core.modules()]
        made, before = self._taps.get(keep, (None, []))
        if made is None or len(before) != len(layers) or any(map(operator.is_not, before, layers)):
            made = tap(self.core, keep)
            self._taps[keep] = made, layers
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs that return single nodes, and without connections: a copy makes its own."""
        return {**self.__dict__, "_taps": {}, "_fans": {}}

    def _normalised(self, images: Tensor) -> Tensor:
        dims, channels = self._takes
        own = len(self.mean)
        fits = images.ndim > 1 and images.shape[0] > 0 and dims in (None, images.ndim)
        if fits and (own == 1 or images.shape[1] in (1, own)):
            normalised = normalise(images, self.mean, self.std)
            if channels in (None, normalised.shape[1]):
                return normalised
        axes = ", ".join(["B", str(channels), *"DHW"[5 - dims :]]) if dims else "B, ..."
        raise ShapeError(
            f"Images of shape {tuple(images.shape)} were given to a network that takes [{axes}] with B of 1 or more."
            " Give images of that shape; frames [T, B, ...] need a student made with coding=FrameCoding()."
        )


def _over_time(rows: Tensor, logits: Logits) -> Tensor:
    """``[T*B, ...]``, or ``[B, ...]`` if all steps are the same, to ``[T, B, ...]`` with T and B of the logits."""
    once = rows.shape[0] == logits.shape[1]
    return rows.expand(len(logits), *rows.shape) if once else rows.unflatten(0, (len(logits), -1))
