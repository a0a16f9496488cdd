"""What is found out about data and teacher before a student is taught: said at once, and written beside the results."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from spikedistill.compute.place import Place
from spikedistill.data.feed import training_samples
from spikedistill.data.images import ImageSet
from spikedistill.data.parts import class_order, listed
from spikedistill.errors import ConfigError
from spikedistill.evaluate.examine import examine_teacher
from spikedistill.files import read_facts, weights_file
from spikedistill.teacher.load import Teacher
from spikedistill.train.run import Run


def introduce(run: Run, say: Callable[[str], object], images: ImageSet, source: ImageSet | None = None) -> None:
    """Say how the data were read, where there is something to say, and write it down as data.json."""
    sets = {"data": images} if source is None else {"data": images, "source": source}
    for one in sets.values():
        for note in one.notes:
            say(f"'{one.name}': {note}")
    run.write("data", {name: one.facts() for name, one in sets.items()})


def known_images(images: ImageSet, validation: float) -> dict[str, Any]:
    """What a network's file says of the images that it was trained on, for when it becomes a teacher."""
    samples = training_samples(images, validation)
    return {"data": images.name, "class_names": list(images.class_names), "samples": samples}


def compare_classes(source: str, teacher: nn.Module, images: ImageSet) -> str:
    """Whether a teacher's classes have the names of the data's: ``same``, ``not known``, or which are ``other``.

    Raises:
        ConfigError: if it knows one of the same names at another place.
    """
    its = teacher.class_names if isinstance(teacher, Teacher) else _facts(source).get("class_names", ())
    moved, differ = class_order(images.class_names, its)
    if moved:
        raise ConfigError(
            f"The teacher '{source}' knows the classes of '{images.name}' in another order: {listed(moved)}. Bring them"
            f" into its order ({listed(its)}); of a folder they are in the order of their names."
        )
    if differ:
        return f"other: {listed(differ)}"
    numbers = all(str(name).isdecimal() for name in its) or all(name.isdecimal() for name in images.class_names)
    return "not known" if numbers or len(its) != images.classes else "same"


def interview(source: str, teacher: nn.Module, images: ImageSet, validation: float, place: Place) -> dict[str, Any]:
    """What is known of a teacher before it teaches.

    Args:
        source: what the recipe calls it.
        teacher: ANN or student.
        images: what it will see.
        validation: the share that is held out.
        place: where it computes.

    Returns:
        As ``examine_teacher``; and ``may_have_seen``, the parts (``validation``, and ``test`` where it was drawn here)
        that may have been among the teacher's training images.

    Raises:
        ConfigError: if its logits are not finite.
    """
    facts = _facts(source)
    apart = {"validation": validation > 0, "test": images.drawn}
    known = facts.get("samples") == training_samples(images, validation)
    stored = facts.get("test_accuracy", facts.get("results", {}).get("test_accuracy"))
    found = examine_teacher(teacher, images, validation, place, stored)
    return {**found, "may_have_seen": [] if known else [part for part, there in apart.items() if there]}


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What ``interview`` found, doubts as warnings."""
    where = "images held out of training" if found["held_out"] else "training images (none are held out)"
    said = [f"the teacher has {found['accuracy']:.2f} % on {found['images']} {where}"]
    said += [f"warning: the teacher may be wrong: {doubt}" for doubt in found["doubts"]]
    if str(found["class_names"]).startswith("other"):
        said.append(f"warning: the teacher has other names for classes ({found['class_names']}): are they the same?")
    if found["may_have_seen"]:
        parts = " and ".join(found["may_have_seen"])
        said.append(f"the teacher may have seen images of {parts} in its training: accuracies on them may be too good")
    return said


def _facts(source: str) -> dict[str, Any]:
    """What the teacher's file says beside its weights."""
    return read_facts(weights_file(source)) if Path(source).exists() else {}
