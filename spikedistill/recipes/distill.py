"""``distill``: convert a trained ANN to a spiking student, train it with distillation, and measure it."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikedistill.compute.place import return_freed_memory
from spikedistill.data.feed import Feed, calibration_inputs
from spikedistill.data.images import ImageSet
from spikedistill.deliver.teachers import NO_TEACHER, find_teacher
from spikedistill.errors import ConfigError, UnsupportedError
from spikedistill.evaluate.measure import check_fits, measure_student
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.objective.qcfs import QCFS
from spikedistill.objective.terms import Needs, Objective
from spikedistill.recipes.checks import (
    check_teacher,
    compare_classes,
    known_images,
    report_data,
    sentences,
    with_its_classes,
)
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.methods import CONVERSIONS, find_method, name_of, sources_of, written
from spikedistill.shapes import steps_by_levels
from spikedistill.student.build import starting_from, to_spiking
from spikedistill.student.report import ConversionReport
from spikedistill.student.save import load_student, save_student, start_from
from spikedistill.student.student import Student
from spikedistill.student.upgrade import FORMAT
from spikedistill.teacher.load import Architecture, Normalised, Teacher
from spikedistill.train.loop import fit
from spikedistill.train.processes import join
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Data, Training, check
from spikedistill.train.run import Run
from spikedistill.train.training_step import settle_objective

FEW = 4
"""Number of images on which a network with fresh weights is tried, to see whether it mixes the samples of a batch."""


@dataclass(frozen=True)
class Distill:
    """The recipe of a distillation: teacher, student, method, data and training."""

    teacher: TeacherChoice = field(default_factory=TeacherChoice)
    """The teacher."""
    student: StudentChoice = field(default_factory=StudentChoice)
    """The student."""
    method: Objective | None = field(default_factory=KDSNN)
    """The objective; None for a conversion without training."""
    data: Data = field(default_factory=Data)
    """What comes in."""
    training: Training = field(default_factory=Training)
    """How it is trained."""

    @property
    def method_name(self) -> str:
        """The name of the method in tables and directories; without training it names the rule for thresholds."""
        return f"conversion-{self.student.rule}" if self.method is None else name_of(self.method)

    def with_method(self, name: str) -> "Distill":
        """The same recipe with another method at its defaults. Its own method keeps its fields.

        Args:
            name: from ``METHODS`` or ``CONVERSIONS``, or ``FILE.py:CLASS``; such a file is executed.

        Raises:
            ConfigError: if the method does not exist, or one of its fields has no default.
        """
        if name == self.method_name:
            return self
        if name in CONVERSIONS:
            return replace(self, method=None, student=replace(self.student, rule=CONVERSIONS[name]))
        kind = find_method(name)
        try:
            return replace(self, method=kind())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"'{name}' cannot be created ({error}): give each of its fields a default.") from error

    def settled(self) -> "Distill":
        """The recipe with open values filled in.

        They are the student's that follow from the method or from events, the frames of these, and the learning rate.
        """
        begins = self.student.inherits or self.student.start is not None
        mild = begins and self.training.lr is None and self.training.optimizer != "adamw"
        lr = 0.02 if mild else self.training.peak
        student = self.student
        if isinstance(self.method, QCFS):
            student = replace(student, gradient="quantised", learn_threshold=True)
        data = self.data
        if data.events == "simulated" or data.holds_recordings:
            student = replace(student, coding="frames")
            data = replace(data, event_frames=data.event_frames or student.timesteps)
        return replace(self, student=student, data=data, training=replace(self.training, lr=lr))

    def written(self) -> dict[str, Any]:
        """The content of recipe.json."""
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

    def problems(self) -> list[str]:
        """What cannot work together, one sentence for each problem."""
        problems = []
        if self.method is None and not self.student.inherits:
            problems.append(
                f"method (={self.method_name}) keeps the teacher's weights: leave student and inherit alone"
            )
        if self.method is None and self.student.start is not None:
            problems.append(f"start (={self.student.start}) is for methods that train, not for {self.method_name}")
        if self.method is not None and self.method.needs.needs_teacher and self.teacher.source == NO_TEACHER:
            problems.append(f"method (={self.method_name}) needs a teacher: name one by teacher, or use direct or tet")
        needs = Needs() if self.method is None else self.method.needs
        if needs.source and self.data.source is None:
            problems.append(f"method (={self.method_name}) needs a second input stream: name its images by source")
        if self.data.source is not None and not (needs.source or needs.needs_teacher):
            problems.append(f"source (={self.data.source}) is not used by method {self.method_name}: omit source")
        if self.student.gradient == "quantised" and not self.student.rounds:
            problems.append(
                "gradient=quantised trains all steps as one, which is for neuron=if with reset=subtract, initial=0.5,"
                " no learn_initial and coding=direct: set these values, or use gradient=exact"
            )
        if self.training.compile and self.student.gradient != "quantised" and self.student.timesteps > 1:
            problems.append(
                "compile is for ANNs, students of one time step and gradient=quantised, not for timesteps"
                f" (={self.student.timesteps}): omit it, a student's neurons are compiled without it"
            )
        if self.training.compile and needs.operations:
            problems.append("compile is not for methods that count synaptic operations: omit it")
        return problems


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
        resume: go on with the run in that directory.
        progress: what shows the work.
        trust_code: execute the Python code that the teacher's file may name as its network.

    Returns:
        The content of results.json: see ``measure_student``; also ``method``, the objective with its open fields filled
        in, and ``teacher``, the check of the teacher before training (see ``check_teacher``).

    Raises:
        ConfigError: if the recipe cannot work, the teacher has the classes in another order or returns logits that are
            not finite, or the loss is no longer finite.
        DataError: if the images do not exist or cannot be read.
        WeightsError: if the teacher's or the starting student's weights cannot be read or do not fit.
        ConversionError: if the network has a part with no spiking equivalent.
        RunError: if the directory holds another run, or another process of this run has ended.
    """
    processes, recipe = join(), recipe.settled()
    progress = progress if progress is not None and processes.is_main_process else Progress.silent()
    if not recipe.training.keep_memory:
        return_freed_memory()
    run = Run(out)
    with processes.main_process_first():
        run.check(recipe.written(), resume)  # before data are read, which can take long
        made = prepare(recipe, trust_code, progress)
        feed = None if made.method is None else made.feed(recipe)
        feed = feed and feed.shared(processes.rank, processes.world_size)
    with progress:
        processes.on_main_process(lambda: _begin(recipe, made, run, resume, progress, processes.world_size))
        if made.method is not None and feed is not None:
            fit(made.student, made.method, feed, recipe.training, run, teacher=made.teacher, progress=progress)
        return processes.on_main_process(lambda: _end(recipe, made, run, progress))


@dataclass(frozen=True)
class Prepared:
    """The objects that a recipe names: data, networks, and the method with its open fields filled in."""

    images: ImageSet
    source: ImageSet | None
    teacher: Teacher | Student | None
    student: Student
    report: ConversionReport
    network: Architecture
    method: Objective | None
    class_names: str | None

    def feed(self, recipe: Distill) -> Feed:
        """The feed of the recipe, with what its method needs."""
        needs = Needs() if self.method is None else self.method.needs
        return recipe.data.feed(self.images, recipe.training, self.source, needs.replacement)

    @property
    def compared(self) -> nn.Module | None:
        """The teacher, if it gets the same inputs as the student."""
        return self.teacher if self.source is None else None


def prepare(recipe: Distill, trust_code: bool, progress: Progress) -> Prepared:
    """Load and build everything that a recipe without open values names; nothing is written."""
    check(recipe, recipe.student, recipe.data, recipe.training)
    recipe.training.place()
    images, source = recipe.data.load(), recipe.data.load_source()
    choice = recipe.teacher
    teacher, architecture = find_teacher(
        source or images, choice.source, choice.network, choice.width, choice.mean, choice.std, trust_code
    )
    images = with_its_classes(images, choice.source, teacher)
    method = recipe.method if images.labelled or recipe.method is None else recipe.method.without_labels()
    calibrates = "calibrating thresholds" if recipe.student.inherits else "building the student"
    with progress.part(calibrates):
        student, report, network = build_student(recipe, teacher, architecture, images)
    method = method and settle_objective(method, student, teacher, report.inherited)
    names = None if teacher is None else compare_classes(choice.source, teacher, source or images)
    return Prepared(images, source, teacher, student, report, network, method, names)


def _begin(recipe: Distill, made: Prepared, run: Run, resume: bool, progress: Progress, processes: int) -> None:
    """Begin the run, or go on with it. Write and print what is known before training."""
    run.start(recipe.written(), resume, Distill().written(), processes)
    for number, file in enumerate(sources_of(made.method)):
        kept = run.path / f"method{f'-{number + 1}' if number else ''}.py"
        if not (kept.exists() and kept.samefile(file)):
            shutil.copyfile(file, kept)
    report_data(run, progress.say, made.images, made.source)
    progress.say(str(made.report).splitlines()[0])
    if recipe.student.gradient == "rate" and recipe.student.neuron == "if":
        progress.say(
            "the rate-based gradient is less accurate with IF neurons, which do not leak: consider --neuron lif"
        )
    run.write("conversion", {"network": made.network.name, **asdict(made.report)})
    place = recipe.training.place()
    if made.teacher is not None:
        if not (resume and (run.path / "teacher.json").exists()):
            shown = made.source or made.images
            with progress.part("checking the teacher"):
                known = check_teacher(recipe.teacher.source, made.teacher, shown, recipe.data.validation, place)
            run.write("teacher", {**known, "class_names": made.class_names})
        facts, doubts = sentences(run.read("teacher"))
        for show, lines in ((progress.say, facts), (progress.warn, doubts)):
            for line in lines:
                show(line)
    if not resume or not (run.path / "before.json").exists():
        with progress.part("measuring before training, on training images"):
            run.write("before", measure_student(made.student, made.compared, made.images, place, 1000))


def _end(recipe: Distill, made: Prepared, run: Run, progress: Progress) -> dict[str, Any]:
    """Measure the student on the test set. Write the student and its results."""
    tested, place = len(made.images.test_images), recipe.training.place()
    with progress.part(f"measuring on {tested} test images", tested * (1 if made.compared is None else 2)) as seen:
        results = measure_student(made.student, made.compared, made.images, place, on_batch=seen)
    results["method"] = {"name": recipe.method_name} if made.method is None else written(made.method)
    if made.teacher is not None:
        results["teacher"] = run.read("teacher")
    results |= run.earlier()
    facts = {"recipe": recipe.written(), "results": results, **known_images(made.images, recipe.data.validation)}
    save_student(run.model, made.student, architecture=made.network, facts=facts)
    run.write("results", results)
    for line in summary(results):
        progress.say(line)
    return results


def summary(results: Mapping[str, Any]) -> list[str]:
    """The results in two lines: accuracies with T x D, agreement and firing rate, all in percent.

    The first needs labels.
    """
    steps = steps_by_levels(results["timesteps"], results["levels"])
    accuracy, likeness = "", ""
    if "test_accuracy" in results:
        accuracy = f"test accuracy {results['test_accuracy']:.2f} % at T x D = {steps}"
    if "teacher_accuracy" in results:
        accuracy += f" (teacher {results['teacher_accuracy']:.2f} %)"
    if "agreement" in results:
        likeness = f"agreement with the teacher {results['agreement']:.2f} %, "
    return [*([accuracy] if accuracy else []), f"{likeness}firing rate {results['firing_rate']:.2f} %"]


CAN_TEACH = (
    "It can teach another network as it is: name one that converts by --student, for instance resnet20 or"
    " torchvision/resnet18, with --method kdsnn-response."
)
"""What a network that cannot be a student is still good for."""


def build_student(
    recipe: Distill, teacher: nn.Module | None, architecture: Architecture | None, images: ImageSet
) -> tuple[Student, ConversionReport, Architecture]:
    """The student that a recipe names, before training, with its report and architecture.

    Raises:
        ConfigError: if the student is to start from a teacher's network or weights and there is no ANN as teacher, or
            if the student does not fit the data.
        ConversionError: if the student's network cannot be converted.
    """
    choice, ann = recipe.student, None
    if choice.network != "same":
        architecture = Architecture(choice.network, images.classes, images.channels, choice.width)
    elif isinstance(teacher, Normalised):
        ann = teacher
    _check_origin(recipe, teacher, architecture, images)
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
    calibrate = calibrate.flatten(0, 1) if images.frames else calibrate  # each frame is a sample here
    try:
        student, report = to_spiking(ann or made, choice.conversion(), calibration_images=calibrate, mean=mean, std=std)
    except UnsupportedError as error:
        raise UnsupportedError(str(error) if ann is None else f"{error}\n{CAN_TEACH}") from error
    student.gradient, student.recompute = choice.gradient, choice.recompute
    if choice.start is not None:
        start_from(student, choice.start)
        other = load_student(choice.start, ann or made) if choice.correct == "layers" else None
        report = starting_from(student, report, choice.start, other, calibrate)
    return student, report, architecture


def _check_origin(
    recipe: Distill, teacher: nn.Module | None, architecture: Architecture | None, images: ImageSet
) -> None:
    """Refuse a student that is to start from a network or weights that do not exist."""
    source, choice = recipe.teacher.source, recipe.student
    if architecture is None:
        raise ConfigError(
            f"The student is the 'same' network as its teacher, but the network of '{source}' is not known: name the"
            " student's network by --student."
        )
    if choice.inherits and not isinstance(teacher, Normalised):
        raise ConfigError(
            f"The student is to start from the weights of an ANN, but the teacher '{source}' is not one: name a student"
            " by --student, or give --inherit False, and --start RUN to go on from a finished student."
        )
    same = choice.network == "same" and isinstance(teacher, Normalised)
    if same and (channels := teacher.mean.numel()) != images.channels:  # type: ignore[union-attr, operator]
        raise ConfigError(
            f"The student is to have the network of '{source}', whose inputs have {channels} channels, but"
            f" '{images.name}' has {images.channels}{' (events have two)' if images.frames else ''}: name a student's"
            " network by --student, for instance vgg9."
        )


def _normalisation(teacher: nn.Module | None, images: ImageSet) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel: the teacher's if it gets the same inputs, else those of the data."""
    if teacher is None or teacher.mean.numel() != images.channels or images.frames:  # type: ignore[operator]
        mean, std = images.statistics()
        return list(mean), list(std)
    return teacher.mean.flatten().tolist(), teacher.std.flatten().tolist()  # type: ignore[operator]
