"""What conversion would do, told without training."""

import pytest
from commands import run_command as call

from spikedistill.errors import ConfigError, ConversionError, WeightsError
from spikedistill.recipes.preview import preview
from spikedistill.recipes.teach import Teach, teach
from spikedistill.teacher.load import Architecture
from spikedistill.train.recipe import Data, Training

pytestmark = pytest.mark.usefixtures("without_compiler")

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.LeakyReLU(0.1)
        self.pool, self.last = nn.MaxPool2d(2), nn.Linear(64, classes)

    def forward(self, x):
        return self.last(self.pool(self.relu(self.first(x))).flatten(1))

class Refused(Net):
    def forward(self, x):
        x = torch.sigmoid(self.first(x))
        x = torch.tanh(x)
        x = torch.tanh(self.relu(x))
        return self.last(self.pool(x).flatten(1))

def net(classes):
    return Net(classes)

def refused(classes):
    return Refused(classes)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs):
    """A folder with data, a teacher and a file of networks."""
    folder = tmp_path_factory.mktemp("preview")
    write_blobs(folder, 48, 24)
    training = Training(epochs=1, batch_size=16, precision="fp32", device="cpu")
    data = Data(str(folder / "blobs.npz"))
    teach(Teach("vgg9", width=4, data=data, training=training), folder / "teacher")
    (folder / "own.py").write_text(OWN)
    return folder


class TestPreview:
    def test_counts_neurons_and_parameters(self, home):
        found = preview(f"{home / 'own.py'}:net", image_size=16, classes=5)
        (site,) = found.report.sites
        assert (site.name, site.kind, found.shape) == ("relu", "LeakyReLU", (3, 16, 16))
        assert found.neurons == {"relu": 4 * 8 * 8}
        assert found.parameters == 4 * 3 * 9 + 4 + 64 * 5 + 5
        assert [pool.name for pool in found.report.pools] == ["pool"] and not found.calibrated

    @pytest.mark.parametrize("coding", ["direct", "frames", "latency", "rate"])
    def test_counts_the_same_whatever_the_coding_and_t(self, home, coding):
        asked = {"image_size": 16, "coding": coding}
        for levels in (1, 4):
            found = preview(f"{home / 'own.py'}:net", timesteps=3, levels=levels, **asked)
            assert found.neurons == {"relu": 256} and found.report.levels == levels

    def test_needs_no_weights_and_no_data(self):
        found = preview("resnet20", width=4, channels=1, classes=3)
        expected = Architecture("resnet20", 3, 1, 4).build()
        assert found.parameters == sum(each.numel() for each in expected.parameters())
        assert len(found.report.sites) == 19 and found.report.timesteps == 4

    def test_of_trained_weights_and_data_has_thresholds(self, home):
        found = preview(str(home / "teacher"), timesteps=2)
        assert found.calibrated and all(site.expected_rate is not None for site in found.report.sites)
        file = preview(str(home / "teacher" / "model.safetensors"), data=str(home / "blobs.npz"), timesteps=2)
        assert file.report == found.report
        assert not preview(str(home / "teacher" / "model.safetensors"), timesteps=2).calibrated

    def test_names_every_part_that_is_refused_once(self, home):
        with pytest.raises(ConversionError) as caught:
            preview(f"{home / 'own.py'}:refused", image_size=16)
        first, *lines = str(caught.value).splitlines()
        assert first == "3 parts of the network cannot be converted:"
        assert [line.split()[0] for line in lines] == ["'sigmoid'", "'tanh'", "'tanh'"]
        assert all("own.py:" in line and "nn.ReLU" in line for line in lines)

    def test_weights_that_do_not_exist_are_no_random_ones(self, tmp_path):
        with pytest.raises(WeightsError, match=r"typo\.safetensors' does not exist"):
            preview(str(tmp_path / "typo.safetensors"), architecture="vgg9")

    def test_refuses_a_student(self, home, tmp_path):
        options = ("--data", home / "blobs.npz", "--teacher", home / "teacher", "--timesteps", 1)
        assert call("distill", *options, "--method", "conversion-max", "--out", tmp_path / "run") == 0
        with pytest.raises(ConfigError, match="is already a spiking student"):
            preview(str(tmp_path / "run"))


class TestCommand:
    def test_prints_a_line_for_each_activation_and_pooling(self, home, capsys):
        assert call("check", f"{home / 'own.py'}:net", "--image-size", 16) == 0
        head, activation, pool, *notes = capsys.readouterr().out.splitlines()
        assert head.split() == ["layer", "in", "the", "ANN", "neurons", "source"]
        assert activation.split() == ["relu", "LeakyReLU", "256", "own.py:12"]
        assert pool.split() == ["pool", "MaxPool2d", "own.py:12"]
        assert "1 spiking layers, 256 neurons for an image of 3 x 16 x 16, 762 parameters, T=4" in notes[-1]
        assert any(note.startswith("relu: negative slope 0.1 dropped") for note in notes)
        assert any("Thresholds are left out" in note for note in notes)

    def test_says_t_and_d_of_graded_spikes(self, home, capsys):
        assert call("check", f"{home / 'own.py'}:net", "--image-size", 16, "--timesteps", 1, "--levels", 4) == 0
        assert "762 parameters, T=1, D=4." in capsys.readouterr().out

    def test_prints_thresholds_that_mean_something(self, home, capsys):
        assert call("check", home / "teacher", "--timesteps", 2) == 0
        shown = capsys.readouterr().out
        assert "threshold" in shown.splitlines()[0] and "left out" not in shown

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("{home}/own.py:refused --image-size 16", "'sigmoid'"),
            ("vgg8", "Did you mean 'vgg"),
            ("vgg9 --levels 0", "levels (=0) must be 1 or more"),
            ("vgg9 --neuron plif --levels 2", "levels (=2) above 1 need reset=subtract"),
            ("vgg9 --timesteps 0", "timesteps (=0) must be 1 or more"),
            ("vgg9 --data nowhere.npz", "nowhere.npz"),
            ("vgg9 --classes 0", "classes (=0)"),
            ("vgg9 --image-size 0", "image_size (=0), the side of an image in pixels"),
            ("{home}/own.py:net --image-size 32", "does not accept"),
            ("{home}/nowhere/model.safetensors", "There is no architecture"),
        ],
    )
    def test_ends_with_code_2_and_one_message_where_it_cannot(self, home, arguments, message, capsys):
        assert call("check", *arguments.format(home=home).split()) == 2
        caught = capsys.readouterr()
        assert message in caught.err and "Traceback" not in caught.err and not caught.out
