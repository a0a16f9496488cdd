"""Everything that needs a GPU, in parts of minutes: is it right, how fast, how accurate at the paper's size?

    python benchmarks/gpu.py --data-dir DATA                          # all parts, one after another
    python benchmarks/gpu.py --parts correct speed --out results      # some of them
    python benchmarks/gpu.py --device cpu --small                     # a rehearsal without a GPU

``correct``: the tests that are marked 'cuda'. ``speed``: seconds, peak memory and waiting of a training step with the
teacher in the loop, ours and SpikingJelly's in turn (contenders.py: ResNet-18 of 64-128-256-512 channels, T=4,
bfloat16, channels_last). ``loop``: how long the GPU waits in the package's own loop. ``teacher``, ``students``,
``pairs``: trainings by the commands in ``RUNS``. Results are appended to OUT/gpu.jsonl as they come. Runs lie in
RUNS/NAME; a finished one is kept, an interrupted one goes on, and its small files are copied to OUT, with weights in
float16. --seconds ends the work in time for a machine that is lent. Results that may only leave it in small pieces:
``tar cz OUT | split -b 15m - PIECE.``
"""

import argparse
import contextlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import idle
from rivals import Contender, Row, in_turn, machine, median
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from spikedistill import (
    Architecture,
    Augment,
    Conversion,
    ImageSet,
    KDSNNResponse,
    MemoryFeed,
    Neuron,
    Run,
    Teacher,
    Training,
    fit,
    to_spiking,
)

HERE = Path(__file__).resolve().parent
CONTENDERS = ("ann", "exact", "rate", "graded", "spikingjelly", "spikingjelly-compiled", "spikingjelly-memopt")
STRONG = ["--crop", "4", "--border", "mirror", "--flip", "--cutout", "12", "--validation", "0.02", "--compile"]
GRADED = [*("--timesteps", "1", "--levels", "4", "--correct", "layers", "--learn-threshold", "--mirror")]
STEPS = [*("--timesteps", "4", "--per-channel", "--learn-threshold", "--learn-initial")]
SOFT = [*("--method", "kdsnn-response", "--temperature", "4", "--alpha", "0.9", "--weight-decay", "5e-4")]
OBJECTIVES = ("direct", "kdsnn-response", "kdsnn-feature", "kdsnn")
STUDENTS = {"resnet18": [], "wrn16-2": ["--student", "wrn16-2"], "vgg9": ["--student", "vgg9", "--student-width", "64"]}
RUNS: dict[str, dict[str, list[str]]] = {
    "teacher": {
        "resnet18": [
            *("teach", "cifar10", "--network", "resnet18", "--width", "64", *STRONG, "--label-smoothing", "0.1"),
            *("--epochs", "50", "--batch-size", "256", "--lr", "0.3", "--weight-decay", "5e-4", "--ema", "0.998"),
        ],
    },
    "students": {
        "resnet18-1x4": [
            *("distill", "cifar10", "--teacher", "{runs}/resnet18", *GRADED, *SOFT, *STRONG),
            *("--epochs", "40", "--batch-size", "256", "--lr", "0.08", "--ema", "0.998"),
        ],
        "resnet18-4x1": [
            *("distill", "cifar10", "--teacher", "{runs}/resnet18", *STEPS, *SOFT, *STRONG[:-1], "--mirror"),
            *("--epochs", "25", "--batch-size", "256", "--lr", "0.08", "--ema", "0.998"),
        ],
    },
    "pairs": {
        f"{student}-{method}-s{seed}": [
            *("distill", "cifar10", "--teacher", "{runs}/resnet18", "--method", method, *network, *STRONG[:-1]),
            *("--inherit", "False", "--timesteps", "4", "--gradient", "rate", "--neuron", "lif", "--seed", str(seed)),
            *("--epochs", "20", "--batch-size", "256", "--lr", "0.2", "--weight-decay", "5e-4"),
        ]
        for seed in range(3)
        for student, network in STUDENTS.items()
        for method in OBJECTIVES
    },
}
"""Part -> name -> arguments of spikedistill."""


def correct(given: argparse.Namespace) -> Iterator[Row]:
    """The tests that are marked 'cuda'."""
    report = given.out / "cuda.xml"
    marked = ["-m", "cuda"] if given.device == "cuda" else []
    # packages of the jaxtyping hook may be missing there, so the project's own options are left out
    options = [*marked, "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", f"--junitxml={report}"]
    options += ["-W", "default"]  # what only that machine warns of is to be read, not to fail
    options += ["-n", "8"] if importlib.util.find_spec("xdist") and given.device == "cuda" else []
    call = [sys.executable, "-m", "pytest", *options, str(HERE.parent / "tests" / "test_device.py")]
    left = given.ends - time.monotonic()
    with (given.out / "cuda.log").open("w", encoding="utf-8") as log:
        try:
            ran = subprocess.run(
                call, cwd=HERE.parent, stdout=log, stderr=log, timeout=None if math.isinf(left) else max(1.0, left)
            )
            passed = ran.returncode == 0
        except subprocess.TimeoutExpired:
            passed = False
    said = (given.out / "cuda.log").read_text(encoding="utf-8").strip().splitlines()
    yield {"name": (said or ["no output"])[-1], "passed": passed}


def speed(given: argparse.Namespace) -> Iterator[Row]:
    """Medians of a step with the teacher's logits, in turn; peak memory; the share of time without a kernel."""
    for batch in (8,) if given.small else (128, 256):
        size = ["--width", "8" if given.small else "64", "--batch", str(batch), "--timesteps", "4", "--threads", "8"]
        contenders: list[Contender] = []
        for name in CONTENDERS:
            if time.monotonic() > given.ends - 60:
                yield {"name": f"step of {name}, batch {batch}", "passed": False, "error": "no time was left"}
                continue
            taught = "none" if name == "ann" else "answers"
            try:
                one = Contender.start(name, name, *size, "--teacher", taught, "--device", given.device, "--bf16")
                one.ask("step 3")
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                yield {"name": f"step of {name}, batch {batch}", "passed": False, "error": str(error)[-500:]}
                continue
            contenders.append(one)
        try:
            times = in_turn(contenders, "step", 2 if given.small else 5, 2 if given.small else 10)
            for one in contenders:
                facts: Row = {"name": f"step of {one.label}, batch {batch}", "seconds": median(times[one.label])}
                facts |= {"operator": one.ask("operator"), "bytes": one.ask("memory")["most"]}
                if given.device == "cuda":
                    facts["waits"] = one.ask("waits 10")
                yield {**facts, "passed": True}
        except RuntimeError as error:  # one of them has ended, for instance without memory
            yield {"name": f"steps of batch {batch}", "passed": False, "error": str(error)[-500:]}
        finally:
            for one in contenders:
                one.stop()


def loop(given: argparse.Namespace) -> Iterator[Row]:
    """What the package's own loop adds: the share of an epoch in which the GPU computes nothing, by gradient."""
    steps, batch, side = (2, 8, 16) if given.small else (200, 128, 32)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (steps * batch, 3, side, side), generator=generator, dtype=torch.uint8)
    images = ImageSet(
        "random", pixels, torch.arange(len(pixels)) % 10, pixels[:10], torch.arange(10), tuple("0123456789")
    )
    ann = Architecture("resnet18", 10, 3, 8 if given.small else 64).build()
    for name, timesteps, levels in (("exact", 4, 1), ("graded", 1, 4)):
        if time.monotonic() > given.ends - 60:
            yield {"name": f"fit, {name}", "passed": False, "error": "no time was left"}
            continue
        teacher = Teacher(ann, (0.5,) * 3, (0.25,) * 3)
        neuron = Neuron(initial=0.5, levels=levels)
        student, _ = to_spiking(
            teacher, Conversion(timesteps=timesteps, neuron=neuron), calibration_images=pixels[:32] / 255
        )
        feed = MemoryFeed(images, batch, augment=Augment(crop=4, flip=True, cutout=8), validation=0.0)
        config = Training(epochs=1, batch_size=batch, lr=0.01, device=given.device)
        for turn in ("compiles", "counts"):
            shown = [ProfilerActivity.CUDA if given.device == "cuda" else ProfilerActivity.CPU]
            looks = contextlib.nullcontext() if turn == "compiles" else profile(activities=shown)
            with tempfile.TemporaryDirectory() as folder, looks as found:
                fit(student, KDSNNResponse(), feed, config, Run(Path(folder)), teacher=teacher)
        waits = idle(found, inner=0.8) if given.device == "cuda" else None  # without the beginning and the end of fit
        yield {"name": f"fit, {name}: an epoch of {steps} steps", "waits": waits, "passed": True}


def trainings(part: str) -> Callable[[argparse.Namespace], Iterator[Row]]:
    """The trainings of a part, as far as time allows."""

    def train(given: argparse.Namespace) -> Iterator[Row]:
        for name, arguments in RUNS[part].items():
            path = given.runs / name
            left = given.ends - time.monotonic()
            if not Run(path).finished and left > 20:
                kind, recipe, *more = (word.format(runs=given.runs) for word in arguments)
                more += ["--data-dir", str(given.data_dir), "--out", str(path), "--device", given.device]
                if given.small:
                    more += ["--data", "digits", "--epochs", "1", "--batch-size", "64", "--crop", "1", "--cutout", "0"]
                    more += ["--network", "resnet20", "--width", "8"] if kind == "teach" else []
                more += ["--resume"] if (path / "recipe.json").exists() else []
                call = [sys.executable, "-m", "spikedistill", kind, recipe, *more]
                ended = contextlib.suppress(subprocess.TimeoutExpired)  # it goes on in the next call
                with (given.out / f"{name}.log").open("a") as log, ended:
                    subprocess.run(call, stdout=log, stderr=subprocess.STDOUT, timeout=left - 10, check=False)
            yield {"name": name, **bring_home(path, given.out)}

    return train


def bring_home(path: Path, out: Path) -> Row:
    """Copy a run's small files and weights to OUT/NAME, and say what it reached."""
    run, target = Run(path), out / path.name
    target.mkdir(parents=True, exist_ok=True)
    for file in path.glob("*.json*"):
        shutil.copyfile(file, target / file.name)
    if not run.finished:
        return {"passed": False, "epochs": len(run.lines("timing"))}
    if path.name in {*RUNS["teacher"], *RUNS["students"]}:
        tensors = load_file(path / "model.safetensors")
        halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        save_file(halves, target / "weights.safetensors")
    results, seconds = run.read("results"), [line["seconds"] for line in run.lines("timing")]
    known = {
        key: results[key] for key in ("test_accuracy", "teacher_accuracy", "agreement", "firing_rate") if key in results
    }
    return {"passed": True, "epochs": len(seconds), "seconds": sum(seconds), **known}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "correct": correct,
    "speed": speed,
    "loop": loop,
    **{part: trainings(part) for part in RUNS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu-results"), help="gpu.jsonl, logs, small files of runs"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after about this time")
    parser.add_argument("--small", action="store_true", help="small networks and one epoch, for a rehearsal on a CPU")
    given = parser.parse_args()
    given.ends = time.monotonic() + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    failed, where = 0, machine()
    for part in given.parts:
        for facts in PARTS[part](given):
            failed += not facts["passed"]
            line: dict[str, Any] = {"part": part, **facts, "machine": where, "torch": torch.__version__}
            with (given.out / "gpu.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
            )
            print("ok    " if facts["passed"] else "FAILED", part, shown, flush=True)
    raise SystemExit(f"{failed} of these failed or did not end" if failed else 0)


if __name__ == "__main__":
    main()
