"""3 x 3 convolutions: PyTorch's and ours in turn, forward and both gradients, at the shapes of networks.

    python benchmarks/convolutions.py [--check]     # 256 images (64 at T=4), two threads; a minute

One process, channels last, freed memory kept, bfloat16 where the processor computes it, else float32; medians over
alternating rounds, in milliseconds. The figure is over the four stages of ResNet-18 (64-128-256-512); the narrow ones
show what is left at 32 channels, where ours begin. In bfloat16 both are PyTorch's at 4 x 4 pixels or 32 channels. The
last column is the largest difference among result and gradients, as a share of the largest value.
"""

import argparse
import copy
import time

import torch
from rivals import Figures, Row, finish, median
from torch import Tensor, nn

from spikedistill.compute.place import choose_place, keep_freed_memory
from spikedistill.compute.winograd import use_winograd

STAGES = ((64, 32), (128, 16), (256, 8), (512, 4))
"""Channels, and pixels a side."""
NARROW = ((32, 32), (32, 16), (32, 8), (64, 4))
PASSES = ("forward", "to input", "to weights")


def work(layer: nn.Conv2d, x: Tensor, arriving: Tensor) -> tuple[list[float], list[Tensor]]:
    """Seconds of each pass, and what it gave."""
    casting = torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is torch.bfloat16)
    began = time.perf_counter()
    with casting:
        found = [layer(x)]
    seconds = [time.perf_counter() - began]
    for leaf in (x, layer.weight):  # each with a graph of its own, in which nothing else needs a gradient
        leaf.requires_grad_()
        with casting:
            y = layer(x)
        began = time.perf_counter()
        found += torch.autograd.grad(y, leaf, arriving)
        seconds.append(time.perf_counter() - began)
        leaf.requires_grad_(False)
    return seconds, found


def measure(channels: int, side: int, batch: int, rounds: int, dtype: torch.dtype) -> Row:
    """Both at one shape: medians in milliseconds, their ratio, and how far apart the results are."""
    drawn = (torch.randn(batch, channels, side, side).to(dtype) for _ in range(2))
    x, arriving = (images.to(memory_format=torch.channels_last) for images in drawn)
    theirs = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    theirs.requires_grad_(False)
    ours = copy.deepcopy(theirs)
    if reason := use_winograd(ours):
        raise SystemExit(f"ours cannot be had here: {reason}")
    (_, expected), (_, found) = work(theirs, x, arriving), work(ours, x, arriving)
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected))
    times: dict[str, list[list[float]]] = {"torch": [], "ours": []}
    for _ in range(rounds):
        for name, layer in (("torch", theirs), ("ours", ours)):
            times[name].append(work(layer, x, arriving)[0])
    row: Row = {"channels": channels, "side": side}
    medians = {name: [1e3 * median(list(each)) for each in zip(*taken)] for name, taken in times.items()}
    for name, taken in medians.items():
        row |= {f"{name} {what}": value for what, value in zip(PASSES, taken)}
    row["faster"] = sum(medians["torch"]) / sum(medians["ours"])
    return row | {"apart": f"{apart:.0e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--check", action="store_true", help="end with code 1 where a bound is missed")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    dtype = choose_place("cpu", given.precision).dtype
    rows = [measure(channels, side, given.batch, given.rounds, dtype) for channels, side in (*STAGES, *NARROW)]
    whole = {
        name: sum(row[f"{name} {what}"] for row in rows[: len(STAGES)] for what in PASSES) for name in ("torch", "ours")
    }
    bound = 2.0 if dtype is torch.float32 else 1.2
    figures: Figures = {
        "convolutions of ResNet-18's stages, times as fast": (whole["torch"] / whole["ours"], "at least", bound)
    }
    finish("convolutions", rows, figures, given.check)


if __name__ == "__main__":
    main()
