"""Event frames, [N, T, 2, H, W] in an .npz file, from the command line to a measured student."""

import itertools
import re

import numpy as np
import pytest
import torch

from spikedistill.student.save import load_student
from spikedistill.train.run import Run

QUICK = ("--epochs", 1, "--batch-size", 16, "--lr", 0.05, "--device", "cpu", "--precision", "fp32")
FRAMES = ("--coding", "frames", "--timesteps", 4)


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs, call):
    """A folder with images, frames of which each class is bright at a time step of its own, and a student of them."""
    folder = tmp_path_factory.mktemp("events")
    write_blobs(folder, 48, 24)
    random, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 48), ("test", 24)):
        labels = np.arange(count) % 3
        frames = random.poisson(0.3, (count, 4, 2, 8, 8))
        frames[np.arange(count), labels] += 3
        arrays |= {f"{part}_images": frames.astype(np.uint8), f"{part}_labels": labels}
    np.savez(folder / "events.npz", **arrays)
    assert call(*distill(folder, *FRAMES), "--out", folder / "student") == 0
    return folder


def distill(home, *options, data="events"):
    """The command that trains a student without a teacher."""
    network = ("--teacher", "none", "--method", "direct", "--student", "vgg9", "--student-width", 4)
    return ("distill", "--data", home / f"{data}.npz", *QUICK, *network, *options)


def test_a_student_sees_as_many_frames_as_it_has_steps(home):
    results, student = Run(home / "student").read("results"), load_student(home / "student")
    assert len(results["accuracy_by_step"]) == student.timesteps == 4 and 0 < results["firing_rate"] < 100
    assert student.core.get_submodule("layer1.0").in_channels == 2
    assert (student.mean.flatten().tolist(), student.std.flatten().tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_it_is_measured_again(command, home, call, capsys):
    assert call(command, home / "student") == 0
    caught, results = capsys.readouterr(), Run(home / "student").read("results")
    assert f" {results['test_accuracy']:.2f} " in caught.out
    assert caught.err == ("evaluate: measuring on 24 test images\n" if command == "evaluate" else "")


def test_it_is_measured_with_early_exits(home, call, capsys):
    with np.load(home / "events.npz") as arrays, torch.no_grad():
        logits = load_student(home / "student")(torch.from_numpy(arrays["test_images"]).float().transpose(0, 1))
    likeliest = (logits.cumsum(0) / torch.arange(1, 5).view(-1, 1, 1)).softmax(-1).amax(-1)
    middle = likeliest[:3].flatten().sort().values[35:37]
    for confidence in (float(middle.mean()), 0.5):
        sure = likeliest > confidence
        sure[-1] = True
        steps = float((sure.int().argmax(0) + 1).double().mean())
        assert call("evaluate", home / "student", "--confidence", confidence) == 0
        assert re.search(rf"(?m)^early exit steps +{steps:.2f} \(mean\)$", capsys.readouterr().out)
        assert 1 < steps < 4 or confidence == 0.5


def test_it_is_measured_under_what_event_cameras_do_wrong(home, tmp_path, call, capsys):
    chosen = ("--kinds", "event", "hardware", "--images", 6)
    assert call("immunity", home / "student", *chosen, "--out", tmp_path / "immunity") == 0
    assert {line["kind"] for line in Run(tmp_path / "immunity").lines("scores")} == {"clean", "event", "hardware"}
    assert call("energy", home / "student", "--images", 6) == 0
    assert call("immunity", home / "student", "--kinds", "noise", "--out", tmp_path / "noise") == 2
    assert "'noise' is not for inputs of shape" in capsys.readouterr().err


def test_it_teaches_a_smaller_one(home, tmp_path, call):
    taught = ("--teacher", home / "student", "--method", "kdsnn", "--student-width", 2)
    assert call(*distill(home, *FRAMES), *taught, "--out", tmp_path / "small") == 0
    results = Run(tmp_path / "small").read("results")
    assert results["teacher_accuracy"] == Run(home / "student").read("results")["test_accuracy"]


@pytest.mark.parametrize(
    "options, data, message",
    [
        (("--coding", "frames", "--timesteps", 3), "events", "T=4: give --coding frames --timesteps 4"),
        (("--coding", "direct", "--timesteps", 4), "events", "holds event frames, T=4: give --coding frames"),
        (("--coding", "rate", "--timesteps", 4), "events", "holds event frames, T=4: give --coding frames"),
        (FRAMES, "blobs", "'blobs' holds images: give --coding direct"),
        ((*FRAMES, "--event-binning", "number"), "events", "event_binning of"),
        ((*FRAMES, "--sensor", 34, 34), "events", "is for folders of event recordings: omit it"),
        (("--event-frames", 3), "blobs", "event_frames of"),
        ((*FRAMES, "--cutout", "2"), "events", "which are for images"),
    ],
)
def test_what_does_not_fit_is_refused(options, data, message, home, tmp_path, call, capsys):
    assert call(*distill(home, *options, data=data), "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_an_ann_is_not_taught_on_them(home, tmp_path, call, capsys):
    command = ("teach", "--data", home / "events.npz", "--network", "vgg9", *QUICK, "--out", tmp_path / "out")
    assert call(*command) == 2
    assert "'events' holds event frames, but an ANN has no time steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_ann_is_no_teacher_of_frames_and_its_images_come_by_source(home, tmp_path, call, capsys):
    ann = ("teach", "--network", "vgg9", "--width", 4, "--data", home / "blobs.npz", *QUICK, "--out", home / "ann")
    assert call(*ann) == 0
    known = ("distill", "--data", home / "events.npz", *QUICK, *FRAMES, "--student", "vgg9", "--student-width", 4)
    response = ("--teacher", home / "ann", "--method", "kdsnn-response", "--out", tmp_path / "run")
    assert call(*known, *response) == 2
    assert "'events' holds event frames: give it images by --source" in capsys.readouterr().err
    assert call(*known, *response, "--source", home / "blobs.npz") == 0
    assert call(*known, "--teacher", "none", "--method", "direct", "--source", home / "blobs.npz") == 2
    assert "is not used by method direct: omit source" in capsys.readouterr().err


def test_cross_kd_learns_events_from_an_image_teacher(home, tmp_path, call):
    ann = ("teach", "--network", "vgg9", "--width", 4, "--data", home / "blobs.npz", *QUICK, "--out", tmp_path / "ann")
    assert call(*ann) == 0
    pair = ("--source", home / "blobs.npz", "--teacher", tmp_path / "ann", "--method", "cross-kd")
    student = ("--student", "vgg9", "--student-width", 4)
    recorded = ("distill", "--data", home / "events.npz", *QUICK, *FRAMES, *student, "--crop", 1, "--flip")
    assert call(*recorded, *pair, "--out", tmp_path / "recorded") == 0
    simulated = ("distill", "--data", home / "blobs.npz", *QUICK, "--events", "simulated", "--timesteps", 3, *student)
    assert call(*simulated, *pair, "--paired", "--out", tmp_path / "simulated") == 0
    for name, steps in (("recorded", 4), ("simulated", 3)):
        results, (line, *_) = Run(tmp_path / name).read("results"), Run(tmp_path / name).lines("metrics")
        assert len(results["accuracy_by_step"]) == steps
        assert {"events", "images", "soft", "dissimilarity"} <= line.keys()
    recipe = Run(tmp_path / "simulated").recipe()
    assert (recipe["data"]["event_frames"], recipe["student"]["coding"]) == (3, "frames")
    assert call("evaluate", tmp_path / "simulated") == 0


def test_events_do_not_go_into_the_network_of_an_image_teacher(home, tmp_path, call, capsys):
    ann = ("teach", "--network", "vgg9", "--width", 4, "--data", home / "blobs.npz", *QUICK, "--out", tmp_path / "ann")
    assert call(*ann) == 0
    pair = ("--source", home / "blobs.npz", "--teacher", tmp_path / "ann", "--method", "cross-kd")
    assert call("distill", "--data", home / "events.npz", *QUICK, *FRAMES, *pair, "--out", tmp_path / "out") == 2
    said = "whose inputs have 3 channels, but 'events' has 2 (events have two): name a student's network by --student"
    assert said in capsys.readouterr().err


def test_a_folder_of_recordings_needs_no_other_word(home, tmp_path, call, capsys):
    random = np.random.default_rng(0)
    for part, label, number in itertools.product(("train", "test"), ("0", "1", "2"), range(8)):
        (tmp_path / "events" / part / label).mkdir(parents=True, exist_ok=True)
        t, p = np.sort(random.integers(0, 9000, 50)), random.integers(0, 2, 50)
        x, y = random.integers(0, 11, (2, 50)) + 11 * int(label)
        np.savez(tmp_path / "events" / part / label / f"{number}.npz", t=t, x=x, y=y, p=p)
    ann = ("teach", "--network", "vgg9", "--width", 4, "--data", home / "blobs.npz", *QUICK, "--out", tmp_path / "ann")
    assert call(*ann) == 0
    known = ("--source", home / "blobs.npz", "--teacher", tmp_path / "ann", "--method", "cross-kd", "--batch-size", 8)
    student = ("--student", "vgg9", "--student-width", 4, "--timesteps", 3, "--image-size", 16)
    given = ("distill", "--data", tmp_path / "events", *QUICK, *student, *known, "--event-binning", "number")
    assert call(*given, "--out", tmp_path / "run") == 0
    assert Run(tmp_path / "run").recipe()["data"]["event_frames"] == 3
    assert load_student(tmp_path / "run").timesteps == 3
    assert call("evaluate", tmp_path / "run") == 0
    assert call(*given, "--events", "simulated", "--out", tmp_path / "other") == 2
    assert "holds event recordings already: omit events" in capsys.readouterr().err
    assert call(*given, "--event-duration", 5, "--out", tmp_path / "other") == 2
    assert "event_duration (=5.0) must be above 0, with event_binning=time" in capsys.readouterr().err


def test_events_are_not_simulated_from_events(home, tmp_path, call, capsys):
    assert call(*distill(home, *FRAMES, "--events", "simulated"), "--out", tmp_path / "out") == 2
    assert "'events' holds event frames already: leave out --events" in capsys.readouterr().err
