"""Does the package run on a GPU, and to the same numbers? Parts of a minute each; results are written as they come.

    python benchmarks/gpu.py --parts correct train speed --out gpu.jsonl     # on the card
    python benchmarks/gpu.py --device cpu --small                            # a rehearsal without one

``correct``: fused neurons against the reference, forward and gradient, over T, number formats, memory orders,
thresholds per channel, leaks and learned thresholds; conversion and bias correction; streaming; folding; a file of the
device on the CPU. ``train``: the loop with each gradient, stopped after an epoch and resumed, on the device and on the
CPU. ``speed``: seconds and peak memory of a training step, exact and rate-based, beside the ANN. The data are random.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill import (
    KDSNN,
    Conversion,
    MemoryFeed,
    Run,
    Teacher,
    Training,
    fit,
    fold,
    load_student,
    save_student,
    to_spiking,
)
from spikedistill.compute.place import choose_place
from spikedistill.data.images import ImageSet
from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron
from spikedistill.neuron.layer import Spiking
from spikedistill.teacher.load import Architecture

Facts = dict[str, Any]
NEURONS: dict[str, Neuron] = {
    "if": dataclasses.replace(IF, initial=0.5),
    "lif": dataclasses.replace(LIF, learn_threshold=True),
    "plif": PLIF,
}
STEPS = (1, 2, 4, 7, 16)
FORMATS = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def blobs(count: int, side: int) -> ImageSet:
    """Random images of ten classes, each brighter in a place of its own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 120, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        images[row, :, label * side // 10] += 120
    return ImageSet("blobs", images, labels, images[:100], labels[:100], tuple("0123456789"))


def passes(layer: Spiking, current: Tensor, timesteps: int) -> list[Tensor]:
    """Spikes of a layer, and the gradients that reach current and parameters."""
    given = current.clone().requires_grad_()
    spikes, _ = layer(given, timesteps)
    weights = torch.linspace(-1, 1, spikes.numel(), device=spikes.device).view(spikes.shape).to(spikes)
    return [spikes, *torch.autograd.grad((spikes * weights).sum(), [given, *layer.parameters()])]


def neurons(device: torch.device) -> Iterator[Facts]:
    """Fused against reference."""
    cases = itertools.product(NEURONS, STEPS, FORMATS, LAYOUTS, (False, True))
    for name, timesteps, dtype, layout, per_channel in cases:
        torch.manual_seed(0)
        threshold = torch.linspace(0.5, 1.5, 8) if per_channel else torch.tensor(1.0)
        layer = Spiking(NEURONS[name], threshold).to(device)
        current = torch.randn(timesteps * 4, 8, 6, 6, device=device).to(dtype).to(memory_format=layout)
        layer.backend = "fused"
        found = passes(layer, current, timesteps)
        layer.backend = "reference"
        wanted = passes(layer, current, timesteps)
        far = max(
            float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-9)) for a, b in zip(found, wanted)
        )
        bound = 1e-4 if dtype is torch.float32 else 2e-2
        shown = f"{name} T={timesteps} {dtype} {layout} {'per channel' if per_channel else 'one threshold'}"
        yield {"check": f"fused equals reference: {shown}", "value": far, "passed": far <= bound}


def conversions(device: torch.device, side: int) -> Iterator[Facts]:
    """Conversion, streaming, folding and files on the device."""
    images = blobs(200, side).train_images.float().div(255).to(device)
    ann = Architecture("resnet20", 10, 3, 8).build().to(device).eval()
    teacher = Teacher(ann, (0.4,) * 3, (0.25,) * 3).to(device)
    for biased in (False, True):
        student, _ = to_spiking(
            teacher, Conversion(timesteps=4, correct="biases" if biased else "nothing"), calibrate=images
        )
        student.to(device).eval()
        with torch.no_grad():
            whole, state, steps = student(images[:8]), None, []
            for _ in range(4):
                logits, state = student.step(images[:8], state)
                steps.append(logits)
            streamed = float((torch.stack(steps) - whole).abs().max())
            folded = float((fold(student)(images[:8]).mean(0) - whole.mean(0)).abs().max())
        yield {
            "check": f"streaming equals the whole call, biases corrected: {biased}",
            "value": streamed,
            "passed": streamed < 1e-3,
        }
        yield {"check": f"folding, biases corrected: {biased}", "value": folded, "passed": bool(folded < 1.0)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.safetensors"
        save_student(path, student, architecture=Architecture("resnet20", 10, 3, 8))
        again = load_student(path)
        alike = all(torch.equal(value, student.state_dict()[name].cpu()) for name, value in again.state_dict().items())
        yield {"check": "a file of the device is read on the CPU, bit for bit", "value": 0.0, "passed": alike}


def correct(given: argparse.Namespace) -> Iterator[Facts]:
    yield from neurons(given.device)
    yield from conversions(given.device, given.side)


def train(given: argparse.Namespace) -> Iterator[Facts]:
    """Each gradient through the loop: interrupted after an epoch, resumed here, and resumed on the CPU."""
    images = blobs(640, given.side)
    ann = Architecture("resnet20", 10, 3, 8).build()
    teacher = Teacher(ann, (0.4,) * 3, (0.25,) * 3)
    calibrate = images.train_images[:128].float() / 255
    for gradient in ("exact", "rate", "quantised"):
        for device in (str(given.device), "cpu"):
            with tempfile.TemporaryDirectory() as folder:
                run = Run(Path(folder))
                lines = []
                for epochs, where in ((1, str(given.device)), (2, device)):
                    torch.manual_seed(0)
                    student, _ = to_spiking(teacher, Conversion(timesteps=2), calibrate=calibrate)
                    student.gradient = gradient  # type: ignore[assignment]
                    config = Training(epochs=epochs, batch_size=64, lr=0.01, device=where)
                    feed = MemoryFeed(images, 64, validation=0.0)
                    lines.append(fit(student, KDSNN(), feed, config, run, teacher=teacher))
                finite = all(line["loss"] == line["loss"] for line in lines)
                name = f"{gradient}: an epoch on {given.device}, the next on {device}"
                yield {"check": name, "value": lines[-1]["loss"], "passed": finite and lines[-1]["epoch"] == 2}


def speed(given: argparse.Namespace) -> Iterator[Facts]:
    """Medians of a step at T=4 in the place that 'auto' chooses, and the peak of memory."""
    place = choose_place(str(given.device))
    images = torch.rand(given.batch, 3, 32, 32).to(place.device, memory_format=place.layout)
    labels = torch.randint(0, 10, (given.batch,), device=place.device)
    ann = Architecture("resnet18", 10, 3, given.width).build()
    student, _ = to_spiking(ann, Conversion(timesteps=4, inherit=False))
    networks: dict[str, nn.Module] = {"ann": ann, "exact": student, "rate": student}
    for name, network in networks.items():
        place.prepare(network)
        network.train()
        if network is student:
            student.gradient = name  # type: ignore[assignment]
        seconds, peak = measured(lambda: step(network, images, labels, place), given.device, given.rounds)  # noqa: B023
        yield {
            "check": f"step of {name}, batch {given.batch}, {place.dtype}",
            "value": seconds,
            "peak": peak,
            "passed": True,
        }


def step(network: nn.Module, images: Tensor, labels: Tensor, place: Any) -> None:
    with place.autocast():
        logits = network(images).float()
    loss = nn.functional.cross_entropy(logits.mean(0) if logits.ndim == 3 else logits, labels)
    network.zero_grad(set_to_none=True)
    loss.backward()


def measured(work: Callable[[], None], device: torch.device, rounds: int) -> tuple[float, int]:
    """Median seconds after three rounds that are left out, and the peak of the device's memory in bytes."""
    cuda, times = device.type == "cuda", []
    for number in range(rounds + 3):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times += [time.perf_counter() - began] if number >= 3 else []
    return statistics.median(times), torch.cuda.max_memory_allocated() if cuda else 0


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Facts]]] = {"correct": correct, "train": train, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="one line per check, appended as it comes")
    parser.add_argument("--small", action="store_true", help="small networks, for a rehearsal on a CPU")
    given = parser.parse_args()
    given.side, given.width, given.batch, given.rounds = (16, 8, 16, 3) if given.small else (32, 64, 128, 20)
    card = torch.cuda.get_device_name() if given.device.type == "cuda" else "a CPU"
    failed = 0
    for part in given.parts:
        for facts in PARTS[part](given):
            failed += not facts["passed"]
            line = {"part": part, **facts, "card": card, "torch": torch.__version__}
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print("ok    " if facts["passed"] else "FAILED", part, facts["check"], f"{facts['value']:.4g}", flush=True)
    raise SystemExit(f"{failed} checks failed" if failed else 0)


if __name__ == "__main__":
    main()
