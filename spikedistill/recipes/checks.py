"""Checks of data and teacher before distillation: printed at once, and written next to the results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spikedistill.compute.place import Place
from spikedistill.data.augment import to_inputs
from spikedistill.data.feed import training_samples
from spikedistill.data.images import ImageSet
from spikedistill.data.parts import class_order, listed
from spikedistill.errors import ConfigError
from spikedistill.evaluate.examine import examine_teacher
from spikedistill.files import read_facts, weights_file
from spikedistill.student.student import Student
from spikedistill.teacher.load import Teacher
from spikedistill.train.run import Run


def report_data(run: Run, say: Callable[[str], object], images: ImageSet, source: ImageSet | None = None) -> None:
    """Print notes on how the data were read, and write them to data.json."""
    sets = {"data": images} if source is None else {"data": images, "source": source}
    for one in sets.values():
        for note in one.notes:
            say(f"'{one.name}': {note}")
    run.write("data", {name: one.facts() for name, one in sets.items()})


def known_images(images: ImageSet, validation: float) -> dict[str, Any]:
    """What a network's file says about its training images. It is used when the network becomes a teacher."""
    samples = training_samples(images, validation)
    shape = list(images.train_images.shape[1:])
    return {"data": images.name, "class_names": list(images.class_names), "samples": samples, "shape": shape}


@torch.no_grad()
def with_its_classes(images: ImageSet, source: str, teacher: Teacher | Student | None) -> ImageSet:
    """The data set; without labels, with the classes that the teacher knows.

    Raises:
        ConfigError: if there are neither labels nor a teacher.
    """
    if images.labelled:
        return images
    if teacher is None:
        raise ConfigError(f"'{images.name}' has no labels, so the student needs a teacher: name one by --teacher.")
    count = teacher.observe(to_inputs(images.train_images[:2])).logits.shape[-1]
    names = _class_names(source, teacher)
    return images.with_classes(names if len(names) == count else [str(number) for number in range(count)])


def _class_names(source: str, teacher: nn.Module) -> tuple[str, ...]:
    """The names of the teacher's classes; none if they are not known."""
    return teacher.class_names if isinstance(teacher, Teacher) else tuple(_facts(source).get("class_names", ()))


def compare_classes(source: str, teacher: nn.Module, images: ImageSet) -> str:
    """Compare the names of the teacher's classes with the data's: ``same``, ``not known``, or ``other`` with names.

    Raises:
        ConfigError: if the teacher has one of the same names at another index.
    """
    its = _class_names(source, teacher)
    moved, differ = class_order(images.class_names, its)
    if moved:
        raise ConfigError(
            f"The teacher '{source}' knows the classes of '{images.name}' in another order: {listed(moved)}. Bring them"
            f" into its order ({listed(its)}); in a folder the classes are ordered by name."
        )
    if differ:
        return f"other: {listed(differ)}"
    numbers = all(str(name).isdecimal() for name in its) or all(name.isdecimal() for name in images.class_names)
    return "not known" if numbers or len(its) != images.classes else "same"


def check_teacher(source: str, teacher: nn.Module, images: ImageSet, validation: float, place: Place) -> dict[str, Any]:
    """Examine a teacher before distillation.

    Args:
        source: the teacher as the recipe names it.
        teacher: ANN or student.
        images: the data set.
        validation: the fraction of the training part that is held out.
        place: device and number format.

    Returns:
        As ``examine_teacher``; also ``may_have_seen``, the parts (``validation``, and ``test`` if it was split off
        here) that may have been among the teacher's training images.

    Raises:
        ConfigError: if its logits are not finite.
    """
    facts = _facts(source)
    apart = {"validation": validation > 0, "test": images.drawn}
    known = facts.get("samples") == training_samples(images, validation)
    stored = facts.get("test_accuracy", facts.get("results", {}).get("test_accuracy"))
    found = examine_teacher(teacher, images, validation, place, stored)
    found["doubts"] = [*found["doubts"], *_of_another_size(facts.get("shape", []), images)]
    return {**found, "may_have_seen": [] if known else [part for part, there in apart.items() if there]}


def _of_another_size(learned: Sequence[int], images: ImageSet) -> list[str]:
    """A doubt if the teacher learned from images of another size."""
    sizes = [" x ".join(map(str, shape[-2:])) for shape in (learned, images.train_images.shape)]
    if not learned or sizes[0] == sizes[1]:
        return []
    remedy = f" (--image-size {learned[-1]})" if learned[-1] == learned[-2] else ""
    return [f"it learned from images of {sizes[0]} pixels and these have {sizes[1]}: give it the size it knows{remedy}"]


def sentences(found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The results of ``check_teacher`` as sentences: facts, and doubts."""
    where = "images held out of training" if found["held_out"] else "training images (none are held out)"
    if "accuracy" in found:
        said = [f"the teacher has {found['accuracy']:.2f} % on {found['images']} {where}"]
    else:
        said = [
            f"the teacher names {found['classes']} classes on {found['images']} {where}, with a mean confidence of"
            f" {found['confidence']:.1f} %"
        ]
    doubts = [f"check the teacher: {doubt}" for doubt in found["doubts"]]
    if str(found["class_names"]).startswith("other"):
        doubts.append(f"the teacher has other names for classes ({found['class_names']}): are they the same?")
    if found["may_have_seen"]:
        parts = " and ".join(found["may_have_seen"])
        said.append(
            f"the teacher may have seen images of {parts} in its training: {_measures(found)} on them may be too high"
        )
    return said, doubts


def _measures(found: Mapping[str, Any]) -> str:
    return "accuracies" if "accuracy" in found else "agreement"


def _facts(source: str) -> dict[str, Any]:
    """The header of the teacher's file."""
    return read_facts(weights_file(source))
