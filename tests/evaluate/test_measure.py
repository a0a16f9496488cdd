import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spikedistill.compute.place import choose_place
from spikedistill.data.images import ImageSet
from spikedistill.errors import ConfigError
from spikedistill.evaluate import measure as module
from spikedistill.evaluate.measure import check_fits, measure_student, measure_teacher
from spikedistill.neuron.dynamics import LIF
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import INHERITED_NEURON, Conversion
from spikedistill.teacher.load import Teacher

PLACE = choose_place("cpu", "fp32", convolutions="torch")

pytestmark = pytest.mark.usefixtures("without_compiler")


def network(channels=3, classes=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))


@pytest.fixture
def teacher():
    return Teacher(network(), (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def student(teacher, blobs):
    return to_spiking(teacher, Conversion(timesteps=3), calibration_images=blobs.train_images.float() / 255)[0].eval()


@pytest.fixture
def events():
    frames = torch.poisson(torch.full((48, 4, 2, 8, 8), 0.8)).to(torch.uint8)
    labels = torch.arange(48) % 3
    return ImageSet("events", frames, labels, frames[:24], labels[:24], ("a", "b", "c"))


class TestStudent:
    def test_is_measured_on_the_test_set_with_the_teacher_beside_it(self, student, teacher, blobs):
        results = measure_student(student, teacher, blobs, PLACE)
        pixels, labels = blobs.test_images.float() / 255, blobs.test_labels
        with torch.no_grad():
            logits, theirs = student(pixels), teacher(pixels)
        right = [100 * (logits[:t].mean(0).argmax(1) == labels).double().mean().item() for t in (1, 2, 3)]
        assert results["accuracy_by_step"] == pytest.approx(right) and results["test_accuracy"] == right[-1]
        agreed = (theirs.argmax(1) == logits.mean(0).argmax(1)).double().mean().item()
        assert results["agreement"] == pytest.approx(100 * agreed)
        assert 0 < results["firing_rate"] < 100 and len(results["firing_rate_by_layer"]) == 1

    def test_tells_how_many_images_each_pass_saw(self, student, teacher, blobs):
        seen = []
        measure_student(student, teacher, blobs, PLACE, confidence=0.5, on_batch=seen.append)
        assert sum(seen) == 3 * len(blobs.test_images)  # student, teacher, early exit

    def test_alone_is_compared_with_nobody(self, student, teacher, blobs):
        whole, alone = (measure_student(student, other, blobs, PLACE) for other in (teacher, None))
        assert whole.keys() - alone.keys() == {"teacher_accuracy", "agreement", "divergence"}
        assert alone.items() <= whole.items()

    def test_with_a_limit_looks_at_training_images_alone(self, student, blobs):
        spoilt = dataclasses.replace(blobs, test_images=torch.zeros_like(blobs.test_images))
        results = measure_student(student, None, blobs, PLACE, limit=10)
        assert results == measure_student(student, None, spoilt, PLACE, limit=10)
        assert "test_accuracy" not in results and results["train_accuracy"] == results["accuracy_by_step"][-1]

    def test_agrees_with_a_spiking_teacher_by_its_mean(self, student, blobs):
        results = measure_student(student, student, blobs, PLACE)
        assert results["agreement"] == 100 and results["divergence"] == pytest.approx(0, abs=1e-6)
        assert results["teacher_accuracy"] == results["test_accuracy"]

    def test_of_event_frames_is_measured_too(self, events):
        conversion = Conversion(timesteps=4, inherit=False, coding=FrameCoding())
        student, _ = to_spiking(network(channels=2), conversion)
        assert len(measure_student(student, None, events, PLACE)["accuracy_by_step"]) == 4

    def test_of_graded_spikes_is_measured_in_sub_steps(self, teacher, blobs):
        neuron = dataclasses.replace(INHERITED_NEURON, levels=3)
        made = Conversion(timesteps=2, neuron=neuron)
        student = to_spiking(teacher, made, calibration_images=blobs.train_images.float() / 255)[0].eval()
        pixels, path = blobs.test_images.float() / 255, student.layers()
        results = measure_student(student, None, blobs, PLACE)
        assert (results["timesteps"], results["levels"], results["schedule"]) == (2, 3, "layer-by-layer")
        assert results["latency"] == {"layer-by-layer": 6} and len(results["accuracy_by_step"]) == 2
        counts = student.observe(pixels, spikes=path).spikes[path[0]].detach()
        assert results["firing_rate"] == pytest.approx(100 * float(counts.mean()) / 3, rel=1e-5)
        single = measure_student(student, None, blobs, PLACE, confidence=1.0, schedule="step-by-step")
        assert (single["timesteps"], single["levels"], single["schedule"]) == (6, 1, "step-by-step")
        assert single["latency"]["step-by-step"] == 6 and len(single["accuracy_by_step"]) == 6
        # one layer of neurons: its spikes are the same ones, but for where in time they are
        assert single["test_accuracy"] == results["test_accuracy"] and single["early_exit_steps"] == 6
        assert single["firing_rate"] == pytest.approx(results["firing_rate"], abs=0.1)
        assert student.conversion.neuron_model.levels == 3 and student.timesteps == 2

    def test_of_leaky_graded_spikes_runs_layer_by_layer_alone(self, blobs):
        conversion = Conversion(timesteps=2, neuron=dataclasses.replace(LIF, levels=2), inherit=False)
        student, _ = to_spiking(network(), conversion)
        with pytest.raises(ConfigError, match=r"Step by step is for neurons without leak.*Run it layer by layer"):
            measure_student(student, None, blobs, PLACE, schedule="step-by-step")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_measured_in_the_number_format_of_the_place(self, student, teacher, blobs, dtype, monkeypatch):
        asked, predict = [], module.predict
        monkeypatch.setattr(
            module, "predict", lambda *given, **named: asked.append(given[2]) or predict(*given, **named)
        )
        measure_student(student, teacher, blobs, dataclasses.replace(PLACE, dtype=dtype))
        assert asked == [dtype, dtype]


def test_a_teacher_has_one_accuracy(teacher, blobs):
    right = teacher(blobs.test_images.float() / 255).argmax(1) == blobs.test_labels
    assert measure_teacher(teacher, blobs, PLACE) == {"test_accuracy": 100 * right.double().mean().item()}


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return self.value


class TestFits:
    def test_what_fits_passes_and_stays_in_its_mode(self, student, teacher, blobs, events):
        check_fits(student.train(), blobs, "It")
        check_fits(teacher, blobs, "It")
        check_fits(Teacher(network(channels=2), (0.0,) * 2, (1.0,) * 2), events, "A network for each frame")
        assert student.training

    @pytest.mark.parametrize(
        "value, message",
        [
            (torch.zeros(2, 4), r"It returns logits of shape \(4,\), but 'blobs' has 3 classes"),
            (torch.zeros(3), r"It returns logits of shape \(\), but 'blobs' has 3 classes"),
            (torch.zeros(1, 1, 2, 3), r"It returns logits of shape \(1, 2, 3\)"),
            ((torch.zeros(2, 3),), r"It does not accept the images .* \(it returns tuple, not a tensor of logits\)"),
            (SimpleNamespace(), r"it returns SimpleNamespace, not a tensor"),
            (
                torch.tensor([[1.0, 2.0, 3.0], [0.0, 9.0, 2.0]]).softmax(1),
                "It returns probabilities, not logits: for two",
            ),
            (torch.eye(3)[:2], "It returns probabilities"),
            (torch.full((4, 2, 3), 1 / 3), "It returns probabilities"),
        ],
    )
    def test_what_does_not_is_refused(self, value, message, blobs):
        with pytest.raises(ConfigError, match=message):
            check_fits(Returns(value), blobs, "It")

    @pytest.mark.parametrize("value", [torch.zeros(2, 3), torch.eye(3)[:2] * 2, torch.rand(2, 3).log_softmax(1)])
    def test_logits_that_are_no_probabilities_pass(self, value, blobs):
        check_fits(Returns(value), blobs, "It")

    def test_a_network_for_other_images_is_refused(self, blobs):
        with pytest.raises(ConfigError, match=r"It does not accept the images of 'blobs' of shape \(3, 8, 8\)"):
            check_fits(Teacher(network(channels=1), (0.5,) * 3, (0.25,) * 3), blobs, "It")
