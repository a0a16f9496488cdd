"""A student of graded spikes in every way of running it: folded, in steps, saved, observed, with every gradient."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from students import convert
from torch import nn

from spikedistill.student.conversion import INHERITED_NEURON
from spikedistill.student.fold import fold
from spikedistill.student.save import load_student, save_student
from spikedistill.student.student import Student


class Blocks(nn.Module):
    """Six layers of neurons with batch norm and skips, so that it can be cut into stages, and pooling over time."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2 if not k else 4, 4, 3, padding=1, bias=False) for k in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.norms[0](self.convs[0](x)))
        for k in (1, 3):
            inner = F.relu(self.norms[k](self.convs[k](x)))
            x = F.relu(self.norms[k + 1](self.convs[k + 1](inner)) + x)
        x = self.pool(F.relu(self.norms[5](self.convs[5](x))))
        return self.fc(F.avg_pool2d(x, 2).flatten(1))


def student(timesteps, levels, **neuron) -> tuple[Student, torch.Tensor]:
    torch.manual_seed(4)
    images = torch.rand(10, 2, 8, 8)
    made, _ = convert(
        Blocks(), images, timesteps, neuron=dataclasses.replace(INHERITED_NEURON, levels=levels, **neuron)
    )
    return made, images


@torch.no_grad()
def counts(made, images):
    found = made.observe(images, spikes=made.layers()).spikes
    return torch.cat([one.flatten() for one in found.values()])


def gradients(made, images):
    made.zero_grad()
    made.train()(images).square().mean().backward()
    return {name: one.grad.clone() for name, one in made.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("timesteps, levels", [(1, 4), (2, 3)])
class TestGraded:
    def test_counts_are_whole_and_reach_the_highest_level(self, timesteps, levels):
        made, images = student(timesteps, levels)
        found = counts(made.eval(), images)
        torch.testing.assert_close(found, found.round(), atol=1e-5, rtol=0)
        assert set(found.round().tolist()) == set(range(levels + 1))

    def test_folding_changes_at_most_counts_at_a_threshold(self, timesteps, levels):
        made, images = student(timesteps, levels)
        made.eval()
        folded = fold(made)
        assert any(isinstance(layer, nn.Identity) for layer in folded.modules())
        assert (counts(folded, images) != counts(made, images)).double().mean() < 1e-3
        with torch.no_grad():
            torch.testing.assert_close(folded(images), made(images), atol=0.02, rtol=0.02)

    @torch.no_grad()
    def test_step_after_step_is_the_whole_run(self, timesteps, levels):
        made, images = student(timesteps, levels)
        whole, state = made.eval()(images), None
        for logits in whole:
            step, state = made.step(images, state)
            torch.testing.assert_close(step, logits, atol=1e-5, rtol=1e-5)
        assert len(state) == made.states

    @torch.no_grad()
    def test_is_saved_and_loaded_with_its_levels(self, timesteps, levels, tmp_path):
        made, images = student(timesteps, levels)
        save_student(tmp_path, made)
        again = load_student(tmp_path, Blocks())
        for layer in again.neurons.values():
            layer.backend = "reference"
        assert again.conversion.neuron_model.levels == levels and again.timesteps == timesteps
        torch.testing.assert_close(again(images), made.eval()(images), rtol=0, atol=0)

    @pytest.mark.parametrize("recompute", ["neurons", "stages"])
    def test_recomputed_gradients_are_the_same(self, timesteps, levels, recompute):
        made, images = student(timesteps, levels, learn_threshold=True)
        other = copy.deepcopy(made)
        other.recompute = recompute
        kept, again = gradients(made, images), gradients(other, images)
        assert kept.keys() == again.keys() and all(one.any() for one in kept.values())
        for name, one in kept.items():
            torch.testing.assert_close(again[name], one, msg=name)


class TestRate:
    def test_of_one_step_is_the_exact_gradient(self):
        made, images = student(1, 4)
        exact = gradients(copy.deepcopy(made), images)
        made.gradient = "rate"
        for name, one in gradients(made, images).items():
            torch.testing.assert_close(one, exact[name], atol=1e-6, rtol=1e-4, msg=name)

    def test_observes_mean_counts(self):
        made, images = student(3, 2)
        made.gradient = "rate"
        seen = made.train().observe(images, spikes=made.layers()).spikes
        made.gradient = "exact"
        exact = made.observe(images, spikes=made.layers()).spikes
        for path, found in seen.items():
            torch.testing.assert_close(found[0], exact[path].mean(0), atol=1e-5, rtol=1e-4)
            assert float(found.detach().max()) <= 2 + 1e-5
