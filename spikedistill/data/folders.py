"""Folders of samples by class: which folders are parts and which are classes.

Ambiguous folders are refused, and the message says what was found. Notes say how the others were read.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spikedistill.data.parts import UNKNOWN, Parts, counted, listed
from spikedistill.errors import DataError

HIDDEN = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini")
"""Files and folders of operating systems, which are not read, like names that begin with a dot."""
ROLES = {
    **dict.fromkeys(("train", "trains", "training", "trainval"), "train"),
    **dict.fromkeys(("test", "tests", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev", "eval", "evaluation"), "validation"),
}
"""Words that name a part."""
FILLERS = (
    *("set", "sets", "data", "dataset", "datasets", "image", "images", "img", "imgs"),
    *("split", "splits", "part", "folder", "dir", "files"),
)
"""Words in a folder's name that say nothing about its part."""
BARE = tuple((role, ()) for role in ("train", "test", "validation"))
"""What ``_role`` returns for a name that means a part and nothing else."""
EXPECTED = (
    "Expected train/CLASS/{file} and test/CLASS/{file} (or val), or CLASS/{file} alone; without classes"
    " train/{file} and test/{file}, or {file} alone."
)
SAID = {
    "linked": "linked folders were followed",
    "turned": "images were turned as their EXIF says",
    "transparent": "images have transparent parts, which became white",
}
"""What is counted while images are read, and the words of its note."""
MUCH = 0.1
"""Part of the events of recordings that are left out, above which it is said."""


@dataclass(frozen=True)
class SampleKind:
    """What the samples in a folder are.

    Args:
        plural: their name in messages.
        suffixes: endings of their files.
        example: the name of a file.
        read: reads files of one size from below a folder: ``[N, ...]`` bytes, and what was counted meanwhile.
    """

    plural: str
    suffixes: tuple[str, ...]
    example: str
    read: Callable[[Path, Sequence[Path], Counter[str]], Tensor]

    def holds(self, file: Path) -> bool:
        """Whether a file is one of them."""
        return file.suffix.lower() in self.suffixes and not file.is_dir()

    @property
    def expected(self) -> str:
        """How folders are expected to lie."""
        return EXPECTED.format(file=self.example)


def read_folder(path: Path, kind: SampleKind, labelled: bool = True) -> Parts:
    """Samples by class: ``train/CLASS/image`` and ``test/CLASS/image``, or ``CLASS/image`` alone.

    - Images without classes: ``train/image`` and ``test/image``, or images alone, without any folder beside them.
    - Parts may have other usual names (``Training`` and ``Testing``, ``seg_train`` and ``seg_test``) and may lie in a
      folder of their own.
    - A validation part (``val``) becomes the test part if there is no other. Otherwise it is not read.
    - Linked folders are followed. Hidden folders are not read.
    - Images are rotated as their EXIF says. Transparent parts become white, as most viewers and web pages show them.
      Both are this project's choice.

    Args:
        path: the folder.
        kind: what lies in it, ``images_of(size)`` for images.
        labelled: whether the classes matter. Otherwise a folder that holds no parts is read whole, with all folders
            below it, and without labels.

    Returns:
        Images as bytes ``[N, 3, H, W]``, or what else ``kind`` reads, with labels; the test part is None where there
        are no parts.

    Raises:
        DataError: if the folders are neither parts nor classes, or an image cannot be read.
    """
    root = _unwrapped(path, kind)
    names, tally = _names(_folders(root)), Counter[str]()
    flat = _flat_pair(root, names, kind)
    if flat is not None:
        return _without_classes(
            [root / name for name in flat], kind, tally, [name for name in names if name not in flat]
        )
    pair = _pair(root, names, kind)
    if pair is None and (not labelled or (not names and _holds(root, kind))):
        return _without_classes([root], kind, tally)
    if pair is None:
        _refuse_parts(path, root, names, kind)
        notes = [f"'{name}' is read as a class, not as a part" for name in names if _role(name) in BARE]
        if deep := {name: _names(_folders(root / name)) for name in names if not _holds(root / name, kind)}:
            below = listed(dict.fromkeys(itertools.chain(*deep.values())))
            notes.append(
                f"the {kind.plural} of {listed(deep)} lie in folders below ({below}): is each of them one class?"
            )
        return Parts(_read_classes(root, names, kind, tally), None, tuple(names), (*notes, *said(tally, kind)))
    train, test = (_unwrapped(root / name, kind) for name in pair)
    classes, tested = (_names(_folders(part)) for part in (train, test))
    if strange := [name for name in tested if name not in classes]:
        raise DataError(
            f"'{test}' has classes that '{train.name}' does not have: {listed(strange)}. The classes of"
            f" '{train.name}' are {listed(classes)}: give both the same names, capitals included."
        )
    others = [name for name in names if name not in pair]
    if beside := [name for name in others if name in classes]:
        raise DataError(f"'{root}' has {listed(beside)} beside {' and '.join(pair)}: put these classes into the parts.")
    tally.update(_ending(file) for file in _listing(root) if not file.is_dir())
    parts = _read_classes(train, classes, kind, tally), _read_classes(test, tested, kind, tally, classes)
    notes = [f"the folders {listed(others)} are ignored"] if others else []
    return Parts(*parts, tuple(classes), (*notes, *said(tally, kind)))


# --- which folders are what -------------------------------------------------------------------------------------------


def _listing(folder: Path) -> list[Path]:
    """Files and folders in a folder, sorted by name, without hidden ones.

    Raises:
        DataError: if the folder cannot be read, or holds a broken link.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"The folder '{folder}' cannot be read ({error}): check its permissions.") from error
    seen = [child for child in found if child.name[0] != "." and child.name.lower() not in HIDDEN]
    for child in seen:
        if child.is_symlink() and not child.exists():
            raise DataError(f"'{child}' is a link to '{os.readlink(child)}', which does not exist: mend or delete it.")
    return seen


def _folders(path: Path) -> list[Path]:
    return [child for child in _listing(path) if child.is_dir()]


def _ending(file: Path) -> str:
    """The ending under which an ignored file is counted."""
    return file.suffix.lower() or "without suffix"


def _holds(folder: Path, kind: SampleKind) -> bool:
    """Whether samples lie directly in a folder."""
    return any(kind.holds(child) for child in _listing(folder))


def _unwrapped(path: Path, kind: SampleKind) -> Path:
    """The first folder below that holds more than a single folder of folders."""
    seen = {path.resolve()}
    while len(inside := _folders(path)) == 1 and not _holds(path, kind):
        if _holds(inside[0], kind) or not _folders(inside[0]):
            break
        path = inside[0]
        if path.resolve() in seen:
            raise DataError(f"The link '{path}' leads back to a folder that it lies in: delete it.")
        seen.add(path.resolve())
    return path


def _names(paths: Sequence[Path]) -> list[str]:
    return [path.name for path in paths]


def _role(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The part that a folder's name means, if any, and the other words of the name.

    >>> _role("seg_train"), _role("TestImages"), _role("valid-2"), _role("trainer")
    (('train', ('seg',)), ('test', ()), ('validation', ()), (None, ('trainer',)))
    """
    known = "|".join(sorted((*ROLES, *FILLERS), key=len, reverse=True))
    words = re.findall("[^\\W\\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    split = [part for word in words for part in _split(word.lower(), known)]
    roles = {ROLES[word] for word in split if word in ROLES}
    rest = tuple(word for word in split if word not in ROLES and word not in FILLERS)
    return (roles.pop() if len(roles) == 1 else None), rest


def _split(word: str, known: str) -> list[str]:
    """Split a word that is made of known words, as "trainset"; else return it whole."""
    return re.findall(known, word) if re.fullmatch(f"(?:{known})+", word) else [word]


def _pair(root: Path, names: Sequence[str], kind: SampleKind) -> tuple[str, str] | None:
    """The names of the training and the test part. None if no folder of folders is named as a part.

    Raises:
        DataError: if folders are named as parts, but not as one training and one test part.
    """
    groups = _groups([name for name in names if _folders(root / name)])
    whole = [(group["train"], group.get("test") or group["validation"]) for group in groups if _paired(group)]
    if len(whole) == 1 and all(len(found) == 1 for found in whole[0]):
        return whole[0][0][0], whole[0][1][0]
    if whole or not all(_holds(root / name, kind) for group in groups for found in group.values() for name in found):
        raise DataError(f"{_found(root, names, kind)} These are not one training and one test part. {kind.expected}")
    return None


def _flat_pair(root: Path, names: Sequence[str], kind: SampleKind) -> tuple[str, str] | None:
    """The names of a training and a test part without classes: every folder is named as a part and holds samples only.

    A validation part becomes the test part if there is no other.
    """
    if not all(_role(name) in BARE and _holds(root / name, kind) and not _folders(root / name) for name in names):
        return None
    group = {role: found for one in _groups(names) for role, found in one.items()}
    train, test = group.get("train", []), group.get("test") or group.get("validation", [])
    return (train[0], test[0]) if len(train) == len(test) == 1 else None


def _groups(names: Sequence[str]) -> list[dict[str, list[str]]]:
    """The names that mean parts, by part. Names are grouped by their other words, as "seg" in seg_train."""
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in names:
        role, rest = _role(name)
        if role is not None:
            groups.setdefault(rest, {}).setdefault(role, []).append(name)
    return list(groups.values())


def _paired(group: Mapping[str, Sequence[str]]) -> bool:
    return "train" in group and len(group) > 1


def _found(root: Path, names: Sequence[str], kind: SampleKind) -> str:
    """A sentence that lists what lies in a folder."""
    shown = []
    for name in names:
        below = _listing(root / name)
        samples, folders = (sum(map(counts, below)) for counts in (kind.holds, Path.is_dir))
        shown.append(f"'{name}' ({f'{folders} folders' if folders else f'{samples} {kind.plural}'})")
    return f"'{root}' holds {listed(shown) or 'no folders'}."


def _refuse_parts(path: Path, root: Path, names: Sequence[str], kind: SampleKind) -> None:
    """Refuse folders that cannot be classes.

    Raises:
        DataError: if they lie in a single part, two are named as parts, one holds both parts, or several hold the same
            folders.
    """
    if alone := [name for name in root.relative_to(path).parts if _role(name) in BARE]:
        wanted = "'test' or 'val'" if _role(alone[-1])[0] == "train" else "'train'"
        raise DataError(f"'{path}' has a folder '{alone[-1]}' but no {wanted} beside it. {kind.expected}")
    if sum(_role(name) in BARE for name in names) > 1:
        raise DataError(
            f"{_found(root, names, kind)} These are names of parts, without a folder for each class. {kind.expected}"
        )
    if held := [name for name in names if any(map(_paired, _groups(_names(_folders(root / name)))))]:
        raise DataError(
            f"{_found(root, names, kind)} '{held[0]}' holds a training and a test part: give '{root / held[0]}', or"
            f" move the parts above the classes. {kind.expected}"
        )
    inside = [() if _holds(root / name, kind) else tuple(_names(_folders(root / name))) for name in names]
    (below, times), *_ = Counter(found for found in inside if len(found) > 1).most_common(1) or [((), 0)]
    if times > 1:
        raise DataError(
            f"{_found(root, names, kind)} {times} of them hold the same folders ({listed(below)}): are these classes,"
            f" and those parts? {kind.expected}"
        )


def said(tally: Counter[str], kind: SampleKind) -> list[str]:
    """Notes on how files and samples were read."""
    notes = [f"{tally.pop(kind)} {text}" for kind, text in SAID.items() if tally[kind]]
    late, events = tally.pop("late", 0), tally.pop("events", 0)
    if late > MUCH * events:
        notes.append(f"{late / events:.0%} of the events came after the last frame and are left out")
    others = Counter({kind: count for kind, count in tally.items() if count and kind not in SAID})
    return notes + ([f"files that are not {kind.plural} of a class are ignored ({counted(others)})"] if others else [])


# --- samples ----------------------------------------------------------------------------------------------------------


def _without_classes(parts: Sequence[Path], kind: SampleKind, tally: Counter[str], others: Sequence[str] = ()) -> Parts:
    """One part, or a training and a test part, of samples without labels, from all files below each."""
    read = []
    for part in parts:
        samples = kind.read(part, _class_files(part, kind, tally), tally)
        read.append((samples, torch.full((len(samples),), UNKNOWN)))
    notes = ["it is read without classes: training needs a teacher's logits or features"]
    notes += [f"the folders {listed(others)} are ignored"] if others else []
    return Parts(read[0], read[1] if len(read) > 1 else None, (), (*notes, *said(tally, kind)))


def _read_classes(
    path: Path, names: Sequence[str], kind: SampleKind, tally: Counter[str], classes: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """The samples of some classes, bytes ``[N, ...]``, and their class numbers ``[N]``."""
    numbers = {name: number for number, name in enumerate(classes or names)}
    files = [(file, numbers[name]) for name in names for file in _class_files(path / name, kind, tally)]
    tally.update(_ending(file) for file in _listing(path) if not file.is_dir())
    if not files:
        lying = f"; {kind.plural} lie in it, but not in class folders" if _holds(path, kind) else ""
        raise DataError(
            f"The folder '{path}' holds no {kind.plural}{lying}: expected {path}/CLASS/{kind.example}"
            f" ({', '.join(kind.suffixes)})."
        )
    samples = kind.read(path, [file for file, _ in files], tally)
    return samples, torch.tensor([number for _, number in files])


def _class_files(folder: Path, kind: SampleKind, tally: Counter[str]) -> list[Path]:
    """All samples of a class, sorted by path.

    Raises:
        DataError: if there are none.
    """
    files = list(files_below(folder, (), tally))
    samples = [file for file in files if kind.holds(file)]
    others = Counter(_ending(file) for file in files if not kind.holds(file))
    tally.update(others)
    if not samples:
        there = f", but {counted(others)}" if others else ""
        raise DataError(
            f"The class folder '{folder}' holds no {kind.plural}{there}: expected {', '.join(kind.suffixes)}. Add some,"
            " or delete it."
        )
    return samples


def files_below(folder: Path, above: tuple[Path, ...] = (), tally: Counter[str] | None = None) -> Iterator[Path]:
    """Every file below a folder, also through links, without hidden ones.

    Args:
        folder: the folder.
        above: the folders that it lies in, as far as they are walked through.
        tally: counts the links.

    Raises:
        DataError: if a folder cannot be read, or a link is broken or leads back.
    """
    tally = Counter() if tally is None else tally
    here = folder.resolve()
    if here in above:
        raise DataError(f"The link '{folder}' leads back to a folder that it lies in: delete it.")
    tally["linked"] += folder.is_symlink()
    for child in _listing(folder):
        if child.is_dir():
            yield from files_below(child, (*above, here), tally)
        else:
            yield child
