"""The main job on CIFAR-10, with what it is compared to: every figure of docs/results/cifar10.csv.

    python benchmarks/main_job.py --data-dir DATA --third-party resnet20.npz     # all runs, one after another: hours
    python benchmarks/main_job.py --only teacher kdsnn ...                    # some of them

Runs go to runs/NAME. A finished one is kept, an interrupted one goes on from its checkpoint. resnet20.npz, and
resnet56.npz in the same folder, are the networks of akamaster/pytorch_resnet_cifar10 (BSD-2; 91.73 and 93.39 % as
published), built by examples/resnet20_cifar.py. The ResNet-20's student of four time steps is trained in three stages,
each from the result of the one before. A name with 1x4 is a student of one time step with four levels. Those of third
parties start from the converted network, and the ResNet-56 teaches both.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from spikedistill.train.run import Run

HERE = Path(__file__).resolve().parent.parent
FRESH = ["--inherit", "False", "--lr", "0.1", "--weight-decay", "5e-4"]
HETEROGENEOUS = [
    "--student",
    "vgg9",
    "--student-width",
    "32",
    "--epochs",
    "12",
    "--lr",
    "0.1",
    "--weight-decay",
    "5e-4",
]
NORMALISED = ["--teacher-mean", "0.485", "0.456", "0.406", "--teacher-std", "0.229", "0.224", "0.225"]
PATIENT = [*NORMALISED, "--per-channel", "--temperature", "4", "--alpha", "0.9", "--ema", "0.999", "--cutout", "0"]
THIRD_PARTY = [*PATIENT, "--learn-initial"]
NETWORKS = f"{HERE}/examples/resnet20_cifar.py"
ONE_BY_FOUR = ["--timesteps", "1", "--levels", "4", "--per-channel", "--cutout", "0"]
CONVERTED = [*NORMALISED, *ONE_BY_FOUR, "--method", "conversion-least-squares", "--correct", "layers"]
LONG = [
    *(*NORMALISED, *ONE_BY_FOUR, "--method", "kdsnn-response", "--temperature", "4", "--alpha", "0.9"),
    *("--learn-threshold", "--lr", "0.1", "--weight-decay", "5e-4", "--ema", "0.998", "--epochs", "76"),
    *("--views", "24", "--compile", "--trust-code"),
]
HUNDRED = ["--data", "cifar100"]
SMALL = ["--student", "airbench94", "--student-width", "44"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "teacher": ("teach", []),
    "faster": ("teach", ["--network", "airbench94", "--epochs", "22"]),
    "fast": ("teach", []),
    "strong": ("teach", []),
    "kdsnn": ("distill", []),
    "direct": ("distill", ["--method", "direct"]),
    "scratch": ("distill", ["--method", "direct", *FRESH]),
    "third-party": ("distill", [*THIRD_PARTY, "--lr", "0.05", "--epochs", "24"]),
    "third-party-2": ("distill", [*THIRD_PARTY, "--lr", "0.03", "--epochs", "12"]),
    "third-party-3": ("distill", [*THIRD_PARTY, "--lr", "0.03", "--epochs", "10", "--learn-threshold"]),
    "third-party-1x4-start": ("distill", CONVERTED),
    "third-party-1x4": ("distill", [*LONG, "--student", f"{NETWORKS}:resnet20"]),
    "third-party-56-1x4-start": ("distill", CONVERTED),
    "third-party-56-1x4": ("distill", LONG),
    "strong-cifar100": ("teach", [*HUNDRED, "--epochs", "26"]),
    "strong-cifar100-1x4": ("distill", HUNDRED),
    "small-cifar100": ("teach", [*HUNDRED, "--network", "airbench94", "--width", "44", "--epochs", "18"]),
    "small-cifar100-start": ("distill", [*HUNDRED, "--method", "conversion-least-squares", "--correct", "layers"]),
    "small-cifar100-1x4": ("distill", [*HUNDRED, *SMALL, "--correct", "nothing", "--epochs", "10", "--views", "3"]),
    "strong-1x4": ("distill", []),
    "strong-1x2": ("distill", ["--levels", "2", "--correct", "nothing", "--epochs", "12"]),
    "strong-1x1": ("distill", ["--levels", "1", "--correct", "nothing", "--epochs", "12"]),
    "heterogeneous-direct": ("distill", ["--method", "direct", *HETEROGENEOUS]),
    "heterogeneous-feature": ("distill", ["--method", "kdsnn-feature", *HETEROGENEOUS]),
    "heterogeneous-kdsnn": ("distill", ["--method", "kdsnn", *HETEROGENEOUS]),
}
"""Name -> command of spikedistill and what differs from the recipe 'cifar10', or that in ``RECIPES``. All: seed 0."""
RECIPES = {
    **dict.fromkeys((n for n in RUNS if n.startswith(("strong", "small"))), "cifar10-strong"),
    **dict.fromkeys(("fast", "faster", "small-cifar100"), "cifar10-fast"),
}
START = {
    "small-cifar100-1x4": "small-cifar100-start",
    "strong-1x2": "strong-1x4",
    "strong-1x1": "strong-1x2",
    "third-party-2": "third-party",
    "third-party-3": "third-party-2",
    "third-party-1x4": "third-party-1x4-start",
    "third-party-56-1x4": "third-party-56-1x4-start",
}
"""Which run a stage goes on from."""
TEACHERS = {
    **dict.fromkeys((n for n in RUNS if n.startswith("strong")), "strong"),
    **dict.fromkeys(("strong-cifar100-1x4", "small-cifar100-1x4"), "strong-cifar100"),
    "small-cifar100-start": "small-cifar100",
}
"""Which run teaches, if it is not ``teacher``."""
BY_RESNET56 = {"third-party-1x4", "third-party-56-1x4-start", "third-party-56-1x4"}
"""The third-party runs whose teacher is the ResNet-56; that of the others is the ResNet-20."""


def command(name: str, runs: Path, data_dir: str, third_party: str) -> list[str]:
    kind, options = RUNS[name]
    teacher = ["--teacher", str(runs / TEACHERS.get(name, "teacher"))]
    if name.startswith("third-party"):
        network = "resnet56" if name in BY_RESNET56 else "resnet20"
        teacher = ["--teacher", str(Path(third_party).with_name(f"{network}.npz"))]
        teacher += ["--teacher-network", f"{NETWORKS}:{network}"]
    start = ["--start", str(runs / START[name])] if name in START else []
    given = [] if kind == "teach" else teacher
    resumed = ["--resume"] if (runs / name).exists() else []
    out = ["--data-dir", data_dir, "--out", str(runs / name)]
    recipe = RECIPES.get(name, "cifar10")
    return [sys.executable, "-m", "spikedistill", kind, recipe, *given, *options, *start, *out, *resumed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--third-party", default="resnet20.npz")
    given = parser.parse_args()
    for name in given.only:
        if not Run(given.runs / name).finished:
            call = command(name, given.runs, given.data_dir, given.third_party)
            print("$", *call, file=sys.stderr, flush=True)
            subprocess.run(call, check=True)
    report([given.runs / name for name in given.only])


def report(paths: list[Path]) -> None:
    """One line a run: accuracy at every step, agreement with the teacher, spikes, and minutes of training."""
    for path in paths:
        run = Run(path)
        results, seconds = run.read("results"), [line["seconds"] for line in run.lines("timing")]
        steps = ", ".join(f"{value:.2f}" for value in results.get("accuracy_by_step", [results["test_accuracy"]]))
        more = "".join(f"  {key} {results[key]:.2f}" for key in ("agreement", "firing_rate") if key in results)
        print(f"{path.name:16} {len(seconds):3} epochs {sum(seconds) / 60:6.1f} min  accuracy {steps}{more}")


if __name__ == "__main__":
    main()
