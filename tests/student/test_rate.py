import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.evaluate.firing import firing_rates
from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.zoo import ZOO

INHERITED_NEURON = dataclasses.replace(IF, initial=0.5)


def pair(name, timesteps, neuron=INHERITED_NEURON, pool="average"):
    """The same student twice, with either gradient."""
    images = torch.rand(8, 3, 16, 16)
    exact, _ = to_spiking(
        ZOO[name](width=4), Conversion(timesteps=timesteps, max_pool=pool, neuron=neuron), calibration_images=images
    )
    for layer in exact.neurons.values():
        layer.backend = "reference"
    rate = copy.deepcopy(exact)
    rate.gradient = "rate"
    return images, exact, rate


def teach(student, images):
    answer = student.observe(images, ("layer2",))
    logits, features = answer.logits, answer.features
    loss = F.cross_entropy(logits.mean(0), torch.arange(8) % 10) + features["layer2"].mean(0).square().mean()
    loss.backward()
    return logits, features["layer2"].mean(0)


@pytest.mark.parametrize("name", ["resnet20", "preact-resnet18", "vgg9"])
@pytest.mark.parametrize(
    "neuron", [INHERITED_NEURON, LIF, dataclasses.replace(IF, detach_reset=True)], ids=["if", "lif", "d"]
)
def test_one_step_has_the_exact_gradient(name, neuron):
    images, exact, rate = pair(name, 1, neuron)
    teach(exact.double(), images.double()), teach(rate.double(), images.double())
    for (path, expected), (_, found) in zip(exact.named_parameters(), rate.named_parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=path)


@pytest.mark.parametrize("name", ["resnet20", "preact-resnet18", "vgg9"])
def test_answers_features_and_running_statistics_are_those_of_all_steps(name):
    images, exact, rate = pair(name, 4)
    for expected, found in zip(teach(exact, images), teach(rate, images)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for expected, found in zip(exact.buffers(), rate.buffers()):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_the_smallest_variance_of_a_batch_norm_is_its_own(timesteps):
    # so large that a norm without it, or with the usual one, gives other logits, features and gradients
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.7), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    images, students = torch.rand(8, 3, 4, 4, dtype=torch.float64), []
    network[0].weight.data.mul_(4)
    for gradient in ("exact", "rate"):
        student, _ = to_spiking(network, Conversion(timesteps=timesteps), calibration_images=images.float())
        student.gradient = gradient
        for layer in student.neurons.values():
            layer.backend = "reference"
        answer = student.double().train().observe(images, ("1",))
        (answer.logits.mean(0).square().sum() + answer.features["1"].mean(0).square().sum()).backward()
        students.append((student, answer))
    (exact, expected), (rate, found) = students
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.features["1"].mean(0), expected.features["1"].mean(0))
    if timesteps == 1:
        for (path, one), (_, other) in zip(exact.named_parameters(), rate.named_parameters()):
            torch.testing.assert_close(other.grad, one.grad, msg=path)


def test_running_statistics_of_a_batch_norm_without_momentum_are_the_mean_of_all_calls():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Flatten())
    norms = []
    for gradient in ("exact", "rate"):
        student, _ = to_spiking(network, Conversion(timesteps=2), calibration_images=torch.full((2, 3, 4, 4), 0.5))
        student.gradient = gradient
        for layer in student.neurons.values():
            layer.backend = "reference"
        for brightness in (0.2, 0.6, 1.0):
            student.train()(brightness * torch.linspace(0, 1, 192).view(4, 3, 4, 4))
        norms.append(student.core.get_submodule("1"))
    exact, rate = norms
    assert rate.num_batches_tracked == 3
    torch.testing.assert_close(rate.running_mean, exact.running_mean)
    torch.testing.assert_close(rate.running_var, exact.running_var)


def test_a_linear_regime_has_the_exact_gradient_at_any_number_of_steps():
    # no neuron resets (threshold far above) and the surrogate is flat: every step has the same slope
    @dataclasses.dataclass(frozen=True)
    class Flat:
        def gradient(self, u):
            return torch.ones_like(u)

    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    neuron = Neuron(leak=0.5, threshold=100.0, surrogate=Flat(), detach_reset=True)
    exact, _ = to_spiking(network, Conversion(timesteps=5, inherit=False, neuron=neuron))
    rate = copy.deepcopy(exact)
    rate.gradient = "rate"
    images = torch.rand(4, 3, 2, 2)
    for student in (exact, rate):
        for layer in student.neurons.values():
            layer.backend = "reference"
        student(images).mean(0).square().sum().backward()
    for expected, found in zip(exact.parameters(), rate.parameters()):
        torch.testing.assert_close(found.grad, expected.grad)


def test_goes_downhill_about_as_far_as_the_exact_gradient():
    images, exact, rate = pair("resnet20", 4)
    gains = []
    for student in (exact, rate):
        optimiser = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(25):
            optimiser.zero_grad()
            loss = F.cross_entropy(student(images).mean(0), torch.arange(8) % 10)
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        gains.append(losses[0] - losses[-1])
    assert gains[0] > 0.1
    assert gains[1] > 0.5 * gains[0]


@pytest.mark.parametrize("pool", ["cumulative", "or"])
def test_evaluation_and_firing_rates_do_not_depend_on_it(pool):
    images, exact, rate = pair("vgg9", 3, pool=pool)
    with firing_rates(exact) as expected, firing_rates(rate) as found:
        exact(images), rate(images)
    assert expected.by_layer() == found.by_layer()
    torch.testing.assert_close(exact.eval()(images), rate.eval()(images))


def test_synchronised_batch_norm_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    student, _ = to_spiking(nn.SyncBatchNorm.convert_sync_batchnorm(network), Conversion(inherit=False))
    student.gradient = "rate"
    with pytest.raises(ConfigError, match="SyncBatchNorm needs those of all"):
        student(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.AlphaDropout])
def test_dropout_is_refused(dropout):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), dropout(0.5), nn.Linear(6, 3))
    student, _ = to_spiking(network, Conversion(inherit=False))
    student.gradient = "rate"
    with pytest.raises(ConfigError, match=r"dropout \(p=0.5\) would differ"):
        student(torch.rand(2, 3, 2, 2))


def test_a_learned_leak_gets_no_gradient():
    images, _, rate = pair("resnet20", 2, PLIF)
    rate(images).sum().backward()
    assert all(layer.leak_logit.grad is None for layer in rate.neurons.values())
