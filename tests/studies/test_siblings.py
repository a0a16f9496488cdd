"""What the studies of the siblings prepare and compare."""

import numpy as np
import pytest
import torch

from spikedistill.data.images import load_images
from spikedistill.errors import DataError
from spikedistill.studies import STUDIES
from spikedistill.studies.siblings import take_share


@pytest.fixture
def recordings(tmp_path):
    """A set like N-MNIST with 1001 training and 101 test recordings, each with its own content."""
    for part, many in (("Train", 1001), ("Test", 101)):
        for number in range(1, many + 1):
            file = tmp_path / "NMNIST" / part / str(number % 10) / f"{number:05d}.bin"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"{part} {number}".encode())
    return tmp_path / "NMNIST"


def found(folder):
    """The contents of the files below a folder, and whether each lies in the folder of its class."""
    files = [*folder.glob("*/*.bin")]
    contents = [file.read_text() for file in files]
    assert all(int(text.split()[1]) % 10 == int(file.parent.name) for file, text in zip(files, contents))
    return sorted(contents)


def test_the_small_part_of_n_mnist_is_300_recordings_against_800(recordings, tmp_path):
    share = tmp_path / "share"
    take_share(recordings, share)
    assert found(share / "train") == sorted(f"Train {number}" for number in range(1, 301))
    expected = [f"Train {number}" for number in range(301, 1001)] + [f"Test {number}" for number in range(1, 101)]
    assert found(share / "test") == sorted(expected)
    (tmp_path / "NMNIST" / "Train" / "1" / "00001.bin").unlink()
    take_share(recordings, share)  # it is there already
    assert len(found(share / "train")) == 300


def test_too_few_recordings_are_refused_and_nothing_is_made(recordings, tmp_path):
    for number in (1, 1001):
        (recordings / "Train" / str(number % 10) / f"{number:05d}.bin").unlink()
    with pytest.raises(DataError, match="holds 999 recordings below Train and 101 below Test"):
        take_share(recordings, tmp_path / "share")
    assert not (tmp_path / "share").exists()


def test_no_image_that_a_test_recording_shows_teaches(recordings, tmp_path):
    """Recording n is MNIST's training image n, and those of 301 to 1000 test."""
    images = torch.arange(1005).div(4, rounding_mode="floor").to(torch.uint8)
    parts = {"train_images": images[:, None, None].expand(-1, 2, 2).numpy(), "train_labels": (images % 10).numpy()}
    parts |= {"test_images": parts["train_images"][:20], "test_labels": (images % 10).repeat(2)[:20].numpy()}
    np.savez(tmp_path / "mnist.npz", class_names=np.array([*"0123456789"]), **parts)
    study = STUDIES["cross-kd"]("small", str(tmp_path), tmp_path / "runs")
    (tmp_path / "runs" / "small").mkdir(parents=True)
    study.prepare()
    (teacher,) = (made for made, _ in study.teachers.values())
    sources = {cell.recipe.data.source for cell in study.cells} - {None}
    assert sources == {teacher.data.name}
    shown = load_images(teacher.data.name)
    assert torch.equal(shown.train_images[:, 0, 0, 0], torch.cat([images[:300], images[1000:]]))
    assert torch.equal(shown.train_labels, torch.cat([images[:300], images[1000:]]).long() % 10)
    study.prepare()  # they are there already


@pytest.mark.parametrize("name", [name for name in STUDIES if not name.startswith("kdsnn")])
def test_students_of_a_study_differ_in_method_and_seed_alone(name, tmp_path):
    """All students of a sibling's study have one network and one training, so that a gain is the method's."""
    made = STUDIES[name]("small", "data", tmp_path)
    seeds = {}
    for cell in made.cells:
        seeds.setdefault((cell.method, cell.setting), []).append(cell.seed)
    more = {("direct", ""), ("cross-kd", "")} if name == "cross-kd" else set()
    assert seeds == {key: [*range(12 if key in more else 3)] for key in seeds} and more <= seeds.keys()
    assert made.seeds == max(map(len, seeds.values()))
    students = {cell.recipe.student for cell in made.cells}
    trainings = {cell.recipe.training.epochs for cell in made.cells}
    assert len(students) == len(trainings) == 1


def test_windows_are_taught_by_a_train_of_several_steps(tmp_path):
    """Spikes of a single step are the same in every window, so nothing about windows could be learned from them."""
    counted = 0
    for name in STUDIES:
        made = STUDIES[name]("small", "data", tmp_path)
        for cell in made.cells:
            if getattr(cell.recipe.method, "window", 0):
                taught_by, _ = made.teachers[cell.teacher]
                assert taught_by.student.timesteps > 1 and cell.recipe.student.timesteps > 1, cell.path
                counted += 1
    assert counted
