"""What the input path costs: one batch fetched and augmented, against one training step of the ANN and of its student.

    python benchmarks/input_path.py            # two threads; a minute

CIFAR-10-sized images (random), batch 128, ResNet-18 of width 32, T=4, the number format that 'auto' chooses. Medians of
alternating measurements in one run. Claimed: under 5 % of the ANN's step with every augmentation switched on.
"""

import statistics
import time

import torch
import torch.nn.functional as F

from spikedistill import Conversion, Teacher, choose_place, to_spiking
from spikedistill.data.augment import Augment
from spikedistill.teacher.zoo import resnet18

BATCH, ROUNDS = 128, 7
PATHS = {
    "crop and flip": Augment(crop=4, flip=True),
    "and cutout": Augment(crop=4, flip=True, cutout=8),
    "and TrivialAugment": Augment(crop=4, flip=True, cutout=8, policy="trivial"),
    "and AutoAugment": Augment(crop=4, flip=True, cutout=8, policy="autoaugment"),
}


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    torch.manual_seed(0)
    place = choose_place("cpu")
    stored = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (BATCH,))
    ann = resnet18(width=32).to(memory_format=torch.channels_last)
    images = torch.rand(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    student, _ = to_spiking(Teacher(ann, (0.5,) * 3, (0.25,) * 3), Conversion(timesteps=4), calibration_images=images)
    student.to(memory_format=torch.channels_last)
    ann.requires_grad_(True).train()

    def step(network) -> None:
        with place.autocast():
            logits = network(images).float()
        F.cross_entropy(logits.mean(0) if logits.ndim == 3 else logits, labels).backward()

    works = {
        name: lambda path=path: path(stored[torch.randint(0, 10_000, (BATCH,))], 0) for name, path in PATHS.items()
    }
    works |= {"ANN step": lambda: step(ann), "student step, T=4": lambda: step(student)}
    for work in works.values():
        work()
    taken = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            taken[name].append(seconds(work))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    print(f"{torch.get_num_threads()} threads, {place.dtype}: {place.reason}")
    for name, median in medians.items():
        share = 100 * median / medians["ANN step"]
        print(f"{name:20}{1000 * median:9.1f} ms{share:9.1f} % of the ANN's step")
    worst = max(medians[name] for name in PATHS) / medians["ANN step"]
    print(f"dearest input path / ANN step: {worst:.3f} (claimed: at most 0.05)")


if __name__ == "__main__":
    main()
