import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from spikedistill.data.augment import Augment
from spikedistill.data.images import ImageSet, split
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import IF, Neuron
from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.student.build import to_spiking
from spikedistill.teacher.load import OneStep, Teacher
from spikedistill.train import loop
from spikedistill.train.loop import Trainer, epoch_order, fit, learning_rate, make_optimiser, step_seed
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


def choices(**changes):
    usual = {"epochs": 2, "batch_size": 16, "lr": 0.1, "precision": "fp32", "device": "cpu", "channels_last": False}
    return Training(**{**usual, **changes})


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
    return OneStep(network, MEAN, STD)


def spiking(network, **options):
    student, _ = to_spiking(network, timesteps=2, neuron=IF, inherit=False, mean=MEAN, std=STD, **options)
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student


def unit(pixels):
    return (pixels.float() / 255 - 0.4) / 0.25


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


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
        fit(student, KDSNNResponse(3.0, 0.6), blobs, config, Run(tmp_path), teacher=teacher)

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
        fit(student, Direct(), blobs, config, Run(tmp_path))

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


class TestLearningRate:
    def test_without_warmup_is_torchs_cosine_annealing(self):
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=40)
        config = choices(lr=0.3, warmup=0.0)
        for step in range(40):
            assert learning_rate(step, 40, config) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
            optimiser.step()
            reference.step()

    def test_one_cycle_is_two_straight_lines(self):
        config = choices(lr=1.0, warmup=0.4, schedule="one-cycle")
        expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
        assert [learning_rate(step, 10, config) for step in range(10)] == pytest.approx(expected)

    @pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
    @given(warmup=st.floats(0, 0.9), steps=st.integers(1, 300), lr=st.floats(1e-4, 10))
    def test_rises_to_its_peak_and_falls_to_nearly_nothing(self, schedule, warmup, steps, lr):
        config = choices(lr=lr, warmup=warmup, schedule=schedule)
        rates = [learning_rate(step, steps, config) for step in range(steps)]
        top = rates.index(max(rates))
        assert min(rates) > 0 and max(rates) <= lr
        assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
        assert max(rates) >= lr * (1 - 1 / max(1, steps * (1 - warmup)))

    def test_ends_near_zero(self):
        for schedule, end in (("cosine", 0.5 * (1 - math.cos(math.pi / 95))), ("one-cycle", 1 / 95)):
            config = choices(lr=2.0, warmup=0.05, schedule=schedule)
            assert learning_rate(99, 100, config) == pytest.approx(2.0 * end)

    def test_is_what_the_metrics_report(self, blobs, tmp_path):
        config = choices(lr=0.1)
        fit(learner(flat()), Direct(), blobs, config, Run(tmp_path))
        reported = [line["lr"] for line in Run(tmp_path).lines("metrics")]
        assert reported == [learning_rate(4, 10, config), learning_rate(9, 10, config)]


class TestEpochOrder:
    indices = torch.arange(0, 200, 2)

    def test_is_a_permutation_without_the_short_batch(self):
        batches = epoch_order(self.indices, seed=3, epoch=1, batch_size=16)
        seen = torch.cat(batches)
        assert [len(batch) for batch in batches] == [16] * 6
        assert len(seen.unique()) == 96 and set(seen.tolist()) <= set(self.indices.tolist())
        assert seen.tolist() != sorted(seen.tolist())

    def test_leaves_none_out_where_batches_fit(self):
        seen = torch.cat(epoch_order(self.indices, seed=3, epoch=1, batch_size=20))
        assert torch.equal(seen.sort().values, self.indices)

    def test_depends_on_seed_and_epoch_alone(self):
        def order(seed, epoch):
            return torch.cat(epoch_order(self.indices, seed, epoch, 10)).tolist()

        first = order(3, 1)
        torch.manual_seed(99)
        assert order(3, 1) == first
        assert order(3, 2) != first and order(4, 1) != first

    @pytest.mark.parametrize("seed", [20260923, -(10**9), 2**62])
    def test_any_seed_can_be_given(self, seed):
        torch.Generator().manual_seed(step_seed(seed, 7, 11))
        assert len(epoch_order(torch.arange(8), seed, 7, 4)) == 2

    def test_the_seeds_of_steps_never_meet(self):
        seeds = [step_seed(seed, epoch, step) for seed in (0, 1) for epoch in (1, 2, 3) for step in range(500)]
        assert len(set(seeds)) == len(seeds)


class TestOptimiser:
    def test_decays_kernels_and_matrices_but_no_vectors_or_scalars(self):
        network = nn.ModuleDict({"student": spiking(convolutional(4)), "frozen": nn.Linear(2, 2).requires_grad_(False)})
        student, _ = to_spiking(convolutional(4), neuron=Neuron(learn_threshold=True), inherit=False)
        network["learned"] = student
        groups = make_optimiser(network, choices(weight_decay=0.25)).param_groups
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert len(decay) == sum(len(group["params"]) for group in groups)
        wanted = {id(p): 0.25 if p.ndim > 1 else 0.0 for p in network.parameters() if p.requires_grad}
        assert decay == wanted
        assert any(p.ndim == 0 for p in network.parameters())

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_a_step_without_gradient_shrinks_the_weights_alone(self, optimizer):
        layer = nn.Linear(3, 3)
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        layer.weight.grad, layer.bias.grad = torch.zeros(3, 3), torch.zeros(3)
        make_optimiser(layer, choices(optimizer=optimizer, momentum=0.0, lr=0.5, weight_decay=0.2)).step()
        torch.testing.assert_close(layer.bias, bias, rtol=0, atol=0)
        shrunk = weight * (1 - 0.5 * 0.2)
        torch.testing.assert_close(layer.weight, shrunk)

    def test_a_network_of_matrices_alone_has_one_group(self):
        assert len(make_optimiser(nn.Linear(2, 2, bias=False), choices()).param_groups) == 1


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
        line = fit(student, Direct(), blobs, choices(ema=0.8), Run(tmp_path))
        assert len(snapshots) == 10
        average = {name: value.double() for name, value in snapshots[0].items()}
        for snapshot in snapshots[1:]:
            average = {name: 0.8 * value + 0.2 * snapshot[name].double() for name, value in average.items()}
        result = student.state_dict()
        for name in average:
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(result[name].double(), average[name], rtol=1e-5, atol=1e-6)
        assert not same(result, snapshots[-1])
        assert line["validation_accuracy"] == self.accuracy_on_held(student, blobs)

    def test_without_them_the_last_weights_are_kept_and_judged(self, blobs, tmp_path):
        student = learner(convolutional(4))
        line = fit(student, Direct(), blobs, choices(), Run(tmp_path))
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
        fit(student, Direct(), blobs, config, begun(path), validation=0.0)
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
        fit(student, Direct(), blobs, choices(seed=seed), begun(path), augment=Augment(crop=1, flip=True))
        return student.state_dict(), (path / "metrics.jsonl").read_bytes()

    def test_the_same_seed_gives_the_same_bits_and_another_seed_others(self, blobs, tmp_path):
        first, second, other = (self.weights(blobs, tmp_path / name, int(name[0])) for name in ("7", "7again", "8"))
        assert same(first[0], second[0]) and first[1] == second[1]
        assert not same(first[0], other[0]) and first[1] != other[1]


class TestRefusals:
    def test_a_loss_that_is_no_number_names_the_learning_rate(self, blobs, tmp_path):
        with pytest.raises(ConfigError, match=r"epoch 1, step \d+: lower --lr \(=1e\+30\)"):
            fit(learner(flat()), Direct(), blobs, choices(lr=1e30), Run(tmp_path))

    def test_a_loss_that_is_no_number_leaves_the_checkpoint_as_it_was(self, blobs, tmp_path):
        with pytest.raises(ConfigError, match="lower --lr"):
            fit(learner(flat()), Direct(), blobs, choices(lr=1e30, checkpoint_minutes=0.0), Run(tmp_path))
        written = load_file(Run(tmp_path).checkpoint)
        assert not any(value.isnan().any() for value in written.values())

    def test_a_batch_larger_than_the_training_part_names_both(self, blobs, tmp_path):
        with pytest.raises(ConfigError, match=r"batch_size \(=87\) must be at most the 86 training samples"):
            fit(learner(flat()), Direct(), blobs, choices(batch_size=87), Run(tmp_path))

    def test_an_objective_that_asks_a_missing_teacher(self, blobs, tmp_path):
        with pytest.raises(ConfigError, match="no teacher was given"):
            fit(learner(flat()), KDSNNResponse(), blobs, choices(), Run(tmp_path))

    def test_a_path_that_is_no_module_of_the_teacher(self, blobs, tmp_path):
        objective, teacher = KDSNNFeature((("layr", "2"),)), Teacher(convolutional(4), MEAN, STD)
        with pytest.raises(ConfigError, match=r"There is no module in Sequential 'layr'"):
            fit(learner(convolutional(4)), objective, blobs, choices(), Run(tmp_path), teacher=teacher)


class TestTeacherAndFeatures:
    objective = KDSNNFeature((("2", "2"),), weight=0.5)

    def adapter(self, blobs, path, lr):
        student, teacher = learner(convolutional(6)), Teacher(convolutional(4, seed=2), MEAN, STD)
        fit(student, self.objective, blobs, choices(epochs=1, lr=lr), begun(path), teacher=teacher)
        return load_file(Run(path).checkpoint)["lesson.adapters.0.weight"]

    def test_the_adapter_is_trained_and_saved(self, blobs, tmp_path):
        before, after = (self.adapter(blobs, tmp_path / str(lr), lr) for lr in (0.0, 0.1))
        assert before.shape == (4, 6, 1, 1)
        assert (after - before).abs().max() > 1e-3

    def test_the_teacher_stays_as_it_was(self, blobs, tmp_path):
        teacher = Teacher(convolutional(4, seed=2), MEAN, STD)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        fit(learner(convolutional(6)), self.objective, blobs, choices(), Run(tmp_path), teacher=teacher)
        assert same(before, teacher.state_dict())
        assert not teacher.training and all(p.grad is None for p in teacher.parameters())

    def test_the_probe_leaves_the_student_as_it_was(self, blobs, tmp_path):
        config = choices(epochs=1, lr=0.0, momentum=0.0)
        with_pairs, without = learner(convolutional(4)), learner(convolutional(4))
        teacher = Teacher(convolutional(4, seed=2), MEAN, STD)
        fit(with_pairs, self.objective, blobs, config, begun(tmp_path / "a"), teacher=teacher)
        fit(without, Direct(), blobs, config, begun(tmp_path / "b"))
        assert same(with_pairs.state_dict(), without.state_dict())


class TestMetrics:
    def test_terms_sum_to_the_loss(self, blobs, tmp_path):
        objective = KDSNN((("2", "2"),), temperature=2.0, alpha=0.4, weight=0.3)
        student, teacher = spiking(convolutional(6)), Teacher(convolutional(4, seed=2), MEAN, STD)
        fit(student, objective, blobs, choices(), Run(tmp_path), teacher=teacher)
        for line in Run(tmp_path).lines("metrics"):
            assert all(line[name] > 0 for name in ("labels", "soft", "features"))
            assert line["loss"] == pytest.approx(line["labels"] + line["soft"] + line["features"])

    def test_the_loss_of_a_single_step_is_the_cross_entropy_by_hand(self, blobs, tmp_path):
        config = choices(epochs=1, batch_size=96)
        line = fit(learner(flat()), Direct(), blobs, config, Run(tmp_path), validation=0.0)
        logits = flat()(unit(blobs.train_images))
        assert line["loss"] == pytest.approx(F.cross_entropy(logits, blobs.train_labels).item(), rel=1e-5)
        right = (logits.argmax(1) == blobs.train_labels).double().mean().item()
        assert line["train_accuracy"] == pytest.approx(100 * right)
        assert "validation_accuracy" not in line

    def test_the_last_line_is_returned_and_every_epoch_has_one(self, blobs, tmp_path):
        last = fit(learner(flat()), Direct(), blobs, choices(epochs=3), Run(tmp_path))
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1] == last
        assert [(line["epoch"], line["step"]) for line in lines] == [(1, 5), (2, 10), (3, 15)]
        assert [line["epoch"] for line in Run(tmp_path).lines("timing")] == [1, 2, 3]
        assert "firing_rate" not in last

    def test_training_teaches(self, blobs, tmp_path):
        last = fit(spiking(convolutional(6)), Direct(), blobs, choices(epochs=6, lr=0.3), Run(tmp_path))
        first = Run(tmp_path).lines("metrics")[0]
        assert last["loss"] < 0.6 * first["loss"] and last["validation_accuracy"] == 100

    def test_the_firing_rate_of_a_student_is_what_a_hand_counts(self, blobs, tmp_path):
        student, twin = spiking(convolutional(6)), spiking(convolutional(6))
        twin.load_state_dict(student.state_dict())
        config = choices(epochs=1, batch_size=96, lr=0.0)
        line = fit(student, Direct(), blobs, config, Run(tmp_path), validation=0.0)
        emitted = []
        for layer in twin.neurons.values():
            layer.register_forward_hook(lambda _, __, output: emitted.append(output[0].detach()))
        twin.train()(blobs.train_images.float() / 255)
        count = sum((spikes != 0).sum().item() for spikes in emitted) / sum(spikes.numel() for spikes in emitted)
        assert 1 < line["firing_rate"] < 99
        assert line["firing_rate"] == pytest.approx(100 * count, abs=0.05)

    def test_tensorboard_gets_the_same_numbers(self, blobs, tmp_path):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        fit(learner(flat()), Direct(), blobs, choices(tensorboard=True), Run(tmp_path))
        assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 1
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
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
    fit(spiking(convolutional(4)), KDSNN((("2", "2"),)), guarded, choices(ema=0.5), Run(tmp_path), teacher=teacher)


def test_augmentation_changes_what_is_learnt_and_depends_on_the_step_alone(blobs, tmp_path):
    def line(name, augment):
        return fit(learner(flat()), Direct(), blobs, choices(epochs=1), begun(tmp_path / name), augment=augment)["loss"]

    assert line("a", Augment(crop=2)) == line("b", Augment(crop=2)) != line("c", None)


class TestViews:
    """Epochs whose batches come again, and the teacher's answers that are kept for them."""

    objective = KDSNN((("2", "2"),))
    augment = Augment(crop=1, flip=True)

    def train(self, blobs, path, config, seed=2, augment=augment, objective=objective, resume=False):
        """The student, the files, and how often the teacher was asked."""
        student, teacher = learner(convolutional(6)), Teacher(convolutional(4, seed=seed), MEAN, STD)
        calls, asked = [], loop.ask
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "ask", lambda *args: calls.append(len(args[1])) or asked(*args))
            fit(student, objective, blobs, config, begun(path), augment=augment, teacher=teacher)
        return student.state_dict(), (path / "metrics.jsonl").read_bytes(), len(calls)

    def without_cache(self, *args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "open_cache", lambda *_: None)
            return self.train(*args, **options)

    def assert_same_run(self, first, second):
        assert same(first[0], second[0]) and first[1] == second[1]

    @pytest.mark.parametrize("views, period", [(0, 5), (1, 1), (2, 2), (3, 3)])
    def test_come_again_in_turn_and_none_does_without(self, views, period, blobs, tmp_path, monkeypatch):
        seen, fetch = [], Trainer.fetch

        def remember(trainer, chosen, seed, epoch):
            images, labels = fetch(trainer, chosen, seed, epoch)
            seen.append((chosen, images))
            return images, labels

        monkeypatch.setattr(Trainer, "fetch", remember)
        config = choices(epochs=5, views=views)
        fit(learner(flat()), Direct(), blobs, config, Run(tmp_path), augment=self.augment)
        assert not (tmp_path / "answers").exists()
        seen = seen[1:]  # the first is the probe's
        epochs = [torch.cat([images for _, images in seen[5 * epoch :][:5]]) for epoch in range(5)]
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

    @pytest.mark.parametrize("objective", [KDSNNResponse(), KDSNNFeature((("2", "2"), ("0", "0")))])
    def test_keep_what_the_objective_compares_alone(self, objective, blobs, tmp_path):
        self.train(blobs, tmp_path, choices(views=1), objective=objective)
        (cache,) = (tmp_path / "answers").iterdir()
        kept = {f"features.{path}.npy" for path, _ in objective.pairs}
        assert {file.name for file in cache.iterdir()} == {"key.json", "samples.npy", "logits.npy"} | kept

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
        progress = loop.Progress.silent()
        progress.say = said.append
        teacher = Teacher(convolutional(4, seed=2), MEAN, STD)
        config = choices(epochs=3, views=2)
        fit(learner(convolutional(6)), self.objective, blobs, config, Run(tmp_path), teacher=teacher, progress=progress)
        size = 2 * 5 * 16 * (4 * 3 + 4 * 4 * 64 + 8) / 1024
        assert any(f"2 views of 5 steps: {size:.1f} KiB in" in line and "0 % of them" in line for line in said)

    def test_are_refused_where_the_disk_is_too_small_before_anything_is_trained(self, blobs, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(ConfigError, match=r"answers to 2 views need 163\.1 KiB in '.*answers', where 1000 bytes"):
            self.train(blobs, tmp_path, choices(epochs=3, views=2))
        assert not list((tmp_path / "answers").iterdir()) and not Run(tmp_path).checkpoint.exists()


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
            fit(student, Direct(), blobs, choices(convolutions=whose, channels_last=True, lr=0.01), run)
            assert {line["convolutions"] for line in run.lines("timing")} == {whose}
            found[whose] = student.state_dict()
        for name, expected in found["torch"].items():
            torch.testing.assert_close(found["winograd"][name], expected, rtol=1e-3, atol=1e-4)
        assert not same(found["torch"], found["winograd"])

    def test_winograd_s_that_cannot_be_had_are_refused(self, blobs, tmp_path):
        with pytest.raises(ConfigError, match=r"=winograd\) cannot be had here \(no convolution"):
            fit(learner(flat()), Direct(), blobs, choices(convolutions="winograd", channels_last=True), Run(tmp_path))
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
        fit(learner(self.network()), KDSNNResponse(2.0, 0.5), blobs, config, Run(tmp_path), teacher=teacher)
        assert all(type(layer) is nn.Conv2d for layer in teacher.modules() if isinstance(layer, nn.Conv2d))
