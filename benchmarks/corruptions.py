"""Every corruption of images at five severities: one picture, and distances from clean images beside the source's.

    python benchmarks/corruptions.py --data-dir DATA     # CIFAR-10; a minute on one core

Writes docs/results/corruptions.png and corruptions.csv. The distance is the root mean square over all values of 1000
test images, evenly spaced, in 0..255. SOURCE is what make_cifar_c.py itself gives (github.com/hendrycks/robustness,
Apache-2.0, its ImageMagick, OpenCV, scikit-image and photographs of frost; run 2026-11-26 on the same images), which
cuts values off to bytes, where we round: half a level darker, seen at the weakest brightness. Its glass blur is given
with pixels exchanged, as its lines read; as NumPy executes them they copy (``AS_EXECUTED``).
"""

import argparse
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from torch import Tensor

from spikedistill.data.images import evenly, load_images
from spikedistill.data.noise import CORRUPTIONS, SEVERITIES, corrupt
from spikedistill.files import write_csv

SOURCE: dict[str, tuple[float, ...]] = {
    "gaussian": (10.08, 15.01, 19.85, 22.27, 24.62),
    "poisson": (7.76, 10.91, 17.07, 19.59, 23.81),
    "impulse": (14.26, 20.14, 24.81, 31.86, 37.77),
    "speckle": (7.99, 13.11, 15.62, 20.58, 25.35),
    "gaussian-blur": (1.97, 7.46, 9.52, 11.25, 14.18),
    "glass-blur": (29.12, 28.79, 25.46, 35.94, 32.10),
    "defocus-blur": (2.05, 5.06, 7.65, 9.98, 14.21),
    "motion-blur": (11.63, 16.84, 20.70, 20.88, 23.70),
    "zoom-blur": (14.45, 17.00, 20.08, 23.10, 25.85),
    "fog": (13.22, 26.06, 33.72, 39.46, 47.20),
    "frost": (32.32, 48.07, 54.18, 50.57, 49.98),
    "snow": (13.36, 26.75, 30.62, 42.15, 56.79),
    "brightness": (10.42, 21.23, 31.70, 41.73, 60.11),
    "contrast": (13.15, 26.29, 31.54, 36.79, 44.68),
    "saturate": (21.44, 27.63, 14.30, 31.53, 44.37),
    "pixelate": (6.00, 8.46, 9.40, 11.82, 14.40),
    "jpeg": (7.45, 9.12, 9.68, 10.28, 11.08),
    "elastic": (35.32, 32.95, 29.74, 27.38, 22.80),
}
AS_EXECUTED = {"glass-blur": (22.31, 22.01, 20.23, 32.01, 29.82)}
NAMES = [name for name, corruption in CORRUPTIONS.items() if corruption.kind != "event"]


def distance(changed: Tensor, images: Tensor) -> float:
    return float((changed.float() - images).square().mean().sqrt())


def draw(path: Path, example: dict[str, list[Tensor]], distances: dict[str, list[float]]) -> None:
    """All corruptions of one image in two blocks side by side: clean with the name, then the distance under each."""
    scale, gap, line = 2, 4, 13
    side = scale * example[NAMES[0]][0].shape[-1]
    half, columns = -(-len(NAMES) // 2), 2 * (1 + len(SEVERITIES))
    page = PIL.Image.new("RGB", (columns * (side + gap), half * (side + gap + line)), "white")
    pen, font = PIL.ImageDraw.Draw(page), PIL.ImageFont.load_default(9)
    for number, name in enumerate(NAMES):
        texts = [name, *(f"{value:.1f}" for value in distances[name])]
        top = number % half * (side + gap + line)
        for column, (pixels, text) in enumerate(zip(example[name], texts), columns // 2 * (number // half)):
            left = column * (side + gap)
            picture = PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
            page.paste(picture.resize((side, side), PIL.Image.Resampling.NEAREST), (left, top))
            pen.text((left, top + side + 1), text, fill="black", font=font)
    page.point([min(255, 8 * round(level / 8)) for level in range(256)] * 3).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=1000, help="test images of each distance")
    parser.add_argument("--shown", type=int, default=0, help="which of them is drawn")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    everything = load_images("cifar10", given.data_dir).test_images
    images = everything[evenly(len(everything), given.images)]
    example: dict[str, list[Tensor]] = {}
    distances: dict[str, list[float]] = {}
    lines = []
    for name in NAMES:
        changed = [corrupt(images, name, severity) for severity in SEVERITIES]
        distances[name] = [distance(one, images) for one in changed]
        example[name] = [images[given.shown], *(one[given.shown] for one in changed)]
        for severity, ours in zip(SEVERITIES, distances[name]):
            there = [table[name][severity - 1] if name in table else "" for table in (SOURCE, AS_EXECUTED)]
            lines.append([name, severity, f"{ours:.2f}", *there])
        print(name, *(f"{value:.2f}" for value in distances[name]), "source:", *SOURCE.get(name, ()), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    write_csv(given.out / "corruptions.csv", ("corruption", "severity", "ours", "source", "source as executed"), lines)
    draw(given.out / "corruptions.png", example, distances)


if __name__ == "__main__":
    main()
