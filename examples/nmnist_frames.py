"""N-MNIST's recordings as event frames in one .npz file, which ``--data`` takes.

    python examples/nmnist_frames.py NMNIST nmnist.npz --timesteps 6
    spikedistill distill --data nmnist.npz --teacher none --method tet --student vgg9 --student-width 16 \\
        --coding frames --timesteps 6 --epochs 30 --batch-size 25

NMNIST is the folder with ``Train/DIGIT/NUMBER.bin`` and ``Test/DIGIT/NUMBER.bin``.
"""

import argparse
from pathlib import Path

import numpy as np

from spikedistill import read_nmnist, to_frames

SIDE = 34
"""Rows and columns of the sensor."""


def read(folder: Path, timesteps: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames [N, T, 2, H, W] and digits [N] of all recordings, in the order of their numbers."""
    files = sorted(folder.glob("*/*.bin"), key=lambda file: int(file.stem))
    frames = to_frames([read_nmnist(file) for file in files], timesteps, SIDE, SIDE)
    return frames.numpy(), np.array([int(file.parent.name) for file in files])


def main() -> None:
    """Read both parts and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--timesteps", type=int, default=6)
    given = parser.parse_args()
    arrays = {}
    for part, folder in (("train", "Train"), ("test", "Test")):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = read(given.folder / folder, given.timesteps)
    np.savez_compressed(given.out, **arrays)
    print({name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main()
