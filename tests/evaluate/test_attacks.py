import contextlib
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from spikedistill.data.noise import SEVERITIES
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import predict
from spikedistill.evaluate.attacks import ATTACKS, OWN, SURROGATES, TEACHER, Target, attack, gradients
from spikedistill.evaluate.immunity import immunity, sample
from spikedistill.neuron.surrogate import ATan, Rectangle, Triangle
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import LatencyCoding, RateCoding
from spikedistill.student.conversion import INHERITED_NEURON, Conversion


def test_one_step_on_a_linear_network_is_the_worst_case():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    images = torch.full((3, 1, 2, 2), 0.5)
    labels = torch.tensor([0, 1, 0])
    changed = attack(net, images, labels, epsilon=0.1, steps=1, generator=Generator())
    weight = net[1].weight.detach()
    for image, label in zip(changed, labels):
        worst = 0.5 + 0.1 * torch.sign(weight[1 - label] - weight[label])
        torch.testing.assert_close(image.flatten(), worst)


@pytest.mark.parametrize("steps", [1, 10])
def test_images_stay_within_reach_and_the_loss_rises(trio, steps):
    _, student, images, labels = trio
    clean = images.float() / 255
    changed = attack(student, clean, labels, epsilon=8 / 255, steps=steps, generator=Generator().manual_seed(0))
    assert float((changed - clean).abs().max()) <= 8 / 255 + 1e-6
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    with torch.no_grad():
        before, after = (F.cross_entropy(student(x).mean(0), labels) for x in (clean, changed))
    assert after > before


@pytest.mark.parametrize("steps", [2, 10])
def test_a_step_of_pgd_is_as_long_as_stated(steps):
    """Of a linear network every step goes the same way: by 2.5 epsilon / steps, until it is out of epsilon."""
    net, seen, epsilon = nn.Sequential(nn.Flatten(), nn.Linear(100, 2, bias=False)), [], 0.1
    net.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    images, labels = torch.full((3, 1, 10, 10), 0.5), torch.tensor([0, 1, 0])
    seen.append(attack(net, images, labels, epsilon=epsilon, steps=steps, generator=Generator().manual_seed(0)))
    *starts, last = seen
    offsets = (starts[0] - images) / epsilon
    assert float(offsets.abs().max()) <= 1 and float(offsets.std()) == pytest.approx(3**-0.5, rel=0.1)
    way = torch.sign(net[1].weight[1 - labels] - net[1].weight[labels]).view_as(images)
    for number, now in enumerate([*starts[1:], last], 1):
        expected = (starts[0] + number * 2.5 * epsilon / steps * way).clamp(0.5 - epsilon, 0.5 + epsilon)
        torch.testing.assert_close(now, expected)
    assert len(starts) == steps


def test_attacked_images_are_drawn_from_the_whole_set():
    """Sorted by class, as files may be: the first half is answered rightly, the second is not."""
    images = torch.full((400, 1, 2, 2), 128, dtype=torch.uint8)
    labels = torch.arange(400) // 200
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net[1].bias.data.copy_(torch.tensor([1000.0, 0.0]))
    scores = immunity({"ann": net}, images, labels, kinds=["attack"], attacked=100)
    found = {score.name: score for score in scores if score.severity in (0, 1)}
    assert found["clean"].accuracy == 50.0 and found["clean"].images == 400
    assert 35 < found["attacked"].accuracy < 65 and found["attacked"].images == 100
    assert found["fgsm"].accuracy == found["pgd"].accuracy == found["attacked"].accuracy


def test_the_sample_is_drawn_by_the_seed_alone_without_repeats():
    chosen = sample(1000, 100, 3)
    assert torch.equal(chosen, sample(1000, 100, 3)) and not torch.equal(chosen, sample(1000, 100, 4))
    assert len(chosen.unique()) == 100 and torch.equal(chosen, chosen.sort().values)
    assert float(chosen.float().mean()) == pytest.approx(500, abs=100)
    assert len((chosen % 10).unique()) == 10  # no class is left out where they take turns
    assert sample(7, 500, 0).tolist() == list(range(7))


def test_the_clean_point_is_of_the_attacked_images(under_attack, attacked):
    (networks, images, labels), _ = under_attack
    chosen = sample(60, 20, 5)
    right = predict(networks["snn"], images[chosen]).mean(0).argmax(-1) == labels[chosen]
    clean = next(score for score in attacked if score.name == "attacked")
    assert clean.accuracy == pytest.approx(100 * float(right.double().mean())) and clean.images == 20
    under = [score for score in attacked if score.kind == "attack"]
    assert len(under) == 10 and all(score.accuracy <= clean.accuracy for score in under)


def test_an_image_counts_as_fooled_where_any_gradient_fools_it(trio):
    teacher, student, images, labels = trio
    target = Target(student, teacher, images, labels, torch.float32, seed=0)
    assert target.gradients == [OWN, *SURROGATES, TEACHER]
    masks = {gradient: target.right("fgsm", 4, gradient) for gradient in target.gradients}
    alone = {gradient: 100 * float(mask.double().mean()) for gradient, mask in masks.items()}
    expected = target.right("", 0, OWN) & torch.stack(list(masks.values())).all(0)
    assert target.worst("fgsm", 4) == 100 * float(expected.double().mean())
    assert target.worst("fgsm", 4) < min(alone.values()) < max(alone.values())


def test_an_image_that_is_wrong_without_an_attack_is_never_withstood():
    class Odd(nn.Module):
        """Errs on bytes, and is right on everything between them."""

        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(1e-3))

        def forward(self, x):
            between = ((255 * x - (255 * x).round()).abs() > 0.1).flatten(1).any(1)
            return torch.stack([10.0 * between + self.slope * x.flatten(1).sum(1), torch.full((len(x),), 5.0)], 1)

    images = torch.full((3, 1, 2, 2), 100, dtype=torch.uint8)
    target = Target(Odd(), None, images, torch.zeros(3, dtype=torch.long), torch.float32, seed=0)
    assert target.accuracy("fgsm", 1, OWN) == 100.0
    assert target.clean() == target.worst("fgsm", 1) == 0.0


def test_scores_name_every_gradient_and_their_worst(attacked):
    for name in ATTACKS:
        for severity in SEVERITIES:
            found = {score.name: score.accuracy for score in attacked if score.severity == severity}
            each = [found[f"{name} by {gradient}"] for gradient in (OWN, *SURROGATES, TEACHER)]
            assert found[name] <= min(each)


def test_a_surrogate_that_is_the_networks_own_is_not_tried_twice(trio):
    student = copy.deepcopy(trio[1])
    for layer in student.neurons.values():
        layer.neuron = dataclasses.replace(layer.neuron, surrogate=Triangle(1.0))
    assert gradients(student, None) == [OWN, *(name for name in SURROGATES if name != "triangle 1")]


def test_graded_spikes_use_no_surrogate_so_others_would_be_the_same_attack():
    neuron = dataclasses.replace(INHERITED_NEURON, levels=2)
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    graded, _ = to_spiking(network, Conversion(neuron=neuron, inherit=False))
    assert gradients(graded, None) == [OWN] and gradients(graded, graded) == [OWN, TEACHER]


def test_a_transfer_is_the_teachers_own_attack(trio):
    teacher, student, images, labels = trio
    target = Target(student, teacher, images, labels, torch.float32, seed=0)
    epsilon = ATTACKS["fgsm"][1][4] / 255
    changed = attack(teacher, images / 255, labels, epsilon=epsilon, steps=1, generator=Generator())
    with torch.no_grad():
        right = student(changed).mean(0).argmax(-1) == labels
    assert torch.equal(target.right("fgsm", 5, TEACHER), right)
    assert gradients(teacher, None) == [OWN] and gradients(teacher, teacher) == [OWN, TEACHER]


def test_a_narrow_surrogate_does_not_look_immune(trio):
    """A rectangle that no potential meets has no gradient: by it alone nothing is fooled, by others much is."""
    _, student, images, labels = trio
    hidden = copy.deepcopy(student)
    for layer in hidden.neurons.values():
        layer.neuron = dataclasses.replace(layer.neuron, surrogate=Rectangle(1e-9))
    target = Target(hidden, None, images, labels, torch.float32, seed=0)
    assert target.accuracy("fgsm", 5, OWN) == target.clean()
    open_one = Target(student, None, images, labels, torch.float32, seed=0)
    assert target.worst("fgsm", 5) <= open_one.accuracy("fgsm", 5, OWN) < target.clean()
    assert {layer.neuron.surrogate for layer in hidden.neurons.values()} == {Rectangle(1e-9)}


def test_networks_come_back_as_they_were_even_from_an_interruption(trio):
    _, student, images, labels = trio
    network, other = copy.deepcopy(student).train(), copy.deepcopy(trio[0].network).train()
    before = [layer.neuron for layer in network.neurons.values()]
    target = Target(network, other, images, labels, torch.float32, seed=0)
    target.worst("fgsm", 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = next(iter(network.neurons.values())).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        target.right("pgd", 5, "sigmoid 4")
    handle.remove()
    assert other.training and [layer.neuron for layer in network.neurons.values()] == before


def test_an_interrupted_suite_goes_on_with_the_same_scores(under_attack, attacked):
    given, options = under_attack
    kept = []
    assert immunity(*given, **options, known=attacked[:-3], keep=kept.append) == attacked
    assert kept == attacked[-3:]


def test_pgd_starts_where_the_seed_says(trio):
    _, student, images, labels = trio
    seen = {}
    for seed in (1, 1, 2):
        inputs = []
        handle = student.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0].detach()))
        task = {"kinds": ["attack"], "attacked": 60, "seed": seed}
        with contextlib.suppress(StopIteration):
            immunity({"snn": student}, images, labels, **task, keep=_stop_at("pgd by own"))
        handle.remove()
        seen.setdefault(seed, []).append(inputs[-11])  # the first of ten steps before the answer
    assert torch.equal(*seen[1]) and not torch.equal(seen[1][0], seen[2][0])


def _stop_at(name):
    def keep(score):
        if score.name == name:
            raise StopIteration

    return keep


def test_the_surrogates_are_of_several_kinds_and_widths():
    assert len(set(map(type, SURROGATES.values()))) >= 3
    assert {Triangle(1.0), Triangle(2.0), ATan(1.0)} <= set(SURROGATES.values())


@pytest.mark.parametrize("coding", [RateCoding(1), LatencyCoding()])
def test_a_coding_without_gradients_is_attacked_by_the_teachers_alone(trio, coding):
    teacher, _, images, labels = trio
    student, _ = to_spiking(teacher, Conversion(timesteps=2, coding=coding), calibration_images=torch.rand(16, 1, 8, 8))
    assert gradients(student, teacher) == [TEACHER]
    with pytest.raises(ConfigError, match="No gradient reaches the pixels"):
        immunity({"snn": student}, images, labels, kinds=["attack"], attacked=5)


@pytest.mark.parametrize("count", [0, -3])
def test_at_least_one_image_is_attacked(trio, count):
    _, student, images, labels = trio
    with pytest.raises(ConfigError, match="must be 1 image or more"):
        immunity({"snn": student}, images, labels, kinds=["attack"], attacked=count)
