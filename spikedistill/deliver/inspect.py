"""What a page says of one run: its pictures with their numbers, samples seen from inside, mistakes, energy."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spikedistill.data.augment import to_inputs
from spikedistill.data.images import ImageSet, evenly
from spikedistill.data.parts import UNKNOWN
from spikedistill.deliver import plot
from spikedistill.deliver.energy import EnergyEstimate, estimate_energy
from spikedistill.deliver.figures import draw_curves, inline_svg
from spikedistill.deliver.record import Record, its_teacher
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import accuracy_by_step, predict
from spikedistill.evaluate.activity import Activity, record_activity
from spikedistill.evaluate.early_exit import predict_early
from spikedistill.evaluate.immunity import immunity
from spikedistill.student.student import Student
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run

CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Of early exit."""
ROBUST = 200
"""Test images under noise."""
DRAWN = {"noise": "gaussian", "event": "dropped-events"}
"""The perturbation whose severities are drawn, of images and of recordings."""
INSIDE = 6
"""Samples that are seen from inside."""
APART = 12
"""Samples shown on which student and teacher disagree."""
TERMS = ("epoch", "step", "lr", "loss")
"""What a line of metrics.jsonl holds besides measures and terms of the loss."""
MEASURES = ("train_accuracy", "validation_accuracy", "train_agreement", "validation_agreement")


@dataclass(frozen=True)
class Picture:
    """A picture with its numbers.

    Args:
        name: an id.
        title: in one line.
        about: how it is read, in a sentence or two.
        svg: the picture.
        columns: heads of the table of its numbers; none for no table.
        rows: its cells.
    """

    name: str
    title: str
    about: str
    svg: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def pictured(
    name: str, title: str, about: str, figure: Any, columns: Sequence[str] = (), rows: Sequence[Sequence[str]] = ()
) -> Picture:
    """A figure of matplotlib as a picture of a page."""
    return Picture(name, title, about, inline_svg(figure, name), columns, rows)


@dataclass(frozen=True)
class Sample:
    """A test image: itself as a data URI, its class, and what student and teacher say."""

    image: str
    label: str
    student: str
    teacher: str = ""
    pictures: Sequence[Picture] = ()


@dataclass
class RunInspection:
    """What was seen of a run; a part that does not apply is empty."""

    learning: list[Picture] = field(default_factory=list)
    time: list[Picture] = field(default_factory=list)
    layers: list[Picture] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    mistakes: list[Picture] = field(default_factory=list)
    apart: list[Sample] = field(default_factory=list)
    robust: list[Picture] = field(default_factory=list)
    energy: list[str] = field(default_factory=list)
    top5: float | None = None
    images: int = 0


def learning(record: Record, name: str) -> list[Picture]:
    """How a run learned: accuracies, and every term of the loss, over epochs. Unfinished runs have curves too."""
    lines = Run(record.path).lines("metrics")
    if not lines:
        return []
    found = []
    for what, title, keys, unit in (
        ("accuracy", "Accuracy while learning", [key for key in MEASURES if key in lines[-1]], "%"),
        ("loss", "Terms of the loss", [key for key in lines[-1] if key not in (*TERMS, *MEASURES, "firing_rate")], ""),
    ):
        curves = {key.replace("_", " "): [(one["epoch"], one[key]) for one in lines if key in one] for key in keys}
        if not curves:
            continue
        drawn = draw_curves({"": curves}, "epoch", f"{what} ({unit})" if unit else what, percent=bool(unit))
        rows = [[str(one["epoch"]), *(_number(one.get(key)) for key in keys)] for one in lines]
        about = "Training images are augmented; validation images are held out of training."
        about = about if unit else "Each term with its weight, mean over an epoch."
        columns = ["epoch", *(key.replace("_", " ") for key in keys)]
        found.append(pictured(f"{name}-{what}", title, about, drawn, columns, rows))
    return found


@torch.no_grad()
def inspect(
    record: Record,
    data: ImageSet,
    name: str,
    images: int,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> RunInspection:
    """Measure a finished run for a page.

    Args:
        record: a run of ``teach`` or ``distill``.
        data: its data set.
        name: what ids of its pictures begin with.
        images: number of test images, evenly spaced.
        trust_code: execute the Python code that the run may name as its networks.
        progress: shows the work.
    """
    progress, seen = progress or Progress.silent(), RunInspection(learning(record, name))
    network, place = record.network(trust_code), record.place()
    chosen = evenly(len(data.test_images), min(images, len(data.test_images)))
    pixels, labels, names = data.test_images[chosen], data.test_labels[chosen], list(data.class_names)
    seen.images = len(pixels)
    place.prepare(network)
    teacher = its_teacher(record, data, trust_code) if record.is_student else None
    with progress.part(f"{record.name}: {len(pixels)} test images", 2 * len(pixels)) as done:
        logits = predict(network, pixels, place.dtype, on_batch=done)
        theirs = None
        if teacher is not None:
            place.prepare(teacher)
            theirs = predict(teacher, pixels, place.dtype, on_batch=done).mean(0)
    answers, known = logits.mean(0).argmax(-1), int(labels[0]) != UNKNOWN
    if known and len(names) > 5:
        seen.top5 = 100 * float((logits.mean(0).topk(5).indices == labels[:, None]).any(1).double().mean())
    if known:
        seen.mistakes = [_confusion(answers, labels, names, name)]
    if theirs is not None:
        seen.apart = _apart(pixels, labels, answers, theirs.argmax(-1), names)
    if not isinstance(network, Student):
        return seen
    progress.say(f"{record.name}: early exit, noise, spikes and energy")
    if known:
        seen.time = _over_time(record, network, logits, theirs, pixels, labels, place.dtype, name)
        seen.robust = _robust(network, teacher, pixels[:ROBUST], labels[:ROBUST], place.dtype, name)
    some = _for_inside(labels, answers)
    activity = record_activity(network.cpu().float(), to_inputs(pixels[some]))
    said = [answers[some], *([] if theirs is None else [theirs.argmax(-1)[some]])]
    seen.layers = [_rates(activity, name)]
    seen.samples = _samples(activity, pixels[some], labels[some], said, names, name)
    place.prepare(network)
    seen.energy = in_words(estimate_energy(record.name, network, pixels[:ROBUST], labels[:ROBUST], place.dtype))
    return seen


def _confusion(answers: Tensor, labels: Tensor, names: Sequence[str], name: str) -> Picture:
    count = len(names)
    matrix = torch.zeros(count, count, dtype=torch.int64)
    matrix.index_put_((labels, answers), torch.ones_like(labels), accumulate=True)
    wrong = [(int(matrix[a, b]), a, b) for a in range(count) for b in range(count) if a != b and matrix[a, b]]
    rows = [[names[a], names[b], str(number)] for number, a, b in sorted(wrong, key=lambda one: -one[0])[:20]]
    drawn = plot.confusion(matrix, names, title=" ")
    about = "Rows are true classes, columns are answers, in percent of the row."
    columns = ["true class", "taken for", "images"]
    title = "What is taken for what"
    return pictured(f"{name}-confusion", title, about, drawn, columns, rows)


def _over_time(
    record: Record,
    student: Student,
    logits: Tensor,
    theirs: Tensor | None,
    pixels: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    name: str,
) -> list[Picture]:
    """Accuracy after every time step, and with early exit; only the answer itself for one time step."""
    steps = accuracy_by_step(logits, labels)
    if len(steps) == 1:
        return []
    curves = {"student": [(float(t), value) for t, value in enumerate(steps, 1)]}
    if theirs is not None:
        (ann,) = accuracy_by_step(theirs[None], labels)
        curves["teacher"] = [(1.0, ann), (float(len(steps)), ann)]
    before = Run(record.path).read("before") if (record.path / "before.json").exists() else {}
    if len(before.get("accuracy_by_step", [])) == len(steps):
        start = [(float(t), float(value)) for t, value in enumerate(before["accuracy_by_step"], 1)]
        curves["before training (training images)"] = start
    rows = [[str(t), *(f"{points[t - 1][1]:.2f}" if len(points) == len(steps) else "" for points in curves.values())]
            for t in range(1, len(steps) + 1)]  # fmt: skip
    drawn = draw_curves({"": curves}, "time step", "accuracy (%)")
    about = f"After each time step, on {len(labels)} test images."
    picture = pictured(f"{name}-steps", "Accuracy over time", about, drawn, ["t", *curves], rows)
    points, table = [], []
    for confidence in CONFIDENCES:
        left = predict_early(student, pixels, confidence, dtype)
        (value,) = accuracy_by_step(left.logits[None], labels)
        points.append((left.mean_steps, value))
        table.append([f"{confidence:g}", f"{left.mean_steps:.2f}", f"{value:.2f}"])
    curves = {"early exit": points, "fixed number of steps": [(float(t), value) for t, value in enumerate(steps, 1)]}
    drawn = draw_curves({"": curves}, "mean time steps per image", "accuracy (%)")
    about = "An image leaves once its likeliest class is more likely than a confidence, from 0.5 (left) to 0.99."
    columns = ["confidence", "mean steps", "accuracy (%)"]
    exits = pictured(f"{name}-exit", "Early exit", about, drawn, columns, table)
    return [picture, exits]


def _robust(
    student: Student,
    teacher: Any,
    pixels: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    name: str,
) -> list[Picture]:
    """Accuracy under Gaussian noise of five severities, or for recordings under lost events (``DRAWN``)."""
    networks = {"student": student, **({} if teacher is None else {"teacher": teacher})}
    kind = "event" if pixels.ndim == 5 else "noise"
    wanted = DRAWN[kind]
    try:
        scores = immunity(networks, pixels, labels, kinds=(kind,), dtypes=dict.fromkeys(networks, dtype))
    except ConfigError:
        return []
    curves = {
        who: [(float(one.severity), one.accuracy) for one in scores
              if one.network == who and (one.name == wanted or one.kind == "clean")]
        for who in networks
    }  # fmt: skip
    rows = [[one.network, one.name, str(one.severity), f"{one.accuracy:.1f}"] for one in scores if one.kind != "clean"]
    drawn = draw_curves({"": curves}, f"severity of {wanted}", "accuracy (%)")
    about = f"On {len(labels)} test images; 0 is none. The table has every perturbation that was tried."
    columns = ["network", "perturbation", "severity", "accuracy (%)"]
    return [pictured(f"{name}-severities", "Under noise", about, drawn, columns, rows)]


def _for_inside(labels: Tensor, answers: Tensor) -> Tensor:
    """Samples to see from inside: right ones of different classes first, and two wrong ones."""
    wrong = (labels != answers).nonzero().flatten()[:2].tolist() if int(labels[0]) != UNKNOWN else []
    right, classes = [], set()
    for place in range(len(labels)):
        if place not in wrong and (int(labels[place]) == UNKNOWN or int(answers[place]) not in classes):
            classes.add(int(answers[place]))
            right.append(place)
    return torch.tensor([*right[: INSIDE - len(wrong)], *wrong])


def _rates(activity: Activity, name: str) -> Picture:
    found = activity.rates()
    drawn = plot.rates(found, levels=activity.levels, title=" ")
    count = activity.timesteps * activity.levels
    columns = ["layer", *(plot.step_name(number, activity.levels) for number in range(count))]
    rows = [[layer, *(f"{value:.1f}" for value in values)] for layer, values in found.items()]
    about = f"Percent of a layer's neurons that fire, for {activity.probabilities.shape[1]} samples."
    if activity.levels > 1:
        about += f" A time step has {activity.levels} sub-steps of at most one spike."
    title = "Neurons that fire"
    return pictured(f"{name}-rates", title, about, drawn, columns, rows)


def _sample(
    pixels: Tensor, label: Tensor, said: Sequence[Tensor], names: Sequence[str], pictures: Sequence[Picture] = ()
) -> Sample:
    """A test image with its class and the answers of the student and, if it is known, of the teacher."""
    student, *teacher = (names[int(one)] for one in said)
    return Sample(data_uri(pixels), _class(label, names), student, "".join(teacher), pictures)


def _class(label: Tensor, names: Sequence[str]) -> str:
    """The name of a class; empty if it is not known."""
    return "" if int(label) == UNKNOWN else names[int(label)]


def _samples(
    activity: Activity, pixels: Tensor, labels: Tensor, said: Sequence[Tensor], names: Sequence[str], name: str
) -> list[Sample]:
    """Samples with pictures of what happens inside; ``said`` are the answers of student and teacher, ``[N]`` each."""
    found = []
    for number, (image, label) in enumerate(zip(pixels, labels)):
        drawn = {
            "answer": (
                "The answer",
                "Probabilities of the likeliest classes after each time step.",
                plot.answer(activity, names, number, label=_class(label, names), title=" "),
            ),
            "raster": (
                "Spikes",
                "A row is a neuron, a mark a spike. In brackets: spikes of the whole layer.",
                plot.raster(activity, number, title=" "),
            ),
            "membrane": (
                "Membrane potentials",
                "Four neurons of one layer. A ring is a spike; it takes the threshold away.",
                plot.membrane(activity, number),
            ),
        }
        pictures = [pictured(f"{name}-{key}-{number}", *one) for key, one in drawn.items()]
        found.append(_sample(image, label, [answers[number] for answers in said], names, pictures))
    return found


def _apart(pixels: Tensor, labels: Tensor, ours: Tensor, theirs: Tensor, names: Sequence[str]) -> list[Sample]:
    """Samples on which student and teacher disagree."""
    places = (ours != theirs).nonzero().flatten()[:APART]
    return [_sample(pixels[place], labels[place], (ours[place], theirs[place]), names) for place in places]


def data_uri(pixels: Tensor) -> str:
    """A sample as a PNG inside a text: an image, or event frames summed over time, red for brighter, blue for darker.

    Args:
        pixels: bytes ``[C, H, W]``, or counts ``[T, 2, H, W]``.
    """
    from PIL import Image

    if pixels.ndim == 4:
        darker, brighter = pixels.float().sum(0)
        most = float(torch.maximum(darker, brighter).max().clamp_min(1))
        red, blue = 255 * (1 - darker / most), 255 * (1 - brighter / most)
        pixels = torch.stack([red, torch.minimum(red, blue), blue]).byte()
    if pixels.shape[0] not in (1, 3):
        pixels = pixels[:1]
    shown = pixels[0] if pixels.shape[0] == 1 else pixels.permute(1, 2, 0)
    picture, file = Image.fromarray(shown.contiguous().numpy()), io.BytesIO()
    picture.thumbnail((128, 128))
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def in_words(estimate: EnergyEstimate) -> list[str]:
    """Spikes, operations and energy of a student in sentences."""
    cost = estimate.cost
    said = [
        f"For one image the student sends {cost.spikes:,.0f} spikes. They cause {cost.acs / 1e6:,.2f} million additions"
        f" of a weight; {cost.macs / 1e6:,.2f} million multiplications are left, mostly in the first layer. The ANN"
        f" needs {cost.dense / 1e6:,.2f} million multiplications."
    ]
    for model, kinds in estimate.energy.items():
        ratio = kinds["student"] / kinds["quantised"]
        less = f"{ratio:.2f} of that" if ratio < 1 else f"{ratio:.2f} times that, so no gain"
        said.append(
            f"Under the cost model {model} the student takes {kinds['student']:.3g} µJ. An ANN whose activations hold"
            f" as much information takes {kinds['quantised']:.3g} µJ: the student takes {less}."
        )
    return [*said, "These are estimates from published costs of single operations, not measurements of a chip."]


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}"


def flat(recipe: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every choice of a recipe by its name; what is not set is left out."""
    found: list[tuple[str, str]] = []
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{name}.")
        elif value not in (None, "", [], ()):
            found.append((f"{prefix}{name}", str(value)))
    return found
