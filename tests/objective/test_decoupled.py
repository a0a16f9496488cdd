"""Temporal decoupling against NumPy, closed forms and its siblings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import IF
from spikedistill.objective.decoupled import TemporalDecoupling, own_target
from spikedistill.objective.direct import TET
from spikedistill.objective.kdsnn import KDSNNResponse
from spikedistill.objective.terms import Batch, Needs, total
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Architecture
from spikedistill.train.training_step import settle_objective

NONE = nn.ModuleDict()


def drawn(seed, *shape):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(steps=3, teaching=1):
    """Four samples of five classes; with three steps their numbers of correct steps are 1, 2, 3 and 0."""
    student, labels = drawn(0, steps, 4, 5), torch.tensor([0, 1, 2, 4])
    for sample, right in enumerate((1, 2, 3, 0)):
        for step in range(steps):
            other = (int(labels[sample]) + 1) % 5
            student[step, sample, int(labels[sample]) if step < right else other] = 9.0
    return Batch(labels=labels, student=Answer(student.requires_grad_()), teacher=Answer(drawn(3, teaching, 4, 5)))


def probabilities(logits, temperature=1.0):
    raised = np.exp(logits / temperature - (logits / temperature).max())
    return raised / raised.sum()


def by_hand(given, made):
    """Every term, summed up over steps and samples one by one."""
    student, teacher = given.student.logits.detach().numpy(), given.teacher.logits.numpy().mean(0)
    steps, count, classes = student.shape
    sums = dict.fromkeys(("labels", "soft", "own", "entropy"), 0.0)
    tau = made.temperature
    for sample in range(count):
        label = int(given.labels[sample])
        truth = np.full(classes, made.label_smoothing / classes) + (1 - made.label_smoothing) * np.eye(classes)[label]
        good = [z for z in student[:, sample] if made.self_teachers == "all" or np.argmax(z) == label]
        for z in student[:, sample]:
            q = probabilities(z, tau)
            sums["labels"] -= np.sum(truth * np.log(probabilities(z)))
            targets = {"soft": [teacher[sample]], "own": [sum(good) / len(good)] if good else []}
            for name, found in targets.items():
                for p in (probabilities(target, tau) for target in found):
                    sums[name] += tau**2 * np.sum(p * np.log(p / q))
            sums["entropy"] += np.sum(q * np.log(q))
    weights = {"labels": 1.0, "soft": made.alpha, "own": made.self_teaching, "entropy": made.entropy}
    return {name: weights[name] * value / (steps * count) for name, value in sums.items()}


@pytest.mark.parametrize(
    "made",
    [
        TemporalDecoupling(entropy=0.01),
        TemporalDecoupling(1.0, 0.7, 0.3, "all", 0.2, 0.1),
        TemporalDecoupling(5.0, 2.0, 1.5, "correct", 1.0, 1.0),
    ],
    ids=repr,
)
def test_its_terms_are_numpys(made):
    given = batch(teaching=2)
    terms, expected = made(given, NONE), by_hand(given, made)
    assert terms.keys() == expected.keys() and expected["own"] > 0
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9), name


def test_its_constants_are_those_of_the_authors_code():
    made = TemporalDecoupling()
    assert (made.temperature, made.alpha, made.self_teaching, made.self_teachers) == (3.0, 0.2, 0.5, "correct")
    assert made(batch(), NONE).keys() == {"labels", "soft", "own"}


def test_with_one_step_labels_and_teacher_say_what_they_say_in_kdsnn():
    given = batch(steps=1)
    terms = TemporalDecoupling(temperature=4.0, alpha=0.3, label_smoothing=0.1)(given, NONE)
    theirs = KDSNNResponse(temperature=4.0, alpha=0.6, label_smoothing=0.1)(given, NONE)
    torch.testing.assert_close(terms["labels"], theirs["labels"] / 0.4)
    torch.testing.assert_close(terms["soft"], theirs["soft"] / 0.6 * 0.3)
    assert terms["own"] == 0


def test_no_step_costs_less_than_the_mean_in_labels_and_soft_targets():
    given = batch()
    terms = TemporalDecoupling(temperature=2.0, alpha=0.5)(given, NONE)
    mean = KDSNNResponse(temperature=2.0, alpha=0.5)(given, NONE)
    assert terms["soft"] > mean["soft"] and terms["labels"] > 2 * mean["labels"]


def test_without_weights_only_the_judgement_of_every_step_is_left():
    given = batch()
    terms = TemporalDecoupling(alpha=0.0, self_teaching=0.0, label_smoothing=0.1)(replace(given, teacher=None), NONE)
    torch.testing.assert_close(terms, {"labels": total(TET(0.1, lam=0.0)(given, NONE))})


class TestSelfTeaching:
    def test_of_a_wrong_step_by_its_neighbours_and_of_no_step_where_all_are_wrong(self):
        """Two classes. The first sample is right with 3 to 1, wrong with 3 to 1, right again; the second is wrong."""
        high, zero = math.log(3), 0.0
        first, second = [[zero, high], [high, zero], [zero, high]], [[high, zero]] * 3
        logits = torch.tensor([first, second]).transpose(0, 1)
        labels = torch.tensor([1, 1])
        target, known = own_target(logits, labels)
        torch.testing.assert_close(target, torch.tensor([[zero, high], [zero, zero]]))
        assert known.tolist() == [True, False]
        made = TemporalDecoupling(temperature=1.0, alpha=0.0, self_teaching=0.8)
        term = made(Batch(labels=labels, student=Answer(logits)), NONE)["own"]
        wrong = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
        assert float(term) == pytest.approx(0.8 * wrong / 6)
        everyone, known = own_target(logits, None)
        torch.testing.assert_close(everyone, torch.tensor([[high / 3, 2 * high / 3], [high, zero]]))
        assert known.tolist() == [True, True]

    def test_costs_nothing_where_all_steps_say_the_same(self):
        given = batch(steps=1)
        same = replace(given, student=Answer(given.student.logits.expand(4, 4, 5)))
        for made in (TemporalDecoupling(), TemporalDecoupling(self_teachers="all")):
            term = made(same, NONE)["own"]
            (slope,) = torch.autograd.grad(term, given.student.logits)
            assert float(term.detach()) == pytest.approx(0, abs=1e-12) and slope.abs().max() < 1e-12

    def test_its_gradient_is_the_difference_of_probabilities_and_none_goes_through_the_target(self):
        given, tau = batch(), 2.0
        logits = given.student.logits
        made = TemporalDecoupling(temperature=tau, self_teaching=0.7)
        (slope,) = torch.autograd.grad(made(given, NONE)["own"], logits)
        target, known = own_target(logits, given.labels)
        assert not target.requires_grad
        difference = (logits.detach() / tau).softmax(-1) - (target / tau).softmax(-1)
        expected = 0.7 * tau * difference * known[:, None] / (3 * 4)
        torch.testing.assert_close(slope, expected)
        assert slope[:, 3].abs().max() == 0 < slope[:, 0].abs().max()


class TestWithoutLabels:
    @pytest.mark.parametrize("made", [TemporalDecoupling(), TemporalDecoupling(4.0, 0.6, 0.1, entropy=0.1)], ids=repr)
    def test_all_steps_teach_and_the_weights_stay(self, made):
        given, free = batch(), made.without_labels()
        assert free == replace(made, self_teachers="all") and free.without_labels() == free
        alone, expected = free(replace(given, labels=None), NONE), by_hand(given, free)
        assert alone.keys() == made(given, NONE).keys() - {"labels"}
        for name, term in alone.items():
            assert term.item() == pytest.approx(expected[name], rel=1e-9)

    def test_called_without_them_it_takes_all_steps_too(self):
        given = replace(batch(), labels=None)
        torch.testing.assert_close(
            TemporalDecoupling()(given, NONE), TemporalDecoupling(self_teachers="all")(given, NONE)
        )

    def test_smoothing_of_labels_is_refused(self):
        with pytest.raises(ConfigError, match=r"label_smoothing \(=0\.1\).*the images have none: leave it out"):
            TemporalDecoupling(label_smoothing=0.1).without_labels()


def test_halves_of_a_batch_have_its_terms_on_the_mean():
    """So several processes need nothing of each other."""
    given, made = batch(), TemporalDecoupling(entropy=0.1)
    whole = made(given, NONE)
    parts = [
        made(
            Batch(
                labels=given.labels[half],
                student=Answer(given.student.logits[:, half]),
                teacher=Answer(given.teacher.logits[:, half]),
            ),
            NONE,
        )
        for half in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close({name: (parts[0][name] + parts[1][name]) / 2 for name in whole}, whole)


class TestNeeds:
    def test_are_every_step_and_the_teacher_unless_it_has_no_weight(self):
        assert TemporalDecoupling().needs == Needs(teacher=True, every_step=True)
        assert TemporalDecoupling(mirror=True).needs == Needs(teacher=True, every_step=True, mirror=True)
        assert TemporalDecoupling(alpha=0.0).needs == Needs(every_step=True)

    @pytest.mark.parametrize("gradient, refused", [("exact", False), ("rate", False), ("quantised", True)])
    def test_are_refused_where_all_steps_are_trained_as_one(self, gradient, refused):
        student, _ = to_spiking(Architecture("vgg9", 5, 3, 2).build(), Conversion(2, neuron=IF, inherit=False))
        student.gradient = gradient
        made = TemporalDecoupling(alpha=0.0)
        if refused:
            with pytest.raises(ConfigError, match=r"gradient \(='quantised'\) trains all steps as one"):
                settle_objective(made, student, None, False)
        else:
            assert settle_objective(made, student, None, False) == made


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"alpha": -0.1},
        {"self_teaching": math.inf},
        {"entropy": -1.0},
        {"label_smoothing": 1.1},
    ],
    ids=repr,
)
def test_a_value_outside_its_range_is_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=rf"{name} \(={value}\)"):
        TemporalDecoupling(**wrong)
