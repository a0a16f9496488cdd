import contextlib
import copy
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spikedistill.data.feed import Inputs
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import IF
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.spikes import DistillingSpikes
from spikedistill.objective.temperatures import HeterogeneousTemperatures
from spikedistill.objective.terms import Needs, Objective, Sum
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Teacher, TrainableANN
from spikedistill.train.recipe import Training
from spikedistill.train.training_step import (
    TeacherRunner,
    TrainingStep,
    make_runner,
    make_training_step,
    settle_objective,
)

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
PLACE = Training(device="cpu", precision="fp32", channels_last=False, convolutions="torch").place()
NO_PROGRESS = torch.zeros(())


def convolutional(width, seed=1):
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def spiking(width=6, timesteps=2, seed=1):
    conversion = Conversion(timesteps=timesteps, neuron=replace(IF, threshold=0.5), inherit=False)
    student, _ = to_spiking(convolutional(width, seed), conversion, mean=MEAN, std=STD)
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student


def inputs(count=8, **others):
    random = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 8, 8, generator=random)
    return Inputs(images, torch.arange(count) % 3, torch.arange(count), **others)


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@dataclass(frozen=True)
class Looks(Objective):
    """Cross-entropy only, by an objective that looks at this."""

    at: Needs

    @property
    def needs(self):
        return self.at

    def __call__(self, batch, modules):
        return {"labels": F.cross_entropy(batch.student.logits.mean(0), batch.labels)}


class Remembers(Looks):
    """Keeps the last batch that it was shown."""

    def __call__(self, batch, modules):
        type(self).shown = batch
        return super().__call__(batch, modules)


class Counted(TorchDispatchMode):
    """Which operations were computed."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


def operations(work):
    with Counted() as counted:
        work()
    return counted.calls


class TestLesson:
    def one(self, training_step, given):
        return training_step(given.student, given.labels, None, given.source, NO_PROGRESS)

    def test_gives_logits_without_gradient_and_terms_with_one(self):
        student, given = spiking(), inputs()
        logits, terms = self.one(TrainingStep(student, Direct(), nn.ModuleDict()), given)
        expected = student(given.student)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(terms["labels"], F.cross_entropy(expected.mean(0), given.labels), rtol=0, atol=0)
        assert not logits.requires_grad and terms["labels"].requires_grad

    def test_costs_no_more_than_the_logits_where_nothing_else_is_looked_at(self):
        student, given = spiking(), inputs()

        def by_hand():
            logits = student(given.student)
            return logits.detach(), F.cross_entropy(logits.mean(0), given.labels)

        training_step = TrainingStep(student, Looks(Needs()), nn.ModuleDict())
        assert operations(lambda: self.one(training_step, given)) == operations(by_hand)

    def test_counts_the_spikes_of_the_layers_that_are_looked_at_and_of_no_others(self):
        student, given = spiking(), inputs()

        def divisions(*paths):
            training_step = TrainingStep(student, Looks(Needs(student_spikes=paths)), nn.ModuleDict())
            return operations(lambda: self.one(training_step, given))[torch.ops.aten.div]

        assert student.layers() == ["2", "4"]
        assert divisions("2") - divisions() == divisions("4") - divisions() == 1
        assert divisions("2", "4") - divisions() == 2

    def test_shows_whole_spikes_by_the_paths_of_the_ann_s_activations(self):
        objective, given = Remembers(Needs(student_spikes=("4", "2"))), inputs()
        self.one(TrainingStep(spiking(timesteps=3), objective, nn.ModuleDict()), given)
        spikes = Remembers.shown.student.spikes
        assert {path: tuple(counts.shape) for path, counts in spikes.items()} == {
            "4": (3, 8, 6, 6, 6),
            "2": (3, 8, 6, 8, 8),
        }
        assert all(set(counts.unique().tolist()) == {0.0, 1.0} for counts in spikes.values())

    def test_shows_the_same_student_s_answer_to_the_second_stream(self):
        student, given = spiking(), inputs(source=torch.rand(8, 3, 8, 8))
        self.one(TrainingStep(student, Remembers(Needs(source=True)), nn.ModuleDict()), given)
        torch.testing.assert_close(Remembers.shown.student.logits, student(given.student), rtol=0, atol=0)
        torch.testing.assert_close(Remembers.shown.source.logits, student(given.source), rtol=0, atol=0)

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("gradient", ["exact", "rate"])
    def test_running_statistics_are_those_of_the_first_stream_alone(self, gradient, momentum):
        (alone, both), given = (spiking(), spiking()), inputs(source=5 * torch.rand(8, 3, 8, 8))
        for student, needs in ((alone, Needs()), (both, Needs(source=True))):
            student.gradient = gradient
            next(m for m in student.modules() if isinstance(m, nn.BatchNorm2d)).momentum = momentum
            training_step = TrainingStep(student, Looks(needs), nn.ModuleDict()).train()
            for scale in (1.0, 2.0):
                images = scale * given.student / 2
                self.one(training_step, replace(given, student=images, source=given.source if needs.source else None))
        ours, expected = (next(m for m in s.modules() if isinstance(m, nn.BatchNorm2d)) for s in (both, alone))
        assert ours.momentum == momentum and ours.running_mean.abs().max() > 1e-3
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(ours, name), getattr(expected, name))

    def test_judges_logits_in_float32_whatever_the_student_computes_in(self):
        given = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            self.one(TrainingStep(spiking(), Remembers(Needs()), nn.ModuleDict()), given)
        assert Remembers.shown.student.logits.dtype == torch.float32


COMPILED = """
import copy, torch
from torch import nn
from spikedistill.train.training_step import statistics_kept

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, first, second):
        one = self.part(first)
        with statistics_kept(self.part):
            return (one * self.part(second)).sum()

torch.manual_seed(0)
given = torch.randn(4, 3, 8, 8), 5 * torch.randn(4, 3, 8, 8)
plain, alone = Two(), Two()
both = copy.deepcopy(plain)
alone.load_state_dict(plain.state_dict())
for _ in range(2):
    plain(*given).backward()
    torch.compile(both, backend="eager", fullgraph=True)(*given).backward()
    alone.part(given[0])
for name, value in both.state_dict().items():
    assert torch.equal(value, plain.state_dict()[name]) and torch.equal(value, alone.state_dict()[name]), name
for ours, theirs in zip(both.parameters(), plain.parameters()):
    torch.testing.assert_close(ours.grad, theirs.grad)
"""


def test_the_second_stream_can_be_compiled_in_one_graph():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TestMakeLesson:
    objective = KDSNNFeature((("4", "4"),), adapt=False)

    def test_makes_the_helpers_of_the_objective(self):
        runner = TeacherRunner(Teacher(convolutional(4), MEAN, STD), self.objective.needs)
        training_step = make_training_step(spiking(6), self.objective, runner, inputs())
        assert [tuple(value.shape) for value in training_step.adapters.parameters()] == [(4, 6, 1, 1)]

    @pytest.mark.parametrize("training", [True, False])
    def test_leaves_the_student_as_it_was(self, training):
        student, runner = (
            spiking().train(training),
            TeacherRunner(Teacher(convolutional(4), MEAN, STD), self.objective.needs),
        )
        before = state(student)
        make_training_step(student, self.objective, runner, inputs())
        assert same(state(student), before)
        assert all(module.training == training for module in student.modules())

    def test_asks_nobody_where_logits_alone_are_looked_at(self):
        class Asked(TrainableANN):
            def observe(self, *_, **__):
                raise AssertionError("was asked")

        asked = Asked(convolutional(4), MEAN, STD)
        make_training_step(asked, KDSNNResponse(), TeacherRunner(asked, KDSNNResponse().needs), inputs())
        with pytest.raises(AssertionError, match="was asked"):
            make_training_step(asked, self.objective, TeacherRunner(asked, self.objective.needs), inputs())

    def test_without_a_second_stream_an_objective_that_looks_at_it_is_refused(self):
        with pytest.raises(ConfigError, match=r"needs a second input stream, and the feed has none: use a PairFeed"):
            make_training_step(spiking(), Looks(Needs(source=True)), None, inputs())


class TestSettleObjective:
    @pytest.mark.parametrize("needs", [Needs(teacher=True), Needs(pairs=(("4", "4"),)), Needs(teacher_spikes=("4",))])
    def test_a_teacher_that_is_looked_at_must_be_there(self, needs):
        with pytest.raises(ConfigError, match="needs a teacher, and no teacher was given"):
            settle_objective(Looks(needs), spiking(), None, True)
        teacher = spiking() if needs.teacher_spikes else Teacher(convolutional(4), MEAN, STD)
        assert settle_objective(Looks(needs), spiking(), teacher, True) == Looks(needs)

    def test_spikes_of_an_ann_are_refused(self):
        with pytest.raises(ConfigError, match=r"needs spikes of 4; .* none, it is an ANN"):
            settle_objective(Looks(Needs(teacher_spikes=("4",))), spiking(), Teacher(convolutional(4), MEAN, STD), True)

    @pytest.mark.parametrize("gradient", ["exact", "rate", "quantised"])
    @pytest.mark.parametrize(
        "needs, refused",
        [
            (Needs(), ()),
            (Needs(every_step=True), ("quantised",)),
            (Needs(student_spikes=("4",)), ("quantised",)),
            (Needs(potentials=("4",)), ("quantised", "rate")),
            (Needs(every_step=True, student_spikes=("4",)), ("quantised", "rate")),
        ],
    )
    def test_a_gradient_that_cannot_give_what_is_looked_at_is_refused(self, gradient, needs, refused):
        student = spiking()
        student.gradient = gradient
        message = rf"gradient \(='{gradient}'\) .*: use gradient='exact', or an objective"
        allowed = contextlib.nullcontext()
        with pytest.raises(ConfigError, match=message) if gradient in refused else allowed:
            settle_objective(Looks(needs), student, None, True)

    def test_an_ann_in_training_gives_what_it_has(self):
        assert settle_objective(TET(), TrainableANN(convolutional(4), MEAN, STD), None, False) == TET()


class TestTutor:
    needs = Needs(teacher=True, pairs=(("4", "4"),), teacher_spikes=("2",))

    def test_averages_a_spiking_teacher_over_its_own_time_steps(self):
        teacher, images = spiking(timesteps=5).eval(), inputs().student
        answer, whole = TeacherRunner(teacher, self.needs).ask(images), teacher.observe(images, ["4"], spikes=["2"])
        torch.testing.assert_close(answer.logits[0], whole.logits.mean(0))
        torch.testing.assert_close(answer.features["4"][0], whole.features["4"].mean(0))
        torch.testing.assert_close(answer.spikes["2"][0], whole.spikes["2"].mean(0))
        assert len(whole.logits) == 5 and len(answer.logits) == 1

    def test_gives_every_step_where_single_steps_are_looked_at(self):
        teacher, images = spiking(timesteps=5).eval(), inputs().student
        answer = TeacherRunner(teacher, replace(self.needs, every_step=True)).ask(images)
        whole = teacher.observe(images, ["4"], spikes=["2"])
        assert same(answer.features, whole.features) and same(answer.spikes, whole.spikes)
        assert torch.equal(answer.logits, whole.logits)

    @pytest.mark.parametrize("teacher", [Teacher(convolutional(4), MEAN, STD), spiking(timesteps=3).eval()])
    def test_its_logits_are_means_over_mirror_images_where_that_is_asked(self, teacher):
        images, needs = inputs().student, Needs(teacher=True, pairs=(("4", "4"),))
        answer, plain = (TeacherRunner(teacher, each).ask(images) for each in (replace(needs, mirror=True), needs))
        mirrored = torch.from_numpy(images.numpy()[..., ::-1].copy())
        expected = (teacher.observe(images).logits.mean(0) + teacher.observe(mirrored).logits.mean(0)) / 2
        torch.testing.assert_close(answer.logits[0], expected)
        assert not torch.allclose(answer.logits, plain.logits) and same(answer.features, plain.features)

    @pytest.mark.parametrize("objective", [KDSNNResponse, KDSNN, HeterogeneousTemperatures, DistillingSpikes])
    def test_every_objective_with_soft_targets_can_ask_for_mirror_images(self, objective):
        assert objective(mirror=True).needs == replace(objective().needs, mirror=True)

    def test_is_shown_its_own_inputs_where_they_differ(self):
        teacher, given = Teacher(convolutional(4), MEAN, STD), inputs(teacher=torch.rand(8, 3, 8, 8))
        answer = TeacherRunner(teacher, Needs(teacher=True)).answer(given, 1, 0)
        assert torch.equal(answer.logits[0], teacher(given.teacher))
        assert not torch.equal(answer.logits[0], teacher(given.student))


class TestMakeTutor:
    def test_there_is_none_where_nobody_is_asked(self):
        assert make_runner(Teacher(convolutional(4), MEAN, STD), TET().needs, PLACE) is None
        assert make_runner(None, Needs(), PLACE) is None

    def test_an_ann_is_folded_and_the_caller_s_stays(self):
        teacher, images = Teacher(convolutional(4), MEAN, STD), inputs().student
        teacher.network[1].running_mean.fill_(0.5)
        before = state(teacher)
        runner = make_runner(teacher, KDSNN((("4", "4"),)).needs, PLACE)
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in runner.teacher.modules())
        assert same(state(teacher), before) and isinstance(teacher.network[1], nn.BatchNorm2d)
        torch.testing.assert_close(runner.ask(images).logits[0], teacher(images))

    def test_a_student_teaches_in_evaluation_mode_bit_for_bit_and_the_caller_s_stays(self):
        teacher, images = spiking(timesteps=3), inputs().student
        for layer in (layer for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)):
            layer.running_var.fill_(2.0)
        before, expected = state(teacher), copy.deepcopy(teacher).eval()(images)
        runner = make_runner(teacher, TET().needs | Needs(teacher=True), PLACE)
        assert torch.equal(runner.ask(images).logits, expected)
        assert same(state(teacher), before)
        assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())


@dataclass(frozen=True)
class Projected(Objective):
    """Logits through a layer of its own, made from the probe's logits."""

    def modules(self, probe, teacher):
        return nn.ModuleDict({"head": nn.Linear(probe.student.logits.shape[-1], 2)})

    def __call__(self, batch, modules):
        return {"head": modules["head"](batch.student.logits.mean(0)).square().mean()}


@pytest.mark.parametrize("objective", [Projected(), Sum(((1.0, Projected()), (1.0, Sum(((0.5, Projected()),)))))])
def test_helpers_of_logits_alone_are_made_from_a_probe(objective):
    training_step = make_training_step(spiking(), objective, None, inputs())
    assert {layer.in_features for layer in training_step.adapters.modules() if isinstance(layer, nn.Linear)} == {3}
