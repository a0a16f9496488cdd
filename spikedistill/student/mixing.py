"""Refusal of networks that mix the samples of a batch.

The batch axis also holds the time steps, so a layer that mixes samples would mix time steps. Operations along dimension
0 are refused as they are read from the graph. All others are found by a trial: a sample's signal must stay the same
when the other samples of its batch change.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikedistill.errors import ConversionError
from spikedistill.inputs import evaluating
from spikedistill.student.graph import GraphInterpreter
from spikedistill.student.trace import source_of

ALONG: dict[str, tuple[int, str, int | None]] = {
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), (1, "dim", 0)),
    **dict.fromkeys(("chunk", "split"), (2, "dim", 0)),
    **dict.fromkeys(("mean", "sum", "squeeze"), (1, "dim", None)),
    **dict.fromkeys(("unsqueeze", "unflatten"), (1, "dim", None)),
    "flatten": (1, "start_dim", 0),
}
"""Operations along a dimension -> position, name and default of the argument that gives the dimension."""
WHOLE = ("mean", "sum")
"""Operations that work along all dimensions if none is given."""
PARTS = ("chunk", "split", "size", "unbind", "getattr", "getitem")
"""Operations that return several values, or a shape; an index then takes one of these."""
TOLERANCE = 1e-2
"""How far a sample's sum may change, relative to the sum of its magnitudes: rounding depends on the batch."""


def refuse_mixing(module: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> None:
    """Refuse a node that works along dimension 0 of the signal.

    Raises:
        ConversionError: if it does.
    """
    if node.op == "call_module":
        fault = _of_layer(module.get_submodule(str(node.target)))
    elif node.op in ("call_function", "call_method") and node not in constants:
        fault = _of_call(module, node, constants)
    else:
        return
    if fault:
        raise ConversionError(
            f"'{node.target if isinstance(node.target, str) else node.target.__name__}' (node {node.name}) at"
            f" {source_of(node)} {fault}. The batch also holds the time steps: work on each sample by itself."
        )


def _of_layer(layer: nn.Module) -> str:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
        return "is a batch norm without running statistics, so it normalises over the batch (track_running_stats=True)"
    if isinstance(layer, nn.Flatten) and layer.start_dim == 0 and layer.end_dim != 0:
        return "flattens the batch (start_dim=0)"
    return "splits the batch (dim=0)" if isinstance(layer, nn.Unflatten) and layer.dim == 0 else ""


def _of_call(module: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is operator.getitem:
        return _of_index(module, node)
    if name == "permute":
        order: Any = node.kwargs.get("dims", node.args[1:])
        order = order[0] if isinstance(order[0], tuple | list) else order
        return "moves the batch away from dimension 0" if order[0] not in (0, -len(order)) else ""
    if name == "transpose":
        moved = (*node.args[1:3], node.kwargs.get("dim0"), node.kwargs.get("dim1"))
        return "moves the batch away from dimension 0" if 0 in moved else ""
    if name not in ALONG or all(source in constants for source in node.all_input_nodes):
        return ""
    position, key, usual = ALONG[name]
    given = node.args[position] if len(node.args) > position else node.kwargs.get(key, node.kwargs.get("axis", usual))
    dims = given if isinstance(given, tuple | list) else (given,)
    if 0 in dims or (given is None and name in WHOLE):
        return f"works along the batch ({key}={given})"
    return ""


def _of_index(module: fx.GraphModule, node: fx.Node) -> str:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node):
        return ""
    if source.op == "call_module" and getattr(module.get_submodule(str(source.target)), "return_indices", False):
        return ""  # find_pools refuses it with a better message
    if getattr(source.target, "__name__", source.target) in PARTS:
        return ""
    first = index[0] if isinstance(index, tuple | list) and index else index
    whole = (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1))
    return "" if first is Ellipsis or first in whole else f"takes a part of the batch ({first})"


class _Sums(GraphInterpreter):
    """Runs a network and keeps, for each node and sample, the sum of the signal and the sum of its magnitudes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sums: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.ndim and n.op not in ("get_attr", "output"):
            rows = value.detach().float().reshape(len(value), -1)
            self.sums[n] = torch.stack([rows.sum(1), rows.abs().sum(1)])
        return value


@torch.no_grad()
def refuse_mixed(module: fx.GraphModule, inputs: Tensor, constants: set[fx.Node]) -> None:
    """Refuse a network in which a sample's signal depends on the other samples of its batch.

    Args:
        module: the traced network.
        inputs: some normalised inputs, ``[n, ...]``.
        constants: the nodes that hold weights, not a signal.

    Raises:
        ConversionError: if it does. The message names the first node where this shows.
    """
    one, two = inputs[:1], inputs[-1:]
    other = inputs.amax() + inputs.amin() - one
    batches = (torch.cat(given) for given in ((one, two), (one, other, other), (other, two)))
    with evaluating(module):
        both, first, second = (_sums(module, batch) for batch in batches)
    for node, sums in both.items():
        if node in constants:
            continue
        rows = [given[node].shape[1] for given in (both, first, second) if node in given]
        same = rows == [2, 3, 2] and _same(sums[:, 0], first[node][:, 0]) and _same(sums[:, 1], second[node][:, 1])
        if not same:
            raise ConversionError(
                f"The node {node.name} ('{node.target}') at {source_of(node)} mixes the samples of a batch: its output"
                " for an image changes when the other images change. The batch also holds the time steps: work on each"
                " sample by itself."
            )


def _sums(module: fx.GraphModule, batch: Tensor) -> dict[fx.Node, Tensor]:
    run = _Sums(module)
    run.run(batch)
    return run.sums


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one[0] - other[0]).abs() <= TOLERANCE * one[1]) or not bool(torch.isfinite(one).all())
