"""The objectives of examples/objectives.py, trained from the command line: spikes teach spikes, and two streams."""

import sys
from pathlib import Path

import numpy as np
import pytest

from spikedistill.cli import main
from spikedistill.files import read_tensors
from spikedistill.train.run import Run

OBJECTIVES = Path(__file__).parents[1] / "examples" / "objectives.py"
QUICK = "--epochs 2 --batch-size 16 --lr 0.05 --device cpu --precision fp32 --validation 0"

pytestmark = pytest.mark.usefixtures("without_compiler")


def call(line, **names):
    """Run the command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spikedistill", *(part.format(**names) for part in line.split())])
        main()


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs):
    """Images, event frames of the same classes in the same order, and a teacher."""
    folder = tmp_path_factory.mktemp("examples")
    write_blobs(folder, 48, 24)
    images, draw = np.load(folder / "blobs.npz"), np.random.default_rng(0)
    arrays = {name: images[name] for name in ("train_labels", "test_labels")}
    for part in ("train", "test"):
        frames = draw.poisson(0.2, (len(images[f"{part}_labels"]), 2, 2, 8, 8))
        for number, label in enumerate(images[f"{part}_labels"]):
            frames[number, :, :, 2 * label : 2 * label + 2] += 3
        arrays[f"{part}_images"] = frames.astype(np.uint8)
    np.savez(folder / "events.npz", **arrays)
    call(f"teach --network vgg9 --width 4 --data {{home}}/blobs.npz --out {{home}}/ann {QUICK}", home=folder)
    return folder


def terms(path):
    return {name for line in Run(path).lines("metrics") for name in line} - {"epoch", "step", "lr", "loss"}


def test_spikes_of_a_large_student_teach_a_small_one(home):
    call(
        f"distill --teacher {{home}}/ann --timesteps 4 --data {{home}}/blobs.npz --out {{home}}/large {QUICK}",
        home=home,
    )
    small = "distill --teacher {home}/large --student vgg9 --student-width 2 --timesteps 2 --data {home}/blobs.npz"
    call(f"{small} --method {OBJECTIVES}:SpikeMatching --views 1 --out {{home}}/small {QUICK}", home=home)
    assert {"labels", "spikes"} < terms(home / "small")
    given, closed = (Run(home / "small").read(name)["method"] for name in ("recipe", "results"))
    assert given["layers"] == [] and len(closed["layers"]) == 3
    assert all(line["spikes"] > 0 for line in Run(home / "small").lines("metrics"))
    kept = next((home / "small" / "answers").iterdir())
    assert {f"spikes.{theirs.replace('/', '%2F')}.npy" for theirs, _ in closed["layers"]} < {
        f.name for f in kept.iterdir()
    }


def test_the_teacher_of_two_streams_falls_silent_and_paired_images_go_with_events(home):
    two = "distill --data {home}/events.npz --source {home}/blobs.npz --paired --teacher {home}/ann --student vgg9"
    options = "--student-width 4 --coding frames --timesteps 2 --until 0.5 --soft-weight 0.5"
    call(f"{two} {options} --method {OBJECTIVES}:TwoStreams --out {{home}}/two {QUICK}", home=home)
    first, last = Run(home / "two").lines("metrics")
    assert terms(home / "two") >= {"events", "images", "soft"}
    assert first["soft"] > 0.001 and last["soft"] < 0.1 * first["soft"]
    assert "agreement" not in Run(home / "two").read("results")  # the teacher saw images, the student saw events
    _, facts = read_tensors(home / "two" / "model.safetensors")
    assert facts["conversion"]["coding"]["name"] == "frames"


def test_squared_distances_of_single_steps_are_a_method(home):
    line = f"distill --teacher {{home}}/ann --timesteps 2 --data {{home}}/blobs.npz --method {OBJECTIVES}:PerStepMSE"
    call(f"{line} --weight-of-logits 0.5 --out {{home}}/own {QUICK}", home=home)
    assert terms(home / "own") >= {"labels", "logits"}
    assert (home / "own" / "method.py").read_bytes() == OBJECTIVES.read_bytes()
