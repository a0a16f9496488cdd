import itertools

import pytest
import torch
from torch import nn

from spikedistill.neuron.dynamics import Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.substeps import run_in_substeps
from spikedistill.teacher.airbench import Group, StartsFromImages, airbench94, airbench96, whitening
from spikedistill.teacher.load import TrainableANN


def images(count=40, channels=3, side=9):
    """Neighbouring pixels and channels go together, as in photographs."""
    noise = torch.randn(count, channels, side + 2, side + 2, generator=torch.Generator().manual_seed(0))
    return noise.unfold(2, 3, 1).unfold(3, 3, 1).mean((-1, -2)) + 0.5 * noise.mean(1, keepdim=True)[..., 1:-1, 1:-1]


def covariance(kernels, inputs):
    outputs = nn.functional.conv2d(inputs.double(), kernels.double())
    return torch.cov(outputs.transpose(0, 1).flatten(1))


class TestWhitening:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_outputs_are_uncorrelated_with_variance_one(self, channels):
        given = images(channels=channels).double()
        kernels = whitening(given, eps=0.0)
        assert kernels.shape == (4 * channels, channels, 2, 2)
        torch.testing.assert_close(covariance(kernels, given), torch.eye(4 * channels).double())
        assert (covariance(torch.eye(4 * channels).unflatten(1, (channels, 2, 2)), given)[0, 1:] > 0.01).all()

    def test_eps_damps_each_direction_by_its_variance(self):
        given = images().double()
        patches = given.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
        values = torch.linalg.eigvalsh(torch.cov(patches.T)).flip(0)
        expected = torch.diag(values / (values + 0.1))
        torch.testing.assert_close(covariance(whitening(given, eps=0.1), given), expected)

    def test_constant_images_give_finite_kernels(self):
        assert torch.isfinite(whitening(torch.full((4, 1, 9, 9), 0.25))).all()

    def test_becomes_the_frozen_first_layer_beside_its_negative(self):
        network = airbench94(width=4)
        assert isinstance(network, StartsFromImages) and network.white.weight.requires_grad
        network.start_from_images(images())
        first, second = network.white.weight.chunk(2)
        assert torch.equal(first, -second) and torch.equal(first, whitening(images()))
        assert not network.white.weight.requires_grad and network.white.bias.requires_grad
        assert not network.white.bias.any()


@pytest.mark.parametrize("residual", [False, True])
def test_a_fresh_group_passes_its_input_on_pooled(residual):
    """Its first channels are the identity. With a skip connection they come twice."""
    group, x = Group(5, 8, residual).eval(), torch.rand(2, 5, 6, 6)
    for layer in group.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.0
    with torch.no_grad():
        out = group(x)[:, :5]
    torch.testing.assert_close(out, nn.functional.max_pool2d(x, 2) * (2 if residual else 1))


def test_a_norm_has_a_trained_bias_and_a_scale_that_stays_one():
    norms = [layer for layer in airbench94(width=4).modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 6
    for norm in norms:
        assert not norm.weight.requires_grad and (norm.weight == 1).all() and norm.bias.requires_grad


def test_logits_are_a_ninth_of_what_the_classifier_says():
    network = airbench94(width=4).eval()
    said = []
    network.classifier.register_forward_hook(lambda layer, given, logits: said.append(logits))
    with torch.no_grad():
        logits = network(torch.rand(2, 3, 9, 9))
    torch.testing.assert_close(logits, said[0] / 9)


@pytest.mark.usefixtures("without_compiler")
class TestStudent:
    @pytest.fixture(params=[airbench94, airbench96], ids=["airbench94", "airbench96"])
    def teacher(self, request):
        """With statistics and biases as after training."""
        network = request.param(width=4, classes=3).train()
        network.start_from_images(images(side=12))
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.bias, 0.2, 0.2)
                layer.momentum = None
        with torch.no_grad():
            network(images(side=12))
        return TrainableANN(network.eval(), (0.0,) * 3, (1.0,) * 3)

    def deviations(self, teacher, timesteps, levels):
        """Of a student's mean logits from its teacher's, in units of their spread."""
        given = images(16, side=12)
        conversion = Conversion(timesteps=timesteps, neuron=Neuron(levels=levels), rule="max")
        student, report = to_spiking(teacher, conversion, calibration_images=given)
        assert len(report.sites) == len([one for one in teacher.modules() if isinstance(one, nn.ReLU)])
        with torch.no_grad():
            wanted, found = teacher.eval()(given)[-1], student.eval()(given).mean(0)
        return float((found - wanted).abs().max() / wanted.std())

    def test_of_many_levels_in_one_step_is_its_teacher(self, teacher):
        """Pooling of currents is exact at T = 1, so that nothing is left but the rounding to D levels."""
        found = [self.deviations(teacher, 1, levels) for levels in (16, 256, 4096)]
        assert all(later < before / 4 for before, later in itertools.pairwise(found)), found
        assert found[-1] < 0.05

    def test_over_several_steps_it_comes_closer_as_steps_or_levels_grow(self, teacher):
        """Pooling of the cumulative input sums to the maximum of the sums, for currents too."""
        assert self.deviations(teacher, 4, 1024) < 0.02 < self.deviations(teacher, 4, 4)

    @pytest.mark.parametrize("timesteps, levels", [(1, 4), (2, 2)])
    def test_its_counts_are_those_of_its_binary_sub_steps(self, teacher, timesteps, levels):
        """Pooling of currents too: the growth over sub-steps adds up to the maximum of their sums."""
        given = images(16, side=12)
        conversion = Conversion(timesteps=timesteps, neuron=Neuron(levels=levels))
        student = to_spiking(teacher, conversion, calibration_images=given)[0].eval()
        paths = tuple(student.layers())
        with torch.no_grad():
            graded = student.observe(given, spikes=paths).spikes
        binary = run_in_substeps(student, given, spikes=paths).spikes
        for path in paths:
            counts = binary[path].unflatten(0, (timesteps, levels)).sum(1)
            assert binary[path].max() <= 1 and (counts.max() > 1 or path != paths[0])
            assert (counts != graded[path].round()).float().mean() < 1e-3
