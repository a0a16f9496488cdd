"""Synaptic operations of a student or an ANN."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spikedistill.errors import ConfigError, ShapeError
from spikedistill.evaluate.calls import Call, Listener, calls_of
from spikedistill.student.graph import PotentialRecorder
from spikedistill.student.student import Student
from spikedistill.student.substeps import SubSteps
from spikedistill.student.synapses import fan_of, zeros_of

MAPS: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    **{f"conv{dims}d": getattr(F, f"conv{dims}d") for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": getattr(F, f"conv_transpose{dims}d") for dims in (1, 2, 3)},
}
"""Functions ``(input, weight, bias, ...)`` that are linear in a batch of inputs."""
OPTIONS = {
    False: ("stride", "padding", "dilation", "groups"),
    True: ("stride", "padding", "output_padding", "groups", "dilation"),
}
"""The arguments after the bias of a convolution, and of a transposed convolution."""
PRODUCTS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("matmul", "__matmul__", "linalg_matmul", "mm", "bmm", "mv", "dot", "vdot", "inner"), (0, 1)),
    "__rmatmul__": (1, 0),
    **dict.fromkeys(("addmm", "addmm_", "addbmm", "baddbmm", "addmv"), (1, 2)),
}
"""Products of matrices and vectors, and the positions of their operands."""
OPERANDS: tuple[tuple[str, ...], ...] = (
    ("input",),
    ("other", "mat1", "mat2", "batch1", "mat", "tensor", "vec"),
    ("mat2", "batch2", "vec"),
)
"""The names of the operand at each position, if it is given by name."""
UNCOUNTED = frozenset(
    (
        *(
            "tensordot",
            "linalg_multi_dot",
            "linalg_vecdot",
            "_sparse_mm",
            "smm",
            "hspmm",
            "chain_matmul",
            "bilinear",
            "outer",
            "kron",
            "cdist",
            "conv_tbc",
            "convolution",
        ),
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        *("multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    )
)
"""Other functions that multiply; they cannot be counted and are refused."""


@dataclass
class Operations:
    """Synaptic operations, counted for each call site.

    An operation is one non-zero input value times one non-zero weight. It is an accumulate (``acs``) if the inputs are
    spikes, that is zero or one height in every channel, else a multiply-accumulate (``macs``). ``dense`` counts all
    inputs, zeros too. Biases do not count. These are the rules of NeuroBench (arXiv 2304.04640), with two differences:
    there a spike is 1 or -1, and dense operations count weights of zero too.

    Two more counts are for a network that runs once per image: ``once``, all connections of a layer, and ``active``,
    those whose input is not zero at some time step. Both are sums over images.

    Operations without weighted connections do not count: batch norm, folded or not, pooling, the additions of residual
    connections, and a neuron's own arithmetic. A product of two signals, as in attention, counts one
    multiply-accumulate for every pair of non-zero values.
    """

    acs: dict[str, float] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    once: dict[str, float] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    images: int = 0

    def add(self, layer: str, inputs: Tensor, fan: Tensor, ever: Tensor | None = None, begins: bool = True) -> None:
        """Count the operations of a layer on its inputs.

        Args:
            layer: its name.
            inputs: ``[N, ...]``.
            fan: the number of connections of each input value, ``[...]``.
            ever: which inputs of each image became active in this call for the first time, ``[B, ...]``. None if every
                row is an image; then all non-zero inputs.
            begins: whether the images are new, or this is a further step of a stream.
        """
        active = inputs != 0
        ever = active if ever is None else ever
        done = float((active.to(torch.float64).sum(0) * fan).sum())
        spikes = _are_spikes(inputs)
        self._sum(layer, self.acs, done if spikes else 0.0)
        self._sum(layer, self.macs, 0.0 if spikes else done)
        self._sum(layer, self.dense, float(fan.sum()) * len(inputs))
        self._sum(layer, self.once, float(fan.sum()) * len(ever) if begins else 0.0)
        self._sum(layer, self.active, float((ever.sum(0) * fan).sum()))

    def add_product(self, layer: str, done: float, dense: float) -> None:
        """Count a product of two signals."""
        counts = ((self.acs, 0.0), (self.macs, done), (self.dense, dense), (self.once, dense), (self.active, done))
        for kind, count in counts:
            self._sum(layer, kind, count)

    def _sum(self, layer: str, kind: dict[str, float], count: float) -> None:
        kind[layer] = kind.get(layer, 0.0) + count

    def per_image(self) -> dict[str, float]:
        """``acs``, ``macs`` and ``dense`` of the whole network, for one image over all time steps.

        Raises:
            ConfigError: if no image was counted.
        """
        if not self.images:
            raise ConfigError(
                "No image was counted: call the network while the context is open, and call eval() on a student first."
            )
        kinds = {"acs": self.acs, "macs": self.macs, "dense": self.dense}
        return {name: sum(counts.values()) / self.images for name, counts in kinds.items()}


def _are_spikes(inputs: Tensor) -> bool:
    """Whether values ``[N, C, ...]`` are zero or one height in every channel. Channels of one value prove nothing."""
    alone = inputs.numel() == inputs.shape[1]
    heights = inputs.amax() if alone else inputs.amax((0, *range(2, inputs.ndim)), keepdim=True)
    return bool(((inputs == 0) | (inputs == heights)).all())


@contextmanager
def operations(network: nn.Module) -> Iterator[Operations]:
    """Count the synaptic operations of every call of a student or an ANN while the context is open.

    The fan-out is exact: at borders, and with strides, groups and dilations, a value counts as often as it is used.
    The part of a student before its first neurons runs once for all time steps and counts once. In a stream
    (``Student.step``) it runs at each step and counts at each. For a student the coding gives the number of images; for
    an ANN each row of the input is an image. A student's calls in training count only with the exact gradient.

    Raises:
        ConfigError: if the network is neither, or is a compiled ANN; during a call, if it multiplies in a way that
            cannot be counted.
        ShapeError: at a step of a stream, if its batch has changed.
    """
    counts = Operations()
    tally = _Tally(counts)
    if isinstance(network, Student):
        graded = network.conversion.neuron_model.levels > 1
        before, network.walk = network.walk, partial(_CountedInSubSteps if graded else _Counted, tally)
        try:
            yield counts
        finally:
            network.walk = before
        return

    def began(given: Tensor) -> None:
        counts.images += len(given)

    with calls_of(network, tally.hear, began):
        yield counts


class _Tally:
    """Counts the operations of calls. For a student ``_Counted`` tells it which rows are time steps."""

    def __init__(self, counts: Operations) -> None:
        self.counts = counts
        self.batch: int | None = None
        self.site = ""
        self.begins, self.goes_on = True, False
        self.seen: dict[str, Tensor] = {}
        self.fans: dict[object, tuple[bytes, Tensor]] = {}

    def hear(self, call: Call) -> None:
        """Count a call if it multiplies a signal; products of weights alone do not count."""
        if "parametrizations" in call.where.split("."):
            return
        if call.name in MAPS:
            self._map(call)
        elif call.name in PRODUCTS:
            first, second = (_operand(call, place) for place in PRODUCTS[call.name])
            self._product(call, torch.inner if call.name == "inner" else torch.matmul, first, second)
        elif call.name == "einsum" and len(call.arguments) == 3:
            self._product(call, partial(torch.einsum, call.arguments[0]), *call.arguments[1:])
        elif call.name == "scaled_dot_product_attention":
            query, key, value = (call.of(place, name) for place, name in enumerate(("query", "key", "value")))
            scores = query.new_ones(*query.shape[:-1], key.shape[-2])
            self._product(call, torch.matmul, query, key.transpose(-1, -2))
            self._product(call, torch.matmul, scores, value)
        elif call.name in UNCOUNTED or call.name == "einsum":
            raise ConfigError(
                f"'{call.name}' at '{call.where}' multiplies, and its operations cannot be counted: expected"
                " convolutions, linear layers and matrix products. Leave this network out."
            )

    def _map(self, call: Call) -> None:
        inputs, weight = call.of(0, "input").detach(), call.of(1, "weight").detach()
        options = OPTIONS["transpose" in call.name] if call.name != "linear" else ()
        given = {name: call.of(3 + place, name) for place, name in enumerate(options)}
        given = {name: value for name, value in given.items() if value is not None}
        inputs = inputs[None] if inputs.ndim < (2 if call.name == "linear" else weight.ndim) else inputs
        fan = self._fan(call, inputs.shape[1:], weight, given).to(inputs.device)
        self.counts.add(call.where, inputs, fan, self._ever(inputs), self.begins)

    def _fan(self, call: Call, shape: Sequence[int], weight: Tensor, options: dict[str, Any]) -> Tensor:
        """``fan_of``, kept from an earlier call whose weights had the same zeros."""
        key = self.site, call.where, call.name, tuple(shape), tuple(weight.shape), str(options)
        zeros = zeros_of(weight)
        if key not in self.fans or self.fans[key][0] != zeros:
            self.fans[key] = zeros, fan_of(partial(MAPS[call.name], **options), weight, shape)
        return self.fans[key][1]

    def _ever(self, inputs: Tensor) -> Tensor | None:
        """Which inputs ``[B, ...]`` of a student's images became active in this call for the first time."""
        if self.batch is None:
            return None
        ever = (inputs != 0).unflatten(0, (-1, self.batch)).any(0)
        if not self.goes_on:
            return ever
        before = torch.zeros_like(ever) if self.begins else self.seen.get(self.site)
        if before is None or before.shape != ever.shape:
            raise ShapeError(
                f"A stream of {'other' if before is None else len(before)} samples goes on with {len(ever)} while its"
                " operations are counted: begin and end a stream inside the context, with all its samples at each step."
            )
        self.seen[self.site] = before | ever
        return ever & ~before

    def _product(self, call: Call, product: Callable[[Tensor, Tensor], Tensor], *operands: Tensor) -> None:
        active = [(one.detach() != 0).to(torch.float64) for one in operands]
        dense = [torch.ones_like(one) for one in active]
        self.counts.add_product(call.where, float(product(*active).sum()), float(product(*dense).sum()))


def _operand(call: Call, place: int) -> Tensor:
    """An operand of a product, by position or by name."""
    named = next((name for name in OPERANDS[place] if name in call.options), "")
    operand: Tensor = call.of(place, named)
    return operand


class _Counted(PotentialRecorder):
    """Runs a student's graph and counts every call in it, except those of its neurons."""

    def __init__(self, tally: _Tally, core: fx.GraphModule, keep: Collection[str], layers: Collection[str]) -> None:
        super().__init__(core, keep, layers)
        self.tally, self.listener, self.quiet = tally, Listener(tally.hear), False

    def run(self, rows: Any, timesteps: int, repeats: int, states: Any, keep: bool) -> Any:  # type: ignore[override]
        """As in ``PotentialRecorder``: ``rows`` of ``timesteps`` steps, each row used at ``repeats`` steps."""
        tally = self.tally
        tally.batch, tally.goes_on = len(rows) * repeats // timesteps, keep
        tally.begins = states[0] is None
        tally.counts.images += tally.batch if tally.begins else 0
        return super().run(rows, timesteps, repeats, states, keep)

    def apply(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """As in ``PotentialRecorder``, counted under the layer's own name."""
        with self._heard(str(self.current.target)):
            result = super().apply(layer, args, kwargs)
            if not self.quiet:
                self.listener.tell_convolution(layer, args[0], result)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As in ``PotentialRecorder``, counted under the name of the call site."""
        with self._heard(self.current.name):
            return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As in ``PotentialRecorder``, counted under the name of the call site."""
        with self._heard(self.current.name):
            return super().call_method(target, args, kwargs)

    @contextmanager
    def _heard(self, name: str) -> Iterator[None]:
        self.listener.where, self.tally.site = [f"core.{name}"], self.current.name
        with nullcontext() if self.quiet else self.listener:
            yield


class _CountedInSubSteps(SubSteps, _Counted):
    """The same for graded neurons, as they run on a chip: a count of n is n accumulates."""

    def constant(self, call: Callable[[], Tensor]) -> Tensor:
        """As in ``SubSteps``, and not counted."""
        self.quiet = True
        result = super().constant(call)
        self.quiet = False
        return result
