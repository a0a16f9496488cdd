"""One contender of a speed or memory comparison, in a process of its own; the other scripts here start it.

Reads one command per line, answers with one line of JSON:  ``step N`` (seconds of N training steps),  ``infer N``
(seconds of N forward passes, in evaluation mode and without graph),  ``timesteps N``, ``batch N`` and ``side N`` (T,
images and their side in pixels from now on),  ``memory`` (bytes: what the process holds now, and the most it ever
held; on a GPU of the card's memory),  ``kernels`` (how many were compiled),  ``spent`` (seconds of the teacher and the
loss in each step so far; ours with 'joint' or 'cached'),  ``waits N`` (the share of N steps in which the GPU computes
nothing),  ``operator`` (what computes the neurons).

Every contender trains the same ResNet-18 for 32x32 images: direct coding, T steps, LIF with half of the potential left
after a step and subtractive reset, mean of the outputs, an ANN of the same kind as teacher (its answers with
temperature 2 and weight 0.7 beside the labels; with 'joint' four stages of features too, ours only; 'cached' takes the
same from disk), SGD. 'default' is what its users get (float32, the usual memory order), 'quick' adds bfloat16 autocast
where the processor computes bfloat16 (rivals.py says which), 'best' channels_last too. The peers run as their
documentation has it.
"""

import argparse
import contextlib
import functools
import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[..., nn.Module]


class Block(nn.Module):
    """Two convolutions beside a shortcut; ``kit`` makes convolution, norm and activation."""

    def __init__(self, kit: "Kit", into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = kit.conv(into, out, 3, stride, 1, bias=False), kit.norm(out), kit.act()
        self.conv2, self.bn2, self.act2 = kit.conv(out, out, 3, 1, 1, bias=False), kit.norm(out), kit.act()
        self.shortcut = nn.Sequential()
        if stride > 1 or into != out:
            self.shortcut = nn.Sequential(kit.conv(into, out, 1, stride, bias=False), kit.norm(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Net(nn.Module):
    """ResNet-18 with a 3x3 stem."""

    def __init__(self, kit: "Kit", width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(kit.conv(3, width, 3, 1, 1, bias=False), kit.norm(width), kit.act())
        stages, into = [], width
        for stage in range(4):
            for block in range(blocks):
                stages.append(Block(kit, into, width * 2**stage, 2 if stage and not block else 1))
                into = width * 2**stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(into, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((-2, -1)))


class Kit:
    """How a library writes the network; this one is the ANN's."""

    conv: Layer = nn.Conv2d
    norm: Layer = nn.BatchNorm2d

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    operator = "PyTorch"

    def act(self) -> nn.Module:
        return nn.ReLU()

    def build(self) -> nn.Module:
        return Net(self, self.options.width, self.options.blocks)

    def settle(self, network: nn.Module, layout: torch.memory_format) -> nn.Module:
        """The network in a memory order."""
        return network.to(memory_format=layout)

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """Mean logits ``[B, K]``."""
        return network(images)

    def teacher(self, network: nn.Module) -> nn.Module:
        """The teacher as the library prepares it."""
        return network

    def inference(self, network: nn.Module) -> nn.Module:
        """The trained network as the library prepares it for use."""
        return network.eval()

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, teacher: nn.Module | None) -> Tensor:
        """Labels, and the teacher's answers where there is one."""
        logits = self.run(network, images).float()
        loss = F.cross_entropy(logits, labels)
        if teacher is None:
            return loss
        with torch.no_grad():
            soft = (teacher(images).float() / 2).softmax(-1)
        return 0.3 * loss + 0.7 * 4 * F.kl_div((logits / 2).log_softmax(-1), soft, reduction="batchmean")


class Known(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *ends: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients


class OwnConvolutions(Kit):
    """The ANN with spikedistill's convolutions, where it takes them."""

    def settle(self, network: nn.Module, layout: torch.memory_format) -> nn.Module:
        from spikedistill.compute.place import choose_place

        place = choose_place(
            self.options.device,
            channels_last=layout is torch.channels_last,
            convolutions=self.options.convolutions,
            keep_memory=not self.options.lean,
        )
        place.prepare(network)
        return network


class Own(OwnConvolutions):
    """spikedistill: the ANN converted, gradient exact or rate-based."""

    gradient = "exact"
    operator = "compiled by torch.compile"
    recompute = "nothing"
    graded = False
    kept: Any = None

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.spent: list[float] = []

    def build(self) -> nn.Module:
        from spikedistill import Conversion, Neuron, to_spiking
        from spikedistill.compute.place import return_freed_memory

        if self.options.lean:
            return_freed_memory()
        neuron = Neuron(initial=0.5, levels=self.options.timesteps) if self.graded else Neuron(leak=0.5, initial=0.5)
        student, _ = to_spiking(
            Net(self, self.options.width, self.options.blocks),
            Conversion(timesteps=self.timesteps, neuron=neuron, inherit=False),
        )
        student.gradient, student.recompute = self.gradient, self.recompute
        return student

    @property
    def timesteps(self) -> int:
        """T; of a graded student 1, with as many levels as the others have steps."""
        return 1 if self.graded else int(self.options.timesteps)

    def teacher(self, network: nn.Module) -> nn.Module:
        from spikedistill import Teacher

        return self.inference(Teacher(network, mean=(0.0,) * 3, std=(1.0,) * 3))

    def inference(self, network: nn.Module) -> nn.Module:
        from spikedistill.student.fold import fold

        return fold(network)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, teacher: nn.Module | None) -> Tensor:
        """The same; with 'joint' and 'cached' KDSNN's features too, the teacher asked, or its answers from disk.

        Then ``spent`` gets the seconds of the teacher and of the loss, there and back.
        """
        if self.options.teacher not in ("joint", "cached"):
            return super().loss(network, images, labels, teacher)
        from spikedistill import KDSNN, Answer, Batch
        from spikedistill.objective.terms import total
        from spikedistill.teacher.cache import Cache
        from spikedistill.train.training_step import TeacherRunner, in_float32, observe

        paths = [f"stages.{(stage + 1) * self.options.blocks - 1}" for stage in range(4)]
        objective = KDSNN(pairs=tuple((path, path) for path in paths), temperature=2.0, alpha=0.7, adapt=False)
        asking = functools.partial(TeacherRunner(teacher, objective.needs).ask, images)
        if self.options.teacher == "cached" and self.kept is None:
            self.folder = tempfile.TemporaryDirectory()
            self.kept = Cache(Path(self.folder.name), {"benchmark": 1}, asking(), 1, 1)
            self.kept.answer(1, 0, torch.arange(len(images)), asking)
            self.kept.flush()
        began = time.perf_counter()
        theirs = asking() if self.kept is None else self.kept.answer(1, 0, torch.arange(len(images)), asking)
        asked = time.perf_counter() - began
        network.set_timesteps(self.timesteps)
        answer = observe(network, images, objective.needs)
        began = time.perf_counter()
        ends = [answer.logits, *answer.features.values()]
        copies = [end.detach().requires_grad_() for end in ends]
        copied = in_float32(Answer(copies[0], dict(zip(answer.features, copies[1:]))))
        batch = Batch(labels=labels, student=copied, teacher=theirs)
        loss = total(objective(batch, objective.modules(batch, teacher)))
        gradients = torch.autograd.grad(loss, copies)
        self.spent.append(asked + time.perf_counter() - began)
        return Known.apply(loss.detach(), gradients, *ends)

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        network.set_timesteps(self.timesteps)
        return network(images).float().mean(0)


class OwnGraded(Own):
    """spikedistill with graded neurons: one step of as many levels as the others have steps, with ``--compile``."""

    graded = True

    def build(self) -> nn.Module:
        from spikedistill.neuron.fused import this_processor

        student = super().build()
        if self.options.setting == "best":
            student.compile(options=this_processor())
        return student


class OwnRate(Own):
    """spikedistill with the rate-based gradient."""

    gradient = "rate"


class OwnStages(Own):
    """spikedistill with the exact gradient and activation checkpointing."""

    recompute = "stages"


class OwnNeurons(Own):
    """spikedistill with the exact gradient, all but convolutions computed again."""

    recompute = "neurons"


class SpikingJelly(Kit):
    """Multi-step mode, as its documentation advises for speed."""

    execution = "eager"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        from spikingjelly.activation_based import layer

        self.conv = lambda *given, **more: layer.Conv2d(*given, **more, step_mode="m")
        self.norm = lambda *given, **more: layer.BatchNorm2d(*given, **more, step_mode="m")

    def act(self) -> nn.Module:
        from spikingjelly.activation_based import neuron, surrogate

        return neuron.LIFNode(
            tau=2.0, decay_input=False, v_reset=None, surrogate_function=surrogate.ATan(), step_mode="m"
        )

    @property
    def operator(self) -> str:  # type: ignore[override]
        """What the library chose for its neurons on this device."""
        from spikingjelly.activation_based.functional.neuron import neuron_implementation

        found = neuron_implementation("lif", torch.device(self.options.device), execution=self.execution)
        return f"{found['implementation']}, {self.execution}"

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(network)
        return network(images.expand(self.options.timesteps, *images.shape)).float().mean(0)


class SpikingJellyCompiled(SpikingJelly):
    """The same network under ``torch.compile``."""

    execution = "compile"

    def settle(self, network: nn.Module, layout: torch.memory_format) -> nn.Module:
        network = super().settle(network, layout)
        network.compile()
        return network


class SpikingJellyMemopt(SpikingJelly):
    """With ``memopt`` as its own ResNets use it: every block checkpointed, spikes that enter it packed into bits.

    Level 1: levels 2 to 4 search by the peak of CUDA memory and refuse a CPU.
    """

    def build(self) -> nn.Module:
        """The network, optimised on two images."""
        from spikingjelly.activation_based import memopt

        network, images = super().build(), torch.rand(2, 3, 32, 32)
        return memopt.optimize_memory(network, Block, lambda current: self.run(current, images), level=1)


class SnnTorch(Kit):
    """Hidden state and a loop over time, as in its tutorials."""

    def act(self) -> nn.Module:
        import snntorch
        from snntorch import surrogate

        return snntorch.Leaky(beta=0.5, spike_grad=surrogate.atan(), init_hidden=True, reset_mechanism="subtract")

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        from snntorch import Leaky

        for module in network.modules():  # its utils.reset does not look inside a module's modules
            if isinstance(module, Leaky):
                module.reset_mem()
        return torch.stack([network(images) for _ in range(self.options.timesteps)]).float().mean(0)


class Stated(nn.Module):
    """A cell ``(x, state) -> (spikes, state)`` that keeps its state between the steps of one batch."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.state = cell, None

    def forward(self, x: Tensor) -> Tensor:
        spikes, self.state = self.cell(x, self.state)
        return spikes


class Norse(Kit):
    """LIF box cells in a loop over time."""

    def act(self) -> nn.Module:
        import norse.torch as norse

        return Stated(norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=torch.tensor(500.0))))

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        for module in network.modules():
            if isinstance(module, Stated):
                module.state = None
        return torch.stack([network(images) for _ in range(self.options.timesteps)]).float().mean(0)


class Sinabs(Kit):
    """Squeezed layers: batch and time share an axis, samples first."""

    def act(self) -> nn.Module:
        import sinabs.layers

        return sinabs.layers.LIFSqueeze(
            tau_mem=1.4427, norm_input=False, batch_size=self.options.batch, spike_fn=sinabs.activation.SingleSpike
        )

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        import sinabs

        sinabs.reset_states(network)
        steps = self.options.timesteps
        return network(images.repeat_interleave(steps, 0)).unflatten(0, (-1, steps)).float().mean(1)


KITS: dict[str, type[Kit]] = {
    "ann": Kit,
    "ann-own": OwnConvolutions,
    "exact": Own,
    "exact-stages": OwnStages,
    "exact-neurons": OwnNeurons,
    "graded": OwnGraded,
    "rate": OwnRate,
    "spikingjelly": SpikingJelly,
    "spikingjelly-compiled": SpikingJellyCompiled,
    "spikingjelly-memopt": SpikingJellyMemopt,
    "snntorch": SnnTorch,
    "norse": Norse,
    "sinabs": Sinabs,
}


class Worker:
    """A contender ready to take steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(options.threads)
        self.began = resident()
        self.best = options.setting == "best"
        self.kit = KITS[options.name](options)
        self.device = torch.device(options.device)
        layout = torch.channels_last if self.best else torch.contiguous_format
        self.network = self.kit.settle(self.kit.build().to(self.device), layout)
        self.layout, self.side = layout, 32
        self.draw()
        self.teacher: Any = None
        if options.teacher != "none":
            teacher = Kit(options).build().to(self.device, memory_format=layout).eval().requires_grad_(False)
            self.teacher = self.kit.settle(self.kit.teacher(teacher), layout)
        self.served: nn.Module | None = None
        self.optimiser = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def draw(self) -> None:
        """A batch of images."""
        options = self.kit.options
        images = torch.rand(options.batch, 3, self.side, self.side)
        self.images = images.to(self.device, memory_format=self.layout)
        self.labels = torch.randint(0, 10, (options.batch,)).to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        options = self.kit.options
        return torch.autocast(self.device.type, torch.bfloat16, enabled=options.bf16 and options.setting != "default")

    def step(self) -> None:
        self.network.train()
        self.served = None
        with self.autocast():
            loss = self.kit.loss(self.network, self.images, self.labels, self.teacher)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()

    def infer(self) -> None:
        if self.served is None:
            self.served = self.kit.inference(self.network)
        with torch.no_grad(), self.autocast():
            self.kit.run(self.served, self.images)

    def answer(self, line: str) -> Any:
        what, _, count = line.partition(" ")
        if what == "operator":
            return self.kit.operator
        if what == "waits":
            return self.waits(int(count))
        if what == "memory":
            gc.collect()
            if self.device.type == "cuda":
                found = {"began": 0, "now": torch.cuda.memory_allocated(), "most": torch.cuda.max_memory_allocated()}
                torch.cuda.reset_peak_memory_stats()
                return found
            return {"began": self.began, "now": resident(), "most": 1024 * resource.getrusage(0).ru_maxrss}
        if what == "spent":
            return self.kit.spent
        if what == "kernels":
            from torch._dynamo.utils import counters

            return counters["stats"]["unique_graphs"]
        if what in ("timesteps", "batch", "side"):
            setattr(self if what == "side" else self.kit.options, what, int(count))
            self.draw()
            return int(count)
        work = {"step": self.step, "infer": self.infer}[what]
        times = []
        for _ in range(int(count)):
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
        return times

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def waits(self, count: int) -> float:
        """The share of the time of ``count`` steps, one right after another, in which no kernel runs."""
        from torch.profiler import ProfilerActivity, profile

        self.step()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(count):
                self.step()
            self.wait()
        return idle(found)


def idle(found: Any, inner: float = 1.0) -> float:
    """The share of time, from the first kernel in a profile to the end of the last, in which none runs.

    With ``inner`` only the kernels of this middle share of the time count.
    """
    ran = sorted((one.time_range.start, one.time_range.end) for one in found.events() if one.device_time > 0)
    first, last = ran[0][0], max(end for _, end in ran)
    cut = (1 - inner) / 2 * (last - first)
    ran = [(start, end) for start, end in ran if start >= first + cut and end <= last - cut]
    busy, end = 0.0, ran[0][0]
    for first, last in ran:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return 1 - busy / (end - ran[0][0])


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=KITS)
    parser.add_argument("--setting", choices=("default", "quick", "best"), default="best")
    parser.add_argument("--bf16", action="store_true", help="what 'quick' and 'best' compute in; else float32")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--convolutions", default="auto", help="ours: whose, as in spikedistill.train.recipe")
    parser.add_argument("--lean", action="store_true", help="ours: return freed memory, as keep_memory=False does")
    parser.add_argument("--teacher", choices=("none", "answers", "joint", "cached"), default="none")
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(parser.parse_args())
    for line in sys.stdin:
        print(json.dumps(worker.answer(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
