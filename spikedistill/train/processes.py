"""Several processes that train one network; the only file that uses ranks. A single process is the case of one.

torchrun and ``accelerate launch`` start the processes. Process 0 decides, writes and prints. If it raises an error, all
processes raise it. The others wait for it without a time limit. If a process ends, the others notice at once; if a
whole machine fails within an epoch, after ``PATIENCE``.
"""

import atexit
import contextlib
import datetime
import functools
import gc
import importlib
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spikedistill.errors import ConfigError, Heard, ProcessError, SpikeDistillError, out_of_memory

Result = TypeVar("Result")

PATIENCE = datetime.timedelta(minutes=30)
"""Longest time that processes wait for each other within a step."""
FOREVER = datetime.timedelta(days=365)
"""Longest time that the others wait while process 0 measures or writes."""
TRAINING = ("distill", "teach")
"""The commands that can run in several processes."""
REFUSALS = (SpikeDistillError, OSError)
"""Errors that process 0 passes on to the others: they have a message for the user."""


@dataclass(frozen=True)
class Processes:
    """The processes of this training, and what they do together. All processes must call each of its methods.

    Args:
        rank: the number of this process, from 0.
        world_size: the number of processes.
        groups: the process groups of torch: ``stepping`` for communication within a step, on the CPU, and ``waiting``,
            in which the others wait for process 0. Empty at the end.
    """

    rank: int = 0
    world_size: int = 1
    groups: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0, which writes and prints."""
        return self.rank == 0

    def on_main_process(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in process 0 while the others wait. All return its result, or raise its error."""
        if self.world_size == 1:
            return work()
        made, refusal = None, None
        if self.is_main_process:
            try:
                made = work()
            except REFUSALS as error:
                refusal = error
        made, refusal = self._broadcast_object((made, refusal))
        if refusal is not None:
            raise self.mark_reported(refusal)
        return made

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body in process 0 first, then in the others. If one raises an error, all raise it.

        So files that process 0 downloads, builds or repairs exist for the others. The body must not wait for other
        processes.
        """
        if self.world_size == 1:
            yield
            return
        if not self.is_main_process and (refusal := self._broadcast_object(None)):
            raise self.mark_reported(refusal)
        try:
            yield
        except REFUSALS as error:
            refusal = error
        else:
            refusal = None
        if self.is_main_process:
            self._broadcast_object(refusal)
            if refusal is not None:
                raise refusal
        for other in self.all_gather(refusal):
            if other is not None:
                raise self.mark_reported(other)

    def mark_reported(self, error: BaseException) -> BaseException:
        """Mark an error that all processes raise; only process 0 prints it."""
        if not self.is_main_process:
            error.__cause__ = Heard()
        return error

    def all_gather(self, value: Result) -> list[Result]:
        """The values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._connected():
            dist.all_gather_object(values, value, group=self.groups["waiting"])
        return values

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """The sums over processes, in float64."""
        if self.world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        with self._connected():
            dist.all_reduce(sums, group=self.groups["stepping"])
        return sums.tolist()

    def all_reduce_mean(self, statistic: Tensor) -> Tensor:
        """The mean over processes of a tensor without gradient; of one process the tensor itself."""
        if self.world_size == 1:
            return statistic
        summed = statistic.detach().clone()
        with self._connected():
            dist.all_reduce(summed, group=self._group(summed))
        return summed / self.world_size

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over processes. A gradient that no process has stays None."""
        if self.world_size == 1:
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for learned in kinds.values():
            self._average(learned)

    def _average(self, learned: Sequence[nn.Parameter]) -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
        given = parts[0].new_tensor([float(p.grad is not None) for p in learned])
        flat = torch.cat([*(part.reshape(-1) for part in parts), given])
        with self._connected():
            dist.all_reduce(flat, group=self._group(flat))
            *means, given = flat.split([*(p.numel() for p in learned), len(learned)])
            gradients = given.tolist()  # NCCL waits here
        for parameter, mean, there in zip(learned, means, gradients, strict=True):
            if there:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad.copy_(mean.view_as(parameter) / self.world_size)

    def broadcast(self, *modules: nn.Module) -> None:
        """Copy the parameters and buffers of process 0 to all processes."""
        if self.world_size == 1:
            return
        held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        for tensor in held:
            sent = tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # not all carry every number format
            with self._connected():
                dist.broadcast(sent, 0, group=self._group(sent))
            tensor.detach().copy_(sent.view(tensor.dtype).view_as(tensor))

    def reseed(self, seed: int) -> None:
        """Seed the random numbers inside the network, differently in each process; process 0 as a single process."""
        torch.manual_seed((seed * 1_000_003 + self.rank) % 2**63)

    def check_devices(self, device: torch.device) -> None:
        """Refuse two processes on one GPU.

        Raises:
            ConfigError: if two processes would use the same GPU.
        """
        if self.world_size == 1 or device.type != "cuda":
            return
        used = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
        if len(set(self.all_gather(used))) < self.world_size:
            raise self.mark_reported(
                ConfigError(
                    f"{self.world_size} processes were started, and two of them would use the same GPU: start at most"
                    f" {torch.cuda.device_count()} on this machine, and give --device cuda without a number."
                )
            )

    def _broadcast_object(self, value: Any) -> Any:
        """The value of process 0, in all processes."""
        told = [value]
        with self._connected():
            dist.broadcast_object_list(told, 0, group=self.groups["waiting"])
        return told[0]

    def _group(self, tensor: Tensor) -> Any:
        """The process group that can transfer a tensor: on a GPU the default group of torch."""
        return self.groups["stepping"] if tensor.device.type == "cpu" else None

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise self._lost(f"another one has ended or cannot be reached ({_reason(error)})") from error

    def _lost(self, why: str) -> ProcessError:
        """The error that ends this process. From now on SIGTERM is ignored, else it could come before the message."""
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return ProcessError(
            f"Process {self.rank} of {self.world_size} ends: {why}. See the message of the process that ended first."
            " Continue by the same command with --resume; the number of processes may differ."
        )

    def terminate(self, *_: Any) -> None:
        """Handler of SIGTERM, which torchrun sends when a process has ended, and a scheduler when time is up."""
        raise self._lost("it got SIGTERM: another process has ended, or a scheduler ends the job")


def launched() -> int:
    """The number of processes that torchrun or ``accelerate launch`` started, including this one."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    known = rank.isdecimal() and size.isdecimal() and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return int(size) if known else 1


def join() -> Processes:
    """The processes that were started together, including this one. The first call waits until all have started.

    Raises:
        ConfigError: if the others do not start within torch's time limit.
    """
    if not dist.is_available() or (launched() == 1 and not dist.is_initialized()):
        return Processes()
    return _join()


@functools.cache
def _join() -> Processes:
    if torch.cuda.is_available() and (local := int(os.environ.get("LOCAL_RANK", "0"))) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    if ours := not dist.is_initialized():
        _meet()
    if dist.get_world_size() == 1:
        return Processes()
    made = Processes(dist.get_rank(), dist.get_world_size())
    atexit.register(_part, made.groups, ours)
    for name, time in (("stepping", PATIENCE), ("waiting", FOREVER)):
        made.groups[name] = dist.new_group(backend="gloo", timeout=time)
    if not made.is_main_process:
        logging.getLogger("spikedistill").setLevel(logging.ERROR)
    with contextlib.suppress(ValueError):  # not in the main thread
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, made.terminate)
    return made


def _meet() -> None:
    importlib.import_module("torch.distributed.nn")  # imported later, its functions would hold the group for ever
    try:
        dist.init_process_group(timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(
            f"This is process {os.environ['RANK']} of {launched()} by its environment, and they did not meet at {place}"
            f" ({_reason(error)}): start all by torchrun, or one alone without RANK and WORLD_SIZE in its environment."
        ) from error


def _part(groups: dict[str, Any], ours: bool) -> None:
    """Close the connections at the end, and end their threads, which live for as long as anything refers to a group.

    A thread of gloo that still holds a tensor while Python ends aborts the process (PyTorch pull request 179291).

    Args:
        groups: what refers to the groups; emptied.
        ours: whether the default group is ours to close.
    """
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError, ValueError):
            for group in (None,) if ours else groups.values():  # None: all
                dist.destroy_process_group(group)
    groups.clear()
    gc.collect()


def _reason(error: BaseException) -> str:
    """What torch says first, without where in gloo, and without its general advice."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S*\] ", "", said).partition(". ")[0]


@contextlib.contextmanager
def speaking(command: str) -> Iterator[None]:
    """Let only process 0 print the output of a command. Errors go on to the caller.

    Raises:
        ConfigError: if this is one of several processes and the command cannot run in several.
    """
    if (count := launched()) == 1:
        yield
        return
    this = Processes(int(os.environ["RANK"]), count)
    if command not in TRAINING:
        raise this.mark_reported(
            ConfigError(
                f"'{command}' runs in one process, but {count} were started: start it without torchrun, and without"
                " WORLD_SIZE in its environment."
            )
        )
    if this.is_main_process:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
