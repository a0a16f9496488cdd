from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.schedule import Constant, Ramp, Switch
from spikedistill.objective.terms import (
    Batch,
    Needs,
    Objective,
    Sum,
    check_fraction,
    check_positive,
    check_terms,
    check_weight,
    total,
)

FULL = Needs(
    teacher=True,
    pairs=(("a", "b"),),
    student_spikes=("c",),
    teacher_spikes=("d",),
    potentials=("e",),
    every_step=True,
    source=True,
    mirror=True,
    operations=True,
    replacement=3.0,
)


@pytest.fixture
def batch():
    return Batch(labels=torch.tensor([0, 1, 2]), student=Answer(torch.zeros(2, 3, 4)))


class TestTotal:
    def test_the_loss_is_the_sum_of_all_terms(self):
        assert total({"labels": torch.tensor(0.25), "soft": torch.tensor(1.5), "features": torch.tensor(2.0)}) == 3.75

    def test_a_single_term_is_the_loss_and_passes_its_gradient_on(self):
        term = torch.tensor(3.0, requires_grad=True)
        total({"labels": 2 * term}).backward()
        assert term.grad == 2

    def test_the_loss_keeps_the_number_format_of_its_terms(self):
        assert total({"labels": torch.tensor(0.1, dtype=torch.float64)}).dtype == torch.float64


class TestBatch:
    def test_alone_it_has_no_teacher_no_second_stream_and_no_features(self, batch):
        assert (batch.teacher, batch.source, dict(batch.student.features)) == (None, None, {})
        with pytest.raises(ConfigError, match="needs a teacher, and no teacher was given"):
            batch.require_teacher()
        with pytest.raises(ConfigError, match="needs a second input stream, and the feed has none: use a PairFeed"):
            batch.require_source()

    def test_what_is_there_is_given(self, batch):
        whole = replace(batch, teacher=Answer(torch.ones(1, 3, 4)), source=Answer(torch.ones(2, 3, 4)))
        assert whole.require_teacher() is whole.teacher and whole.require_source() is whole.source

    def test_it_stands_at_the_beginning_of_training(self, batch):
        assert batch.progress.shape == () and batch.progress == 0


class TestNeeds:
    def test_all_of_them_are_tried_here(self):
        assert all(value != getattr(Needs(), name) for name, value in vars(FULL).items())

    @pytest.mark.parametrize("name", [name for name in vars(FULL)])
    def test_what_either_needs_both_need_together(self, name):
        one = Needs(**{name: getattr(FULL, name)})
        assert one | Needs() == Needs() | one == one | one == one
        assert one | FULL == FULL

    def test_paths_are_joined_in_order_without_doubles(self):
        first, second = Needs(pairs=(("a", "b"), ("c", "d"))), Needs(pairs=(("e", "f"), ("a", "b")))
        assert (first | second).pairs == (("a", "b"), ("c", "d"), ("e", "f"))

    @pytest.mark.parametrize("name", [name for name in vars(FULL)])
    def test_a_teacher_is_asked_for_logits_features_and_its_own_spikes_alone(self, name):
        needs = Needs(**{name: getattr(FULL, name)})
        assert needs.needs_teacher == (name in ("teacher", "pairs", "teacher_spikes"))


def test_an_objective_needs_nothing_and_has_no_helpers_unless_it_says_so(batch):
    objective = Objective()
    assert (objective.needs, len(objective.modules(batch, None))) == (Needs(), 0)
    with pytest.raises(NotImplementedError):
        objective(batch, nn.ModuleDict())


@dataclass(frozen=True)
class Weighs(Objective):
    """Has one term and one trainable helper that multiplies it."""

    name: str = "labels"
    known: Needs = field(default_factory=Needs)

    @property
    def needs(self):
        return self.known

    def modules(self, probe, teacher):
        return nn.ModuleDict({"scale": nn.Linear(1, 1, bias=False)})

    def __call__(self, batch, modules):
        return {self.name: modules["scale"].weight.sum() * batch.student.logits.square().sum()}


def taught(seed=0):
    """A batch with all that the methods of this package look at."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    student = Answer(draw(3, 4, 5), {"late": draw(3, 4, 6)})
    return Batch(
        labels=torch.tensor([0, 1, 2, 4]), student=student, teacher=Answer(draw(1, 4, 5), {"deep": draw(1, 4, 6)})
    )


def gradient(objective, batch):
    """What the student's logits and features get."""
    leaves = [batch.student.logits, batch.student.features["late"]]
    return torch.autograd.grad(total(objective(batch, objective.modules(batch, None))), leaves, materialize_grads=True)


PARTS = [Direct(0.1), TET(lam=0.3), KDSNNResponse(3.0), KDSNNFeature((("deep", "late"),)), KDSNN((("deep", "late"),))]


class TestSum:
    @pytest.mark.parametrize("silent", [0.0, Constant(0.0), Switch(before=0.0, after=1.0)], ids=repr)
    @pytest.mark.parametrize("part", PARTS, ids=repr)
    def test_a_part_of_weight_0_leaves_the_gradient_of_the_rest(self, part, silent):
        for rest in PARTS:
            found, expected = (gradient(each, taught()) for each in (Sum(((1.0, rest), (silent, part))), rest))
            torch.testing.assert_close(found, expected)

    @given(weight=st.floats(0, 100), gone=st.floats(0, 1))
    def test_terms_are_multiplied_by_the_weight_of_this_moment(self, weight, gone):
        batch = replace(taught(), progress=torch.tensor(gone))
        parts = ((weight, KDSNNResponse(3.0)), (Ramp(1.0, 3.0), TET()), (2.0, KDSNNFeature((("deep", "late"),))))
        objective = Sum(parts)
        terms = objective(batch, objective.modules(batch, None))
        first, second, third = (part(batch, part.modules(batch, None)) for _, part in parts)
        ramp = 1 + 2 * gone
        expected = {
            "labels": weight * first["labels"] + ramp * second["labels"] + 2 * third["labels"],
            "soft": weight * first["soft"],
            "spread": ramp * second["spread"],
            "features": 2 * third["features"],
        }
        assert list(terms) == ["labels", "soft", "spread", "features"]
        torch.testing.assert_close(terms, expected)

    def test_one_part_of_weight_1_is_that_part(self):
        for part in PARTS:
            batch, alone = taught(), Sum(((1.0, part),))
            modules = part.modules(batch, None)
            torch.testing.assert_close(
                alone(batch, nn.ModuleDict({"0": modules})), part(batch, modules), rtol=0, atol=0
            )

    def test_a_sum_of_sums_is_the_sum_of_all(self):
        batch = taught()
        nested = Sum(((2.0, Sum(((0.5, Direct()), (3.0, TET())))), (1.0, KDSNNResponse())))
        flat = Sum(((1.0, Direct()), (6.0, TET()), (1.0, KDSNNResponse())))
        torch.testing.assert_close(*(each(batch, each.modules(batch, None)) for each in (nested, flat)))

    def test_it_needs_what_its_parts_need(self):
        needs = [Needs(**{name: value}) for name, value in vars(FULL).items()]
        assert Sum(tuple((1.0, Weighs(known=each)) for each in needs)).needs == FULL
        assert Sum(((0.0, KDSNNResponse()), (1.0, TET()))).needs == Needs(teacher=True, every_step=True)

    def test_every_part_trains_helpers_of_its_own(self, batch):
        objective = Sum(((1.0, Weighs("first")), (1.0, Direct()), (3.0, Weighs("second"))))
        modules = objective.modules(batch, None)
        assert [name for name, _ in modules.named_parameters()] == ["0.scale.weight", "2.scale.weight"]
        ones = replace(batch, student=Answer(torch.ones(2, 3, 4)))
        total(objective(ones, modules)).backward()
        assert [weight.grad.item() for weight in modules.parameters()] == [24.0, 3 * 24.0]

    def test_helpers_of_other_parts_are_not_taken(self, batch):
        with pytest.raises(ValueError, match="shorter"):
            Sum(((1.0, Direct()),))(batch, nn.ModuleDict())

    def test_without_parts_it_is_refused(self):
        with pytest.raises(ConfigError, match=r"at least one part \(weight, objective\)"):
            Sum(())

    @pytest.mark.parametrize("wrong", [-0.5, float("nan"), float("inf")])
    def test_a_weight_that_no_part_can_have_is_refused(self, wrong):
        with pytest.raises(ConfigError, match=rf"the weight of a part \(={wrong}\) must be 0 or more and finite"):
            Sum(((1.0, Direct()), (wrong, TET())))


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_fraction_from_0_to_1_is_taken(value):
    check_fraction("alpha", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_fraction_outside_0_to_1_is_refused(value):
    with pytest.raises(ConfigError, match=rf"alpha \(={value}\) is a weight: give a value from 0 to 1"):
        check_fraction("alpha", value)


@pytest.mark.parametrize("value", [1e-6, 4.0])
def test_a_scale_above_0_is_taken(value):
    check_positive("temperature", value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_above_0_and_finite_is_refused(value):
    with pytest.raises(ConfigError, match=rf"temperature \(={value}\) must be above 0"):
        check_positive("temperature", value)


@pytest.mark.parametrize("value", [0.0, 4.0])
def test_a_weight_of_0_or_more_is_taken(value):
    check_weight("weight", value)


@pytest.mark.parametrize("value", [-1e-6, float("nan"), float("inf")])
def test_a_weight_below_0_or_not_finite_is_refused(value):
    with pytest.raises(ConfigError, match=rf"weight \(={value}\) must be 0 or more and finite"):
        check_weight("weight", value)


@pytest.mark.parametrize(
    "terms, said",
    [
        ({}, "no terms"),
        ({"labels": torch.zeros(()), "epoch": torch.zeros(())}, "epoch"),
        ({"labels": torch.zeros(3)}, "labels"),
    ],
)
def test_terms_are_scalars_under_names_of_their_own(terms, said):
    with pytest.raises(ConfigError, match=rf"The objective returned {said}: expected one or more scalar tensors"):
        check_terms(terms)
    check_terms({"labels": torch.zeros(())})


@pytest.mark.parametrize(
    "part, said",
    [
        ((Constant(-1.0), Direct()), "the weight of a part"),
        ((Ramp(0.5, -0.5), Direct()), "the weight of a part"),
    ],
)
def test_parts_of_a_sum_are_weights_and_objectives(part, said):
    with pytest.raises(ConfigError, match=said):
        Sum((part,))
