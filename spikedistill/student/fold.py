"""Fold batch norm into the weights before it: the same function in evaluation mode, in fewer operations."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from spikedistill.student.rate import CONVOLUTIONS, NORMS
from spikedistill.student.student import Student
from spikedistill.student.trace import trace
from spikedistill.teacher.load import Normalised

Network = TypeVar("Network", bound=nn.Module)


def fold(network: Network, keep: Sequence[str] = ()) -> Network:
    """A copy in evaluation mode with batch norms folded into the convolution or linear layer before them.

    A norm is folded if its layer is called once and has no other reader. ``nn.Identity`` takes its place, so all other
    module paths stay. The copy is for inference: it would train differently from the original.

    Args:
        network: a student, a teacher, or any network that torch.fx can trace; it is not changed.
        keep: module paths whose output must not change. The norm after such a layer is not folded.

    Raises:
        ConversionError: if torch.fx cannot trace the network.
    """
    copied = copy.deepcopy(network).eval()
    core: nn.Module
    if isinstance(copied, Student):
        core, graph, ends = copied.core, copied.core.graph, copied.output_nodes
    else:
        core = copied.network if isinstance(copied, Normalised) else copied
        module, nodes = trace(copy.deepcopy(core))
        graph, ends = module.graph, {path: node.name for path, node in nodes.items()}
    for layer, norm in _neighbours(core, graph, {ends[path] for path in keep if path in ends}):
        _merge(core, layer, norm)
    return copied


def _neighbours(core: nn.Module, graph: fx.Graph, kept: set[str]) -> list[tuple[str, str]]:
    """Paths of layer and norm if the norm is the layer's only reader, each is called once, and the node is not kept."""
    modules = dict(core.named_modules())
    called = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        users = list(node.users)
        if node.op != "call_module" or len(users) != 1 or users[0].op != "call_module" or node.name in kept:
            continue
        layer, norm = str(node.target), str(users[0].target)
        first, second = modules.get(layer), cast(Any, modules.get(norm))
        fits = type(first) in (*CONVOLUTIONS, nn.Linear) and type(second) in NORMS and second.track_running_stats
        if fits and called[layer] == called[norm] == 1:
            found.append((layer, norm))
    return found


def _merge(core: nn.Module, path: str, norm_path: str) -> None:
    layer: Any = core.get_submodule(path)
    norm: Any = core.get_submodule(norm_path)
    merge = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    learns = layer.weight.requires_grad
    weight, bias = merge(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    layer.weight = nn.Parameter(weight.detach(), learns)
    layer.bias = nn.Parameter(bias.detach(), learns)
    core.set_submodule(norm_path, nn.Identity())
