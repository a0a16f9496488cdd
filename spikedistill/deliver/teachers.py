"""The teacher that a recipe names: a run, a weights file, a library's network, a spiking student or network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from spikedistill.data.augment import to_inputs
from spikedistill.data.images import ImageSet
from spikedistill.errors import ConfigError, RunError, WeightsError
from spikedistill.evaluate.measure import check_fits
from spikedistill.files import read_facts, weights_file
from spikedistill.student.save import load_student
from spikedistill.student.student import Student
from spikedistill.teacher.classes import count_classes
from spikedistill.teacher.load import Architecture, Teacher, from_library, load_published, load_teacher
from spikedistill.teacher.spiking import SpikingTeacher, with_steps
from spikedistill.train.run import Run

NO_TEACHER = "none"
"""The value of a recipe's teacher if it has none."""
TRIED = 16
"""On this many training images the layers of neurons of a spiking network are found."""


def is_published(source: str, network: str | None) -> bool:
    """Whether the source is a library's network with its published weights."""
    return network is None and from_library(source) and not Path(source).exists()


def find_teacher(
    images: ImageSet,
    source: str,
    network: str | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust_code: bool = False,
) -> tuple[Teacher | Student | None, Architecture | None]:
    """The teacher that a recipe names, checked against the data: an ANN, a student of ``distill``, or another SNN.

    An SNN is a network of the user's own code that returns logits ``[T, B, K]``. It becomes a ``SpikingTeacher``, and
    its architecture is not returned, since it cannot be converted.

    Args:
        images: the data set.
        source: a run directory, a weights file, a library's network, or ``none``.
        network: the network of a weights file that does not name it.
        width: channels of the first stage of a zoo network.
        mean: mean per channel for the input normalisation of a weights file that does not hold it.
        std: standard deviation per channel, likewise.
        trust_code: execute the Python code that a weights file may name as its network.

    Raises:
        ConfigError: if it does not exist, does not fit the data, or was never trained.
        RunError: if its run is not finished.
    """
    if source == NO_TEACHER:
        return None, None
    images = images if images.labelled else images.with_classes(())  # it names the classes
    classes = images.classes or (0 if network is None else count_classes(source, network, images.channels, width))
    given = None if network is None else Architecture(network, classes, images.channels, width)
    if is_published(source, network):
        teacher, architecture = load_published(source)
    elif given is None and not (Path(source).exists() or weights_file(source).exists()):
        raise ConfigError(
            f"There is no teacher at '{source}': train one by 'spikedistill teach ... --out {source}', or give a"
            " weights file with --teacher-network, --teacher-mean and --teacher-std, or 'none'."
        )
    elif (Path(source) / "recipe.json").exists() and not (run := Run(Path(source))).finished:
        raise RunError(f"The teacher '{source}' {run.unfinished()}: end it by its own command with --resume.")
    elif (facts := read_facts(weights_file(source))).get("kind") == "student":
        return _spiking_teacher(images, source, facts, given, trust_code)
    else:
        teacher, architecture = load_teacher(source, architecture=given, mean=mean, std=std, trust_code=trust_code)
    if images.frames:
        raise ConfigError(
            f"The teacher '{source}' takes images, but '{images.name}' holds event frames: give it images by --source,"
            " or use a run of 'distill' on event frames, or none."
        )
    for what, its, ours in (
        ("knows {} classes", architecture.classes, images.classes),
        ("normalises {} channels", len(teacher.mean), images.channels),
    ):
        if ours and its != ours:
            raise ConfigError(
                f"The teacher '{source}' {what.format(its)}, but '{images.name}' has {ours}: give the data that it was"
                " trained on."
            )
    found = with_steps(teacher, to_inputs(images.train_images[:TRIED])) if architecture.names_code else teacher
    check_fits(found, images, f"The teacher '{source}' ({architecture.name})")
    if isinstance(found, SpikingTeacher):
        return cast(Any, found), None  # it is asked only for what a student has too
    return found, architecture


def _spiking_teacher(
    images: ImageSet, source: str, facts: Mapping[str, Any], given: Architecture | None, trust_code: bool
) -> tuple[Student, Architecture | None]:
    """A student as the teacher, with its architecture if its file names one."""
    student = load_student(source, None if given is None else given.build(), trust_code)
    check_fits(student, images, f"The spiking teacher '{source}'")
    named = facts.get("network", facts.get("architecture", {}))
    try:
        return student, given or (Architecture(**named) if "name" in named else None)
    except TypeError as error:
        raise WeightsError(
            f"This version cannot read the description of the network in '{source}' ({error}): save it again."
        ) from error
