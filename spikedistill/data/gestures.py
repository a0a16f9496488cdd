"""The folder of DVS128 Gesture: a file per trial, with labels beside it (Amir et al., CVPR 2017).

``trials_to_train.txt`` and ``trials_to_test.txt`` name the files of both parts. ``NAME.aedat`` holds the events of a
trial, and ``NAME_labels.csv`` a line for each gesture: its class from 1, and the times of its begin and end in
microseconds. ``gesture_mapping.csv`` has the names of the classes.
"""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spikedistill.data.folders import said
from spikedistill.data.parts import Parts
from spikedistill.data.recordings import Recordings, read_recording
from spikedistill.errors import DataError

TRIALS = {"train": "trials_to_train.txt", "test": "trials_to_test.txt"}
"""The files that list a part's trials."""
SENSOR = (128, 128)
"""Rows and columns of the camera, if no others are given."""


def is_gestures(path: Path) -> bool:
    """Whether a folder lies as DVS128 Gesture is published."""
    return all((path / name).is_file() for name in TRIALS.values())


def read_gestures(path: Path, recordings: Recordings) -> Parts:
    """The gestures of a folder as frames, those of a trial one after the other.

    Args:
        path: the folder.
        recordings: how a gesture becomes frames.

    Raises:
        DataError: if a file is missing or damaged, a line of labels cannot be read, or a gesture has no event.
    """
    tally = Counter[str]()
    parts = {part: _read_part(path, name, recordings, tally) for part, name in TRIALS.items()}
    most = 1 + max(int(labels.max()) for _, labels in parts.values())
    return Parts(parts["train"], parts["test"], _names(path, most), tuple(said(tally, recordings.kind())))


def _read_part(path: Path, name: str, recordings: Recordings, tally: Counter[str]) -> tuple[Tensor, Tensor]:
    trials = [path / trial for trial in _text(path / name).split()]
    gestures = [_gestures(file.with_name(f"{file.stem}_labels.csv")) for file in trials]
    labels = [label for found in gestures for label, _, _ in found]
    if not labels:
        raise DataError(f"'{path / name}' names no trial with a gesture.")
    frames = recordings.begun(path / name, len(labels), recordings.sensor or SENSOR)
    for file, found in zip(trials, gestures):
        events = read_recording(file)
        for label, begin, end in found:
            inside = (events.t >= begin) & (events.t < end)
            if not inside.any():
                raise DataError(f"'{file}' has no event of gesture {label + 1} from {begin} to {end}: it is cut.")
            frames.add(file, events.of(inside))
    return frames.checked(tally), torch.tensor(labels)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"'{file}' cannot be read as text ({error}): it is missing or damaged.") from error


def _gestures(file: Path) -> list[tuple[int, int, int]]:
    """Class from 0, begin and end of each gesture of a trial."""
    try:
        table = np.loadtxt(file, dtype=np.int64, delimiter=",", skiprows=1, ndmin=2)
        if table.shape[1] != 3 or (table[:, 0] < 1).any() or (table[:, 2] <= table[:, 1]).any():
            raise ValueError("expected class, begin and end in each line, with classes from 1")
    except (OSError, ValueError) as error:
        raise DataError(f"The labels '{file}' cannot be read: {error}.") from error
    return [(int(label) - 1, int(begin), int(end)) for label, begin, end in table]


def _names(path: Path, count: int) -> tuple[str, ...]:
    """The names of the classes; without the file of names, their numbers from 1."""
    numbers = {number: str(number) for number in range(1, count + 1)}
    file = path / "gesture_mapping.csv"
    if file.is_file():
        lines = csv.reader(_text(file).splitlines())
        numbers |= {int(line[-1]): line[0] for line in lines if line and line[-1].strip().isdigit()}
    return tuple(numbers[number] for number in sorted(numbers))
