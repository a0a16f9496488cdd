"""Two temperatures and budgets, against the formulas."""

import pytest
import torch
from torch import nn

from spikedistill.answer import Answer
from spikedistill.deliver.energy import estimate_energy
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import Neuron
from spikedistill.objective.budget import Budget, Penalty, spikes_per_image
from spikedistill.objective.kdsnn import KDSNNResponse
from spikedistill.objective.temperatures import HeterogeneousTemperatures
from spikedistill.objective.terms import Batch, Sum, total
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Architecture
from spikedistill.train.training_step import settle_objective

pytestmark = pytest.mark.usefixtures("without_compiler")
NONE = nn.ModuleDict()


def batch(spikes=0.0, operations=0.0):
    """Logits of three steps; 4 images with so many spikes in two layers, and so many operations."""
    torch.manual_seed(0)
    half = torch.full((3, 4, 2), spikes / 12, requires_grad=True)
    return Batch(
        labels=torch.tensor([0, 1, 2, 4]),
        student=Answer(
            torch.randn(3, 4, 5),
            spikes={"a": half, "b": half},
            operations=torch.full((3, 4), operations / 3, requires_grad=True),
        ),
        teacher=Answer(torch.randn(1, 4, 5)),
    )


class TestTemperatures:
    def test_equal_ones_are_those_of_kdsnn(self):
        made = HeterogeneousTemperatures(temperature=3.0, student_temperature=3.0, alpha=0.4)
        torch.testing.assert_close(made(batch(), NONE), KDSNNResponse(3.0, 0.4)(batch(), NONE))

    def test_the_divergence_is_that_of_probabilities_by_hand(self):
        given = batch()
        p = (given.teacher.logits.mean(0) / 5).exp()
        q = (given.student.logits.mean(0) / 2).exp()
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        by_hand = (p * (p / q).log()).sum(-1).mean()
        made = HeterogeneousTemperatures(temperature=5.0, student_temperature=2.0, alpha=1.0)
        torch.testing.assert_close(made(given, NONE)["soft"], 10 * by_hand)

    def test_logits_smaller_by_the_ratio_of_temperatures_are_enough(self):
        teacher = torch.randn(1, 4, 5)
        given = Batch(labels=torch.zeros(4).long(), student=Answer(teacher / 4), teacher=Answer(teacher))
        made = HeterogeneousTemperatures(temperature=8.0, student_temperature=2.0)
        assert float(made(given, NONE)["soft"]) == pytest.approx(0, abs=1e-5)

    def test_a_temperature_of_zero_is_refused(self):
        with pytest.raises(ConfigError, match="student_temperature"):
            HeterogeneousTemperatures(student_temperature=0.0)


def spiking(timesteps=2, levels=1):
    torch.manual_seed(0)
    ann, images = Architecture("vgg9", 5, 3, 4).build(), torch.rand(16, 3, 16, 16)
    conversion = Conversion(timesteps=timesteps, neuron=Neuron(levels=levels, initial=0.5))
    return to_spiking(ann, conversion, calibration_images=images)[0].eval(), images


class TestBudget:
    @pytest.mark.parametrize("spikes, operations", [(30.0, 0.0), (0.0, 900.0), (30.0, 900.0)])
    def test_what_goes_beyond_a_target_is_penalised_relative_to_it(self, spikes, operations):
        given = batch(spikes=50.0, operations=1200.0)
        terms = Penalty(spikes, operations)(given, NONE)
        expected = {"spikes": 50 / 30 - 1} if spikes else {}
        expected |= {"operations": 1200 / 900 - 1} if operations else {}
        assert {name: float(term.detach()) for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)

    def test_within_the_target_there_is_no_term_and_no_gradient(self):
        given = batch(spikes=20.0, operations=100.0)
        found = total(Penalty(spikes=30.0, operations=900.0)(given, NONE))
        assert float(found.detach()) == 0
        (slope,) = torch.autograd.grad(found, given.student.spikes["a"])
        assert not slope.any()

    def test_processes_decide_together(self):
        given = batch(spikes=50.0)
        together = Batch(labels=None, student=given.student, mean_over_processes=lambda found: 0 * found + 10.0)
        assert float(Penalty(spikes=30.0)(together, NONE)["spikes"].detach()) == 0

    def test_only_its_own_layers_count_beside_other_parts(self):
        given = batch(spikes=50.0)
        for layers, found in (((), 50.0), (("a",), 25.0)):
            term = Penalty(spikes=10.0, layers=layers)(given, NONE)["spikes"]
            assert float(term.detach()) == pytest.approx(found / 10 - 1)

    @pytest.mark.parametrize("timesteps, levels", [(4, 1), (1, 4)])
    def test_spikes_are_those_that_energy_counts(self, timesteps, levels):
        student, _ = spiking(timesteps, levels)
        images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
        cost = estimate_energy("student", student, images, torch.zeros(16).long(), torch.float32).cost
        assert (cost.timesteps, cost.levels) == (timesteps, levels) and cost.spikes > 100
        answer = student.observe(images.float() / 255, spikes=student.layers())
        found = spikes_per_image(Batch(labels=None, student=answer))
        assert float(found.detach()) == pytest.approx(cost.spikes, rel=1e-6)

    def test_it_adds_to_distillation(self):
        given = batch(spikes=50.0, operations=1200.0)
        made = Budget(temperature=3.0, student_temperature=2.0, spikes=30.0, operations=900.0, penalty=0.5)
        terms = made(given, NONE)
        usual = HeterogeneousTemperatures(3.0, student_temperature=2.0)(given, NONE)
        over = Penalty(30.0, 900.0)(given, NONE)
        expected = {**usual, "spikes": 0.5 * over["spikes"], "operations": 0.5 * over["operations"]}
        torch.testing.assert_close(terms, expected)

    def test_training_with_it_lowers_operations(self):
        student, images = spiking()
        method = settle_objective(Sum(((1.0, Penalty(spikes=1.0, operations=1.0)),)), student, None, True)
        assert method.needs.operations and set(method.needs.student_spikes) == set(student.layers())
        with torch.no_grad():
            before = student.observe(images, operations=True).operations.mean()
        optimiser = torch.optim.SGD(student.parameters(), 1e-2)
        for _ in range(5):
            answer = student.observe(images, spikes=student.layers(), operations=True)
            loss = total(method(Batch(labels=None, student=answer), nn.ModuleDict({"0": NONE})))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
        with torch.no_grad():
            assert student.observe(images, operations=True).operations.mean() < before

    def test_without_a_target_it_is_refused(self):
        with pytest.raises(ConfigError, match=r"--spikes, --operations or both"):
            Budget().settled(None, spiking()[0], True)

    @pytest.mark.parametrize("fields", [{"spikes": -1.0}, {"operations": float("inf")}, {"penalty": -1.0}])
    def test_values_outside_their_range_are_refused(self, fields):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            Budget(**fields)
