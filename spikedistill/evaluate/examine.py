"""A check of the teacher before distillation: its accuracy on held-out images, and doubts about it.

Every doubt is a statistical test at one percent on the same images, so few images cannot raise a doubt by chance. The
list of doubts is our choice.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.compute.place import Place
from spikedistill.data.images import ImageSet, evenly, split
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import predict
from spikedistill.shapes import ClassLogits, Labels

MOST = 1000
"""Number of images that are examined, evenly spaced."""
VALUES = 4096
"""About this many values of an image are compared with class means."""
MANY_ALIKE = 20
"""This many images without labels in one class raise a doubt."""
LEVEL = 0.01
"""Level of the tests: a result that is likelier than this by chance counts as chance."""


def examine_teacher(
    teacher: nn.Module, images: ImageSet, validation: float, place: Place, stored: float | None = None
) -> dict[str, Any]:
    """The accuracy of a teacher before distillation, and doubts about it.

    Args:
        teacher: ANN or student.
        images: the data set.
        validation: the fraction of the training part that is held out. With 0, training images are examined.
        place: device and number format.
        stored: the test accuracy in percent that its file reports.

    Returns:
        ``accuracy`` (percent), ``images`` (their number), ``held_out`` (whether they are held out of training) and
        ``doubts`` (sentences). Without labels there is no accuracy, but ``classes``, the number of classes that it
        names, and ``confidence``, the mean probability of the class that it names, in percent.

    Raises:
        ConfigError: if its logits are not finite.
    """
    train, held = split(images.train_labels, validation, seed=0)
    some = held[evenly(len(held), MOST)] if len(held) else train[evenly(len(train), MOST)]
    pixels, labels = images.train_images[some], images.train_labels[some]
    place.prepare(teacher)
    with torch.random.fork_rng(devices=[]):  # training afterwards must draw the same random numbers as without
        logits = predict(teacher, pixels, place.dtype).mean(0)
    if not logits.isfinite().all():
        raise ConfigError(
            f"The teacher's logits of {len(labels)} images of '{images.name}' hold NaN or infinity: check its weights,"
            " and --teacher-mean and --teacher-std."
        )
    about = {"images": len(labels), "held_out": len(held) > 0}
    if not images.labelled:
        return {**_without_labels(logits), **about}
    right = logits.argmax(1) == labels
    doubts = [*_as_a_guess(right, labels), *_below_class_means(right, pixels, labels, images, train)]
    doubts += [*_in_another_order(logits, labels, images.class_names), *_within_one(logits)]
    accuracy = 100.0 * float(right.double().mean())
    doubts += _below_its_file(right, stored, len(images.test_labels))
    return {"accuracy": accuracy, **about, "doubts": doubts}


def _without_labels(logits: ClassLogits) -> dict[str, Any]:
    """What can be said of a teacher without labels."""
    named = Counter(logits.argmax(1).tolist())
    doubts = _within_one(logits)
    if len(logits) >= MANY_ALIKE and len(named) == 1:
        doubts.append(f"it gives all {len(logits)} images one class: are they images of its kind, normalised alike?")
    confidence = 100.0 * float(logits.double().softmax(1).amax(1).mean())
    return {"classes": len(named), "confidence": confidence, "doubts": doubts}


def _as_a_guess(right: Tensor, labels: Labels) -> list[str]:
    """A doubt if always naming the most frequent class is as good, as far as this number of images can tell."""
    share, hits = float(labels.bincount().max()) / len(labels), int(right.sum())
    if 1 - _at_most(hits - 1, len(right), share) <= LEVEL:
        return []
    return [f"its accuracy is no better than that of a guess, {100 * share:.2f} %"]


def _below_its_file(right: Tensor, stored: float | None, count: int) -> list[str]:
    """A doubt if the accuracy is below the one in the teacher's file, which may itself be from few test images."""
    if stored is None or _at_most(int(right.sum()), len(right), (stored / 100 * count + 1) / (count + 2)) >= LEVEL:
        return []
    return [f"its file reports {stored:.2f} % on its test images: are these images like those, and normalised alike?"]


def _below_class_means(right: Tensor, pixels: Tensor, labels: Labels, images: ImageSet, train: Tensor) -> list[str]:
    """A doubt if choosing the class with the nearest mean image is more accurate."""
    found = _nearest(pixels, _class_means(images, train[evenly(len(train), 10 * MOST)])) == labels
    if not _better(found, right):
        return []
    return [f"choosing the class with the nearest mean image is better, {100 * float(found.double().mean()):.2f} %"]


def _class_means(images: ImageSet, places: Tensor) -> Tensor:
    """The mean image of each class ``[K, n]``; far from everything for a class without images."""
    sums = torch.zeros(images.classes, _thinned(images.train_images[:1]).shape[1])
    for part in places.split(256):
        sums.index_add_(0, images.train_labels[part], _thinned(images.train_images[part]))
    means = sums / images.train_labels[places].bincount(minlength=images.classes)[:, None]
    return means.nan_to_num(nan=1e6)


def _nearest(pixels: Tensor, means: Tensor) -> Tensor:
    """The class of the nearest mean image ``[N]``."""
    own = means.square().sum(1)
    return torch.cat([(own - 2 * _thinned(part) @ means.T).argmin(1) for part in pixels.split(256)])


def _thinned(pixels: Tensor) -> Tensor:
    """Samples as rows ``[N, n]``; large samples keep only some of their values, evenly spaced."""
    rows = pixels.flatten(1)
    return rows[:, :: max(1, rows.shape[1] // VALUES)].float()


def _in_another_order(logits: ClassLogits, labels: Labels, names: Sequence[str]) -> list[str]:
    """A doubt if outputs and classes are in another order: matched on half of the images, tested on the other half."""
    answers = logits.argmax(1)
    order = torch.arange(len(labels)) % 2 == 0
    table = 0.5 * torch.eye(logits.shape[1])  # in a tie an output keeps its own class
    table.index_put_((answers[order], labels[order]), torch.ones(()), accumulate=True)
    matched = _matched(table)
    found, right = matched[answers[~order]] == labels[~order], (answers == labels)[~order]
    if not _better(found, right):
        return []
    moved = [place for place in range(len(matched)) if matched[place] != place and (answers == place).any()]
    shown = ", ".join(f"'{names[int(matched[place])]}' at {place}" for place in moved[:4])
    return [
        f"with its classes in another order it has {100 * float(found.double().mean()):.2f} %, for instance {shown}:"
        " name the classes of the data as it was trained on them"
    ]


def _matched(table: Tensor) -> Tensor:
    """For each output a class of its own, the pairs with the most images first; outputs without images keep theirs."""
    outputs, classes = table.nonzero(as_tuple=True)
    matched, free = torch.arange(len(table)), ({*range(len(table))}, {*range(len(table))})
    for place in table[outputs, classes].argsort(descending=True, stable=True).tolist():
        output, label = int(outputs[place]), int(classes[place])
        if output in free[0] and label in free[1]:
            matched[output] = label
            free[0].remove(output)
            free[1].remove(label)
    return matched


def _within_one(logits: ClassLogits) -> list[str]:
    """A doubt if the logits look like the probabilities of single classes."""
    low, high = float(logits.min()), float(logits.max())
    if low < 0 or high > 1 or low == high:
        return []
    return [f"all its logits are {low:.2f} to {high:.2f}, as after a sigmoid or softmax: return what comes before"]


def _better(ours: Tensor, theirs: Tensor) -> bool:
    """The sign test: whether, of the images that only one of the two classifies correctly, too many are ours."""
    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return won > lost and _at_most(lost, won + lost, 0.5) < LEVEL


def _at_most(hits: int, count: int, share: float) -> float:
    """The probability of at most this many hits among ``count`` trials, each with probability ``share``.

    >>> round(_at_most(1, 3, 0.5), 9), _at_most(-1, 3, 0.5)
    (0.5, 0.0)
    """
    if not 0 < share < 1:
        return float(share <= 0 or hits >= count) if hits >= 0 else 0.0
    odds, whole = math.log(share), math.log1p(-share)

    def term(k: int) -> float:
        chosen = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        return math.exp(chosen + k * odds + (count - k) * whole)

    return min(1.0, math.fsum(term(k) for k in range(hits + 1)))
