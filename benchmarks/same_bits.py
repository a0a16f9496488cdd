"""Do two checkouts train to the same bits? The same commands run in both, and what they leave is compared.

    git worktree add ../before COMMIT
    python benchmarks/same_bits.py ../before . --data-dir DATA --third-party resnet20.npz --out runs/same-bits

Teachers and students on digits (every method, the three gradients, views, recomputation, neurons, codings, a run that
is killed and resumed), some 300 steps of CIFAR-10, and a study of one seed on MNIST: half an hour on two cores.
Compared are metrics.jsonl byte by byte, results.json and before.json, every tensor of the model and of the checkpoint.
A key of results.json or before.json that only the second checkout writes does not count; of results.json it is named.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

E = ["--epochs", "2"]
VGG = ["--student", "vgg9", "--student-width", "8"]
MORE = ["--ema", "0.99", "--noise", "0.1", "--label-smoothing", "0.1", "--clip", "1", "--flip", "--cutout", "2"]
PAIRS = ["--pairs", "layer4.0.bn2", "layer4.0.bn2", "layer2", "layer2"]
THIRD_PARTY = [
    *("--teacher", "{third_party}", "--teacher-network", "{code}/examples/resnet20_cifar.py:resnet20"),
    *("--teacher-mean", "0.485", "0.456", "0.406", "--teacher-std", "0.229", "0.224", "0.225"),
]
DIGITS: dict[str, list[str]] = {
    "direct": ["--method", "direct"],
    "tet": ["--method", "tet", "--lam", "0.01"],
    "response": ["--method", "kdsnn-response", "--temperature", "3", "--alpha", "0.6"],
    "feature": ["--method", "kdsnn-feature", "--weight", "0.5"],
    "kdsnn": [],
    "margin": ["--margin", "--partial", "--label-smoothing", "0.1", *PAIRS],
    "fresh": ["--inherit", "False", "--lr", "0.1"],
    "heterogeneous": [*VGG, "--method", "kdsnn-feature"],
    "adapters": ["--student", "wrn16-2", "--student-width", "8", "--adapt", "True", "--timesteps", "2"],
    "conversion-max": ["--method", "conversion-max"],
    "conversion-percentile": ["--method", "conversion-percentile", "--correct", "biases", "--percentile", "99"],
    "conversion-least-squares": ["--method", "conversion-least-squares", "--no-per-channel"],
    "conversion-qcfs": ["--method", "conversion-qcfs"],
    "rate": ["--gradient", "rate"],
    "rate-lif": ["--gradient", "rate", "--neuron", "lif"],
    "rate-direct": ["--gradient", "rate", "--method", "direct"],
    "rate-tet": ["--gradient", "rate", "--method", "tet"],
    "rate-feature": ["--gradient", "rate", "--method", "kdsnn-feature", *VGG],
    "quantised": ["--gradient", "quantised"],
    "quantised-response": ["--gradient", "quantised", "--method", "kdsnn-response"],
    "quantised-compiled": ["--gradient", "quantised", "--method", "direct", "--compile"],
    "quantised-feature": ["--gradient", "quantised", "--method", "kdsnn-feature"],
    "graded": ["--levels", "4", "--timesteps", "1"],
    "graded-rate": ["--levels", "2", "--timesteps", "2", "--gradient", "rate"],
    "views": ["--views", "1"],
    "views-feature": ["--views", "1", "--method", "kdsnn-feature", "--gradient", "rate"],
    "plif": ["--neuron", "plif", "--learn-threshold", "--learn-initial", "--ema", "0.9"],
    "stages": ["--recompute", "stages", "--timesteps", "6"],
    "neurons": ["--recompute", "neurons", "--method", "kdsnn-feature"],
    "latency": ["--coding", "latency"],
    "rate-coding": ["--coding", "rate", "--max-pool", "average"],
    "start": ["--start", "{out}/kdsnn", "--timesteps", "2", "--learn-initial"],
    "float32": ["--precision", "fp32"],
    "killed": ["--checkpoint-minutes", "0.02"],
}
"""Students on digits, two epochs each: name -> options."""
CIFAR = ["--epochs", "1", "--batch-size", "160"]
RUNS: dict[str, list[str]] = {
    "teacher": ["teach", "digits", *E],
    "teacher-more": ["teach", "digits", *E, "--network", "vgg9", "--width", "8", "--optimizer", "adamw", *MORE],
    "teacher-compiled": ["teach", "digits", *E, "--compile"],
    **{name: ["distill", "digits", "--teacher", "{out}/teacher", *E, *options] for name, options in DIGITS.items()},
    "cifar10-teacher": ["teach", "cifar10", "--width", "8", "--no-compile", *CIFAR],
    "cifar10": ["distill", "cifar10", "--teacher", "{out}/cifar10-teacher", "--timesteps", "2", *CIFAR],
    "cifar10-third-party": ["distill", "cifar10", *THIRD_PARTY, "--learn-initial", "--timesteps", "1", *CIFAR],
}
STUDY = ["mnist-teacher", "mnist-direct-s0", "mnist-kdsnn-s0"]
"""Runs of ``reproduce kdsnn-mnist --budget small --seeds 1``."""
OLDER = {"--weight": "--feature-weight"}
"""Options that an older checkout knew by another name."""


def call(code: Path, arguments: list[str], **names: str) -> subprocess.Popen[str]:
    """Start one command of a checkout."""
    given = [argument.format(code=code, **names) for argument in arguments]
    if not (code / "spikedistill" / "answer.py").exists():
        given = [OLDER.get(argument, argument) for argument in given]
    command = [sys.executable, "-m", "spikedistill", *given]  # of the checkout, which is where it runs
    return subprocess.Popen(command, cwd=code, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def train(code: Path, out: Path, given: argparse.Namespace) -> None:
    """Run what is not finished; 'killed' is killed by SIGKILL after its first checkpoint and resumed."""
    names = {"out": str(out), "third_party": str(given.third_party.resolve())}
    place = ["--data-dir", str(given.data_dir.resolve())]
    for name in given.only:
        path = out / name
        if name == "study" or (path / "results.json").exists():
            continue
        arguments = [*RUNS[name], "--out", str(path), *place]
        if name == "killed":
            process = call(code, arguments, **names)
            while not (path / "checkpoint.safetensors").exists() and process.poll() is None:
                time.sleep(0.05)
            time.sleep(1.0)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            arguments.append("--resume")
        finish(name, call(code, arguments, **names))
    if "study" in given.only:
        study = ["reproduce", "kdsnn-mnist", "--budget", "small", "--seeds", "1", "--runs", str(out / "study"), *place]
        finish("study", call(code, [*study, "--out", str(out / "reports")]))


def finish(name: str, process: subprocess.Popen[str]) -> None:
    """Wait for a command, and end with what it said where it failed."""
    _, said = process.communicate()
    print(name, "ended with code", process.returncode, flush=True)
    if process.returncode:
        raise SystemExit(said[-2000:])


def differences(one: Path, two: Path) -> list[str]:
    """In what two run directories differ."""
    found = []
    for name in ("metrics.jsonl", "before.json", "results.json"):
        first, second = ((path / name).read_text() if (path / name).exists() else "" for path in (one, two))
        if name != "metrics.jsonl" and first and second:
            old, new = json.loads(first), json.loads(second)
            old = {key: value for key, value in old.items() if key not in ("run", "checksum")}
            first, second = json.dumps(old), json.dumps({key: value for key, value in new.items() if key in old})
        found += [name] if first != second else []
    for name in ("model.safetensors", "checkpoint.safetensors"):
        if (one / name).exists() or (two / name).exists():
            first, second = load_file(one / name), load_file(two / name)
            if "optimiser.0.momentum_buffer" in first.keys() ^ second.keys():  # an older one numbers parameters
                first, second = ({k: v for k, v in x.items() if k[:10] != "optimiser."} for x in (first, second))
            found += [f"{name}: names of tensors"] if first.keys() != second.keys() else []
            found += [
                f"{name}: {key}" for key in first.keys() & second.keys() if not torch.equal(first[key], second[key])
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--third-party", type=Path, default=Path("resnet20.npz"))
    parser.add_argument("--out", type=Path, default=Path("runs/same-bits"))
    parser.add_argument("--only", nargs="+", choices=[*RUNS, "study"], default=[*RUNS, "study"], metavar="NAME")
    given = parser.parse_args()
    folders = [(given.out / name).resolve() for name in ("before", "after")]
    for code, folder in zip((given.before.resolve(), given.after.resolve()), folders):
        train(code, folder, given)
    names = [name for name in given.only if name != "study"]
    names += [f"study/small/{name}" for name in STUDY] if "study" in given.only else []
    wrong = 0
    for name in names:
        found = differences(*(folder / name for folder in folders))
        wrong += bool(found)
        new = set(json.loads((folders[1] / name / "results.json").read_text())) - set(
            json.loads((folders[0] / name / "results.json").read_text())
        )
        print(f"{name:32}{'same' if not found else '; '.join(found[:3])}{f' (new: {new})' if new else ''}")
    print(f"{len(names) - wrong} of {len(names)} runs are the same")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
