"""What the readers of folders and files hand on, and what is checked of every set that users bring."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spikedistill.errors import MANY, DataError

SHOWN = 8
"""So many names are listed in a message; more are counted."""


@dataclass(frozen=True)
class Parts:
    """A training and a test part as read.

    Args:
        train: images ``[N, C, H, W]`` and labels ``[N]``.
        test: likewise; None where there is one part alone.
        class_names: one name a class.
        notes: what a reader of its figures should know of how it was read, one sentence each.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def listed(names: Iterable[object]) -> str:
    """Names in a sentence, the first few where there are many.

    >>> listed(["cat", "dog"])
    'cat, dog'
    """
    known = [str(name)[:MANY] for name in names]
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return ", ".join(known[:SHOWN]) + more


def check_classes(name: str, parts: Parts) -> tuple[str, ...]:
    """What is to be said of the classes of a set.

    Raises:
        DataError: if fewer than two classes have training images, or a class has test images alone.
    """
    train = set(parts.train[1].unique().tolist())
    test = train if parts.test is None else set(parts.test[1].unique().tolist())
    known = {number for number in range(len(parts.class_names)) if number in train}
    if len(known) < 2:
        raise DataError(
            f"'{name}' has training images of {len(known)} class ({listed(parts.class_names)}): a classifier needs two"
            " classes, each with its images."
        )

    def named(numbers: Iterable[int]) -> str:
        return listed(parts.class_names[number] for number in sorted(numbers))

    if test - train:
        raise DataError(
            f"'{name}' has test images, but no training images, of the classes {named(test - train)}: give both, or"
            " leave these classes away."
        )
    notes = []
    if train - test:
        notes.append(f"no test images of {named(train - test)}: the test accuracy says nothing of them")
    if absent := set(range(len(parts.class_names))) - train:
        notes.append(f"no images at all of {named(absent)}: {len(known)} of {len(parts.class_names)} classes are there")
    if several := sorted(text for text, count in Counter(parts.class_names).items() if count > 1):
        notes.append(f"several classes have one name: {listed(several)}")
    numeric = [text for text in parts.class_names if text.isdecimal()]
    if len(numeric) == len(parts.class_names) and sorted(numeric, key=int) != numeric:
        notes.append(f"classes are in the order of their names as text: {listed(numeric)}")
    return tuple(notes)


def copies(train: Sequence[Tensor], test: Sequence[Tensor]) -> tuple[str, ...]:
    """What is to be said of test samples whose bytes are a training sample's too.

    Args:
        train: samples and labels.
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
    return (f"{share} are copies of training images{otherwise}: the test accuracy is too good by them",)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().data, digest_size=16).digest()


def counted(counts: Counter[str]) -> str:
    """Kinds with how often they were met.

    >>> counted(Counter({".txt": 2, ".gif": 1}))
    '1 .gif, 2 .txt'
    """
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def class_order(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names that two lists of classes have at different places, and pairs of names that differ at one place.

    Lists of mere numbers are taken as unknown. Case, blanks, hyphens and underscores do not count.

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


def _plain(name: str) -> str:
    return " ".join(str(name).casefold().replace("-", " ").replace("_", " ").split())
