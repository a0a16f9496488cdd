import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikedistill.neuron.dynamics import IF, Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.train.optimise import (
    Lookahead,
    learning_rate,
    make_averaged,
    make_lookahead,
    make_optimiser,
    set_learning_rate,
)
from spikedistill.train.recipe import Training


def convolutional():
    stem = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def spiking(neuron):
    return to_spiking(convolutional(), Conversion(neuron=neuron, inherit=False))[0]


class TestLearningRate:
    def test_without_warmup_is_torchs_cosine_annealing(self):
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=40)
        config = Training(lr=0.3, warmup=0.0)
        for step in range(40):
            assert learning_rate(step, 40, config) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
            optimiser.step()
            reference.step()

    def test_one_cycle_is_two_straight_lines(self):
        config = Training(lr=1.0, warmup=0.4, schedule="one-cycle")
        expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
        assert [learning_rate(step, 10, config) for step in range(10)] == pytest.approx(expected)

    @pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
    @given(warmup=st.floats(0, 0.9), steps=st.integers(1, 300), lr=st.floats(1e-4, 10))
    def test_rises_to_its_peak_and_falls_to_nearly_nothing(self, schedule, warmup, steps, lr):
        config = Training(lr=lr, warmup=warmup, schedule=schedule)
        rates = [learning_rate(step, steps, config) for step in range(steps)]
        top = rates.index(max(rates))
        assert min(rates) > 0 and max(rates) <= lr
        assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
        assert max(rates) >= lr * (1 - 1 / max(1, steps * (1 - warmup)))

    def test_ends_near_zero(self):
        for schedule, end in (("cosine", 0.5 * (1 - math.cos(math.pi / 95))), ("one-cycle", 1 / 95)):
            config = Training(lr=2.0, warmup=0.05, schedule=schedule)
            assert learning_rate(99, 100, config) == pytest.approx(2.0 * end)

    @pytest.mark.parametrize("schedule, middle", [("cosine", 0.3 + 0.7 * 0.5), ("one-cycle", 0.65)])
    def test_rises_and_falls_between_the_given_fractions_of_the_peak(self, schedule, middle):
        config = Training(lr=2.0, warmup=0.5, schedule=schedule, lr_first=0.2, lr_last=0.3)
        rates = [learning_rate(step, 16, config) / 2.0 for step in range(16)]
        assert rates[:8] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        assert rates[8] == 1.0 and rates[12] == pytest.approx(middle)
        assert 0.3 < rates[15] < 0.4


class TestOptimiser:
    def test_decays_kernels_and_matrices_but_no_vectors_or_scalars(self):
        network = nn.ModuleDict({"student": spiking(IF), "frozen": nn.Linear(2, 2).requires_grad_(False)})
        network["learned"] = spiking(Neuron(learn_threshold=True))
        groups = make_optimiser(network, Training(weight_decay=0.25)).param_groups
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
        make_optimiser(layer, Training(optimizer=optimizer, momentum=0.0, lr=0.5, weight_decay=0.2)).step()
        torch.testing.assert_close(layer.bias, bias, rtol=0, atol=0)
        shrunk = weight * (1 - 0.5 * 0.2)
        torch.testing.assert_close(layer.weight, shrunk)

    def test_a_network_of_matrices_alone_has_one_group(self):
        assert len(make_optimiser(nn.Linear(2, 2, bias=False), Training()).param_groups) == 1

    def test_every_group_takes_the_rate_that_is_set(self):
        optimiser = make_optimiser(convolutional(), Training(lr=0.5))
        set_learning_rate(optimiser, 0.125)
        assert [group["lr"] for group in optimiser.param_groups] == [0.125, 0.125]

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
    def test_biases_of_batch_norm_have_a_rate_of_their_own(self, optimizer):
        network = convolutional()
        optimiser = make_optimiser(network, Training(lr=0.5, norm_lr=64.0, optimizer=optimizer))
        set_learning_rate(optimiser, 0.25)
        rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
        assert rates.pop(id(network[1].bias)) == 16.0
        muon = rates.pop(id(network[0].weight))
        assert muon == (pytest.approx(0.12) if optimizer == "muon" else 0.25)
        assert set(rates.values()) == {0.25} and len(rates) == 4

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_without_gradient_these_biases_shrink_like_the_weights(self, optimizer):
        norm = nn.BatchNorm2d(4)
        norm.bias.data.fill_(3.0)
        norm.weight.grad, norm.bias.grad = torch.zeros(4), torch.zeros(4)
        optimiser = make_optimiser(norm, Training(optimizer=optimizer, momentum=0.0, norm_lr=16.0, weight_decay=0.2))
        set_learning_rate(optimiser, 0.5)
        optimiser.step()
        torch.testing.assert_close(norm.bias.detach(), torch.full((4,), 3.0 * (1 - 0.5 * 0.2)))
        assert (norm.weight == 1).all()

    def test_muon_takes_kernels_and_leaves_frozen_weights_out(self):
        network = convolutional()
        network[1].weight.requires_grad_(False)
        groups = make_optimiser(network, Training(optimizer="muon", norm_lr=2.0)).param_groups
        assert [[tuple(p.shape) for p in group["params"]] for group in groups if group["orthogonal"]] == [
            [(4, 3, 3, 3)]
        ]
        assert sum(len(group["params"]) for group in groups) == 5

    def test_a_rate_of_zero_is_allowed_with_muon(self):
        network = convolutional()
        before = [p.detach().clone() for p in network.parameters()]
        optimiser = make_optimiser(network, Training(optimizer="muon", lr=0.0))
        set_learning_rate(optimiser, 0.0)
        network(torch.rand(2, 3, 5, 5)).sum().backward()
        optimiser.step()
        for parameter, value in zip(network.parameters(), before):
            torch.testing.assert_close(parameter.detach(), value)


class TestAveraged:
    def test_there_is_none_unless_a_decay_is_given(self):
        assert make_averaged(nn.Linear(1, 1), Training()) is None

    @pytest.mark.parametrize("decay", [0.5, 0.999])
    def test_is_the_recursion_by_hand(self, decay):
        """Running statistics too. Half is the smaller decay from the eighth step on, 0.999 never within 20 steps."""
        layer, norm = nn.Linear(1, 1, bias=False).double(), nn.BatchNorm1d(1).double()
        network = nn.Sequential(layer, norm)
        averaged = make_averaged(network, Training(ema=decay))
        values = torch.rand(20, generator=torch.Generator().manual_seed(0)).double().tolist()
        average = values[0]
        for done, value in enumerate(values):
            layer.weight.data.fill_(value)
            norm.running_mean.fill_(value)
            averaged.update_parameters(network)
            kept = min(decay, (1 + done) / (10 + done)) if done else 0.0
            average = kept * average + (1 - kept) * value
        assert averaged.module[0].weight.item() == pytest.approx(average, rel=1e-12)
        assert averaged.module[1].running_mean.item() == pytest.approx(average, rel=1e-12)

    @pytest.mark.parametrize("steps", [20, 300])
    def test_a_short_training_is_averaged_over_its_end(self, steps):
        """A weight that grows by one each step is less than two tenths of the training behind, whatever the decay."""
        layer = nn.Linear(1, 1, bias=False).double()
        averaged = make_averaged(layer, Training(ema=0.9999))
        for done in range(steps):
            layer.weight.data.fill_(done)
            averaged.update_parameters(layer)
        assert 0 < steps - averaged.module.weight.item() < 0.2 * steps


class TestLookahead:
    def test_there_is_none_unless_it_is_asked_for(self):
        assert make_lookahead(nn.Linear(1, 1), Training()) is None

    @pytest.mark.parametrize("steps", [12, 11, 2])
    def test_is_the_recursion_by_hand(self, steps):
        """A weight that grows by one each step, every third step averaged with the slow one."""
        layer, norm = nn.Linear(1, 1, bias=False).double(), nn.BatchNorm1d(1).double()
        nn.init.constant_(layer.weight, 5.0)
        norm.running_mean.fill_(5.0)
        network = nn.Sequential(layer, norm)
        lookahead = make_lookahead(network, Training(lookahead=3))
        fast = slow = 5.0
        for done in range(1, steps + 1):
            with torch.no_grad():
                layer.weight.add_(1.0)
            norm.running_mean.copy_(layer.weight.detach()[0])
            norm.num_batches_tracked.fill_(done)
            lookahead.update(network, done, steps)
            fast += 1.0
            if done % 3 == 0:
                kept = 0.95**3 * (done / steps) ** 3
                fast = slow = kept * slow + (1 - kept) * fast
            if done == steps:
                fast = slow
            assert layer.weight.item() == pytest.approx(fast)
            assert lookahead.slow[0].weight.item() == pytest.approx(slow)
            assert norm.running_mean.item() == pytest.approx(fast)
            assert norm.num_batches_tracked == done
        assert lookahead.state_dict().keys() == {f"slow.{name}" for name in network.state_dict()}

    def test_the_network_is_not_shared(self):
        layer = nn.Linear(2, 2)
        lookahead = Lookahead(layer, 5)
        layer.weight.data.zero_()
        assert lookahead.slow.weight.any() and not any(p.requires_grad for p in lookahead.parameters())
