"""What has a spiking meaning: which activations become neurons, what passes spikes on, and what is refused and why."""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from spikedistill.errors import ConversionError, UnsupportedError
from spikedistill.student.mixing import refuse_mixing
from spikedistill.student.pool import MAX_POOLS, MaxPool
from spikedistill.student.trace import POOL_CALLS, argument, constants_of, source_of, squeeze_places

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
ACTIVATION_CALLS = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, "relu", "relu_"}
LARGEST_SLOPE = 0.3
"""A LeakyReLU with at most this slope is converted like a ReLU: neurons have no negative spikes."""

TIMELESS = (
    *(
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Linear,
    ),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Flatten, nn.Unflatten, nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad2d),
    *(
        nn.ReplicationPad2d,
        nn.Upsample,
        nn.UpsamplingNearest2d,
        nn.UpsamplingBilinear2d,
        nn.PixelShuffle,
        nn.PixelUnshuffle,
    ),
)
TIMELESS_CALLS = {
    *(
        torch.add,
        torch.sub,
        torch.mul,
        torch.div,
        torch.cat,
        torch.concat,
        torch.stack,
        torch.flatten,
        torch.mean,
        torch.sum,
    ),
    *(torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose, torch.chunk, torch.split),
    *(operator.add, operator.sub, operator.mul, operator.truediv),
    *(operator.getitem, operator.floordiv, operator.neg, getattr),
    *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.avg_pool2d, F.adaptive_avg_pool2d, F.pad, F.interpolate),
    *(F.avg_pool1d, F.adaptive_avg_pool1d, *POOL_CALLS),
    *(F.pixel_shuffle, F.pixel_unshuffle, squeeze_places),
}
TIMELESS_METHODS = {
    *(
        "add",
        "sub",
        "mul",
        "div",
        "mean",
        "sum",
        "reshape",
        "reshape_as",
        "flatten",
        "squeeze",
    ),
    *("unsqueeze", "permute", "transpose", "contiguous", "size", "dim", "chunk", "split", "expand", "to", "float"),
    *("unflatten", "type_as", "clone", "detach"),
}
PRODUCTS = {torch.mul, torch.div, operator.mul, operator.truediv, "mul", "div"}
QUOTIENTS = {torch.div, operator.truediv, "div"}

REMEDIES = (
    (
        r"sigmoid",
        "replace it by nn.ReLU, or leave it out with its product where it is a gate (squeeze and excitation),"
        " and fine-tune the ANN for a few epochs",
    ),
    (
        r"gelu|silu|swish|mish|elu|softplus|tanh|prelu|rrelu",
        "replace it by nn.ReLU and fine-tune the ANN for a few epochs",
    ),
    (
        r"attention|softmax|bmm|matmul|einsum|transformer",
        "attention multiplies and normalises real numbers; use a convolutional network",
    ),
    (
        r"layer_?norm|group_?norm|instance_?norm|local_response|rms_?norm",
        "it computes statistics of every input; use batch norm, which folds into the weights",
    ),
    (r"lstm|gru|rnn", "recurrent layers have their own time; use a feed-forward network"),
)


@dataclass(frozen=True)
class CallSite:
    """Where an activation or a max pooling is called: its node, a readable name, its kind and its source line."""

    node: str
    name: str
    kind: str
    source: str
    note: str = ""


def find_activations(module: fx.GraphModule) -> list[CallSite]:
    """All activations in order of execution.

    Raises:
        ConversionError: if parts have no spiking equivalent (the message names each with its remedy), or there is no
            activation at all.
    """
    single_input(module.graph)
    constants = constants_of(module.graph)
    found: list[CallSite] = []
    refused: list[str] = []
    for node in module.graph.nodes:
        if node in constants:  # operations on weights are not part of the signal
            continue
        kind = _kind(module, node)
        try:
            if kind:
                name = _readable(node, found)
                found.append(CallSite(node.name, name, kind, source_of(node), _slope_note(module, node)))
            else:
                _refuse_meaningless(module, node, constants)
                refuse_mixing(module, node, constants)
        except ConversionError as error:
            refused.append(str(error))
    if refused:
        raise UnsupportedError(_all_refused(refused))
    if not found:
        raise ConversionError(
            "The network has no ReLU, ReLU6 or LeakyReLU, so nothing would spike: give a network with activations."
        )
    return found


def _all_refused(refused: Sequence[str]) -> str:
    """One message for all refused parts; equal ones on one source line are named once."""
    if len(refused) == 1:
        return refused[0]
    alike: dict[str, list[str]] = {}
    for said in refused:
        alike.setdefault(re.sub(r"^'[^']*'|\(node \w+\)", "", said), []).append(said)
    lines = [said[0] + (f" ({len(said) - 1} more like it)" if len(said) > 1 else "") for said in alike.values()]
    return "\n  ".join([f"{len(refused)} parts of the network cannot be converted:", *lines])


def _readable(node: fx.Node, found: Sequence[CallSite]) -> str:
    """The path of a module or the name of a call; with a number if it is called again."""
    base = str(node.target if node.op == "call_module" else node.name)
    count = sum(one.name.split("#")[0] == base for one in found)
    return base if not count else f"{base}#{count + 1}"


def find_pools(module: fx.GraphModule, max_pool: MaxPool) -> list[CallSite]:
    """All calls of max pooling in order of execution.

    Raises:
        ConversionError: if one returns indices, or is to be replaced and takes its size from the input.
    """
    found: list[CallSite] = []
    for node in module.graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, MAX_POOLS):
            if layer.return_indices:
                raise ConversionError(
                    f"The max pooling '{node.target}' at {source_of(node)} returns indices, which spikes do not have:"
                    " omit return_indices."
                )
            found.append(CallSite(node.name, _readable(node, found), type(layer).__name__, source_of(node)))
        elif node.target in POOL_CALLS and max_pool != "or":
            raise ConversionError(
                f"The max pooling at {source_of(node)} takes its size from the input: write nn.AdaptiveMaxPool2d(1) for"
                " the maximum of a whole image, a size in numbers otherwise, or convert with max_pool='or'."
            )
    return found


def _kind(module: fx.GraphModule, node: fx.Node) -> str:
    """The name of the activation; empty if the node is none."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return type(layer).__name__ if isinstance(layer, ACTIVATIONS) else ""
    if node.op in ("call_function", "call_method") and node.target in ACTIVATION_CALLS:
        return node.target if isinstance(node.target, str) else node.target.__name__
    return ""


def _slope_note(module: fx.GraphModule, node: fx.Node) -> str:
    slope = 0.0
    if node.op == "call_module":
        slope = getattr(module.get_submodule(str(node.target)), "negative_slope", 0.0)
    elif node.target is F.leaky_relu:
        slope = argument(node, 1, "negative_slope", 0.01)
    if abs(slope) > LARGEST_SLOPE:
        raise ConversionError(
            f"'{node.target}' at {source_of(node)} has a negative slope of {slope}, above {LARGEST_SLOPE}: neurons"
            " have no negative spikes and cannot replace it. Train the ANN with ReLU."
        )
    return f"negative slope {slope} dropped" if slope else ""


def _refuse_meaningless(module: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> None:
    if node.op in ("placeholder", "get_attr", "output"):
        return
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if isinstance(layer, (*TIMELESS, *MAX_POOLS)):
            return
        raise _refusal(f"'{node.target}' ({type(layer).__name__})", type(layer).__name__, node)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    known = node.target in TIMELESS_METHODS if isinstance(node.target, str) else node.target in TIMELESS_CALLS
    if not known:
        raise _refusal(f"'{name}' (node {node.name})", name, node)
    signals = [
        position
        for position, value in enumerate((*node.args, *node.kwargs.values()))
        if isinstance(value, fx.Node) and value not in constants and not is_size(value)
    ]
    if node.target in PRODUCTS and len(signals) > 1:
        raise _refusal(f"the product '{name}' of two signals (node {node.name})", "gate", node)
    if node.target in QUOTIENTS and any(signals):
        raise _refusal(f"the division '{name}' by a signal (node {node.name})", "gate", node)
    if node.target is operator.floordiv and not is_size(node):
        raise _refusal(f"'{name}' (node {node.name})", name, node)


def is_size(node: Any) -> bool:
    """Whether a node is a number taken from a shape."""
    if node.target in ("size", "dim") or (node.target is getattr and node.args[1] in ("shape", "ndim")):
        return True
    arithmetic = (operator.getitem, operator.mul, operator.floordiv, operator.add, operator.sub)
    sources = [source for source in getattr(node, "args", ()) if isinstance(source, fx.Node)]
    return node.target in arithmetic and bool(sources) and all(map(is_size, sources))


def _refusal(what: str, name: str, node: fx.Node) -> ConversionError:
    remedy = next((text for pattern, text in REMEDIES if re.search(pattern, name.lower())), None)
    remedy = remedy or "use convolutions, linear layers, batch norm, pooling, additions and ReLU"
    return ConversionError(f"{what} at {source_of(node)} has no spiking equivalent: {remedy}.")


def single_input(graph: fx.Graph) -> fx.Node:
    """The one placeholder of a graph that maps one tensor to one tensor.

    Raises:
        ConversionError: if it has more inputs, or another output.
    """
    tensors = [node for node in graph.nodes if node.op == "placeholder" and (node.users or not node.args)]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(tensors) != 1 or not isinstance(result, fx.Node):
        raise ConversionError(
            f"The network takes {len(tensors)} inputs and returns"
            f" {type(result).__name__ if not isinstance(result, fx.Node) else 'a tensor'}: expected one tensor in and"
            " one tensor of logits out. Wrap it in a module that selects them."
        )
    return tensors[0]
