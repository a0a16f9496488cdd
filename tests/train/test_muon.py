import pytest
import torch
from torch import nn

from spikedistill.train.muon import Muon, orthogonalise

SHAPES = [(8, 8), (6, 40), (40, 6)]


def matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestOrthogonalise:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_singular_values_come_near_one_and_the_vectors_stay(self, shape):
        given = matrix(shape) * 1e-3
        u, values, v = torch.linalg.svd(given, full_matrices=False)
        values[values < 0.1 * values[0]] = 0.3 * values[0]
        given = u @ torch.diag(values) @ v
        found = orthogonalise(given, repeats=5)
        turned = u.T @ found @ v.T
        torch.testing.assert_close(turned, torch.diag(turned.diagonal()), rtol=0, atol=1e-9)
        assert 0.65 < turned.diagonal().min() <= turned.diagonal().max() < 1.25

    def test_each_repeat_is_the_quintic_of_the_singular_values(self):
        given = torch.diag(torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64))
        x = given.diagonal() / given.norm()
        for _ in range(3):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        torch.testing.assert_close(orthogonalise(given, 3), torch.diag(x))

    def test_zero_stays_zero(self):
        assert not orthogonalise(torch.zeros(3, 5)).any()


def muon(kernels, others=(), lr=0.1, momentum=0.9, decay=0.0):
    groups = [{"params": list(others), "weight_decay": decay}] if others else []
    return Muon({"params": list(kernels)}, groups, lr, momentum)


class TestMuon:
    def test_everything_but_kernels_moves_as_with_sgd(self):
        layers = [nn.Linear(4, 3), nn.Linear(4, 3)]
        layers[1].load_state_dict(layers[0].state_dict())
        ours = muon([], layers[0].parameters(), lr=0.3, momentum=0.8, decay=0.1)
        theirs = torch.optim.SGD(layers[1].parameters(), lr=0.3, momentum=0.8, weight_decay=0.1, nesterov=True)
        for seed in range(3):
            slopes = [matrix((3, 4), seed).float(), matrix((3,), seed).float()]
            for layer, optimiser in zip(layers, (ours, theirs)):
                for parameter, slope in zip(layer.parameters(), slopes):
                    parameter.grad = slope.clone()
                optimiser.step()
        for one, other in zip(layers[0].parameters(), layers[1].parameters()):
            torch.testing.assert_close(one, other)

    def test_a_kernel_moves_as_published_up_to_its_norm(self):
        """Jordan et al. scale the kernel to the root of its rows before each step; here it keeps its own norm."""
        kernel = nn.Parameter(matrix((6, 3, 2, 2)) * 5)
        norm, theirs = kernel.norm().detach(), kernel.detach().flatten(1).clone()
        optimiser, velocity = muon([kernel], lr=0.2), torch.zeros(6, 12, dtype=torch.float64)
        for seed in (1, 2, 3):
            slope = matrix((6, 12), seed)
            kernel.grad = slope.view(6, 3, 2, 2).clone()
            optimiser.step()
            velocity = 0.6 * velocity + slope
            theirs = theirs * (6**0.5 / theirs.norm()) - 0.2 * orthogonalise(slope + 0.6 * velocity, 3)
            torch.testing.assert_close(kernel.norm(), norm)
            torch.testing.assert_close(kernel.flatten(1) / norm, theirs / theirs.norm())

    def test_a_kernel_of_zeros_and_one_without_gradient_stay(self):
        kernels = [nn.Parameter(torch.zeros(2, 1, 2, 2)), nn.Parameter(torch.ones(2, 1, 2, 2))]
        kernels[0].grad = torch.ones(2, 1, 2, 2)
        muon(kernels).step()
        assert not kernels[0].any() and (kernels[1] == 1).all()
