"""Biases corrected after conversion: each channel's mean output becomes that of the ANN."""

import contextlib
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikedistill.inputs import evaluating
from spikedistill.neuron.layer import Spiking
from spikedistill.student.calibrate import by_channel
from spikedistill.student.graph import repeat_time


class _Stop(BaseException):
    """Ends a run after the layer of interest. It is no ``Exception``, since torch.fx would print one."""


@torch.no_grad()
def correct_biases(
    student: Any,
    core: fx.GraphModule,
    neurons: Mapping[str, Spiking],
    wanted: Mapping[str, Tensor],
    images: Tensor,
    batch_size: int,
) -> None:
    """Shift the biases before every layer of neurons so that each channel's mean output equals that of the ANN.

    This is the bias correction of Li et al. (ICML 2021, arXiv 2106.06984), layer by layer. Once the earlier layers are
    corrected, the remaining difference is added to the bias of the batch norm, convolution or linear layer before the
    neurons. If no such layer has its own bias, nothing is corrected there.

    Args:
        student: changed in place.
        core: its graph.
        neurons: its layers of neurons by name, in order of execution.
        wanted: for each layer the mean activations of the ANN, ``[C]``.
        images: raw images in 0..1.
        batch_size: images at a time.
    """
    calls = {str(node.target): node for node in core.graph.nodes if node.op == "call_module"}
    device = next(student.parameters()).device
    for name, layer in neurons.items():
        before = preceding_layer(core, calls[f"{core.meta['neurons']}.{name}"].args[0])
        if before is None:
            continue
        sums: list[Tensor] = []

        def listen(_: nn.Module, given: Any, result: tuple[Tensor, Any], sums: list[Tensor] = sums) -> None:
            sums.append(by_channel(result[0]))
            raise _Stop

        handle = layer.register_forward_hook(listen)
        parts = images.split(batch_size)
        for part in parts:
            rows, repeats = student.shown(part.to(device))
            with contextlib.suppress(_Stop), evaluating(student):
                core(rows, student.timesteps, repeats, (None,) * student.states, False)
        handle.remove()
        weights = torch.tensor([len(part) / len(images) for part in parts], device=device)
        lacking = wanted[name].to(device) - (torch.stack(sums) * weights[:, None]).sum(0)
        before.bias += lacking.to(before.bias)


SUMS = (operator.add, torch.add, "add")
PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def preceding_layer(core: fx.GraphModule, node: Any) -> Any:
    """The layer with a bias whose output reaches this node and no other reader, if any; for a sum, that of one part."""
    if not isinstance(node, fx.Node) or len(node.users) > 1:
        return None
    if node.op == "call_module":
        layer = core.get_submodule(str(node.target))
        if isinstance(layer, PASSING):
            return preceding_layer(core, node.args[0])
        calls = sum(other.op == "call_module" and other.target == node.target for other in core.graph.nodes)
        return layer if calls == 1 and getattr(layer, "bias", None) is not None else None
    if node.target in SUMS or node.target is repeat_time:
        found = (preceding_layer(core, part) for part in node.args)
        return next((layer for layer in found if layer is not None), None)
    return None
