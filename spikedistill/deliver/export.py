"""``export``: a finished student as files for other programs, each checked against the student before it is written.

The check runs 256 test images through the file and through the student, in batches of 1, 3 and up to 64. Logits must
agree within 1e-4. Other programs add in another order, and where a potential lies on a threshold within that rounding,
a spike more or less is no fault. So for an image whose logits differ, the student itself is run with parameters that
are changed in their last bits: if that moves its logits too, the image is counted as one on a threshold. If it does
not, the export fails.
"""

import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from spikedistill import __version__
from spikedistill.data.augment import to_inputs
from spikedistill.deliver.onnx import Form, OnnxStudent, onnx_model, states_of, traced
from spikedistill.deliver.record import Record, some_of
from spikedistill.errors import ConfigError, RunError
from spikedistill.files import holds, write_bytes
from spikedistill.shapes import Logits
from spikedistill.student.coding import RateCoding
from spikedistill.student.student import Student
from spikedistill.train.progress import Progress

Format = Literal["onnx", "torch"]
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
CHECKED = 256
"""Test images of the check."""
BATCHES = (1, 3, 64)
"""Sizes of the first batches of the check; the last is that of all others."""
TOLERANCE = 1e-4
"""Largest difference of logits."""
ROUNDED = 2.0**-22
"""Relative change of parameters that shows whether an image lies on a threshold, two units in the last place."""
DRAWS = 8
MOST = 0.1
"""Share of images that may lie on a threshold."""
KEPT = 0.98
"""Share of images whose most likely class int8 weights must keep."""
ANSWER = "the class with the largest mean of the logits over the time steps"


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what its check found.

    Args:
        path: the file.
        form: which form of the student.
        images: number of test images of the check.
        difference: the largest difference of logits from those of the student, without images on a threshold.
        on_threshold: number of images whose logits differ, because a potential lies on a threshold within rounding.
        same_class: share of all images with the same most likely class, 0 to 1.
    """

    path: Path
    form: Form
    images: int
    difference: float
    on_threshold: int
    same_class: float


def export(
    path: Annotated[Path, Positional, arg(metavar="RUN")],
    format: Format = "onnx",
    form: Literal["sequence", "step", "both"] = "both",
    out: Path | None = None,
    int8: bool = False,
    data_dir: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> list[Exported]:
    """Write a finished student as files that run without this package.

    Each file is checked against the student before it is written. The metadata of a file name its classes, T x D, and
    what goes in and comes out. The normalisation of images is inside.

    Args:
        path: run directory of 'distill', the file of a student, or the name of one that comes with the package.
        format: onnx for onnxruntime and other programs; torch for torch.export.load (.pt2).
        form: sequence takes images and gives the logits of all T steps; step takes an image and a state and gives the
            logits of one step and the next state; both writes two files.
        out: folder of the files (default: the run directory, for a student's file the current folder).
        int8: store weights as int8 with a scale per output channel, a quarter of the size. Onnx alone.
        data_dir: folder of the data, if it is no longer the one of the run.
        trust_code: execute Python code that the run may name as its network.
        progress: shows the work; silent by default.

    Raises:
        ConfigError: if the packages for ONNX are missing, the run is a teacher, or its input coding draws at random.
        RunError: if the run is not finished, or a file does not do what the student does. Such a file is not written.
        DataError: if the data do not exist.
    """
    record = Record.read(path)
    if not record.is_student:
        raise ConfigError(f"'{path}' holds a teacher: torch.onnx.export writes an ANN; give a run of 'distill'.")
    student = record.network(trust_code)
    assert isinstance(student, Student)
    data, folder = record.images(data_dir), record.path.is_dir()
    images, _ = some_of(data, min(CHECKED, len(data.test_images)))
    stored = record.stored_accuracy()
    facts = {"data": json.dumps(asdict(replace(record.data, data_dir=None))), "student": record.name}
    facts |= {"test_accuracy": f"{stored:.2f}"} if stored is not None else {}
    name, out = "student" if folder else record.path.stem, out or (record.path if folder else Path())
    return export_student(
        student, images, out, name, format, form, int8, classes=data.class_names, facts=facts, progress=progress
    )


def export_student(
    student: Student,
    images: Tensor,
    out: Path,
    name: str = "student",
    format: Format = "onnx",
    form: Literal["sequence", "step", "both"] = "both",
    int8: bool = False,
    *,
    classes: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Exported]:
    """``export`` for a student in memory, as your own training loop leaves it. The student is not changed.

    Args:
        student: any student, on any device.
        images: the samples of the check, bytes ``[N, C, H, W]`` or event frames ``[N, T, 2, H, W]``; N is 2 or more.
        out: folder of the files, ``NAME.onnx`` and ``NAME-step.onnx``.
        name: begins the names of the files. Files of this name that ``export`` wrote are replaced.
        format: see ``export``.
        form: see ``export``.
        int8: see ``export``.
        classes: names of the classes in the order of the logits.
        facts: more metadata, names and texts.
        progress: shows the work; silent by default.

    Raises:
        ConfigError: if the packages for ONNX are missing, there are fewer than two samples, or the input coding draws
            at random.
        RunError: if a file does not do what the student does, or would replace another one. It is not written.
    """
    progress = progress or Progress.silent()
    if int8 and format != "onnx":
        raise ConfigError("int8 is for --format onnx: omit it.")
    forms: list[Form] = ["sequence", "step"] if form == "both" else [form]
    if isinstance(student.coding, RateCoding) and "sequence" in forms:
        raise ConfigError(
            "Rate coding draws spikes at random, which no file can repeat: give --form step, whose caller draws them."
        )
    if len(images) < 2 or images.dtype is not torch.uint8:
        kind = str(images.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{len(images)} samples of {kind} were given for the check: expected two or more, as bytes (uint8)."
        )
    student, images = copy.deepcopy(student).float().cpu().eval(), images.cpu()
    known = {**_facts(student, classes), "student": name, **(facts or {})}
    done = []
    for one in forms:
        file = out / f"{name}{'-step' if one == 'step' else ''}{'-int8' if int8 else ''}{SUFFIXES[format]}"
        _check_replaceable(file, known["student"])
        with progress.part(f"writing '{file}'"):
            made, run = _made(student, to_inputs(images[:2]), format, one, known, int8)
        with progress.part(f"comparing {len(images)} images", len(images)) as seen:
            found = check(student, run, images, str(file), kept=KEPT if int8 else None, on_batch=seen)
        write_bytes(file, lambda part, content=made: part.write_bytes(content))  # type: ignore[misc]
        done.append(replace(found, path=file, form=one))
    return done


def _check_replaceable(file: Path, student: str) -> None:
    """Refuse to replace a file that is not an earlier export of this student.

    Raises:
        RunError: if it exists and is something else.
    """
    name = student.encode()
    length = bytes([len(name)] if len(name) < 128 else [len(name) % 128 + 128, len(name) // 128])
    there = b"student\x12" + length + name, f'"student": {json.dumps(student)}'.encode()  # in .onnx, in .pt2
    if file.exists() and not holds(file, *there):
        raise RunError(f"'{file}' exists and is no export of '{student}': give another --out, or move it away.")


def _facts(student: Student, classes: Sequence[str]) -> dict[str, str]:
    """The metadata of all forms."""
    return {
        "spikedistill": __version__,
        "torch": torch.__version__,
        "timesteps": str(student.timesteps),
        "levels": str(student.conversion.neuron_model.levels),
        "coding": type(student.coding).__name__,
        "input": "float32 pixels, bytes / 255, channels first; they are normalised inside",
        "answer": ANSWER,
        "classes": json.dumps(list(classes)),
    }


def _made(
    student: Student, example: Tensor, format: Format, form: Form, facts: dict[str, str], int8: bool
) -> tuple[bytes, Callable[[Tensor], Logits]]:
    """The content of a file, and a function that runs it."""
    if format == "onnx":
        content = onnx_model(student, example, form, facts, int8)
        return content, OnnxStudent(content)
    facts = {"form": form, **facts, **({"state": json.dumps(states_of(student, example))} if form == "step" else {})}
    buffer = io.BytesIO()
    torch.export.save(traced(student, example, form), buffer, extra_files={"spikedistill.json": json.dumps(facts)})
    content = buffer.getvalue()
    module: Any = torch.export.load(io.BytesIO(content)).module()
    return content, module if form == "sequence" else partial(_stepwise, module, student)


def _stepwise(module: Any, student: Student, images: Tensor) -> Logits:
    state, logits = None, []
    for t in range(student.timesteps):
        image = student.coding.frame(images, t, student.timesteps)
        found, *after = module(image, student.initial_state(image) if state is None else state)
        state = tuple(after)
        logits.append(found)
    return torch.stack(logits)


@torch.no_grad()
def check(
    student: Student,
    run: Callable[[Tensor], Logits],
    images: Tensor,
    name: str,
    kept: float | None = None,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Exported:
    """Compare what a file does with what the student does.

    Args:
        student: in evaluation mode, float32, on the CPU.
        run: the file, from inputs as the student takes them to logits ``[T, B, K]``.
        images: bytes ``[N, C, H, W]``, or event frames ``[N, T, 2, H, W]``.
        name: the file, for messages.
        kept: for rounded weights: the share of images whose most likely class must be the same. Without it logits are
            compared.
        on_batch: called after each batch with the number of its images.

    Raises:
        RunError: if they differ by more than rounding.
    """
    largest, same, moved = 0.0, 0, 0
    for first, part in _batches(images):
        inputs = to_inputs(part)
        ours, theirs = student(inputs), run(inputs)
        gaps = (ours - theirs).abs().nan_to_num(torch.inf).amax((0, 2))
        same += int((ours.mean(0).argmax(-1) == theirs.mean(0).argmax(-1)).sum())
        on_batch(len(part))
        if kept is not None:
            largest = max(largest, float(gaps.max()))
            continue
        for place in (gaps > TOLERANCE).nonzero().flatten().tolist():
            if not on_threshold(student, to_inputs(part[place : place + 1])):
                raise RunError(_parted(name, first + place, ours[:, place], theirs[:, place]))
            moved += 1
        largest = max([largest, *gaps[gaps <= TOLERANCE].tolist()])
    share = same / len(images)
    if kept is not None and share < kept:
        raise RunError(
            f"With int8 weights the most likely class of {100 * (1 - share):.0f} % of {len(images)} images changes:"
            f" '{name}' was not written; omit --int8."
        )
    if moved > MOST * len(images):
        raise RunError(
            f"The logits of {moved} of {len(images)} images differ in '{name}', more than rounding explains: it was not"
            " written. Please report this with the network."
        )
    return Exported(Path(name), "sequence", len(images), largest, moved, share)


def _batches(images: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The index of the first image, and the images, of every batch."""
    first, sizes = 0, [*BATCHES]
    while first < len(images):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        yield first, images[first : first + size]
        first += size


def on_threshold(student: Student, inputs: Tensor) -> bool:
    """Whether changes of the parameters in their last bits move the logits of an input."""
    before = student(inputs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        changed = copy.deepcopy(student)
        for value in [*changed.parameters(), *changed.buffers()]:
            if value.is_floating_point():
                value.mul_(1 + ROUNDED * (2 * torch.rand(value.shape, generator=generator) - 1))
        if float((changed(inputs) - before).abs().max()) > TOLERANCE:
            return True
    return False


def _parted(name: str, image: int, ours: Tensor, theirs: Tensor) -> str:
    """Where a file and the student part."""
    gaps = (ours - theirs).abs()
    step = int((gaps > TOLERANCE).any(-1).nonzero()[0])
    worst = int(gaps[step].argmax())
    return (
        f"'{name}' does not do what the student does: at test image {image} (from 0), time step {step + 1}, the logit"
        f" of class {worst} is {float(theirs[step, worst]):.6g}, the student's {float(ours[step, worst]):.6g}. It was"
        " not written. Please report this with the network."
    )
