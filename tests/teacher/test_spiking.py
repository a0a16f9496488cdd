"""Spiking networks of the user's own as teachers: one written by hand, with a student's weights, says what it says."""

import copy

import pytest
import torch
from torch import nn

from spikedistill.answer import Learner
from spikedistill.compute.place import choose_place
from spikedistill.data.feed import MemoryFeed
from spikedistill.errors import ConfigError, ShapeError
from spikedistill.files import fingerprint_of
from spikedistill.neuron.dynamics import Neuron
from spikedistill.objective.spikes import DistillingSpikes
from spikedistill.objective.terms import Batch
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Teacher
from spikedistill.teacher.spiking import SpikingTeacher, over_steps, with_steps
from spikedistill.train.loop import fit
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run
from spikedistill.train.training_step import make_runner, settle_objective

pytestmark = pytest.mark.usefixtures("without_compiler")
STEPS = 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
MODES = ("loop", "steps", "rows")
FIRED = ["layer1.fire", "layer2.fire"]
images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1, self.pool, self.layer2 = block(3, 6), nn.AvgPool2d(2), block(6, 5)
        self.fc = nn.Linear(80, 3)

    def forward(self, x):
        return self.fc(self.layer2(self.pool(self.layer1(x))).flatten(1))


class Fire(nn.Module):
    """Integrate-and-fire with a threshold of 1, a subtractive reset and an initial half, and its state inside."""

    def __init__(self, mode="loop"):
        super().__init__()
        self.mode, self.v = mode, 0.5

    def reset(self):
        self.v = 0.5

    def once(self, current):
        charged = self.v + current
        spikes = (charged >= 1).float()
        self.v = charged - spikes
        return spikes

    def forward(self, current):
        if self.mode == "loop":
            return self.once(current)
        steps = current if self.mode == "steps" else current.unflatten(0, (STEPS, -1))
        spikes = torch.stack([self.once(step) for step in steps])
        return spikes if self.mode == "steps" else spikes.flatten(0, 1)


class Layer(nn.Module):
    def __init__(self, conv, bn, threshold, mode):
        super().__init__()
        self.conv, self.bn, self.fire = conv, bn, Fire(mode)
        self.register_buffer("threshold", threshold.view(-1, 1, 1))

    def forward(self, x):
        current = self.bn(self.conv(x)) / self.threshold
        if self.fire.mode == "steps":
            return self.threshold * self.fire(current.unflatten(0, (STEPS, -1))).flatten(0, 1)
        return self.threshold * self.fire(current)


class ByHand(nn.Module):
    """The student of ``Small``, written as users do: T times over all layers, or each layer with all steps."""

    def __init__(self, ann, thresholds, mode="loop"):
        super().__init__()
        self.mode, self.pool, self.fc = mode, ann.pool, ann.fc
        self.layer1, self.layer2 = (
            Layer(*block[:2], threshold, mode) for block, threshold in zip((ann.layer1, ann.layer2), thresholds)
        )

    def once(self, x):
        return self.fc(self.layer2(self.pool(self.layer1(x))).flatten(1))

    def forward(self, x):
        if self.mode == "loop":
            return torch.stack([self.once(x) for _ in range(STEPS)])
        return self.once(x.repeat(STEPS, 1, 1, 1)).unflatten(0, (STEPS, -1))


def made(mode="loop"):
    """A student, and what is written by hand with its weights and thresholds."""
    ann = Small()
    for norm in (ann.layer1[1], ann.layer2[1]):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    conversion = Conversion(STEPS, Neuron(initial=0.5))
    student, _ = to_spiking(Teacher(ann, MEAN, STD), conversion, calibration_images=images)
    return student.eval(), ByHand(ann, [layer.threshold for layer in student.neurons.values()], mode)


def wrapped(network, layers=(), given=images, **options):
    return SpikingTeacher(network, MEAN, STD, given, layers, **options)


class TestWrittenByHand:
    @pytest.mark.parametrize("mode", MODES)
    def test_says_what_the_student_says(self, mode):
        student, network = made(mode)
        teacher = wrapped(network)
        assert isinstance(teacher, Learner) and teacher.layers() == FIRED
        with torch.no_grad():
            ours = student.observe(images, ["layer1.1", "layer2.1"], spikes=student.layers())
            theirs = teacher.observe(images, ["layer1.bn", "layer2.bn"], spikes=FIRED)
            assert torch.equal(teacher(images), theirs.logits)
        assert theirs.logits.shape == (STEPS, 6, 3)
        torch.testing.assert_close(theirs.logits, ours.logits)
        for mine, its in zip(ours.spikes.values(), theirs.spikes.values(), strict=True):
            assert torch.equal(its, mine) and 0 < mine.mean() < 1
        for mine, its in zip(ours.features.values(), theirs.features.values(), strict=True):
            torch.testing.assert_close(its, mine)

    @pytest.mark.parametrize("window", [0, 2])
    def test_teaches_as_the_student_does_and_is_copied_unfolded(self, window):
        student, network = made()
        learner, _ = to_spiking(Small(), Conversion(STEPS, inherit=False), mean=MEAN, std=STD)
        terms = []
        for teacher in (student, wrapped(network)):
            objective = settle_objective(DistillingSpikes(alpha=0.5, window=window), learner, teacher, inherits=True)
            assert [theirs for theirs, _ in objective.spike_pairs] == teacher.layers()
            runner = make_runner(teacher, objective.needs, choose_place("cpu", "fp32"))
            ours = learner.observe(images, spikes=objective.needs.student_spikes)
            batch = Batch(labels=torch.arange(6) % 3, student=ours, teacher=runner.ask(images))
            terms.append(objective(batch, objective.modules(batch, teacher)))
        torch.testing.assert_close(terms[1], terms[0])
        assert terms[1].keys() == {"labels", "soft", "distance"} and terms[1]["distance"] > 0
        assert runner.teacher.network is not network and isinstance(runner.teacher.network.layer1.bn, nn.BatchNorm2d)

    def test_is_frozen_and_stays_in_evaluation_mode(self):
        _, network = made()
        teacher = wrapped(network).train()
        assert not teacher.network.layer1.bn.training and not any(part.requires_grad for part in teacher.parameters())

    def test_keeps_its_answers_for_runs_that_follow(self, blobs, tmp_path):
        _, network = made()
        teacher = wrapped(network, given=blobs.train_images[:8].float() / 255)
        config = Training(
            epochs=2, batch_size=16, lr=0.1, precision="fp32", device="cpu", views=1, cache_dir=str(tmp_path / "kept")
        )
        for name in ("first", "second"):
            torch.manual_seed(0)
            learner, _ = to_spiking(Small(), Conversion(STEPS, inherit=False), mean=MEAN, std=STD)
            feed = MemoryFeed(blobs, 16, 0, views=1)
            fit(learner, DistillingSpikes(), feed, config, Run(tmp_path / name), teacher=teacher)
            teacher(images)  # leaves nothing that would make it another teacher
        first, second = (Run(tmp_path / name).lines("metrics") for name in ("first", "second"))
        assert first == second and first[0]["distance"] > first[1]["distance"] > 0
        assert len(list((tmp_path / "kept").iterdir())) == 1


ALL: list[nn.Module] = []
"""Every layer of neurons that was ever made, as snnTorch keeps them. Copies are not in it."""


class Stateful(nn.Module):
    """Neurons that keep their potential in a buffer, as snnTorch's do; ``begin`` says who resets it."""

    def __init__(self, begin):
        super().__init__()
        self.begin = begin
        self.register_buffer("mem", torch.zeros(0), persistent=False)
        ALL.append(self)

    def clear(self):
        self.mem = torch.zeros(0)

    def forward(self, current):
        charged = current if self.mem.shape != current.shape else self.mem + current
        spikes = (charged >= 1).float()
        self.mem = charged - spikes
        return spikes, self.mem


class Resets(Stateful):
    def reset(self):
        self.clear()


class ResetsMem(Stateful):
    def __init__(self, begin):
        super().__init__(begin)
        self.reset = torch.zeros(1)  # as snnTorch's neurons have after a call

    def reset_mem(self):
        self.clear()


class ResetsAsTold(Stateful):
    def reset(self, potential):
        raise AssertionError(potential)


class Counting(nn.Module):
    """A network whose logits at each step are what its neurons hold."""

    def __init__(self, kind=Stateful, begin=""):
        super().__init__()
        self.lin, self.fire = nn.Linear(192, 7), kind(begin)

    def forward(self, x):
        if self.fire.begin == "forward":
            self.fire.clear()
        if self.fire.begin == "registry":
            for instance in ALL:
                instance.clear()
        return torch.stack([self.fire(self.lin(x.flatten(1)))[1] for _ in range(STEPS)])


class TestState:
    @pytest.mark.parametrize(
        "kind, begin", [(Stateful, "forward"), (ResetsAsTold, "forward"), (Resets, ""), (ResetsMem, "")]
    )
    def test_that_is_reset_before_each_call_makes_all_calls_equal(self, kind, begin):
        teacher = wrapped(Counting(kind, begin))
        alike = wrapped(Counting(Resets))
        alike.network.lin = teacher.network.lin
        first = teacher(images)
        for network in (teacher, copy.deepcopy(teacher), alike):
            assert torch.equal(network(images), first) and torch.equal(network(images), first)
            torch.testing.assert_close(network(images[2:4]), first[:, 2:4])
        current = teacher.network.lin(((images - teacher.mean) / teacher.std).flatten(1))
        fired = teacher.observe(images, spikes=["fire"]).spikes["fire"]
        by_hand = torch.zeros_like(current)
        for spikes, logits in zip(fired, first, strict=True):
            by_hand += current
            assert torch.equal(spikes, (by_hand >= 1).float())
            by_hand -= spikes
            torch.testing.assert_close(logits, by_hand)

    @pytest.mark.parametrize("kind, begin", [(Stateful, ""), (ResetsAsTold, ""), (Stateful, "registry")])
    def test_that_stays_between_calls_is_refused(self, kind, begin):
        message = r"Counting keeps state between calls: .* the same 6 images.*start of forward.*a method reset\(\)"
        with pytest.raises(ConfigError, match=message):
            wrapped(Counting(kind, begin))

    def test_leaves_the_teacher_as_it_was(self):
        teacher = wrapped(Counting(Stateful, "forward"))
        before = fingerprint_of(teacher)
        teacher(images)
        teacher.observe(images[:2], ["fire"])
        assert fingerprint_of(teacher) == before and teacher.network.fire.mem.shape == (0,)

    def test_of_random_numbers_is_none(self):
        class Drawing(Counting):
            def forward(self, x):
                return super().forward(torch.bernoulli((0.2 * x + 0.5).clamp(0, 1)))

        teacher = wrapped(Drawing(Resets))
        assert not torch.equal(teacher(images), teacher(images))


class TestPaths:
    def test_that_do_not_exist_are_refused_with_those_that_do(self):
        _, network = made()
        with pytest.raises(
            ConfigError, match=r"no module in ByHand 'layer2\.fir'. Did you mean 'layer2\.fire'.*fc, la"
        ):
            wrapped(network, ["layer2.fir"])
        teacher = wrapped(network, ["layer2.fire"])
        assert teacher.layers() == ["layer2.fire"] and {"layer1.conv", "fc"} < set(teacher.paths())
        with pytest.raises(ConfigError, match=r"layer of neurons 'layer1\.fire'.*Known: layer2\.fire\."):
            teacher.observe(images, spikes=["layer1.fire"])
        with pytest.raises(ConfigError, match=r"no module in ByHand 'fcs'"):
            teacher.observe(images, ["fcs"])

    @pytest.mark.parametrize("layer", ["layer1", "layer1.conv"])
    def test_of_layers_without_counts_are_refused(self, layer):
        with pytest.raises(ConfigError, match=rf"'{layer}' returns values such as -?\d.*counts.*height behind the lay"):
            wrapped(made()[1], [layer])

    def test_of_potentials_are_refused(self):
        with pytest.raises(ConfigError, match=r"potentials of ByHand at layer1\.fire are not known"):
            wrapped(made()[1]).observe(images, potentials=["layer1.fire"])

    @pytest.mark.parametrize(
        "shapes, said",
        [
            ([(6, 2)], r"called 1 times and returned \[6, 2\], for T=4 time steps of B=6 images: expected one call"),
            ([(4,)], r"1 times and returned \[4\]"),
            ([(6, 4, 2)], r"1 times and returned \[6, 4, 2\]"),
            ([(6, 2)] * 8, r"8 times and returned \[6, 2\], for"),
            ([(24, 2)] * 4, r"4 times and returned \[24, 2\]"),
            ([(6, 2)] * 3 + [(5, 2)], r"4 times and returned \[6, 2\], \[5, 2\]"),
            ([], r"0 times, for T=4"),
        ],
    )
    def test_of_modules_called_in_other_ways_are_refused(self, shapes, said):
        with pytest.raises(
            ConfigError, match=rf"The module 'here' was {said if 'called' in said else 'called ' + said}"
        ):
            over_steps("here", [torch.zeros(shape) for shape in shapes], torch.zeros(STEPS, 6, 3))

    def test_of_one_step_need_no_axis_of_time(self):
        seen = torch.rand(6, 2)
        assert torch.equal(over_steps("here", [seen], torch.zeros(1, 6, 3)), seen[None])


class Outer(nn.Module):
    """A neuron as SpikingJelly writes it, with its surrogate gradient as a module, and a leak for each channel."""

    def __init__(self):
        super().__init__()
        self.leak = nn.Parameter(torch.full((7, 1, 1), 0.5))
        self.surrogate = Step()

    def forward(self, current):
        return self.surrogate(self.leak.flatten() * current)


class Step(nn.Module):
    def forward(self, x):
        return x > 0


class Crowd(nn.Module):
    """Neurons among modules that return counts too, but turn no current into spikes, or hold more than neurons."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(192, 7), nn.Flatten(), Step())
        self.again, self.silent, self.shared = nn.Identity(), Step(), Step()
        self.lin, self.second = nn.Linear(7, 7), Outer()
        self.bounded, self.fc = nn.ReLU6(), nn.Linear(7, 3)

    def forward(self, x):
        logits = []
        for _ in range(STEPS):
            spikes = self.again(self.first(x.flatten(1)).float())
            self.silent(spikes - 2)
            self.bounded(self.lin(spikes))
            spikes = self.second(self.lin(spikes)).float()
            logits.append(self.fc(self.shared(spikes - 0.5) + self.shared(0.5 - spikes) + spikes))
        return torch.stack(logits)


class TestLayersThatAreFound:
    def test_turn_currents_into_spikes(self):
        teacher = wrapped(Crowd())
        assert teacher.layers() == ["first.2", "second"]
        spikes = teacher.observe(images, spikes=["second"]).spikes["second"]
        assert spikes.is_floating_point() and spikes.shape == (STEPS, 6, 7) and set(spikes.unique().tolist()) == {0, 1}

    def test_are_asked_for_where_there_are_none(self):
        class NoModules(Counting):
            def forward(self, x):
                return self.lin(x.flatten(1)).expand(STEPS, -1, -1)

        teacher = wrapped(NoModules())
        assert teacher(images).shape == (STEPS, 6, 7)
        with pytest.raises(ConfigError, match=r"No layer of neurons was found in NoModules: .*SpikingTeacher\(layers="):
            teacher.layers()


class Returns(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer, self.lin = answer, nn.Linear(192, 3)

    def forward(self, x):
        return self.answer(self.lin(x.flatten(1)))


class TestWhatIsNoSpikingNetwork:
    @pytest.mark.parametrize(
        "answer, said",
        [
            (lambda x: x, r"shape \(6, 3\)"),
            (lambda x: x[:, None].expand(-1, STEPS, -1), r"shape \(6, 4, 3\)"),
            (lambda x: x.expand(1, STEPS, -1, -1), r"shape \(1, 4, 6, 3\)"),
            (lambda x: (x, x), "tuple"),
        ],
    )
    def test_is_refused_by_its_logits(self, answer, said):
        with pytest.raises(ConfigError, match=rf"Returns returns {said} for 6 images: expected logits \[T, B, K\]"):
            wrapped(Returns(answer))

    def test_is_refused_by_its_inputs(self):
        teacher = wrapped(made()[1])
        with pytest.raises(ShapeError, match=r"shape \(4, 6, 3, 8, 8\) were given: expected images \[B, C, H, W\]"):
            teacher(images.expand(STEPS, -1, -1, -1, -1))
        with pytest.raises(ShapeError, match="uint8"):
            teacher(images.to(torch.uint8))

    @pytest.mark.parametrize(
        "mean, std, said",
        [((0.4,), STD, "one value per channel"), (MEAN, (0.2, 0.0, 0.2), "std"), ((9.0,) * 3, STD, "255")],
    )
    def test_is_refused_by_its_normalisation(self, mean, std, said):
        with pytest.raises(ConfigError, match=said):
            SpikingTeacher(made()[1], mean, std, images)

    def test_is_refused_if_it_observes_itself(self):
        with pytest.raises(ConfigError, match="normalises its inputs itself"):
            wrapped(made()[0])


class TestWithSteps:
    def test_a_spiking_network_becomes_a_spiking_teacher(self):
        _, network = made()
        found = with_steps(Teacher(network, MEAN, STD, ["a", "b", "c"]), images)
        assert isinstance(found, SpikingTeacher) and found.class_names == ("a", "b", "c") and found.layers() == FIRED
        assert torch.equal(found(images), wrapped(network)(images))

    @pytest.mark.parametrize("answer", [lambda x: x, lambda x: (x, x), lambda x: x.no_such_method()])
    def test_any_other_stays_as_it_is(self, answer):
        teacher = Teacher(Returns(answer), MEAN, STD)
        assert with_steps(teacher, images) is teacher
