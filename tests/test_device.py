"""What must be true on every device. On a machine with CUDA ``pytest -m cuda`` runs these tests there, too.

The tests of the CPU run in the ordinary suite, so that this file stays true between two visits to a GPU.
"""

import copy
import dataclasses
import itertools
import json

import pytest
import torch

from spikedistill.compute.place import choose_place
from spikedistill.data import feed as feed_module
from spikedistill.data.augment import Augment
from spikedistill.data.feed import MemoryFeed
from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import IF, LIF, PLIF
from spikedistill.neuron.layer import Spiking
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.fold import fold
from spikedistill.student.save import load_student, save_student
from spikedistill.teacher.load import Architecture, Teacher
from spikedistill.train.loop import fit
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

CUDA = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []
MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
NEURONS = {
    "if": dataclasses.replace(IF, initial=0.5),
    "if with learned threshold and initial potential": dataclasses.replace(
        IF, initial=0.5, learn_threshold=True, learn_initial=True
    ),
    "graded": dataclasses.replace(IF, initial=0.5, levels=4, learn_threshold=True),
    "lif": dataclasses.replace(LIF, learn_threshold=True),
    "plif": PLIF,
}
EVERY = itertools.product(NEURONS, (1, 4, 7)) if CUDA else ()
CASES = [
    ("cpu", "if", 1),
    ("cpu", "graded", 2),
    *(pytest.param("cuda", *case, marks=pytest.mark.cuda) for case in EVERY),
]
"""Two on the CPU, since each compiles for a while and ``neuron/test_fused.py`` has more."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def passes(layer, current, timesteps):
    """Spikes of a layer, and the gradients that reach its current and its parameters."""
    given = current.clone().requires_grad_()
    spikes, _ = layer(given, timesteps)
    weights = torch.linspace(-1, 1, spikes.numel(), device=spikes.device).view(spikes.shape).to(spikes)
    return [spikes.detach(), *torch.autograd.grad((spikes * weights).sum(), [given, *layer.parameters()])]


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9))


@pytest.mark.parametrize("device, name, timesteps", CASES)
def test_fused_neurons_equal_the_reference_forward_and_backward(device, name, timesteps):
    for dtype, layout, per_channel in itertools.product((torch.float32, torch.bfloat16), LAYOUTS, (False, True)):
        torch.manual_seed(0)
        threshold = torch.linspace(0.5, 1.5, 8) if per_channel else torch.tensor(1.0)
        layer = Spiking(NEURONS[name], threshold).to(device)
        current = torch.randn(timesteps * 4, 8, 6, 6, device=device).to(dtype).to(memory_format=LAYOUTS[layout])
        results = {}
        for layer.backend in ("fused", "reference"):
            results[layer.backend] = passes(layer, current, timesteps)
        bound = 1e-4 if dtype is torch.float32 else 2e-2
        for found, expected in zip(results["fused"], results["reference"]):
            assert distance(found, expected) <= bound, (dtype, layout, per_channel)


@pytest.fixture(params=["cpu", *CUDA])
def device(request):
    return request.param


@pytest.fixture
def images(blobs):
    return blobs.train_images.float() / 255


@pytest.mark.parametrize(
    "augment", [Augment(crop=2, flip=True, cutout=3), Augment(crop=1, border="mirror", noise=0.1, zoom=0.5)]
)
def test_batches_made_on_the_device_are_those_of_the_cpu(device, blobs, augment):
    feed = MemoryFeed(blobs, 16, augment=augment)
    there = feed.on(torch.device(device))
    for found, expected in zip(there.batches(2), feed.batches(2), strict=True):
        assert found.student.device.type == found.labels.device.type == device
        torch.testing.assert_close(found.student.cpu(), expected.student, rtol=0, atol=1e-5)
        assert torch.equal(found.labels.cpu(), expected.labels) and torch.equal(found.samples, expected.samples)
    assert there.fingerprint() == feed.fingerprint()


def test_policies_and_large_sets_stay_on_the_cpu(blobs, monkeypatch):
    card = torch.device("cuda")
    assert MemoryFeed(blobs, 16).on(card).device == card
    assert MemoryFeed(blobs, 16, augment=Augment(policy="trivial")).on(card).device.type == "cpu"
    monkeypatch.setattr(feed_module, "LARGEST", blobs.train_images.nbytes - 1)
    assert MemoryFeed(blobs, 16).on(card).device.type == "cpu"


def resnet():
    torch.manual_seed(3)
    return Architecture("resnet20", 3, 3, 8).build().eval()


def converted(device, images, **options):
    """A student of four time steps, converted on a device."""
    teacher = Teacher(resnet(), MEAN, STD).to(device)
    student, _ = to_spiking(teacher, Conversion(timesteps=4, **options), calibration_images=images.to(device))
    return student.to(device).eval()


@pytest.mark.parametrize("correct", ["nothing", "biases", "layers"])
def test_a_conversion_has_the_thresholds_and_biases_of_the_cpu(device, images, correct):
    there, here = converted(device, images, correct=correct), converted("cpu", images, correct=correct)
    for (name, found), expected in zip(there.state_dict().items(), here.state_dict().values()):
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize("levels", [1, 4])
def test_a_stream_equals_the_whole_call(device, images, levels):
    student, state, logits = (
        converted(device, images, neuron=dataclasses.replace(IF, initial=0.5, levels=levels)),
        None,
        [],
    )
    with torch.no_grad():
        whole = student(images[:8].to(device))
        for _ in range(4):
            step, state = student.step(images[:8].to(device), state)
            logits.append(step)
    torch.testing.assert_close(torch.stack(logits), whole, rtol=1e-4, atol=1e-4)


def test_a_folded_teacher_gives_the_same_logits(device, images):
    teacher = Teacher(resnet(), MEAN, STD).to(device).eval()
    given = images[:8].to(device)
    torch.testing.assert_close(fold(teacher)(given), teacher(given), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recompute", ["neurons", "stages"])
def test_recomputed_activations_give_the_same_gradients(device, images, recompute):
    gradients = []
    for choice in ("nothing", recompute):
        student = converted(device, images)
        student.recompute = choice
        student.train()
        student(images[:8].to(device)).square().mean().backward()
        gradients.append([weight.grad for weight in student.parameters() if weight.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_file_of_the_device_is_read_on_the_cpu_bit_for_bit(device, images, tmp_path):
    student = converted(device, images)
    save_student(tmp_path / "student.safetensors", student, architecture=Architecture("resnet20", 3, 3, 8))
    again = load_student(tmp_path / "student.safetensors").state_dict()
    assert all(torch.equal(again[name], value.cpu()) for name, value in student.state_dict().items())


def trained(blobs, path, device, gradient="exact", objective=None, **changes):
    """The metrics of a student's two epochs; it goes on with what is in ``path``."""
    torch.manual_seed(0)
    teacher = Teacher(resnet(), MEAN, STD)
    student, _ = to_spiking(teacher, Conversion(timesteps=2), calibration_images=blobs.train_images[:32].float() / 255)
    student.gradient = gradient
    config = Training(epochs=2, batch_size=32, lr=0.01, ema=0.9, device=device, precision="fp32", **changes)
    feed = MemoryFeed(blobs, 32, validation=0.0, augment=Augment(crop=1, flip=True), views=config.views)
    fit(student, objective or KDSNN(), feed, config, Run(path), teacher=teacher)
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("gradient", ["exact", "rate", "quantised"])
def test_training_does_what_it_does_on_the_cpu(blobs, tmp_path, device, gradient):
    there = trained(blobs, tmp_path / "there", device, gradient=gradient)
    here = trained(blobs, tmp_path / "here", "cpu", gradient=gradient)
    assert [line["loss"] for line in there] == pytest.approx([line["loss"] for line in here], rel=0.05)


@pytest.mark.parametrize("to", ["cpu", *CUDA])
def test_a_run_goes_on_on_another_device(blobs, tmp_path, device, to):
    whole = trained(blobs, tmp_path / "whole", device)
    (tmp_path / "moved").mkdir()
    first = stopped_after_an_epoch(blobs, tmp_path / "moved", device)
    moved = trained(blobs, tmp_path / "moved", to)
    assert moved[0] == first and len(moved) == 2
    assert moved[1]["loss"] == pytest.approx(whole[1]["loss"], rel=0 if to == device == "cpu" else 0.05)


class Stopped(Exception):
    """Stands for whatever ends a process."""


def stopped_after_an_epoch(blobs, path, device):
    """The metrics of the first epoch of a run that ended before the second."""

    class Once(KDSNN):
        def __call__(self, batch, modules):
            if (path / "metrics.jsonl").exists():
                raise Stopped
            return super().__call__(batch, modules)

    with pytest.raises(Stopped):
        trained(blobs, path, device, objective=Once())
    return json.loads((path / "metrics.jsonl").read_text())


def test_kept_outputs_of_the_teacher_teach_the_same(blobs, tmp_path, device):
    kept = trained(blobs, tmp_path / "kept", device, views=2, objective=KDSNNFeature())
    asked = trained(blobs, tmp_path / "asked", device, objective=KDSNNFeature())
    assert [line["loss"] for line in kept] == pytest.approx([line["loss"] for line in asked], rel=1e-3)


def test_a_device_that_is_not_there_is_refused_before_anything_is_built():
    with pytest.raises(ConfigError, match="The device 'cuda:99' cannot be used here"):
        choose_place("cuda:99")


def test_a_copy_on_the_device_has_the_logits_of_the_cpu(device, images):
    here = converted("cpu", images)
    there = copy.deepcopy(here).to(device)
    with torch.no_grad():
        found, expected = there(images.to(device)).mean(0).cpu(), here(images).mean(0)
    assert distance(found, expected) < 0.02
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95
