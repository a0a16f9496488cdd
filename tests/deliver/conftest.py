"""Runs that energy and immunity are measured on; other files of this folder have runs of their own."""

import json
import shutil

import pytest

from spikedistill.compute import place
from spikedistill.objective.direct import Direct
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.05, precision="fp32", device="cpu")


@pytest.fixture(scope="session")
def train_home(tmp_path_factory, write_blobs):
    """Makes a folder with data, a teacher, and students by name, each of a choice and a method."""

    def train(**students):
        folder = tmp_path_factory.mktemp("runs")
        write_blobs(folder, 48, 24)
        data = Data(str(folder / "blobs.npz"))
        teach(Teach("vgg9", width=4, data=data, training=TRAINING), folder / "teacher")
        teacher = TeacherChoice(str(folder / "teacher"))
        for name, (choice, method) in students.items():
            distill(Distill(teacher, choice, method, data, TRAINING), folder / name)
        return folder

    return train


@pytest.fixture(scope="module")
def home(train_home):
    """A folder with data, a teacher, and a student of two steps."""
    return train_home(student=(StudentChoice(timesteps=2), Direct()))


@pytest.fixture
def elsewhere(home, tmp_path, monkeypatch):
    """A copy of the student that was trained in bfloat16, as its record alone says, for this processor has none."""
    monkeypatch.setattr(place, "processor_flags", lambda: {"avx2"})
    shutil.copytree(home / "student", tmp_path / "elsewhere")
    (timing,) = Run(home / "student").lines("timing")
    (tmp_path / "elsewhere" / "timing.jsonl").write_text(json.dumps({**timing, "dtype": "bfloat16"}) + "\n")
    recipe = Run(home / "student").read("recipe")
    recipe["training"] |= {"precision": "auto", "channels_last": False}
    Run(tmp_path / "elsewhere").write("recipe", recipe)
    return tmp_path / "elsewhere"
