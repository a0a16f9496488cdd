"""README's picture: one image, the spikes of three layers over T steps, and accuracy by time step against the teacher.

    python benchmarks/picture.py --data-dir DATA          # writes docs/images/student.png

The student is the trained one that is shipped, ``examples/resnet20_t4``. Spikes and predictions are what it says to one
image of the CIFAR-10 test set. Accuracies are those of the whole test set, as the run's ``results.json`` has them.
"""

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from torch import Tensor

from spikedistill import load_images, load_student
from spikedistill.files import write_bytes

matplotlib.use("Agg")

HOME = Path(__file__).resolve().parents[1]
RUN = HOME / "examples" / "resnet20_t4"
SHOWN = {"relu": 8, "relu_6": 15, "relu_8": 7}
"""Layer of neurons -> the channel that is shown: of those in which one still sees the image."""
NETWORK = runpy.run_path(str(HOME / "examples" / "resnet20_cifar.py"))["resnet20"]
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"
"""Of Okabe and Ito, who chose colours that colour-blind readers tell apart."""


def accuracies(run: Path) -> tuple[list[float], float]:
    """Test accuracy of a student after every time step, and of its teacher, in percent."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return results["accuracy_by_step"], results["teacher_accuracy"]


def told() -> str:
    """What the picture shows, which its file says too."""
    by_step, teacher = accuracies(RUN)
    return f"accuracy by step {by_step}, teacher {teacher}"


def asked(data_dir: str, number: int) -> tuple[Tensor, str, list[str], list[Tensor]]:
    """A test image [H, W, C], its class, the prediction after every step, and the spikes [T, H, W] that are shown."""
    images = load_images("cifar10", data_dir=data_dir)
    student = load_student(RUN, network=NETWORK(classes=10)).eval()
    pixels = images.test_images[number : number + 1].float() / 255
    with torch.no_grad():
        said = student.observe(pixels, spikes=list(SHOWN))
    names = images.class_names
    likeliest = [names[int(logits.argmax())] for logits in said.logits[:, 0].cumsum(0)]
    spikes = [said.spikes[layer][:, 0, channel] for layer, channel in SHOWN.items()]
    return pixels[0].permute(1, 2, 0), names[int(images.test_labels[number])], likeliest, spikes


def draw(path: Path, image: Tensor, label: str, likeliest: list[str], spikes: list[Tensor]) -> None:
    """Write the picture."""
    by_step, teacher = accuracies(RUN)
    with pyplot.rc_context({"font.size": 12, "font.family": "DejaVu Sans"}):
        figure = pyplot.figure(figsize=(11.0, 4.3), dpi=160, facecolor="white")
        left, middle, right = figure.subfigures(1, 3, width_ratios=[2.5, 4.9, 3.6])
        _show_image(left, image, label, teacher)
        _show_spikes(middle, spikes, likeliest, label)
        _show_accuracy(right, by_step, teacher)
        about = {"Description": told()}
        write_bytes(path, lambda part: figure.savefig(part, format="png", metadata=about))
        pyplot.close(figure)


def _titles(figure: Any, place: float, title: str, below: str) -> None:
    figure.text(place, 0.925, title, ha="center", weight="bold", size=13)
    figure.text(place, 0.85, below, ha="center", color=GREY)


def _show_image(figure: Any, image: Tensor, label: str, teacher: float) -> None:
    _titles(figure, 0.5, "Teacher: an ANN", "trained ResNet-20")
    axis = figure.add_axes((0.06, 0.245, 0.88, 0.555))
    axis.imshow(image.numpy(), interpolation="nearest")
    axis.axis("off")
    figure.text(0.5, 0.12, f"test image: {label}", ha="center")
    figure.text(0.5, 0.03, f"accuracy {teacher:.2f} %", ha="center", weight="bold", color=ORANGE)


def _show_spikes(figure: Any, spikes: list[Tensor], likeliest: list[str], label: str) -> None:
    _titles(figure, 0.57, f"Student: an SNN, T = {len(likeliest)} steps", "a dot is a spike; one channel of a layer")
    for row, (layer, fired) in enumerate(zip(SHOWN, spikes)):
        number = int(layer.partition("_")[2] or 0) + 1
        figure.text(0.175, 0.71 - 0.205 * row, f"layer {number}", ha="right", va="center")
        for step, dots in enumerate(fired):
            axis = figure.add_axes((0.2 + 0.195 * step, 0.615 - 0.205 * row, 0.185, 0.19))
            axis.imshow(dots.numpy(), cmap=ListedColormap(["white", BLUE]), vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_color("#bbbbbb")
    figure.text(0.175, 0.12, "says", ha="right")
    for step, name in enumerate(likeliest):
        colour, weight = (BLUE, "bold") if name == label else (GREY, "normal")
        figure.text(0.2925 + 0.195 * step, 0.12, name, ha="center", color=colour, weight=weight)
        figure.text(0.2925 + 0.195 * step, 0.03, f"t = {step + 1}", ha="center")


def _show_accuracy(figure: Any, by_step: list[float], teacher: float) -> None:
    _titles(figure, 0.55, "Accuracy after step t", "CIFAR-10, 10,000 test images")
    axis = figure.add_axes((0.18, 0.145, 0.77, 0.66))
    steps = range(1, len(by_step) + 1)
    axis.axhline(teacher, color=ORANGE, linestyle="--", linewidth=2)
    axis.plot(steps, by_step, color=BLUE, marker="o", linewidth=2.5, markersize=7)
    axis.text(0.8, teacher + 1.5, f"teacher {teacher:.2f} %", color=ORANGE, va="bottom", weight="bold")
    for step, value in zip(steps, by_step):
        axis.text(step + 0.08, value - 3, f"{value:.2f}", va="top", color=BLUE)
    axis.set(ylim=(0, 104), xlim=(0.7, len(by_step) + 0.7))
    axis.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axis.set_xticks(list(steps), [f"t = {step}" for step in steps])
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--image", type=int, default=13, help="number of the test image")
    parser.add_argument("--out", type=Path, default=HOME / "docs" / "images" / "student.png")
    given = parser.parse_args()
    draw(given.out, *asked(given.data_dir, given.image))


if __name__ == "__main__":
    main()
