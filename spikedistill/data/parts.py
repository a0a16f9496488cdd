"""What the readers of folders and files return, and the checks of every data set that a user brings."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spikedistill.errors import MANY, DataError

UNKNOWN = -1
"""The label of an image whose class is not known."""
SHOWN = 8
"""A message lists this many names and counts the rest."""


@dataclass(frozen=True)
class Parts:
    """A training and a test part as read.

    Args:
        train: images ``[N, C, H, W]`` and labels ``[N]``; labels are all ``UNKNOWN`` for a set without classes.
        test: likewise; None if the set has no test part.
        class_names: one name per class.
        notes: how the set was read, as far as it matters for its accuracies; one sentence each.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def listed(names: Iterable[object]) -> str:
    """Names as part of a sentence; only the first few of many.

    >>> listed(["cat", "dog"])
    'cat, dog'
    """
    known = [str(name)[:MANY] for name in names]
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return ", ".join(known[:SHOWN]) + more


def check_classes(name: str, parts: Parts) -> tuple[str, ...]:
    """Check the classes of a set, and return notes on them, one sentence each.

    Raises:
        DataError: if fewer than two classes have training images, or a class has test images only.
    """
    train = set(parts.train[1].unique().tolist())
    test = train if parts.test is None else set(parts.test[1].unique().tolist()) - {UNKNOWN}
    known = {number for number in range(len(parts.class_names)) if number in train}
    if len(known) < 2:
        raise DataError(
            f"'{name}' has training images of {len(known)} class ({listed(parts.class_names)}): give images of at least"
            " two classes, or --labels none for distillation without labels."
        )

    def named(numbers: Iterable[int]) -> str:
        return listed(parts.class_names[number] for number in sorted(numbers))

    if test - train:
        raise DataError(
            f"'{name}' has test images, but no training images, of the classes {named(test - train)}: add training"
            " images, or remove these classes."
        )
    notes = []
    if train - test:
        notes.append(f"no test images of {named(train - test)}: the test accuracy says nothing about them")
    if absent := set(range(len(parts.class_names))) - train:
        notes.append(f"no images at all of {named(absent)}: {len(known)} of {len(parts.class_names)} classes are there")
    if several := sorted(text for text, count in Counter(parts.class_names).items() if count > 1):
        notes.append(f"several classes have one name: {listed(several)}")
    numeric = [text for text in parts.class_names if text.isdecimal()]
    if len(numeric) == len(parts.class_names) and sorted(numeric, key=int) != numeric:
        notes.append(f"classes are in the order of their names as text: {listed(numeric)}")
    return tuple(notes)


def copies(train: Sequence[Tensor], test: Sequence[Tensor]) -> tuple[str, ...]:
    """A note on test samples that are copies of training samples, byte for byte; none if there are none.

    Args:
        train: samples ``[N, ...]`` and labels ``[N]``.
        test: likewise.
    """
    known: dict[bytes, int] = dict(zip(map(_digest, train[0]), train[1].tolist()))
    found = [(known.get(_digest(image)), label) for image, label in zip(test[0], test[1].tolist())]
    same = [(ours, label) for ours, label in found if ours is not None]
    if not same:
        return ()
    other = sum(ours != label for ours, label in same)
    otherwise = f", {other} of them under another class" if other else ""
    share = f"{len(same)} of {len(found)} test images"
    return (f"{share} are copies of training images{otherwise}: they make the test accuracy too high",)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().data, digest_size=16).digest()


def counted(counts: Counter[str]) -> str:
    """Kinds and how often each was found.

    >>> counted(Counter({".txt": 2, ".gif": 1}))
    '1 .gif, 2 .txt'
    """
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def class_order(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[str], list[str]]:
    """How the class names of two sets differ: names at different places, and pairs that differ at the same place.

    Names that are all numbers say nothing and are not compared. Case, blanks, hyphens and underscores do not count.

    >>> class_order(["cat", "dog"], ["Dog", "Cat"])[0]
    ["'cat' is 0 and 1", "'dog' is 1 and 0"]
    >>> class_order(["car", "dog"], ["automobile", "dog"])
    ([], ["'car' and 'automobile'"])
    """
    first, second = ([_plain(name) for name in names] for names in (ours, theirs))
    if len(first) != len(second) or any(all(name.isdecimal() for name in names) for names in (first, second)):
        return [], []
    moved, differ = [], []
    for place, (name, other) in enumerate(zip(first, second)):
        if name != other:
            differ.append(f"'{ours[place]}' and '{theirs[place]}'")
            if name in second:
                moved.append(f"'{ours[place]}' is {place} and {second.index(name)}")
    return moved, differ


def check_pair(names: tuple[str, str], ours: Sequence[str], theirs: Sequence[str]) -> None:
    """Check that two sets have the same classes in the same order.

    Args:
        names: the names of both sets.
        ours: the class names of the first.
        theirs: those of the second.

    Raises:
        DataError: if they differ.
    """
    first, second = names
    if len(ours) != len(theirs):
        plain = [{_plain(name) for name in known} for known in (ours, theirs)]
        alone = (
            (first, [name for name in ours if _plain(name) not in plain[1]]),
            (second, [name for name in theirs if _plain(name) not in plain[0]]),
        )
        only = "".join(f" Only '{name}' has {listed(found)}." for name, found in alone if found)
        raise DataError(
            f"'{first}' and '{second}' cannot be paired: expected the same classes, found {len(ours)} and"
            f" {len(theirs)}.{only} Remove the classes that are not in both."
        )
    moved, differ = class_order(ours, theirs)
    if differ:
        raise DataError(
            f"'{first}' and '{second}' cannot be paired, their classes differ: {listed(moved or differ)}."
            " Give both the same class_names in the same order."
        )


def _plain(name: str) -> str:
    return " ".join(str(name).casefold().replace("-", " ").replace("_", " ").split())
