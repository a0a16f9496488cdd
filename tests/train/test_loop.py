import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from spikedistill.data.augment import Augment
from spikedistill.data.feed import MemoryFeed, PairFeed, as_frames, epoch_order
from spikedistill.data.images import ImageSet, split
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import IF, Neuron
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.schedule import Switch
from spikedistill.objective.terms import Needs, Objective, Sum
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import Conversion
from spikedistill.student.student import Student
from spikedistill.teacher.load import Teacher, TrainableANN
from spikedistill.train.loop import Trainer, fit
from spikedistill.train.optimise import learning_rate
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run
from spikedistill.train.training_step import TeacherRunner

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


def choices(**changes):
    usual = {"epochs": 2, "batch_size": 16, "lr": 0.1, "precision": "fp32", "device": "cpu", "channels_last": False}
    return Training(**{**usual, **changes})


def teach(student, objective, images, config, run, *, augment=None, validation=0.1, **others):
    """``fit`` on images in memory."""
    feed = MemoryFeed(images, config.batch_size, config.seed, augment or Augment(), validation, config.views)
    return fit(student, objective, feed, config, run, **others)


def begun(path):
    path.mkdir(exist_ok=True)
    return Run(path)


def flat(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 3))


def convolutional(width, seed=1):
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def learner(network):
    return TrainableANN(network, MEAN, STD)


def spiking(network, timesteps=2):
    student, _ = to_spiking(network, Conversion(timesteps=timesteps, neuron=IF, inherit=False), mean=MEAN, std=STD)
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student


def unit(pixels):
    return (pixels.float() / 255 - 0.4) / 0.25


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


@dataclass(frozen=True)
class Looks(Objective):
    """Cross-entropy only, by an objective that looks at more."""

    at: Needs

    @property
    def needs(self):
        return self.at

    def __call__(self, batch, modules):
        return Direct()(batch, modules)


class Follows(Looks):
    """Also the teacher's mean spikes and logits, of every step that it is shown."""

    def __call__(self, batch, modules):
        answer = batch.require_teacher()
        steps = torch.arange(1.0, 1 + len(answer.logits))[:, None]  # a step in another place is another loss
        wanted = (steps * (answer.spikes["2"].flatten(1).mean(1)[:, None] + answer.logits.mean(2))).mean(0)
        return {
            **super().__call__(batch, modules),
            "follow": (batch.student.logits.mean((0, 2)) - wanted).square().mean(),
        }


@dataclass(frozen=True)
class SpikeBudget(Objective):
    """Spikes at one layer that are more than this share of the chances to spike."""

    path: str
    share: float = 0.1

    @property
    def needs(self):
        return Needs(student_spikes=(self.path,))

    def __call__(self, batch, modules):
        return {"spikes": (batch.student.spikes[self.path].mean() - self.share).relu()}


class Steep(Direct):
    """A term that is 0 and has an infinite slope there."""

    def __call__(self, batch, modules):
        away = (batch.student.logits - batch.student.logits.detach()).square().sum().sqrt()
        return {**super().__call__(batch, modules), "steep": away}


class Large(Direct):
    """A term that is 0 and whose slopes are finite, but not the sum of their squares."""

    def __call__(self, batch, modules):
        away = 1e30 * (batch.student.logits - batch.student.logits.detach()).sum()
        return {**super().__call__(batch, modules), "large": away}


class Broken(MemoryFeed):
    """Batches with one pixel that is no number."""

    def batches(self, epoch, first=0):
        for inputs in super().batches(epoch, first):
            inputs.student[0, 0, 0, 0] = torch.nan
            yield inputs


@dataclass(frozen=True)
class SourceOnly(Objective):
    """Cross-entropy of the answers to the second stream."""

    @property
    def needs(self):
        return Needs(source=True)

    def __call__(self, batch, modules):
        return {"images": F.cross_entropy(batch.require_source().logits.mean(0), batch.labels)}


@dataclass(frozen=True)
class Clock(Objective):
    """A term of 1, and every progress that it was shown."""

    shown: list = field(default_factory=list, hash=False)

    def __call__(self, batch, modules):
        self.shown.append(batch.progress)
        return {"clock": 1 + 0 * batch.student.logits.sum()}


class TestAPlainLoopGivesTheSameWeights:
    def rates(self, lr, steps):
        """Straight up over the first 2.5 of 10 steps, then half a cosine."""
        return [
            lr * min(1, (s + 1) / 2.5) if s < 2.5 else lr / 2 * (1 + math.cos(math.pi * (s - 2.5) / 7.5))
            for s in range(steps)
        ]

    def test_for_sgd_with_nesterov_momentum_weight_decay_and_a_teacher(self, blobs, tmp_path):
        config = choices(lr=0.2, warmup=0.25, momentum=0.9, weight_decay=0.01, seed=5)
        student, teacher = learner(flat()), Teacher(flat(seed=2), MEAN, STD)
        teach(student, KDSNNResponse(3.0, 0.6), blobs, config, Run(tmp_path), teacher=teacher)

        weights, taught = flat(), flat(seed=2)
        parameters = list(weights.parameters())
        velocities = [torch.zeros_like(parameter) for parameter in parameters]
        indices, _ = split(blobs.train_labels, 0.1, seed=0)
        batches = [batch for epoch in (1, 2) for batch in epoch_order(indices, 5, epoch, 16)]
        assert len(batches) == 10
        for batch, rate in zip(batches, self.rates(0.2, 10)):
            images, labels = unit(blobs.train_images[batch]), blobs.train_labels[batch]
            logits = weights(images)
            target, answer = (taught(images).detach() / 3).softmax(1), (logits / 3).softmax(1)
            soft = 9 * (target * (target.log() - answer.log())).sum(1).mean()
            loss = 0.4 * F.cross_entropy(logits, labels) + 0.6 * soft
            for parameter, velocity, slope in zip(parameters, velocities, torch.autograd.grad(loss, parameters)):
                slope = slope + (0.01 * parameter if parameter.ndim > 1 else 0)
                velocity.mul_(0.9).add_(slope)
                parameter.data -= rate * (slope + 0.9 * velocity)
        for trained, expected in zip(student.parameters(), parameters):
            torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)

    def test_for_adamw(self, blobs, tmp_path):
        config = choices(lr=0.01, warmup=0.25, weight_decay=0.1, optimizer="adamw")
        student, weights = learner(flat()), flat()
        teach(student, Direct(), blobs, config, Run(tmp_path))

        parameters = list(weights.parameters())
        first, second = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
        indices, _ = split(blobs.train_labels, 0.1, seed=0)
        batches = [batch for epoch in (1, 2) for batch in epoch_order(indices, 0, epoch, 16)]
        for number, (batch, rate) in enumerate(zip(batches, self.rates(0.01, 10)), start=1):
            loss = F.cross_entropy(weights(unit(blobs.train_images[batch])), blobs.train_labels[batch])
            for parameter, m, v, slope in zip(parameters, first, second, torch.autograd.grad(loss, parameters)):
                m.lerp_(slope, 0.1)
                v.lerp_(slope.square(), 0.001)
                decay = 0.1 if parameter.ndim > 1 else 0.0
                downhill = (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
                parameter.data.mul_(1 - rate * decay).sub_(rate * downhill)
        for trained, expected in zip(student.parameters(), parameters):
            torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)


class TestAveragedWeights:
    def test_are_the_hand_computed_average_of_every_step(self, blobs, tmp_path, monkeypatch):
        snapshots = []
        step = Trainer.step

        def remember(trainer, *args):
            result = step(trainer, *args)
            snapshots.append({name: value.clone() for name, value in trainer.student.state_dict().items()})
            return result

        monkeypatch.setattr(Trainer, "step", remember)
        student = learner(convolutional(4))
        line = teach(student, Direct(), blobs, choices(ema=0.4), Run(tmp_path))
        assert len(snapshots) == 10
        average = {name: value.double() for name, value in snapshots[0].items()}
        for done, snapshot in enumerate(snapshots[1:], start=1):
            kept = min(0.4, (1 + done) / (10 + done))
            average = {name: kept * old + (1 - kept) * snapshot[name].double() for name, old in average.items()}
        result = student.state_dict()
        for name in average:
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(result[name].double(), average[name], rtol=1e-5, atol=1e-6)
        assert not same(result, snapshots[-1])
        assert line["validation_accuracy"] == self.accuracy_on_held(student, blobs)

    @pytest.mark.parametrize("decay, least, most", [(0.999, 70.0, 100.0), (0.0, 0.0, 50.0)])
    def test_are_judged_in_place_of_the_last_ones(self, blobs, tmp_path, monkeypatch, decay, least, most):
        """The last step, after which the average has followed, leaves weights of zero."""
        done, step = [], Trainer.step

        def ruin(trainer, *args):
            done.append(step(trainer, *args))
            if len(done) == 10:
                for parameter in trainer.student.parameters():
                    parameter.data.zero_()
            return done[-1]

        monkeypatch.setattr(Trainer, "step", ruin)
        student = learner(convolutional(4))
        line = teach(student, Direct(), blobs, choices(ema=decay), Run(tmp_path))
        assert len(done) == 10
        assert line["validation_accuracy"] == self.accuracy_on_held(student, blobs)
        assert least <= line["validation_accuracy"] <= most

    def test_without_them_the_last_weights_are_kept_and_judged(self, blobs, tmp_path):
        student = learner(convolutional(4))
        line = teach(student, Direct(), blobs, choices(), Run(tmp_path))
        assert line["validation_accuracy"] == self.accuracy_on_held(student, blobs)

    def accuracy_on_held(self, student, blobs):
        _, held = split(blobs.train_labels, 0.1, seed=0)
        student.eval()
        answers = student.network(unit(blobs.train_images[held])).argmax(1)
        return pytest.approx(100 * (answers == blobs.train_labels[held]).double().mean().item())


class TestClipping:
    def moved(self, blobs, path, clip):
        student = learner(flat())
        config = choices(epochs=1, batch_size=96, lr=1.0, momentum=0.0, weight_decay=0.0, warmup=0.0, clip=clip)
        teach(student, Direct(), blobs, config, begun(path), validation=0.0)
        pairs = zip(student.network.parameters(), flat().parameters())
        return torch.cat([(after - before).flatten() for after, before in pairs]).detach()

    def test_bounds_the_norm_and_keeps_the_direction(self, blobs, tmp_path):
        free = self.moved(blobs, tmp_path / "free", 0.0)
        clipped = self.moved(blobs, tmp_path / "clipped", 0.01)
        assert free.norm() > 0.1
        assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
        assert F.cosine_similarity(free, clipped, dim=0).item() == pytest.approx(1.0, abs=1e-5)

    def test_leaves_smaller_gradients_alone(self, blobs, tmp_path):
        free, loose = (self.moved(blobs, tmp_path / str(clip), clip) for clip in (0.0, 1e6))
        torch.testing.assert_close(loose, free, rtol=1e-5, atol=0)


class TestSeed:
    def weights(self, blobs, path, seed):
        student = spiking(convolutional(4))
        teach(student, Direct(), blobs, choices(seed=seed), begun(path), augment=Augment(crop=1, flip=True))
        return student.state_dict(), (path / "metrics.jsonl").read_bytes()

    def test_the_same_seed_gives_the_same_bits_and_another_seed_others(self, blobs, tmp_path):
        first, second, other = (self.weights(blobs, tmp_path / name, int(name[0])) for name in ("7", "7again", "8"))
        assert same(first[0], second[0]) and first[1] == second[1]
        assert not same(first[0], other[0]) and first[1] != other[1]


class TestRefusals:
    def test_a_loss_that_is_no_number_names_the_learning_rate(self, blobs, tmp_path):
        with pytest.raises(ConfigError, match=r"epoch 1, step \d+: lower --lr \(=1e\+30\)"):
            teach(learner(flat()), Direct(), blobs, choices(lr=1e30), Run(tmp_path))

    def test_a_loss_that_is_no_number_leaves_the_checkpoint_as_it_was(self, blobs, tmp_path):
        with pytest.raises(ConfigError, match="lower --lr"):
            teach(learner(flat()), Direct(), blobs, choices(lr=1e30, checkpoint_minutes=0.0), Run(tmp_path))
        written = load_file(Run(tmp_path).checkpoint)
        assert not any(value.isnan().any() for value in written.values())

    @pytest.mark.parametrize("clip", [0.0, 1.0])
    @pytest.mark.parametrize(("steep", "norm"), [(Steep(), "nan"), (Large(), "inf")])
    def test_a_gradient_that_is_not_finite_is_refused_before_the_step(self, steep, norm, clip, blobs, tmp_path):
        student = learner(flat())
        before = copy.deepcopy(student.state_dict())
        message = (
            rf"The norm of the gradient became {norm} at the loss .* in epoch 1, step 1: lower --lr \(=0\.1\), or set"
            r" --clip 1.* Not finite: nothing else; finite: weights, inputs, teacher's outputs, student's logits\."
        )
        with pytest.raises(ConfigError, match=message):
            teach(student, steep, blobs, choices(clip=clip), Run(tmp_path))
        assert same(before, student.state_dict()) and not Run(tmp_path).checkpoint.exists()

    def test_weights_without_a_gradient_break_nothing(self, blobs, tmp_path):
        student = learner(flat())
        frozen = next(student.parameters()).requires_grad_(False)
        before = frozen.clone()
        student.register_parameter("unused", nn.Parameter(torch.ones(3)))
        assert teach(student, Direct(), blobs, choices(epochs=1, clip=1.0), Run(tmp_path))["epoch"] == 1
        assert torch.equal(frozen, before)

    @pytest.mark.parametrize(
        "where, remedy",
        [
            ("teacher's outputs", "check the teacher's weights and its normalisation"),
            ("weights", "an earlier step broke the weights, or their file holds such values: lower --lr"),
            ("inputs", "check the images, their normalisation and their augmentation"),
        ],
    )
    def test_a_loss_that_is_no_number_names_what_is_not_finite_and_what_to_do(self, where, remedy, blobs, tmp_path):
        student, teacher = spiking(convolutional(4)), Teacher(convolutional(4), MEAN, STD)
        feed = MemoryFeed(blobs, 16, 0, Augment(), 0.1, 0)
        if where == "weights":
            student.core.get_submodule("5").bias.data[0] = torch.nan
        elif where == "inputs":
            feed = Broken(blobs, 16, 0, Augment(), 0.1, 0)
        else:
            teacher.network[5].bias.data[0] = torch.inf
        with pytest.raises(ConfigError, match=rf"The loss became .*nan.*step 1: {remedy}.*Not finite: .*{where}"):
            fit(student, KDSNNResponse(), feed, choices(), Run(tmp_path), teacher=teacher)

    def test_answers_that_are_not_finite_are_not_kept_on_disk(self, blobs, tmp_path):
        teacher = Teacher(convolutional(4), MEAN, STD)
        teacher.network[5].bias.data[0] = torch.nan
        with pytest.raises(ConfigError, match="The teacher's logits or features hold NaN or infinity and are not kept"):
            teach(spiking(convolutional(4)), KDSNNResponse(), blobs, choices(views=1), Run(tmp_path), teacher=teacher)

    @pytest.mark.parametrize("part", ["weight", "momentum", "average"])
    def test_what_is_not_finite_is_neither_saved_nor_judged(self, part, blobs, tmp_path, monkeypatch):
        run, student, step = Run(tmp_path), learner(flat()), Trainer.step
        teach(student, Direct(), blobs, choices(epochs=1, ema=0.5), run)
        saved, lines = run.checkpoint.read_bytes(), run.lines("metrics")

        def poisoned(self, inputs, epoch, number):
            result = step(self, inputs, epoch, number)
            if number != (0 if self.config.checkpoint_minutes == 0 else self.feed.steps - 1):
                return result
            weight = next(self.student.parameters())
            held = {"weight": weight, "momentum": self.optimiser.state[weight]["momentum_buffer"]}
            held["average"] = next(self.averaged.parameters())
            held[part].data.flatten()[3] = torch.inf
            return result

        monkeypatch.setattr(Trainer, "step", poisoned)
        for minutes in (0.0, 60.0):
            config = choices(epochs=2, ema=0.5, checkpoint_minutes=minutes)
            with pytest.raises(
                ConfigError, match=r"After epoch \d, step \d+, .* hold NaN or infinity, .* --lr \(=0.1\)"
            ):
                teach(learner(flat()), Direct(), blobs, config, run)
            assert run.checkpoint.read_bytes() == saved and run.lines("metrics") == lines

    def test_a_batch_larger_than_the_training_part_names_both(self, blobs, tmp_path):
        with pytest.raises(ConfigError, match=r"batch_size \(=87\) must be at most the 86 training samples"):
            teach(learner(flat()), Direct(), blobs, choices(batch_size=87), Run(tmp_path))

    @pytest.mark.parametrize(
        "objective, gradient, message",
        [
            (KDSNNResponse(), "exact", "needs a teacher, and no teacher was given: pass teacher=..., or use Direct"),
            (KDSNNFeature(), "exact", "needs a teacher, and no teacher was given"),
            (Sum(((0.5, Direct()), (0.5, KDSNNResponse()))), "exact", "needs a teacher, and no teacher was given"),
            (TET(), "quantised", r"gradient \(='quantised'\) trains all steps as one"),
            (SpikeBudget("2"), "quantised", r"gradient \(='quantised'\) trains all steps as one"),
            (
                Looks(Needs(potentials=("2",))),
                "rate",
                r"gradient \(='rate'\) computes firing rates only, no potentials",
            ),
            (
                Looks(Needs(source=True)),
                "exact",
                "needs a second input stream, and the feed has none: use a Pair",
            ),
            (SpikeBudget("0"), "exact", "There is no layer of neurons '0'"),
        ],
    )
    def test_an_objective_that_looks_at_what_there_is_not(self, objective, gradient, message, blobs, tmp_path, no_step):
        student = spiking(convolutional(4))
        student.gradient = gradient
        with pytest.raises(ConfigError, match=message):
            teach(student, objective, blobs, choices(), Run(tmp_path))

    def test_an_objective_that_looks_at_the_spikes_of_an_ann(self, blobs, tmp_path, no_step):
        objective, teacher = Looks(Needs(teacher_spikes=("2",))), Teacher(convolutional(4), MEAN, STD)
        with pytest.raises(ConfigError, match=r"needs spikes of 2; .* none, it is an ANN\. Use a spiking"):
            teach(spiking(convolutional(4)), objective, blobs, choices(), Run(tmp_path), teacher=teacher)
        with pytest.raises(ConfigError, match="Sequential is an ANN and has no spikes"):
            teach(learner(convolutional(4)), SpikeBudget("2"), blobs, choices(), Run(tmp_path))

    @pytest.fixture
    def no_step(self, monkeypatch):
        def step(*_):
            raise AssertionError("a step was taken")

        monkeypatch.setattr(Trainer, "step", step)

    def test_a_path_that_is_no_module_of_the_teacher(self, blobs, tmp_path):
        objective, teacher = KDSNNFeature((("layr", "2"),)), Teacher(convolutional(4), MEAN, STD)
        with pytest.raises(ConfigError, match=r"There is no module in Sequential 'layr'"):
            teach(learner(convolutional(4)), objective, blobs, choices(), Run(tmp_path), teacher=teacher)


class TestTeacherAndFeatures:
    objective = KDSNNFeature((("2", "2"),), weight=0.5)

    def adapter(self, blobs, path, lr):
        student, teacher = learner(convolutional(6)), Teacher(convolutional(4, seed=2), MEAN, STD)
        teach(student, self.objective, blobs, choices(epochs=1, lr=lr), begun(path), teacher=teacher)
        return load_file(Run(path).checkpoint)["lesson.adapters.0.weight"]

    def test_the_adapter_is_trained_and_saved(self, blobs, tmp_path):
        before, after = (self.adapter(blobs, tmp_path / str(lr), lr) for lr in (0.0, 0.1))
        assert before.shape == (4, 6, 1, 1)
        assert (after - before).abs().max() > 1e-3

    def test_the_teacher_stays_as_it_was(self, blobs, tmp_path):
        teacher = Teacher(convolutional(4, seed=2), MEAN, STD)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        teach(learner(convolutional(6)), self.objective, blobs, choices(), Run(tmp_path), teacher=teacher)
        assert same(before, teacher.state_dict())
        assert not teacher.training and all(p.grad is None for p in teacher.parameters())

    def test_the_probe_leaves_the_student_as_it_was(self, blobs, tmp_path):
        config = choices(epochs=1, lr=0.0, momentum=0.0)
        with_pairs, without = learner(convolutional(4)), learner(convolutional(4))
        teacher = Teacher(convolutional(4, seed=2), MEAN, STD)
        teach(with_pairs, self.objective, blobs, config, begun(tmp_path / "a"), teacher=teacher)
        teach(without, Direct(), blobs, config, begun(tmp_path / "b"))
        assert same(with_pairs.state_dict(), without.state_dict())


class TestASpikingTeacher:
    """A student of another T and width."""

    objective = KDSNN((("2", "2"),), temperature=2.0, alpha=0.4, weight=0.3)

    @pytest.fixture
    def teacher(self, blobs):
        teacher = spiking(convolutional(8, seed=2), timesteps=5)
        teacher(blobs.train_images.float() / 255)  # its batch norms know the images
        return teacher

    def test_teaches_by_the_mean_of_its_own_time_steps(self, teacher, blobs, tmp_path):
        student, twin = spiking(convolutional(6)), spiking(convolutional(6))
        twin.load_state_dict(student.state_dict())
        config = choices(epochs=1, batch_size=96, lr=0.0, weight_decay=0.0)
        line = teach(student, self.objective, blobs, config, Run(tmp_path), validation=0.0, teacher=teacher)

        images, labels = blobs.train_images.float() / 255, blobs.train_labels
        known, ours = copy.deepcopy(teacher).eval().observe(images, ["2"]), twin.train().observe(images, ["2"])
        assert len(known.logits) == 5 and known.features["2"].shape[:3] == (5, 96, 8)
        logits, target = ours.logits.mean(0), (known.logits.mean(0) / 2).softmax(1)
        soft = 4 * (target * (target.log() - (logits / 2).log_softmax(1))).sum(1).mean()
        weight = load_file(Run(tmp_path).checkpoint)["lesson.adapters.0.weight"]
        wanted = known.features["2"].mean(0)
        distance = (F.conv2d(ours.features["2"].mean(0), weight) - wanted).square().mean() / wanted.square().mean()
        assert line["labels"] == pytest.approx(0.6 * F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert line["soft"] == pytest.approx(0.4 * soft.item(), rel=1e-4)
        assert line["features"] == pytest.approx(0.3 * distance.item(), rel=1e-4)

    def test_stays_as_it_was(self, teacher, blobs, tmp_path):
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        teach(spiking(convolutional(6)), self.objective, blobs, choices(), Run(tmp_path), teacher=teacher)
        assert same(before, teacher.state_dict())
        assert all(module.training for module in teacher.modules())
        assert all(p.requires_grad and p.grad is None for p in teacher.parameters())

    def test_is_not_counted_in_the_student_s_firing_rate(self, teacher, blobs, tmp_path):
        config = choices(epochs=1, lr=0.0)
        with_it, without = spiking(convolutional(6)), spiking(convolutional(6))
        without.load_state_dict(with_it.state_dict())
        line = teach(with_it, KDSNNResponse(), blobs, config, begun(tmp_path / "a"), teacher=teacher)
        alone = teach(without, Direct(), blobs, config, begun(tmp_path / "b"))
        assert line["firing_rate"] == alone["firing_rate"]


class TestTwoStreams:
    """Events for the student; beside each an image, which the teacher sees as it is and the student as frames."""

    @pytest.fixture
    def feed(self, blobs):
        parts = (blobs.train_images, blobs.test_images)
        train, test = (part[:, None, :2].repeat(1, 2, 1, 1, 1) // 50 for part in parts)
        frames = ImageSet("frames", train, blobs.train_labels, test, blobs.test_labels, blobs.class_names)
        return PairFeed(MemoryFeed(frames, 96, validation=0.0), blobs, paired=True)

    @pytest.fixture
    def student(self):
        network = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), *convolutional(6)[1:])
        student, _ = to_spiking(network, Conversion(timesteps=2, neuron=IF, inherit=False, coding=FrameCoding()))
        student.neurons["2"].backend = "reference"
        return student

    def test_give_the_terms_that_a_hand_computes(self, feed, student, blobs, tmp_path):
        twin, teacher = copy.deepcopy(student), Teacher(convolutional(4, seed=2), MEAN, STD)
        objective = Sum(((1.0, KDSNNResponse(2.0, 0.4)), (1.0, SourceOnly())))
        line = fit(student, objective, feed, choices(epochs=1, lr=0.0), Run(tmp_path), teacher=teacher)

        images, labels = blobs.train_images.float() / 255, blobs.train_labels
        events = feed.events.images.train_images.transpose(0, 1).float()
        logits, target = twin(events).mean(0), (teacher(images) / 2).softmax(1)
        source = twin(as_frames(images, 2, 8, 8)).mean(0)
        soft = 4 * (target * (target.log() - (logits / 2).log_softmax(1))).sum(1).mean()
        assert line["labels"] == pytest.approx(0.6 * F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert line["soft"] == pytest.approx(0.4 * soft.item(), rel=1e-4)
        assert line["images"] == pytest.approx(F.cross_entropy(source, labels).item(), rel=1e-5)

    @pytest.mark.parametrize("objective, passes", [(SourceOnly(), 2 * 2 + 2), (SpikeBudget("2"), 2 + 1), (Direct(), 2)])
    def test_cost_a_second_pass_just_where_an_objective_looks_at_them(
        self, objective, passes, feed, student, tmp_path, monkeypatch
    ):
        calls, observe = [], Student.observe
        monkeypatch.setattr(Student, "observe", lambda *args, **kwargs: calls.append(1) or observe(*args, **kwargs))
        fit(student, objective, feed, choices(), Run(tmp_path))
        assert len(calls) == passes  # a step an epoch, and the probe


class TestSpikes:
    def test_that_cost_something_become_fewer_and_the_student_still_learns(self, blobs, tmp_path):
        lines = {}
        for weight in (0.0, 2.0):
            objective, config = Sum(((1.0, Direct()), (weight, SpikeBudget("2")))), choices(epochs=6)
            lines[weight] = teach(spiking(convolutional(6)), objective, blobs, config, begun(tmp_path / str(weight)))
        assert 0 < lines[2.0]["firing_rate"] < 0.5 * lines[0.0]["firing_rate"]
        assert lines[2.0]["validation_accuracy"] == 100

    def test_that_cost_nothing_change_nothing(self, blobs, tmp_path):
        alone = teach(spiking(convolutional(6)), Direct(), blobs, choices(), begun(tmp_path / "alone"))
        objective = Sum(((1.0, Direct()), (0.0, SpikeBudget("2"))))
        beside = teach(spiking(convolutional(6)), objective, blobs, choices(), begun(tmp_path / "beside"))
        assert {**alone, "spikes": 0.0} == beside

    def test_are_counted_just_where_an_objective_looks_at_them(self, blobs, tmp_path, monkeypatch):
        counted, count = [], Student._counts

        def remember(student, path, emitted):
            counted.append(path)
            return count(student, path, emitted)

        monkeypatch.setattr(Student, "_counts", remember)
        teach(spiking(convolutional(6)), TET(), blobs, choices(), begun(tmp_path / "without"))
        assert counted == []
        teach(spiking(convolutional(6)), SpikeBudget("2"), blobs, choices(), begun(tmp_path / "with"))
        assert counted == ["2"] * (1 + 10)  # one is the probe's


COMPILED = """
import dataclasses
import sys
from functools import partial
from pathlib import Path
import torch
from torch import nn
from spikedistill.data.feed import MemoryFeed
from spikedistill.objective.direct import Direct
from spikedistill.objective.schedule import Ramp, Switch
from spikedistill.objective.terms import Sum
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import INHERITED_NEURON, Conversion
from spikedistill.teacher.load import TrainableANN
from spikedistill.train.loop import fit
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

folder, kind = Path(sys.argv[1]), sys.argv[2]
torch.compile = partial(torch.compile, backend="eager")
torch._dynamo.config.error_on_recompile = True
blobs = torch.load(folder / "blobs.pt", weights_only=False)
if kind == "ann":
    student = TrainableANN(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), (0.4,) * 3, (0.25,) * 3)
else:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    neuron = dataclasses.replace(INHERITED_NEURON, levels=4)
    images = blobs.train_images[:16].float() / 255
    student, _ = to_spiking(layers, Conversion(timesteps=1, neuron=neuron), calibration_images=images)
    for layer in student.neurons.values():
        layer.backend = "reference"
objective = Sum(((Ramp(), Direct()), (Switch(), Direct(0.1))))
config = Training(epochs=2, batch_size=16, precision="fp32", device="cpu", compile=True)
fit(student, objective, MemoryFeed(blobs, 16), config, Run(folder))
assert not torch._dynamo.utils.counters["graph_break"], torch._dynamo.utils.counters["graph_break"]
print(torch._dynamo.utils.counters["frames"]["total"])
"""


class TestProgress:
    def test_runs_from_0_to_below_1(self, blobs, tmp_path):
        clock = Clock()
        teach(learner(flat()), Sum(((1.0, Direct()), (1.0, clock))), blobs, choices(), Run(tmp_path))
        assert [progress.item() for progress in clock.shown] == pytest.approx([step / 10 for step in range(10)])
        assert all(progress.shape == () for progress in clock.shown)

    def test_switches_terms_on_and_off(self, blobs, tmp_path):
        off, more = Switch(at=0.5, width=0.0), Switch(at=0.6, before=2.0, after=3.0, width=0.0)
        parts = ((off, Direct()), (more, Clock()))
        teach(learner(flat()), Sum(parts), blobs, choices(), Run(tmp_path))
        first, second = Run(tmp_path).lines("metrics")
        assert first["labels"] > 0.1 and second["labels"] == 0
        assert (first["clock"], second["clock"]) == pytest.approx((2.0, (2 + 4 * 3) / 5))

    @pytest.mark.parametrize("kind", ["ann", "graded student, whose firing rate is measured"])
    def test_does_not_compile_every_step_anew(self, blobs, tmp_path, kind):
        torch.save(blobs, tmp_path / "blobs.pt")
        command = [sys.executable, "-c", COMPILED, str(tmp_path), kind]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "1\n"


class TestMetrics:
    def test_terms_sum_to_the_loss(self, blobs, tmp_path):
        objective = KDSNN((("2", "2"),), temperature=2.0, alpha=0.4, weight=0.3)
        student, teacher = spiking(convolutional(6)), Teacher(convolutional(4, seed=2), MEAN, STD)
        teach(student, objective, blobs, choices(), Run(tmp_path), teacher=teacher)
        for line in Run(tmp_path).lines("metrics"):
            assert all(line[name] > 0 for name in ("labels", "soft", "features"))
            assert line["loss"] == pytest.approx(line["labels"] + line["soft"] + line["features"])

    def test_the_loss_of_a_single_step_is_the_cross_entropy_by_hand(self, blobs, tmp_path):
        config = choices(epochs=1, batch_size=96)
        line = teach(learner(flat()), Direct(), blobs, config, Run(tmp_path), validation=0.0)
        logits = flat()(unit(blobs.train_images))
        assert line["loss"] == pytest.approx(F.cross_entropy(logits, blobs.train_labels).item(), rel=1e-5)
        right = (logits.argmax(1) == blobs.train_labels).double().mean().item()
        assert line["train_accuracy"] == pytest.approx(100 * right)
        assert "validation_accuracy" not in line

    def test_report_the_learning_rate(self, blobs, tmp_path):
        config = choices(lr=0.1)
        teach(learner(flat()), Direct(), blobs, config, Run(tmp_path))
        reported = [line["lr"] for line in Run(tmp_path).lines("metrics")]
        assert reported == [learning_rate(4, 10, config), learning_rate(9, 10, config)]

    def test_the_last_line_is_returned_and_every_epoch_has_one(self, blobs, tmp_path):
        last = teach(learner(flat()), Direct(), blobs, choices(epochs=3), Run(tmp_path))
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1] == last
        assert [(line["epoch"], line["step"]) for line in lines] == [(1, 5), (2, 10), (3, 15)]
        assert [line["epoch"] for line in Run(tmp_path).lines("timing")] == [1, 2, 3]
        assert "firing_rate" not in last

    def test_training_teaches(self, blobs, tmp_path):
        last = teach(spiking(convolutional(6)), Direct(), blobs, choices(epochs=6, lr=0.3), Run(tmp_path))
        first = Run(tmp_path).lines("metrics")[0]
        assert last["loss"] < 0.6 * first["loss"] and last["validation_accuracy"] == 100

    def test_the_firing_rate_of_a_student_is_what_a_hand_counts(self, blobs, tmp_path):
        student, twin = spiking(convolutional(6)), spiking(convolutional(6))
        twin.load_state_dict(student.state_dict())
        config = choices(epochs=1, batch_size=96, lr=0.0)
        line = teach(student, Direct(), blobs, config, Run(tmp_path), validation=0.0)
        emitted = []
        for layer in twin.neurons.values():
            layer.register_forward_hook(lambda _, __, output: emitted.append(output[0].detach()))
        twin.train()(blobs.train_images.float() / 255)
        count = sum((spikes != 0).sum().item() for spikes in emitted) / sum(spikes.numel() for spikes in emitted)
        assert 1 < line["firing_rate"] < 99
        assert line["firing_rate"] == pytest.approx(100 * count, abs=0.05)

    def test_tensorboard_gets_the_same_numbers(self, blobs, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        teach(learner(flat()), Direct(), blobs, choices(tensorboard=True), Run(tmp_path))
        assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 1
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        for line in Run(tmp_path).lines("metrics"):
            for name in line.keys() - {"epoch"}:
                point = next(point for point in events.Scalars(name) if point.step == line["epoch"])
                assert point.value == pytest.approx(line[name], rel=1e-6)


class Guarded(ImageSet):
    """A set whose test part cannot be looked at once it is made."""

    def __getattribute__(self, name):
        if name.startswith("test_") and "sealed" in object.__getattribute__(self, "__dict__"):
            raise AssertionError(f"{name} was looked at")
        return object.__getattribute__(self, name)


def test_the_test_part_is_never_looked_at(blobs, tmp_path):
    guarded = Guarded(**vars(blobs))
    vars(guarded)["sealed"] = True
    with pytest.raises(AssertionError, match="test_images was looked at"):
        _ = guarded.test_images
    teacher = Teacher(convolutional(4, seed=2), MEAN, STD)
    teach(spiking(convolutional(4)), KDSNN((("2", "2"),)), guarded, choices(ema=0.5), Run(tmp_path), teacher=teacher)


def test_augmentation_changes_what_is_learnt_and_depends_on_the_step_alone(blobs, tmp_path):
    def line(name, augment):
        return teach(learner(flat()), Direct(), blobs, choices(epochs=1), begun(tmp_path / name), augment=augment)[
            "loss"
        ]

    assert line("a", Augment(crop=2)) == line("b", Augment(crop=2)) != line("c", None)


class TestViews:
    """Epochs whose batches come again, and the teacher's answers that are kept for them."""

    objective = KDSNN((("2", "2"),))
    augment = Augment(crop=1, flip=True)

    def train(self, blobs, path, config, seed=2, augment=augment, objective=objective, teacher=None):
        """The student, the files, and how often the teacher was asked."""
        student, teacher = learner(convolutional(6)), teacher or Teacher(convolutional(4, seed=seed), MEAN, STD)
        calls, asked = [], TeacherRunner.ask
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TeacherRunner, "ask", lambda *args: calls.append(len(args[1])) or asked(*args))
            teach(student, objective, blobs, config, begun(path), augment=augment, teacher=teacher)
        return student.state_dict(), (path / "metrics.jsonl").read_bytes(), len(calls)

    def without_cache(self, *args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TeacherRunner, "keep_answers", lambda *_: None)
            return self.train(*args, **options)

    def assert_same_run(self, first, second):
        assert same(first[0], second[0]) and first[1] == second[1]

    @pytest.mark.parametrize("views, period", [(0, 5), (1, 1), (2, 2), (3, 3)])
    def test_come_again_in_turn_and_none_does_without(self, views, period, blobs, tmp_path, monkeypatch):
        seen, step = [], Trainer.step

        def remember(trainer, inputs, *args):
            seen.append(inputs.student)
            return step(trainer, inputs, *args)

        monkeypatch.setattr(Trainer, "step", remember)
        config = choices(epochs=5, views=views)
        teach(learner(flat()), Direct(), blobs, config, Run(tmp_path), augment=self.augment)
        assert not (tmp_path / "answers").exists()
        epochs = [torch.cat(seen[5 * epoch :][:5]) for epoch in range(5)]
        for first in range(5):
            for second in range(first + 1, 5):
                assert torch.equal(epochs[first], epochs[second]) == ((second - first) % period == 0)

    def test_begin_with_the_epochs_of_a_run_without_them(self, blobs, tmp_path):
        def first_loss(name, views):
            self.train(blobs, tmp_path / name, choices(epochs=3, views=views))
            return [line["loss"] for line in Run(tmp_path / name).lines("metrics")]

        fresh, repeated = first_loss("fresh", 0), first_loss("repeated", 2)
        assert fresh[:2] == repeated[:2] and fresh[2] != repeated[2]

    @pytest.mark.parametrize(
        "changes",
        [{}, {"channels_last": True}, {"precision": "bf16", "channels_last": True}, {"precision": "bf16", "ema": 0.5}],
    )
    def test_with_kept_answers_are_the_same_run_bit_for_bit(self, changes, blobs, tmp_path):
        config = choices(epochs=4, views=2, **changes)
        kept = self.train(blobs, tmp_path / "kept", config)
        fresh = self.without_cache(blobs, tmp_path / "fresh", config)
        self.assert_same_run(kept, fresh)
        assert fresh[2] - 1 == 4 * 5  # one is the probe
        assert kept[2] - 2 == 2 * 5  # and one says how large the answers are

    @pytest.mark.parametrize("every_step", [False, True])
    def test_with_kept_answers_of_a_spiking_teacher_are_the_same_run_bit_for_bit(self, every_step, blobs, tmp_path):
        needs = Needs(teacher=True, pairs=(("2", "2"),), teacher_spikes=("2",), every_step=every_step)
        options = {"teacher": spiking(convolutional(8, seed=2), timesteps=5), "objective": Follows(needs)}
        kept = self.train(blobs, tmp_path / "kept", choices(epochs=4, views=2), **options)
        fresh = self.without_cache(blobs, tmp_path / "fresh", choices(epochs=4, views=2), **options)
        self.assert_same_run(kept, fresh)
        assert (kept[2] - 2, fresh[2] - 1) == (2 * 5, 4 * 5)
        (cache,) = (tmp_path / "kept" / "answers").iterdir()
        assert np.load(cache / "spikes.2.npy").shape == (2, 5, 5 if every_step else 1, 16, 8, 8, 8)

    @pytest.mark.parametrize("objective", [KDSNNResponse(), KDSNNFeature((("2", "2"), ("0", "0")))])
    def test_keep_what_the_objective_compares_alone(self, objective, blobs, tmp_path):
        self.train(blobs, tmp_path, choices(views=1), objective=objective)
        (cache,) = (tmp_path / "answers").iterdir()
        kept = {f"features.{path}.npy" for path, _ in objective.needs.pairs}
        assert {file.name for file in cache.iterdir()} == {
            "key.json",
            "samples.npy",
            "checksums.npy",
            "logits.npy",
        } | kept

    @pytest.mark.parametrize("minutes", [0.0, 60.0], ids=["checkpoint-every-step", "checkpoint-every-epoch"])
    @pytest.mark.parametrize("steps", [3, 5, 7, 13])
    def test_interrupted_and_resumed_are_the_same_run(self, steps, minutes, blobs, tmp_path):
        config = choices(epochs=4, views=2, checkpoint_minutes=minutes)
        whole = self.train(blobs, tmp_path / "whole", config)
        step, left = Trainer.step, [steps]

        def cut(trainer, *args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return step(trainer, *args)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "step", cut)
            self.train(blobs, tmp_path / "cut", config)
        self.assert_same_run(self.train(blobs, tmp_path / "cut", config), whole)

    def test_are_shared_by_runs_that_ask_the_same(self, blobs, tmp_path):
        config = choices(epochs=2, views=2, cache_dir=str(tmp_path / "shared"))
        first, second = (self.train(blobs, tmp_path / name, config) for name in ("first", "second"))
        self.assert_same_run(first, second)
        assert second[2] == 3  # the probe, the size, and one comparison
        assert len(list((tmp_path / "shared").iterdir())) == 1
        assert not (tmp_path / "first" / "answers").exists()

    def test_are_never_served_to_a_run_that_asks_something_else(self, blobs, tmp_path):
        config = choices(views=1, cache_dir=str(tmp_path / "shared"))
        pixels = blobs.train_images.clone()
        pixels[0, 0, 0, 0] ^= 1
        others = {
            "first": (blobs, config, {}),
            "teacher": (blobs, config, {"seed": 3}),
            "augmentation": (blobs, config, {"augment": Augment(crop=1)}),
            "objective": (blobs, config, {"objective": KDSNN((("0", "0"),))}),
            "logits": (blobs, config, {"objective": KDSNNResponse()}),
            "mirror": (blobs, config, {"objective": KDSNNResponse(mirror=True)}),
            "seed": (blobs, dataclasses.replace(config, seed=1), {}),
            "batch": (blobs, dataclasses.replace(config, batch_size=17), {}),
            "order": (blobs, dataclasses.replace(config, channels_last=True), {}),
            "format": (blobs, dataclasses.replace(config, precision="bf16"), {}),
            "views": (blobs, dataclasses.replace(config, views=2), {}),
            "pixel": (dataclasses.replace(blobs, train_images=pixels), config, {}),
        }
        for number, (name, (images, changed, options)) in enumerate(others.items(), start=1):
            shared = self.train(images, tmp_path / name, changed, **options)
            assert len(list((tmp_path / "shared").iterdir())) == number, name
            alone = dataclasses.replace(changed, cache_dir=None)
            self.assert_same_run(shared, self.without_cache(images, tmp_path / f"{name}-alone", alone, **options))

    def test_say_how_large_their_answers_are(self, blobs, tmp_path):
        said = []
        progress = Progress.silent()
        progress.say = said.append
        teacher = Teacher(convolutional(4, seed=2), MEAN, STD)
        config = choices(epochs=3, views=2)
        teach(
            learner(convolutional(6)), self.objective, blobs, config, Run(tmp_path), teacher=teacher, progress=progress
        )
        size = 2 * 5 * 16 * (4 * 3 + 4 * 4 * 64 + 8) / 1024
        assert any(f"2 views of 5 steps: {size:.1f} KiB in" in line and "0 % already computed" in line for line in said)

    def test_are_refused_where_the_disk_is_too_small_before_anything_is_trained(self, blobs, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(ConfigError, match=r"outputs for 2 views need 163\.1 KiB in '.*answers', where 1000 bytes"):
            self.train(blobs, tmp_path, choices(epochs=3, views=2))
        assert not list((tmp_path / "answers").iterdir()) and not Run(tmp_path).checkpoint.exists()


def test_learned_thresholds_stay_above_zero(blobs, tmp_path):
    neuron = Neuron(threshold=0.01, learn_threshold=True)
    student, _ = to_spiking(flat(), Conversion(timesteps=2, neuron=neuron, inherit=False), mean=MEAN, std=STD)
    (layer,) = student.neurons.values()
    layer.backend = "reference"
    before, lowest = layer.raise_threshold, []
    layer.raise_threshold = lambda: (lowest.append(float(layer.threshold.detach())), before())
    teach(student, Direct(), blobs, choices(lr=30.0, clip=1.0), Run(tmp_path))
    assert min(lowest) < 0 < float(layer.threshold.detach())


class TestConvolutions:
    def network(self):
        torch.manual_seed(1)
        stem = [nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
        return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))

    def test_winograd_s_train_the_same_network_and_timing_names_them(self, blobs, tmp_path):
        found = {}
        for whose in ("torch", "winograd"):
            student, run = learner(self.network()), Run(tmp_path / whose)
            run.path.mkdir()
            teach(student, Direct(), blobs, choices(convolutions=whose, channels_last=True, lr=0.01), run)
            assert {line["convolutions"] for line in run.lines("timing")} == {whose}
            found[whose] = student.state_dict()
        for name, expected in found["torch"].items():
            torch.testing.assert_close(found["winograd"][name], expected, rtol=1e-3, atol=1e-4)
        assert not same(found["torch"], found["winograd"])

    def test_winograd_s_that_cannot_be_had_are_refused(self, blobs, tmp_path):
        with pytest.raises(ConfigError, match=r"=winograd\) are not available here \(no convolution"):
            teach(learner(flat()), Direct(), blobs, choices(convolutions="winograd", channels_last=True), Run(tmp_path))
        assert not (tmp_path / "metrics.jsonl").exists()

    def test_a_teacher_that_cannot_be_traced_stays_as_it_was(self, blobs, tmp_path):
        class Reads(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x) if float(x.sum()) > -1e9 else x

        teacher = Teacher(Reads(self.network()), MEAN, STD)
        config = choices(epochs=1, convolutions="winograd", channels_last=True)
        teach(learner(self.network()), KDSNNResponse(2.0, 0.5), blobs, config, Run(tmp_path), teacher=teacher)
        assert all(type(layer) is nn.Conv2d for layer in teacher.modules() if isinstance(layer, nn.Conv2d))
