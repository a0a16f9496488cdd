import pytest
import torch
from torch import nn

from spikedistill.neuron.dynamics import IF
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import TrainableANN
from spikedistill.train.meters import EVERY, FiringRateMeter, Meters


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


class TestMeters:
    def test_terms_are_averaged_over_steps_and_accuracy_over_samples(self):
        meters = Meters()
        meters.add({"labels": 1.0, "soft": 4.0}, correct=3, samples=4)
        meters.add({"labels": 3.0, "soft": 0.0}, correct=3, samples=8)
        assert meters.means() == {"loss": 4.0, "labels": 2.0, "soft": 2.0, "train_accuracy": 50.0}

    def test_before_the_first_step_there_is_nothing_to_say(self):
        assert Meters().means() == {}


class TestFiringRateMeter:
    @pytest.fixture
    def student(self):
        made, _ = to_spiking(network(), Conversion(timesteps=3, neuron=IF, inherit=False))
        (layer,) = made.neurons.values()
        layer.backend = "reference"
        made.core.get_submodule("1").bias.data[:4] = 100.0  # half of the neurons fire at every step, the others never
        made.core.get_submodule("1").bias.data[4:] = -100.0
        return made

    def look(self, meter, student, step):
        with meter.at(step):
            student(torch.rand(2, 3, 2, 2))

    def test_knows_nothing_before_it_looked(self, student):
        assert FiringRateMeter(student).facts() == {}

    def test_counts_spikes_a_neuron_and_step_in_percent(self, student):
        meter = FiringRateMeter(student)
        self.look(meter, student, 0)
        assert meter.facts() == {"firing_rate": 50.0}

    def test_looks_now_and_then_and_keeps_the_last_rate(self, student):
        meter, seen = FiringRateMeter(student), []
        for step in range(2 * EVERY + 1):
            student.core.get_submodule("1").bias.data.fill_(100.0 if step % EVERY or step == EVERY else -100.0)
            self.look(meter, student, step)
            seen.append(meter.percent)
        assert seen == [0.0] * EVERY + [100.0] * EVERY + [0.0]

    def test_of_all_steps_trained_as_one_there_is_none(self):
        student, _ = to_spiking(network(), Conversion(inherit=False))
        student.gradient = "quantised"
        meter = FiringRateMeter(student)
        self.look(meter, student, 0)
        assert meter.facts() == {}

    def test_of_an_ann_there_is_none(self):
        ann = TrainableANN(network(), (0.0,) * 3, (1.0,) * 3)
        meter = FiringRateMeter(ann)
        self.look(meter, ann, 0)
        assert meter.facts() == {}
