"""The main job: a trained ANN becomes a spiking student, is trained, and is measured."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.data.augment import to_unit
from spikedistill.data.images import ImageSet, evenly, load_images
from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.accuracy import accuracy_by_step, answers
from spikedistill.evaluate.activity import firing_rates
from spikedistill.evaluate.agreement import agreement, divergence
from spikedistill.evaluate.early_exit import early_answers
from spikedistill.files import read_tensors, write_tensors
from spikedistill.neuron.layer import Spiking
from spikedistill.objective.kdsnn import Pairs
from spikedistill.recipes.choices import Method, StudentChoice, TeacherChoice
from spikedistill.recipes.teach import check_answers
from spikedistill.student.build import Report, Student, to_spiking
from spikedistill.student.coding import CODINGS
from spikedistill.teacher.load import (
    Architecture,
    Normalised,
    Teacher,
    load_teacher,
    load_weights,
    pretrained,
)
from spikedistill.train.device import choose_device, choose_precision, return_freed_memory, settle
from spikedistill.train.loop import fit
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Data, Training, check
from spikedistill.train.run import Run


@dataclass(frozen=True)
class Distill:
    """A student, its teacher, what it is taught, and how."""

    who: TeacherChoice = field(default_factory=TeacherChoice)
    """Who teaches."""
    student: StudentChoice = field(default_factory=StudentChoice)
    """Who learns."""
    what: Method = field(default_factory=Method)
    """What is taught."""
    data: Data = field(default_factory=Data)
    """What comes in."""
    training: Training = field(default_factory=Training)
    """How it is trained."""

    def settled(self) -> "Distill":
        """The recipe with what its method decides about the student, and its inheritance about the learning rate."""
        begins = self.student.inherits or self.student.start is not None
        lr = 0.02 if begins and self.training.lr is None else self.training.peak
        training = dataclasses.replace(self.training, lr=lr)
        return dataclasses.replace(self, student=self.what.settle(self.student), training=training)

    def written(self) -> dict[str, Any]:
        """What recipe.json holds."""
        return {"kind": "distill", **asdict(self.settled())}

    def faults(self) -> list[str]:
        """What cannot work together, one sentence each."""
        faults = []
        if not self.what.trains and not self.student.inherits:
            faults.append(f"method (={self.what.method}) keeps the teacher's weights: leave student and inherit alone")
        if not self.what.trains and self.student.start is not None:
            faults.append(f"start (={self.student.start}) is for methods that train, not for {self.what.method}")
        if self.student.gradient == "quantised" and not self.student.rounds:
            faults.append(
                "the quantised stand-in is for neuron=if with reset=subtract, initial=0.5, no learn_initial and"
                " coding=direct: leave those as they are, or take gradient=exact"
            )
        if self.training.compile and self.student.gradient != "quantised":
            faults.append("compile is for ANNs: leave it out, a student's neurons are compiled without it")
        return faults


def distill(recipe: Distill, out: Path, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Build a student, train it into a run directory, and measure it once on the test set.

    Args:
        recipe: teacher, student, method, data and training.
        out: the run directory.
        resume: go on with the run that lies there.
        progress: what shows the work.

    Returns:
        What results.json holds: see ``measure``.

    Raises:
        ConfigError: if the recipe cannot work, or the loss is no longer a number.
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
    images = load_images(recipe.data.data, recipe.data.data_dir, recipe.data.image_size)
    teacher, architecture = find_teacher(recipe.who, images)
    student, report, network = build_student(recipe, teacher, architecture, images)
    objective = None
    if recipe.what.trains:
        objective = recipe.what.objective(feature_pairs(recipe.what, teacher.network, student), report.inherited)
    run = Run(out)
    run.start(recipe.written(), resume, Distill().written())
    progress.say(str(report).splitlines()[0])
    if recipe.student.gradient == "rate" and recipe.student.neuron == "if":
        progress.say("the rate-based gradient loses points with neurons that forget nothing: consider --neuron lif")
    run.write("conversion", {"network": network.name, **asdict(report)})
    augment, held = recipe.data.augment(), recipe.data.validation
    with progress:
        if not resume or not (out / "before.json").exists():
            run.write("before", measure(student, teacher, images, recipe.training, 1000))
        if objective is not None:
            fit(
                student,
                objective,
                images,
                recipe.training,
                run,
                teacher=teacher,
                augment=augment,
                validation=held,
                progress=progress,
            )
        results = measure(student, teacher, images, recipe.training)
    facts = {"kind": "student", "architecture": network.facts(), "recipe": asdict(recipe), "data": images.name}
    facts |= {"mean": student.mean.flatten().tolist(), "std": student.std.flatten().tolist(), "results": results}
    write_tensors(run.model, student.state_dict(), facts)
    run.write("results", results)
    return results


def find_teacher(choice: TeacherChoice, images: ImageSet) -> tuple[Teacher, Architecture]:
    """The teacher that a recipe names, fit for the data.

    Raises:
        ConfigError: if it answers with another number of classes, or was never trained.
    """
    given = None
    if choice.teacher_network is not None:
        given = Architecture(choice.teacher_network, images.classes, images.channels, choice.teacher_width)
    if choice.published:
        teacher, architecture = pretrained(choice.teacher)
    elif given is None and not Path(choice.teacher).exists():
        raise ConfigError(
            f"There is no teacher at '{choice.teacher}': train one by 'spikedistill teach ... --out {choice.teacher}',"
            " or give a weights file with --teacher-network, --teacher-mean and --teacher-std."
        )
    else:
        teacher, architecture = load_teacher(
            choice.teacher, architecture=given, mean=choice.teacher_mean, std=choice.teacher_std
        )
    if architecture.classes != images.classes:
        raise ConfigError(
            f"The teacher '{choice.teacher}' knows {architecture.classes} classes, '{images.name}' has"
            f" {images.classes}: give the data that it was trained on."
        )
    if len(teacher.mean) != images.channels:
        raise ConfigError(
            f"The teacher '{choice.teacher}' normalises {len(teacher.mean)} channels, '{images.name}' has"
            f" {images.channels}: give the data that it was trained on."
        )
    check_answers(teacher, images, f"The teacher '{choice.teacher}' ({architecture.name})")
    return teacher, architecture


def build_student(
    recipe: Distill, teacher: Teacher, architecture: Architecture, images: ImageSet
) -> tuple[Student, Report, Architecture]:
    """The student that a recipe names, before training, with its report and architecture."""
    choice = recipe.student
    same, inherits = choice.student == "same", choice.inherits
    if not same:
        architecture = Architecture(choice.student, images.classes, images.channels, choice.student_width)
    torch.manual_seed(recipe.training.seed)
    mean, std = teacher.mean.flatten().tolist(), teacher.std.flatten().tolist()
    ann: nn.Module = teacher if same else architecture.build()
    if not same:
        check_answers(Normalised(ann, mean, std), images, f"The student '{choice.student}'")
    some = evenly(len(images.train_images), choice.calibration)
    student, report = to_spiking(
        ann,
        timesteps=choice.timesteps,
        neuron=choice.make_neuron(),
        calibrate=to_unit(images.train_images[some]) if inherits else None,
        inherit=inherits,
        rule=choice.rule,
        percentile=choice.percentile,
        per_channel=choice.per_channel,
        correct_bias=choice.correct_bias,
        max_pool=choice.max_pool,
        coding=CODINGS[choice.coding](),
        mean=mean,
        std=std,
    )
    student.gradient, student.recompute = choice.gradient, choice.recompute
    if choice.start is not None:
        file, tensors, _ = read_student(choice.start)
        fill(student, tensors, f"'{file}'")
    return student, report, architecture


def read_student(path: str | Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The weights file of a run directory, or that file; its tensors; what it knows of them.

    Raises:
        WeightsError: if it cannot be read.
        RunError: if it is no student's.
    """
    file = Path(path)
    file = file / "model.safetensors" if file.is_dir() else file
    tensors, facts = read_tensors(file)
    if facts.get("kind") != "student":
        raise RunError(
            f"'{file}' holds no student but {facts.get('kind', 'weights of unknown origin')}: give a run of 'distill'."
        )
    return file, tensors, facts


def fill(student: Student, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load weights, and thresholds whether there is one for each layer or channel.

    A student that learns initial potentials keeps its own where the given one did not learn them.

    Raises:
        WeightsError: if they do not fit.
    """
    for path, layer in student.named_modules():
        if isinstance(layer, Spiking) and (given := tensors.get(f"{path}.threshold")) is not None:
            layer.set_threshold(given)
    fixed = {f"{path}.initial" for path, layer in student.named_modules() if isinstance(layer, Spiking)}
    own = {name: value for name, value in student.state_dict().items() if name in fixed - tensors.keys()}
    load_weights(student, {**tensors, **own}, source)


def feature_pairs(method: Method, teacher: nn.Module, student: Student) -> Pairs:
    """The pairs that were asked for; else the stage ends (layer1, stage1, ...), matched from the last backwards."""
    if method.pairs or method.method not in ("kdsnn", "kdsnn-feature"):
        return method.pairs
    theirs = [name for name, _ in teacher.named_children() if re.fullmatch(r"(layer|stage)\D?\d+", name)]
    ours = [path for path in student.paths() if re.fullmatch(r"(layer|stage)\D?\d+", path)]
    pairs = tuple(zip(reversed(theirs), reversed(ours)))[::-1]
    if not pairs:
        raise ConfigError(
            "No stages named layer1, layer2, ... were found in both networks: say which features to compare by --pairs "
            "TEACHER-PATH STUDENT-PATH, or take --method kdsnn-response."
        )
    return pairs


def measure(
    student: Student,
    teacher: Teacher | None,
    images: ImageSet,
    training: Training,
    limit: int | None = None,
    confidence: float | None = None,
) -> dict[str, Any]:
    """Accuracy at every step, agreement with the teacher and firing rates on the test set.

    Batch norm is not folded for it: folded weights round in another way, and a spike at its threshold may tip.

    Args:
        student: the network.
        teacher: for comparison.
        images: whose test part is used.
        training: names device and precision.
        limit: look at training images instead, so many, evenly spaced; nothing of the test part is then used.
        confidence: measure early exit at this confidence too.

    Returns:
        ``accuracy_by_step`` and ``test_accuracy`` (percent), ``firing_rate`` and ``firing_rate_by_layer``
        (percent of all chances to spike); with a teacher also ``teacher_accuracy``, ``agreement`` (percent) and
        ``divergence`` (nats); with a limit ``train_accuracy`` instead of ``test_accuracy``; with a confidence
        ``early_exit_accuracy`` (percent) and ``early_exit_steps`` (mean).
    """
    pixels, labels = images.test_images, images.test_labels
    if limit is not None:
        some = evenly(len(images.train_images), limit)
        pixels, labels = images.train_images[some], images.train_labels[some]
    device = choose_device(training.device)
    dtype = choose_precision(training, device).dtype
    layout = torch.channels_last if training.channels_last else torch.contiguous_format
    settle(student, device, layout, training)
    with firing_rates(student) as rates:
        logits = answers(student, pixels, dtype)
    steps = accuracy_by_step(logits, labels)
    results: dict[str, Any] = {
        "test_accuracy" if limit is None else "train_accuracy": steps[-1],
        "accuracy_by_step": steps,
        "firing_rate": 100.0 * rates.mean(),
        "firing_rate_by_layer": {name: 100.0 * rate for name, rate in rates.by_layer().items()},
    }
    if teacher is not None:
        settle(teacher, device, layout, training)
        theirs = answers(teacher, pixels, dtype)
        results["teacher_accuracy"] = accuracy_by_step(theirs, labels)[-1]
        results["agreement"] = agreement(logits, theirs[0])
        results["divergence"] = divergence(logits, theirs[0])
    if confidence is not None:
        early = early_answers(student, pixels, confidence, dtype)
        results["early_exit_accuracy"] = accuracy_by_step(early.logits[None], labels)[-1]
        results["early_exit_steps"] = early.mean_steps
    return results
