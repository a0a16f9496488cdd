"""The simulated event camera beside real N-MNIST recordings of the same digits, and its speed.

    python benchmarks/event_camera.py NMNIST --data-dir DATA

NMNIST is the folder with ``Train/DIGIT/NUMBER.bin``; recording n is MNIST's training image n - 1. Prints events per
recording, the share of brighter ones, the share in the fifth of the pixels that send most, and the correlation of both
maps of events; then images of CIFAR-10's size per second. Draws docs/images/event_camera.png.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from spikedistill.data.camera import EventCamera
from spikedistill.data.events import read_nmnist, to_frames
from spikedistill.data.images import load_images

SIDE = 34
"""Rows and columns of N-MNIST."""
SEEN = 30
"""Rows and columns that MNIST's 28 take on that sensor, as found by correlation."""
SHOWN = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nmnist", type=Path)
    parser.add_argument("--data-dir")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/event_camera.png"))
    given = parser.parse_args()
    files = sorted((given.nmnist / "Train").glob("*/*.bin"), key=lambda file: int(file.stem))[: given.count]
    real = to_frames([read_nmnist(file) for file in files], 6, SIDE, SIDE)
    digits = load_images("mnist", given.data_dir).train_images[[int(file.stem) - 1 for file in files]]
    larger = F.interpolate(digits.float(), (SEEN, SEEN), mode="bilinear", antialias=True).round().to(torch.uint8)
    simulated = EventCamera(border=(SIDE - SEEN) // 2).record(larger)
    for name, frames in (("N-MNIST", real), ("simulated", simulated)):
        print(f"{name:10}", described(frames))
    print(f"correlation of the maps of events: {likeness(real, simulated):.3f} (with another digit's: ", end="")
    print(f"{likeness(real, simulated.roll(1, 0)):.3f})")
    draw(given.picture, real, simulated)
    images = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8)
    images = F.avg_pool2d(images.float(), 5, 1, 2).to(torch.uint8)
    began = time.perf_counter()
    EventCamera().record(images)
    speed = len(images) / (time.perf_counter() - began)
    print(f"{speed:.0f} images of 32 x 32 per second, {torch.get_num_threads()} threads")


def described(frames: Tensor) -> str:
    counts = frames.float()
    events, maps = counts.sum((1, 2, 3, 4)), counts.sum((1, 2)).flatten(1)
    most = maps.sort(descending=True)[0][:, : maps.shape[1] // 5].sum(1) / events
    brighter = counts[:, :, 1].sum((1, 2, 3)) / events
    steps = counts.sum((0, 2, 3, 4)) / counts.sum()
    return (
        f"events {events.mean():.0f} ± {events.std():.0f}, brighter {100 * brighter.mean():.1f} %, in the busiest fifth"
        f" {100 * most.mean():.1f} %, pixels that send {100 * (maps > 0).float().mean():.1f} %, by frame "
        + " ".join(f"{100 * step:.0f}" for step in steps)
        + " %"
    )


def likeness(first: Tensor, second: Tensor) -> float:
    """The correlation of the maps of events, at the best common shift of up to three pixels."""
    ours, theirs = (frames.float().sum((1, 2)) for frames in (first, second))
    return max(
        float(_correlation(ours, theirs.roll((down, right), (1, 2)))) for down in range(-3, 4) for right in range(-3, 4)
    )


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    ours, theirs = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (first, second))
    return F.cosine_similarity(ours, theirs).mean()


def draw(path: Path, real: Tensor, simulated: Tensor) -> None:
    """Digits side by side, the events of the first saccade: brighter red, darker blue."""
    figure = Figure(figsize=(1.3 * SHOWN, 3.1), layout="constrained")
    axes = figure.subplots(2, SHOWN)
    for row, (name, frames) in zip(axes, (("N-MNIST", real), ("simulated", simulated))):
        for place, axis in enumerate(row):
            darker, brighter = frames[place, :2].float().sum(0)
            axis.imshow(brighter - darker, cmap="RdBu_r", vmin=-8, vmax=8)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name)
    figure.suptitle("the first saccade over six digits: brighter minus darker events", fontsize=10)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
