"""The main job: a trained ANN becomes a spiking student, is trained, and is measured."""

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikedistill.compute.place import return_freed_memory
from spikedistill.data.feed import calibration_inputs
from spikedistill.data.images import ImageSet
from spikedistill.deliver.record import NO_TEACHER, find_teacher
from spikedistill.errors import ConfigError
from spikedistill.evaluate.measure import check_fits, measure_student
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.objective.qcfs import QCFS
from spikedistill.objective.terms import Needs, Objective
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.methods import CONVERSIONS, find_method, name_of, sources_of, written
from spikedistill.recipes.tutor import compare_classes, interview, introduce, known_images, sentences
from spikedistill.student.build import Student, to_spiking
from spikedistill.student.report import Report
from spikedistill.student.save import fill, read_student, save_student
from spikedistill.student.upgrade import FORMAT
from spikedistill.teacher.load import Architecture, Normalised
from spikedistill.train.lesson import settle_objective
from spikedistill.train.loop import fit
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Data, Training, check
from spikedistill.train.run import Run

FEW = 4
"""Images on which a network with fresh weights, which needs no thresholds, is tried: whether it mixes them."""


@dataclass(frozen=True)
class Distill:
    """A student, its teacher, what it is taught, and how."""

    teacher: TeacherChoice = field(default_factory=TeacherChoice)
    """Who teaches."""
    student: StudentChoice = field(default_factory=StudentChoice)
    """Who learns."""
    method: Objective | None = field(default_factory=KDSNN)
    """What is taught; None for a conversion without training."""
    data: Data = field(default_factory=Data)
    """What comes in."""
    training: Training = field(default_factory=Training)
    """How it is trained."""

    @property
    def method_name(self) -> str:
        """How tables and directories call the method; without training by the rule for thresholds."""
        return f"conversion-{self.student.rule}" if self.method is None else name_of(self.method)

    def with_method(self, name: str) -> "Distill":
        """The same with another method, all its fields at their defaults; with its own method unchanged.

        Args:
            name: of ``METHODS`` or ``CONVERSIONS``, or ``FILE.py:CLASS``; such a file is executed.

        Raises:
            ConfigError: if there is no such method, or a field of it has no default.
        """
        if name == self.method_name:
            return self
        if name in CONVERSIONS:
            return replace(self, method=None, student=replace(self.student, rule=CONVERSIONS[name]))
        kind = find_method(name)
        try:
            return replace(self, method=kind())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"'{name}' cannot be made ({error}): give each of its fields a default.") from error

    def settled(self) -> "Distill":
        """The recipe with what its method decides about the student, and its inheritance about the learning rate."""
        begins = self.student.inherits or self.student.start is not None
        lr = 0.02 if begins and self.training.lr is None else self.training.peak
        student = self.student
        if isinstance(self.method, QCFS):
            student = replace(student, gradient="quantised", learn_threshold=True)
        return replace(self, student=student, training=replace(self.training, lr=lr))

    def written(self) -> dict[str, Any]:
        """What recipe.json holds."""
        made = self.settled()
        return {
            "kind": "distill",
            "format": FORMAT,
            "teacher": asdict(made.teacher),
            "student": asdict(made.student),
            "method": {"name": made.method_name} if made.method is None else written(made.method),
            "data": asdict(made.data),
            "training": asdict(made.training),
        }

    def faults(self) -> list[str]:
        """What cannot work together, one sentence each."""
        faults = []
        if self.method is None and not self.student.inherits:
            faults.append(f"method (={self.method_name}) keeps the teacher's weights: leave student and inherit alone")
        if self.method is None and self.student.start is not None:
            faults.append(f"start (={self.student.start}) is for methods that train, not for {self.method_name}")
        if self.method is not None and self.method.needs.asks_teacher and self.teacher.source == NO_TEACHER:
            faults.append(f"method (={self.method_name}) needs a teacher: name one by teacher, or take direct or tet")
        needs = Needs() if self.method is None else self.method.needs
        if needs.source and self.data.source is None:
            faults.append(f"method (={self.method_name}) needs a second input stream: name its images by source")
        if self.data.source is not None and not (needs.source or needs.asks_teacher):
            faults.append(f"source (={self.data.source}) is looked at by nobody: method {self.method_name} needs none")
        if self.student.gradient == "quantised" and not self.student.rounds:
            faults.append(
                "the quantised stand-in is for neuron=if with reset=subtract, initial=0.5, no learn_initial and"
                " coding=direct: leave those as they are, or take gradient=exact"
            )
        if self.training.compile and self.student.gradient != "quantised":
            faults.append("compile is for ANNs: leave it out, a student's neurons are compiled without it")
        return faults


def distill(
    recipe: Distill,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Build a student, train it into a run directory, and measure it once on the test set.

    Args:
        recipe: teacher, student, method, data and training.
        out: the run directory.
        resume: go on with the run that lies there.
        progress: what shows the work.
        trust_code: execute the Python code that the teacher's file may name as its network.

    Returns:
        What results.json holds: see ``measure_student``; and ``method``, the objective with its open fields closed;
        and ``teacher``, what was found out about it before (see ``interview``).

    Raises:
        ConfigError: if the recipe cannot work, the teacher knows the classes in another order or answers nothing that
            is finite, or the loss is no longer a number.
        DataError: if there are no such images.
        WeightsError: if the teacher's or the starting student's weights cannot be read or do not fit.
        ConversionError: if the network has a part with no spiking meaning.
        RunError: if another run lies in the directory.
    """
    progress = progress or Progress.silent()
    recipe = recipe.settled()
    check(recipe, recipe.student, recipe.data, recipe.training)
    if not recipe.training.keep_memory:
        return_freed_memory()
    images, source = recipe.data.load(), recipe.data.load_source()
    choice = recipe.teacher
    teacher, architecture = find_teacher(
        source or images, choice.source, choice.network, choice.width, choice.mean, choice.std, trust_code
    )
    student, report, network = build_student(recipe, teacher, architecture, images)
    method = recipe.method and settle_objective(recipe.method, student, teacher, report.inherited)
    names = None if teacher is None else compare_classes(choice.source, teacher, source or images)
    run = Run(out)
    run.start(recipe.written(), resume, Distill().written())
    for number, file in enumerate(sources_of(method)):
        kept = out / f"method{f'-{number + 1}' if number else ''}.py"
        if not (kept.exists() and kept.samefile(file)):
            shutil.copyfile(file, kept)
    introduce(run, progress.say, images, source)
    progress.say(str(report).splitlines()[0])
    if recipe.student.gradient == "rate" and recipe.student.neuron == "if":
        progress.say("the rate-based gradient loses points with neurons that forget nothing: consider --neuron lif")
    run.write("conversion", {"network": network.name, **asdict(report)})
    place, compared = recipe.training.place(), teacher if source is None else None
    with progress:
        if teacher is not None and not (resume and (out / "teacher.json").exists()):
            known = interview(choice.source, teacher, source or images, recipe.data.validation, place)
            run.write("teacher", {**known, "class_names": names})
        if teacher is not None:
            for sentence in sentences(run.read("teacher")):
                progress.say(sentence)
        if not resume or not (out / "before.json").exists():
            run.write("before", measure_student(student, compared, images, place, 1000))
        if method is not None:
            feed = recipe.data.feed(images, recipe.training, source)
            fit(student, method, feed, recipe.training, run, teacher=teacher, progress=progress)
        results = measure_student(student, compared, images, place)
    results["method"] = {"name": recipe.method_name} if method is None else written(method)
    if teacher is not None:
        results["teacher"] = run.read("teacher")
    facts = {"recipe": recipe.written(), "results": results, **known_images(images, recipe.data.validation)}
    save_student(run.model, student, architecture=network, facts=facts)
    run.write("results", results)
    return results


def build_student(
    recipe: Distill, teacher: nn.Module | None, architecture: Architecture | None, images: ImageSet
) -> tuple[Student, Report, Architecture]:
    """The student that a recipe names, before training, with its report and architecture.

    Raises:
        ConfigError: if the student is to take over from a teacher that is none or spikes, or does not fit the data.
    """
    choice, ann = recipe.student, None
    if choice.network != "same":
        architecture = Architecture(choice.network, images.classes, images.channels, choice.width)
    elif isinstance(teacher, Normalised):
        ann = teacher
    _check_origin(recipe, teacher, architecture)
    assert architecture is not None
    if bool(images.frames) != (choice.coding == "frames") or (images.frames and images.frames != choice.timesteps):
        raise ConfigError(
            f"'{images.name}' holds {f'event frames, T={images.frames}' if images.frames else 'images'}: give --coding"
            f" {f'frames --timesteps {images.frames}' if images.frames else 'direct'}."
        )
    torch.manual_seed(recipe.training.seed)
    mean, std = _normalisation(teacher, images)
    if ann is None:
        made = architecture.build()
        check_fits(Normalised(made, mean, std), images, f"The student '{choice.network}'")
    calibrate = calibration_inputs(images, choice.calibration if choice.inherits else FEW)
    calibrate = calibrate.flatten(0, 1) if images.frames else calibrate  # a frame is a sample here
    student, report = to_spiking(ann or made, choice.conversion(), calibrate=calibrate, mean=mean, std=std)
    student.gradient, student.recompute = choice.gradient, choice.recompute
    if choice.start is not None:
        file, tensors, _ = read_student(choice.start)
        fill(student, tensors, f"'{file}'")
    return student, report, architecture


def _check_origin(recipe: Distill, teacher: nn.Module | None, architecture: Architecture | None) -> None:
    """Refuse a student that takes over what is not there."""
    source, choice = recipe.teacher.source, recipe.student
    if architecture is None:
        raise ConfigError(
            f"The student is the 'same' network as its teacher, and that of '{source}' is not known: name one by"
            " --student."
        )
    if choice.inherits and not isinstance(teacher, Normalised):
        raise ConfigError(
            f"The student is to start from the weights of an ANN, and the teacher '{source}' is none: name a student by"
            " --student, or give --inherit False, and --start RUN to go on from a finished student."
        )


def _normalisation(teacher: nn.Module | None, images: ImageSet) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel: the teacher's, where it sees what the student sees; else those of the data."""
    if teacher is None or teacher.mean.numel() != images.channels or images.frames:  # type: ignore[operator]
        mean, std = images.statistics()
        return list(mean), list(std)
    return teacher.mean.flatten().tolist(), teacher.std.flatten().tolist()  # type: ignore[operator]
