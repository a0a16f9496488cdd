import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spikedistill.data.augment import Augment
from spikedistill.data.feed import MemoryFeed, PairFeed
from spikedistill.data.images import ImageSet
from spikedistill.errors import SpikeDistillError
from spikedistill.files import read_tensors, write_tensors
from spikedistill.neuron.dynamics import Neuron
from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature
from spikedistill.objective.logits import cross_entropy_of_mean
from spikedistill.objective.schedule import Ramp, Switch
from spikedistill.objective.terms import Needs, Objective, Sum
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import DirectCoding, FrameCoding, RateCoding
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Architecture, Teacher, TrainableANN
from spikedistill.train import loop
from spikedistill.train.loop import Trainer, fit
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


class Cut(Exception):
    """Stands for whatever ends a process."""


def convolutional(width, dropout=0.0):
    stem = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def spiking(coding, dropout=0.0):
    neuron = Neuron(learn_threshold=True)
    student, _ = to_spiking(
        convolutional(6, dropout),
        Conversion(timesteps=2, neuron=neuron, inherit=False, coding=coding),
        mean=MEAN,
        std=STD,
    )
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student


LEARNERS = {
    "an ANN": lambda: TrainableANN(convolutional(6), MEAN, STD),
    "an ANN with dropout": lambda: TrainableANN(convolutional(6, dropout=0.5), MEAN, STD),
    "a student": lambda: spiking(DirectCoding()),
    "a student with dropout": lambda: spiking(DirectCoding(), dropout=0.5),
    "a student with random spikes": lambda: spiking(RateCoding()),
}


def train(learner, images, path, changes, objective=None):
    """Two epochs of five steps with all that keeps state: adapters, augmentation, momentum."""
    torch.manual_seed(1)
    student = LEARNERS[learner]()
    teacher = Teacher(convolutional(4), MEAN, STD)
    config, objective = choices(changes), objective or KDSNN((("2", "2"),))
    feed = MemoryFeed(images, config.batch_size, augment=Augment(crop=1), views=config.views)
    return finish(student, objective, feed, config, path, teacher)


def train_on_pairs(images, path, paired, changes):
    """Two epochs of five steps on frames, beside each an image of its class."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), *convolutional(6)[1:])
    student, _ = to_spiking(network, Conversion(timesteps=2, neuron=Neuron(), inherit=False, coding=FrameCoding()))
    (layer,) = student.neurons.values()
    layer.backend = "reference"
    teacher, config = Teacher(convolutional(4), MEAN, STD), choices(changes)
    parts = (images.train_images, images.test_images)
    train, test = (part[:, None, :2].repeat(1, 2, 1, 1, 1) // 50 for part in parts)
    frames = ImageSet("frames", train, images.train_labels, test, images.test_labels, images.class_names)
    feed = PairFeed(MemoryFeed(frames, config.batch_size, views=config.views), images, paired)
    return finish(student, Sum(((Ramp(), BothStreams()), (0.5, KDSNN((("2", "2"),))))), feed, config, path, teacher)


def choices(changes):
    usual = {"epochs": 2, "batch_size": 16, "precision": "fp32", "device": "cpu", "checkpoint_minutes": 0.0}
    return Training(**{**usual, **changes})


def finish(student, objective, feed, config, path, teacher):
    """Begin the run or go on with it; whatever random numbers were drawn before."""
    path.mkdir(exist_ok=True)
    torch.manual_seed(len(os.listdir(path)))
    last = fit(student, objective, feed, config, Run(path), teacher=teacher)
    return student.state_dict(), last


@dataclass(frozen=True)
class BothStreams(Objective):
    """Cross-entropy of the answers to both streams."""

    @property
    def needs(self):
        return Needs(source=True)

    def __call__(self, batch, modules):
        answers = {"labels": batch.student, "images": batch.require_source()}
        return {name: cross_entropy_of_mean(answer.logits, batch.labels) for name, answer in answers.items()}


def cut(patch, target, name, calls):
    """Let a function be called so often, then end the run when it is called again."""
    original, left = getattr(target, name), [calls]

    def counted(*args, **kwargs):
        if not left[0]:
            raise Cut
        left[0] -= 1
        return original(*args, **kwargs)

    patch.setattr(target, name, counted)


def assert_same_run(first, second, name="metrics.jsonl"):
    assert (first / name).read_bytes() == (second / name).read_bytes()
    checkpoints = [load_file(path / "checkpoint.safetensors") for path in (first, second)]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    for key, value in checkpoints[0].items():
        assert torch.equal(value, checkpoints[1][key]), key
    assert read_tensors(first / "checkpoint.safetensors")[1] == read_tensors(second / "checkpoint.safetensors")[1]


def assert_resumes(work, tmp_path, monkeypatch):
    """Cut twice and resumed is the same run as at one go."""
    whole, last = work(tmp_path / "whole")
    for steps in (3, 4):
        with monkeypatch.context() as patch, pytest.raises(Cut):
            cut(patch, Trainer, "step", steps)
            work(tmp_path / "cut")
    resumed, again = work(tmp_path / "cut")
    assert_same_bits(whole, resumed)
    assert last == again
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("learner", ["a student with dropout", "a student with random spikes"])
def test_numbers_drawn_between_the_steps_do_not_change_them(learner, blobs, tmp_path, monkeypatch):
    usual, _ = train(learner, blobs, tmp_path / "usual", {})
    line = Trainer.line

    def draws(self, *given):
        torch.rand(7)
        return line(self, *given)

    monkeypatch.setattr(Trainer, "line", draws)
    assert_same_bits(train(learner, blobs, tmp_path / "drawn", {})[0], usual)


MUON = {"optimizer": "muon", "lookahead": 3, "norm_lr": 8.0, "schedule": "one-cycle", "lr_first": 0.2, "lr_last": 0.1}
ADAMW = {"optimizer": "adamw", "lr": 0.01}


@pytest.mark.parametrize(
    "learner, changes",
    [
        ("an ANN", {}),
        ("an ANN", {"ema": 0.8}),
        ("an ANN", ADAMW),
        ("an ANN", {"views": 1}),
        ("an ANN", MUON),
        ("an ANN with dropout", {"channels_last": False}),
        ("an ANN with dropout", {**ADAMW, "ema": 0.5, "clip": 0.1}),
        ("a student", {}),
        ("a student", {"lookahead": 4}),
        ("a student", {**ADAMW, "ema": 0.5, "schedule": "one-cycle"}),
        ("a student with dropout", {"ema": 0.8}),
        ("a student with random spikes", ADAMW),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(learner, changes, blobs, tmp_path, monkeypatch):
    assert_resumes(lambda path: train(learner, blobs, path, changes), tmp_path, monkeypatch)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("recompute", ["neurons", "stages"])
def test_resumed_in_another_way_is_the_same_up_to_rounding(recompute, optimizer, blobs, tmp_path, monkeypatch):
    """With less memory, in another memory order: as after an end for lack of memory."""
    changes = {"optimizer": optimizer, "lr": 0.01}
    whole, line = train("a student", blobs, tmp_path / "whole", changes)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut(patch, Trainer, "step", 4)
        train("a student", blobs, tmp_path / "cut", changes)

    def saving():
        student = spiking(DirectCoding())
        student.recompute = recompute
        return student

    monkeypatch.setitem(LEARNERS, "a student", saving)
    others = {"channels_last": False, "convolutions": "torch", "keep_memory": False}
    resumed, again = train("a student", blobs, tmp_path / "cut", changes | others)
    assert again == pytest.approx(line, rel=1e-4)
    for name, value in whole.items():
        # batch norm undoes the bias before it: its gradient is rounding alone, and AdamW makes whole steps of that
        if value.is_floating_point() and value.shape == (6,) and optimizer == "adamw" and "weight" not in name:
            continue
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learner", ["an ANN with dropout", "a student"])
def test_a_sum_with_schedules_and_adapters_is_resumed_like_any_objective(learner, blobs, tmp_path, monkeypatch):
    parts = ((Ramp(), KDSNN((("2", "2"),))), (Switch(), KDSNNFeature((("0", "0"),), adapt=True)))
    assert_resumes(lambda path: train(learner, blobs, path, {}, Sum(parts)), tmp_path, monkeypatch)
    names = load_file(tmp_path / "cut" / "checkpoint.safetensors").keys()
    assert {"lesson.adapters.0.0.weight", "lesson.adapters.1.0.weight"} <= names


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("changes", [{}, {"views": 1}])
def test_a_run_on_two_streams_is_resumed_like_any_run(paired, changes, blobs, tmp_path, monkeypatch):
    assert_resumes(lambda path: train_on_pairs(blobs, path, paired, changes), tmp_path, monkeypatch)


@pytest.mark.parametrize("minutes", [0.0, 60.0], ids=["checkpoint-every-step", "checkpoint-every-epoch"])
@pytest.mark.parametrize(
    "target, name, calls",
    [
        (Trainer, "step", 0),
        (Trainer, "step", 1),
        (Trainer, "step", 5),
        (Trainer, "step", 6),
        (Trainer, "step", 9),
        (Trainer, "save", 0),
        (Trainer, "save", 1),
        (loop, "predict", 0),
        (loop, "predict", 1),
        (Run, "append", 0),
        (Run, "append", 1),
        (Run, "append", 2),
        (Run, "append", 3),
        (Run, "lines", 0),
        (os, "replace", 1),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_moment_of_the_interruption_does_not_matter(target, name, calls, minutes, blobs, tmp_path, monkeypatch):
    changes = {"checkpoint_minutes": minutes}
    whole, _ = train("an ANN with dropout", blobs, tmp_path / "whole", changes)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut(patch, target, name, calls)
        train("an ANN with dropout", blobs, tmp_path / "cut", changes)
    resumed, _ = train("an ANN with dropout", blobs, tmp_path / "cut", changes)
    assert_same_bits(whole, resumed)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_is_written_after_every_step_that_asks_for_one(blobs, tmp_path, monkeypatch):
    seen = []

    def look(path, modules, optimiser, facts):
        seen.append((facts["epoch"], facts["step"]))

    monkeypatch.setattr(loop, "save_checkpoint", look)
    train("an ANN", blobs, tmp_path / "often", {"checkpoint_minutes": 0.0})
    assert seen == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 0)]
    seen.clear()
    train("an ANN", blobs, tmp_path / "rarely", {"checkpoint_minutes": 60.0})
    assert seen == [(1, 0), (2, 0)]


def test_a_finished_run_is_given_back_without_another_step(blobs, tmp_path, monkeypatch):
    whole, last = train("an ANN", blobs, tmp_path / "run", {"ema": 0.5})
    cut(monkeypatch, Trainer, "step", 0)
    again, line = train("an ANN", blobs, tmp_path / "run", {"ema": 0.5})
    assert_same_bits(whole, again)
    assert line == last


def test_a_checkpoint_of_another_network_is_refused(blobs, tmp_path):
    train("an ANN", blobs, tmp_path, {})
    other = TrainableANN(convolutional(7), MEAN, STD)
    with pytest.raises(SpikeDistillError, match=r"checkpoint\.safetensors' belongs to another network"):
        config = Training(epochs=2, batch_size=16, device="cpu")
        fit(other, Direct(), MemoryFeed(blobs, 16), config, Run(tmp_path))


class TestKill:
    """The real thing: a process that is killed in the middle of an epoch, and the same command with --resume."""

    @pytest.fixture(params=["a student", "a compiled ANN in bfloat16"])
    def command(self, request, blobs, tmp_path):
        images = {
            f"{part}_{kind}": getattr(blobs, f"{part}_{kind}")
            for part in ("train", "test")
            for kind in ("images", "labels")
        }
        arrays = {name: np.tile(value.numpy(), (4,) + (1,) * (value.ndim - 1)) for name, value in images.items()}
        arrays = {name: value.transpose(0, 2, 3, 1) if value.ndim == 4 else value for name, value in arrays.items()}
        np.savez(tmp_path / "blobs.npz", **arrays)
        network = Architecture("resnet20", classes=3, channels=3, width=4)
        facts = {"kind": "teacher", "architecture": asdict(network), "mean": MEAN, "std": STD}
        write_tensors(tmp_path / "teacher" / "model.safetensors", network.build().state_dict(), facts)
        options = "--epochs 2 --batch-size 16 --crop 1 --validation 0.1 --lr 0.05 --ema 0.9 --checkpoint-minutes 0"
        options += f" --device cpu --data {tmp_path / 'blobs.npz'}"
        if request.param == "a student":
            who = f"distill --teacher {tmp_path / 'teacher'} --student vgg9 --student-width 6 --timesteps 2"
            options += " --precision fp32"
        else:
            who, options = "teach --network vgg9 --width 6", options + " --precision bf16 --compile"
        return [sys.executable, "-m", "spikedistill", *who.split(), *options.split()]

    @pytest.fixture
    def environment(self):
        return {**os.environ, "OMP_NUM_THREADS": "1"}

    def finish(self, command, environment, out):
        done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    def reached(self, checkpoint):
        content = checkpoint.read_bytes()  # at one go: the file is exchanged while we look
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"]["spikedistill"])
        return facts["epoch"] == 1 and facts["step"] >= 3

    def kill_in_the_second_epoch(self, command, environment, out):
        process = subprocess.Popen(
            [*command, "--out", str(out)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        checkpoint, ends = out / "checkpoint.safetensors", time.monotonic() + 300
        try:
            while process.poll() is None and time.monotonic() < ends:
                if checkpoint.exists() and self.reached(checkpoint):
                    break
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
        assert code == -signal.SIGKILL

    def test_minus_nine_in_mid_epoch_leaves_no_trace_in_the_result(self, command, environment, tmp_path):
        self.finish(command, environment, tmp_path / "whole")
        self.kill_in_the_second_epoch(command, environment, tmp_path / "cut")
        _, facts = read_tensors(tmp_path / "cut" / "checkpoint.safetensors")
        assert facts["epoch"] == 1 and 3 <= facts["step"] < 21
        assert len(Run(tmp_path / "cut").lines("metrics")) == 1
        assert not (tmp_path / "cut" / "results.json").exists()

        done = self.finish([*command, "--resume"], environment, tmp_path / "cut")
        assert f"continuing after epoch 1, step {facts['step']}" in done.stderr
        assert_same_run(tmp_path / "whole", tmp_path / "cut")
        weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
        assert_same_bits(*weights)
        alike = sorted({path.name for path in (tmp_path / "whole").glob("*.json")} - {"environment.json"})
        assert {"recipe.json", "results.json"} <= set(alike)
        for name in alike:
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
