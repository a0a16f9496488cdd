"""The mathematics of ``dynamics`` for all T steps in one pass over memory, forward and backward.

Both passes are plain Python over tensors ``[T, N]``, or ``[T, A, L]`` with thresholds per channel, which broadcast over
A or L. torch.compile makes of each pass one loop over the N neurons that keeps potentials in registers. The backward
pass recomputes the potentials from the current, so only the inputs are stored.

It goes from the last step to the first. Let g_t be the gradient at the spikes of step t, theta the threshold, ``'`` the
surrogate gradient, and r the gradient at the potential after the reset:

    at the spike       q = theta g_t - r          (subtractive reset; to zero: theta g_t - u r; detached: theta g_t)
    at the charge      p = r + q s'(u - 1)        (to zero: (1 - s) r + q s'(u - 1); graded: s' of the counts)
    to the current     gain p / theta
    to the past        r <- leak p

One kernel serves layers of every size: the length N is dynamic, leak and threshold are tensors. The T steps run in
chunks of ``CHUNK`` that pass the potential on, so that another T can use the same kernels.
"""

import dataclasses
import functools
import logging
import threading
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikedistill.errors import out_of_memory
from spikedistill.files import note
from spikedistill.neuron.dynamics import Neuron, Reset, slope_step
from spikedistill.neuron.surrogate import slope_of, spikes_of

log = logging.getLogger("spikedistill")

Kernel = Callable[..., Any]

CHUNK = 4
"""Time steps that one kernel unrolls. More steps are a chain of kernels."""


def chunks(timesteps: int) -> list[slice]:
    """The steps 0..T-1 in pieces of at most ``CHUNK``.

    >>> chunks(6)
    [slice(0, 4, None), slice(4, 6, None)]
    """
    return [slice(first, min(first + CHUNK, timesteps)) for first in range(0, timesteps, CHUNK)]


def _fires(charged: Tensor, levels: int) -> Tensor:
    """``spikes_of`` for the backward pass, without NaN, which comes from the surrogate. So sums keep their order."""
    return (charged - 1.0 >= 0).float() if levels == 1 else charged.floor().clamp(0.0, float(levels))


def _charges(
    neuron: Neuron,
    current: Tensor,
    state: Tensor | None,
    leak: Tensor,
    threshold: Tensor,
    timesteps: int,
    fires: Callable[[Tensor, int], Tensor] = spikes_of,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Potentials before and after the charge, and spikes, per step. The first list also has the final potential."""
    before = [torch.full_like(current[0], neuron.initial, dtype=torch.float32) if state is None else state]
    charged, spikes = [], []
    for t in range(timesteps):
        x = current[t].float() / threshold
        u = leak * before[t] + ((1.0 - leak) * x if neuron.decay_input else x)
        s = fires(u, neuron.levels)
        charged.append(u)
        spikes.append(s)
        before.append(u - s if neuron.reset is Reset.SUBTRACT else u * (1.0 - s))
    return before, charged, spikes


def _forward(
    neuron: Neuron, current: Tensor, state: Tensor | None, leak: Tensor, threshold: Tensor, timesteps: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    before, _, spikes = _charges(neuron, current, state, leak, threshold, timesteps)
    return torch.stack([(threshold * s).to(current.dtype) for s in spikes]), before[-1] if keep else None


def _forward_with_slope(
    neuron: Neuron,
    current: Tensor,
    carry: Tensor | None,
    leak: Tensor,
    threshold: Tensor,
    timesteps: int,
    share: Tensor | None,
) -> tuple[Tensor, ...]:
    """Spikes ``[T, N]``, their mean over time ``[N]`` and its slope ``[N]``; ``share`` is 1 over the number of steps.

    If more steps follow, ``share`` is None. The second tensor is then ``[4, N]``, for the next chunk: potential,
    tangent, sum of spikes, sum of slopes.
    """
    state, tangent, count, slope = (None, None, None, None) if carry is None else carry.unbind()
    before, charged, spikes = _charges(neuron, current, state, leak, threshold, timesteps)
    gain = (1.0 - leak) if neuron.decay_input else torch.ones_like(leak)
    zero = torch.zeros_like(charged[0])
    tangent, count, slope = (zero if given is None else given for given in (tangent, count, slope))
    for u, s in zip(charged, spikes):
        spiked, tangent = slope_step(u, s, tangent, neuron, leak, gain)
        slope, count = slope + spiked, count + s
    trains = torch.stack([(threshold * s).to(current.dtype) for s in spikes])
    if share is None:
        return trains, torch.stack((before[-1], tangent, count, slope))
    return trains, (threshold * count * share).to(current.dtype), (slope * share).to(current.dtype)


def _probe(neuron: Neuron, current: Tensor, timesteps: int) -> Tensor:
    return current + timesteps


def _backward(
    neuron: Neuron,
    current: Tensor,
    state: Tensor | None,
    leak: Tensor,
    threshold: Tensor,
    timesteps: int,
    grad: Tensor,
    grad_state: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of current ``[T, N]``, state (None without a state), leak and threshold (None if not learned)."""
    before, charged, spikes = _charges(neuron, current, state, leak, threshold, timesteps, _fires)
    gain = (1.0 - leak) if neuron.decay_input else torch.ones_like(leak)
    rest = torch.zeros_like(before[0]) if grad_state is None else grad_state
    to_leak, to_threshold = torch.zeros_like(rest), torch.zeros_like(rest)
    to_current: list[Tensor] = []
    for t in reversed(range(timesteps)):
        u, s = charged[t], spikes[t]
        arriving = grad[t].float()
        q = threshold * arriving
        if not neuron.detach_reset:
            q = q - (rest if neuron.reset is Reset.SUBTRACT else u * rest)
        past = rest if neuron.reset is Reset.SUBTRACT else rest * (1.0 - s)
        p = past + q * slope_of(u, neuron.levels, neuron.surrogate)
        to_current.append((gain * p / threshold).to(current.dtype))
        x = current[t].float() / threshold
        if neuron.learn_leak:
            to_leak = to_leak + p * (before[t] - x if neuron.decay_input else before[t])
        if neuron.learn_threshold:
            to_threshold = to_threshold + arriving * s - gain * p * x / threshold
        rest = leak * p
    to_current.reverse()
    return (
        torch.stack(to_current),
        None if state is None else rest.sum_to_size(state.shape),
        to_leak.sum() if neuron.learn_leak else None,
        to_threshold.sum_to_size(threshold.shape) if neuron.learn_threshold else None,
    )


SAID = threading.Event()
"""Set once the note that neurons are being compiled was printed."""
PATIENCE = 20.0
"""Seconds within which torch.compile looks for a kernel in its cache on disk."""


def _not_in_cache() -> int:
    """Number of kernels that torch.compile did not find on disk."""
    from torch._dynamo.utils import counters

    return sum(counters["inductor"][f"fxgraph_cache_{event}"] for event in ("miss", "bypass"))


def _say_if_compiled(before: int) -> None:
    """Print one note if a kernel has to be compiled, not if the cache on disk has it. Runs in a thread of its own."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not SAID.is_set():
        if _not_in_cache() > before:
            SAID.set()
            note("compiling neurons, once, about 10 s")
        time.sleep(0.1)


@functools.lru_cache(maxsize=512)
def _compiled(function: Kernel, neuron: Neuron, *facts: object) -> Kernel:
    """One kernel per set of static facts: model, T, dtypes, which arguments are given. The length N stays dynamic.

    torch.compile limits recompilations per code object, so each kernel gets its own copy of the code object.
    """
    log.info("compiling a neuron kernel: %s, %s", neuron, facts)
    if not SAID.is_set():
        threading.Thread(target=_say_if_compiled, args=(_not_in_cache(),), daemon=True).start()
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    return functools.partial(torch.compile(own, fullgraph=True, options=this_processor() | _on_gpu()), neuron)


def this_processor() -> dict[str, Any]:
    """Options of torch.compile by which its cache on disk tells kernels of other processors apart.

    Torch picks the length of vectors by itself, and its cache does not ask for it. A kernel that was written for
    vectors of 8 numbers and is found by a processor with 16 writes beyond the end of its results.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return {"cpp.simdlen": pick_vec_isa().bit_width()}


def _on_gpu() -> dict[str, Any]:
    """Options for kernels of Triton, as far as this version of torch has them; none without a GPU.

    The results of all steps are written by the loop that computes them, not by a second one that computes them again.
    Divisions are rounded as everywhere else, so that the same neurons fire. Neither was measured yet.
    """
    wanted = {"max_pointwise_cat_inputs": 0, "max_complex_pointwise_cat_inputs": 0}
    wanted |= {"eager_numerics.division_rounding": True}
    known = torch._inductor.config.get_config_copy() if torch.cuda.is_available() else {}
    return {name: value for name, value in wanted.items() if name in known}


def _facts(argument: Tensor) -> tuple[object, ...]:
    """What a kernel may rely on: dtype, inference mode, and which dimensions are 1 and so broadcast."""
    return argument.dtype, argument.is_inference(), tuple(size == 1 for size in argument.shape)


def _call(function: Kernel, neuron: Neuron, *arguments: Any) -> Any:
    """Run a compiled pass. Layers that differ only in threshold or in the value of the leak share a kernel."""
    arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    facts: list[object] = [_facts(a) if isinstance(a, Tensor) else a for a in arguments]
    facts += [torch.is_inference_mode_enabled(), torch.get_num_threads()]
    model = dataclasses.replace(neuron, threshold=1.0, leak=1.0 if neuron.leak == 1.0 else 0.5)
    neurons = arguments[0].ndim - 1
    for argument in arguments:
        if isinstance(argument, Tensor):
            for dimension in range(max(0, argument.ndim - neurons), argument.ndim):
                torch._dynamo.maybe_mark_dynamic(argument, dimension)
    with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
        return _compiled(function, model, *facts)(*arguments)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        current: Tensor,
        state: Tensor | None,
        leak: Tensor,
        threshold: Tensor,
        neuron: Neuron,
        timesteps: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        spikes, states = _run(current, state, neuron, leak, threshold, timesteps, keep)
        ctx.save_for_backward(current, leak, threshold, *states[:-1])
        ctx.neuron, ctx.timesteps, ctx.has_state = neuron, timesteps, state is not None
        ctx.set_materialize_grads(False)
        return spikes, states[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor | None, grad_state: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        current, leak, threshold, *states = ctx.saved_tensors
        if grad is None:
            grad = current.new_zeros(1).expand(ctx.timesteps, *current.shape[1:])
        rest = None if grad_state is None else grad_state.contiguous()
        if rest is None and len(states) > 1:
            rest = torch.zeros_like(current[0], dtype=torch.float32)
        constant = current.shape[0] < ctx.timesteps
        given = current.float() if constant else current  # steps are summed before they are rounded
        parts, to_leak, to_threshold = [], None, None
        for steps, state in reversed(list(zip(chunks(ctx.timesteps), states))):
            part, rest, leak_part, threshold_part = _call(
                *(_backward, ctx.neuron, _steps(given, steps), state, leak, threshold, steps.stop - steps.start),
                *(grad[steps].contiguous(), rest),
            )
            parts.append(part.sum(0, keepdim=True) if constant else part)
            to_leak = leak_part if to_leak is None else to_leak + leak_part
            to_threshold = threshold_part if to_threshold is None else to_threshold + threshold_part
        parts.reverse()
        to_current = sum(parts[1:], start=parts[0]).to(current.dtype) if constant else _joined(parts)
        return to_current, rest if ctx.has_state else None, to_leak, to_threshold, None, None, None


def _run(
    current: Tensor,
    state: Tensor | None,
    neuron: Neuron,
    leak: Tensor,
    threshold: Tensor,
    timesteps: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Spikes, and the states before each chunk and after the last (None: initial potential, or not kept)."""
    pieces = chunks(timesteps)
    if state is None and len(pieces) > 1:
        state = torch.full_like(current[0], neuron.initial, dtype=torch.float32)
    parts, states = [], [state]
    for steps in pieces:
        more = keep or len(pieces) > 1
        length = steps.stop - steps.start
        part, after = _call(_forward, neuron, _steps(current, steps), states[-1], leak, threshold, length, more)
        parts.append(part)
        states.append(after)
    return _joined(parts), states


def _steps(current: Tensor, steps: slice) -> Tensor:
    """The current of a chunk. A constant current is copied for each step, so that it needs no kernel of its own."""
    if current.shape[0] > 1:
        return current[steps]
    return current.expand(steps.stop - steps.start, *current.shape[1:]).contiguous()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fused_run(
    current: Tensor, state: Tensor | None, neuron: Neuron, leak: Tensor, threshold: Tensor, timesteps: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As ``dynamics.run``, for a current ``[T, N]`` or ``[1, N]``. The final state is None without ``keep``.

    A state that broadcasts to the neurons, as one potential per channel, is not expanded in memory.
    """
    current = current.contiguous()
    given = (current, leak, threshold) if state is None else (current, leak, threshold, state)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Fused.apply(current, state, leak, threshold, neuron, timesteps, keep)
    spikes, states = _run(current, state, neuron, leak, threshold, timesteps, keep)
    return spikes, states[-1] if keep else None


@torch.no_grad()
def fused_run_with_slope(
    current: Tensor, state: Tensor | None, neuron: Neuron, leak: Tensor, threshold: Tensor, timesteps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``dynamics.run_with_slope``, for a current ``[T, N]`` or ``[1, N]``."""
    current = current.contiguous()
    parts, pieces = [], chunks(timesteps)
    whole = None if state is None else state.float().expand(current.shape[1:])
    carry = None if whole is None else torch.stack((whole, *[torch.zeros_like(whole)] * 3))
    for steps in pieces:
        share = torch.full_like(leak, 1.0 / timesteps) if steps is pieces[-1] else None
        part, *rest = _call(
            *(_forward_with_slope, neuron, _steps(current, steps), carry),
            *(leak, threshold, steps.stop - steps.start, share),
        )
        parts.append(part)
        carry = rest[0]
    rate, slope = rest
    return _joined(parts), rate, slope


REMEDY = {
    "cpu": "Install a C++ compiler (on Debian: apt-get install g++).",
    "cuda": "It needs Triton, a C compiler with the headers of Python, and a card of compute capability 7.0 or more.",
}
"""What makes compilation possible, by device."""


@functools.cache
def works(device_type: str) -> bool:
    """Whether this machine can compile for the device. If not, it warns once.

    The first try trusts the processor's list of vector instructions. The second lets PyTorch test each kind with a
    small program, which takes eight of twenty seconds on two cores.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_news)
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    with config.patch({"cpp.vec_isa_ok": True}):
        valid_vec_isa_list()  # remembered from here on
        reason = _failure(device_type)
    if reason and device_type == "cpu":
        valid_vec_isa_list.cache_clear()
        reason = _failure(device_type)
    if reason:
        warnings.warn(
            f"torch.compile does not work here ({reason}): neurons run step by step, several times slower and with "
            f"more memory. {REMEDY.get(device_type, REMEDY['cpu'])}",
            stacklevel=3,
        )
    return not reason


def _is_news(record: logging.LogRecord) -> bool:
    """False for torch's warning that CUDA finds no GPU, which does not matter here."""
    return "No CUDA runtime is found" not in str(record.msg)


def _failure(device_type: str) -> str:
    """Why a minimal kernel cannot be compiled and run; empty if it can."""
    try:
        _call(_probe, Neuron(), torch.zeros(1, 8, device=device_type), 1)
    except Exception as error:  # whatever a missing or broken compiler raises
        if out_of_memory(error):
            raise
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ""
