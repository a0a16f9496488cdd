"""Runs of 'distill' and spiking networks of one's own as teachers, and students without one, by the command line."""

import runpy

import numpy as np
import pytest
import torch
from scores import percent_right
from torch import nn

from spikedistill.data.images import load_images
from spikedistill.deliver.record import Record
from spikedistill.student.save import load_student
from spikedistill.train.run import Run

QUICK = ("--epochs", 1, "--batch-size", 16, "--lr", 0.05, "--device", "cpu", "--precision", "fp32")
SMALL = ("--student", "vgg9", "--student-width", 4, "--timesteps", 4)
KINDS = ("images", "labels")
OWN = """
import torch
from torch import nn


class Fire(nn.Module):
    def forward(self, current):
        if self.potential is None:
            self.potential = torch.zeros_like(current)
        spikes = (self.potential + current >= 1).float()
        self.potential = self.potential + current - spikes
        return spikes


def layer(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), Fire())


class Keeps(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer1, self.layer2, self.fc = layer(3, 6), layer(6, 5), nn.Linear(320, classes)
        self.begin()

    def begin(self):
        for one in (self.layer1, self.layer2):
            one[1].potential = None

    def forward(self, x):
        return torch.stack([self.fc(self.layer2(self.layer1(x)).flatten(1)) for _ in range(5)])


class Begins(Keeps):
    def forward(self, x):
        self.begin()
        return super().forward(x)


class BatchFirst(Begins):
    def forward(self, x):
        return super().forward(x).transpose(0, 1)
"""


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs, call):
    """A folder with data and a student of T=8 that learned without a teacher."""
    folder = tmp_path_factory.mktemp("spiking")
    write_blobs(folder, 48, 24)
    large = ("--student", "resnet20", "--student-width", 8, "--timesteps", 8, "--method", "direct")
    known = ("distill", "--data", folder / "blobs.npz", *QUICK)
    assert call(*known, "--teacher", "none", *large, "--out", folder / "large") == 0
    (folder / "own.py").write_text(OWN)
    torch.manual_seed(3)
    torch.save(own(folder, "Begins").state_dict(), folder / "own.pt")
    return folder


def own(home, name):
    return runpy.run_path(str(home / "own.py"))[name](classes=3)


def distill(home, *options):
    """The command that teaches by the spiking teacher."""
    return ("distill", "--data", home / "blobs.npz", *QUICK, "--teacher", home / "large", *options)


class TestASpikingTeacher:
    @pytest.mark.parametrize("method", ["kdsnn-response", "kdsnn-feature", "kdsnn"])
    def test_of_more_steps_and_another_network_teaches(self, method, home, tmp_path, call, capsys):
        assert call(*distill(home, *SMALL), "--method", method, "--out", tmp_path / "small") == 0
        run = Run(tmp_path / "small")
        results, (line,) = run.read("results"), run.lines("metrics")
        assert (
            line.keys() & {"soft", "features"}
            == {
                "kdsnn-response": {"soft"},
                "kdsnn-feature": {"features"},
                "kdsnn": {"soft", "features"},
            }[method]
        )
        assert len(results["accuracy_by_step"]) == 4 and not run.read("conversion")["inherited"]
        assert results["teacher_accuracy"] == Run(home / "large").read("results")["test_accuracy"]
        capsys.readouterr()
        assert call("evaluate", tmp_path / "small") == 0
        assert f"{results['agreement']:.2f} %" in capsys.readouterr().out

    def test_is_agreed_with_by_the_mean_of_its_steps(self, home, tmp_path, call):
        assert call(*distill(home, *SMALL), "--out", tmp_path / "small") == 0
        large, small = load_student(home / "large"), load_student(tmp_path / "small")
        assert (large.timesteps, small.timesteps) == (8, 4)
        pixels = load_images(str(home / "blobs.npz")).test_images.float() / 255
        with torch.no_grad():
            agreed = large(pixels).mean(0).argmax(1) == small(pixels).mean(0).argmax(1)
        expected = 100 * agreed.double().mean().item()
        assert Run(tmp_path / "small").read("results")["agreement"] == pytest.approx(expected)

    def test_is_not_changed_by_teaching(self, home, tmp_path, call):
        before = {file.name: file.read_bytes() for file in (home / "large").iterdir()}
        assert call(*distill(home, *SMALL), "--out", tmp_path / "small") == 0
        assert {file.name: file.read_bytes() for file in (home / "large").iterdir()} == before

    @pytest.mark.parametrize("options", [(), ("--inherit", True)], ids=["default", "asked"])
    def test_gives_no_weights_to_the_same_student(self, options, home, tmp_path, call, capsys):
        assert call(*distill(home, "--student", "same", *options), "--out", tmp_path / "same") == 2
        message = capsys.readouterr().err
        assert f"start from the weights of an ANN, but the teacher '{home / 'large'}' is not one" in message
        assert "name a student by --student, or give --inherit False, and --start RUN" in message
        assert not (tmp_path / "same").exists()

    def test_is_followed_by_the_remedies_of_that_refusal(self, home, tmp_path, call):
        same = distill(home, "--student", "same", "--timesteps", 4, "--inherit", False)
        assert call(*same, "--out", tmp_path / "fresh") == 0
        assert call(*same, "--start", home / "large", "--out", tmp_path / "start") == 0
        fresh, start = (Run(tmp_path / name) for name in ("fresh", "start"))
        assert fresh.read("conversion")["network"] == start.read("conversion")["network"] == "resnet20"
        assert fresh.read("before")["divergence"] > start.read("before")["divergence"]


class TestASpikingNetworkOfOnesOwn:
    def command(self, home, name, *options):
        """The command that teaches by the network of this name."""
        given = ("--teacher", home / "own.pt", "--teacher-network", f"{home / 'own.py'}:{name}")
        scale = ("--teacher-mean", 0.3, 0.4, 0.5, "--teacher-std", 0.2, 0.25, 0.3)
        return ("distill", "--data", home / "blobs.npz", *QUICK, *given, *scale, *options)

    def test_teaches_by_its_spikes_and_is_measured(self, home, tmp_path, call, capsys):
        command = self.command(home, "Begins", *SMALL, "--method", "distilling-spikes", "--alpha", 0.5, "--window", 2)
        assert call(*command, "--out", tmp_path / "small") == 0
        run = Run(tmp_path / "small")
        results, (line,) = run.read("results"), run.lines("metrics")
        assert line["distance"] > 0 and line["soft"] > 0
        assert [theirs for theirs, _ in results["method"]["spike_pairs"]] == ["layer1.1", "layer2.1"]
        images = load_images(str(home / "blobs.npz"))
        network = own(home, "Begins")
        network.load_state_dict(torch.load(home / "own.pt"))
        expected = percent_right(Scaled(network), images.test_images, images.test_labels)
        assert results["teacher_accuracy"] == pytest.approx(expected)
        held_out = results["teacher"]["accuracy"]
        assert run.read("teacher")["accuracy"] == held_out and 0 <= held_out <= 100
        capsys.readouterr()
        assert call("evaluate", tmp_path / "small") == 0
        assert "agreement" not in capsys.readouterr().out
        assert call("evaluate", tmp_path / "small", "--trust-code") == 0
        assert f"{results['agreement']:.2f} %" in capsys.readouterr().out

    @pytest.mark.parametrize("labels", [(), ("--labels", "none")], ids=["labels", "none"])
    def test_teaches_by_its_logits_and_keeps_them(self, labels, home, tmp_path, call):
        command = self.command(home, "Begins", *SMALL, "--method", "kdsnn-response", *labels)
        kept = ("--epochs", 2, "--views", 1, "--cache-dir", tmp_path / "kept")
        assert call(*command, *kept, "--out", tmp_path / "first") == 0
        assert call(*command, *kept, "--out", tmp_path / "second") == 0
        first, second = (Run(tmp_path / name).lines("metrics") for name in ("first", "second"))
        assert first == second and first[0]["soft"] != first[1]["soft"]
        assert len(list((tmp_path / "kept").iterdir())) == 1

    @pytest.mark.parametrize(
        "name, options, message",
        [
            ("Keeps", SMALL, "Keeps keeps state between calls: its second logits for the same 16 images are others."),
            ("BatchFirst", SMALL, "BatchFirst returns shape (16, 5, 3) for 16 images: expected logits [T, B, K], time"),
            (
                "Begins",
                (),
                "'same' network as its teacher, but the network of '{own}' is not known: name the student's",
            ),
            ("Begins", ("--data", "{events}"), "'{own}' takes images, but 'events' holds event frames: give it images"),
        ],
        ids=["state", "axes", "same", "events"],
    )
    def test_that_cannot_teach_is_refused(self, name, options, message, home, tmp_path, call, capsys):
        frames = torch.randint(0, 3, (12, 4, 2, 8, 8)).byte().numpy()
        labels = (torch.arange(12) % 3).numpy()
        parts = {f"{part}_{kind}": held for part in ("train", "test") for kind, held in zip(KINDS, (frames, labels))}
        np.savez(tmp_path / "events.npz", **parts)
        places = {"own": home / "own.pt", "events": tmp_path / "events.npz"}
        given = [str(option).format(**places) for option in options]
        assert call(*self.command(home, name, *given, "--out", tmp_path / "out")) == 2
        assert message.format(**places) in capsys.readouterr().err and not (tmp_path / "out").exists()


class Scaled(nn.Module):
    """The network after the normalisation that the command names, by hand."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        scaled = [(images[:, c] - mean) / std for c, (mean, std) in enumerate(((0.3, 0.2), (0.4, 0.25), (0.5, 0.3)))]
        return self.network(torch.stack(scaled, 1))


class TestNoTeacher:
    def test_is_enough_for_cross_entropy(self, home, call, capsys):
        results = Run(home / "large").read("results")
        record = Record.read(home / "large")
        images = record.images()
        expected = percent_right(record.network(), images.test_images, images.test_labels)
        assert results["test_accuracy"] == pytest.approx(expected) and "agreement" not in results
        assert Run(home / "large").read("recipe")["teacher"]["source"] == "none"
        assert call("evaluate", home / "large") == 0
        caught = capsys.readouterr()
        assert "firing rate" in caught.out and caught.err == "evaluate: measuring on 24 test images\n"

    @pytest.mark.parametrize("method", ["kdsnn", "kdsnn-response", "kdsnn-feature"])
    def test_is_not_enough_for_a_method_that_asks_one(self, method, home, tmp_path, call, capsys):
        command = (*distill(home, *SMALL), "--teacher", "none", "--method", method, "--out", tmp_path / "out")
        assert call(*command) == 2
        assert f"method (={method}) needs a teacher: name one by teacher" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("method", ["direct", "conversion-max"])
    def test_has_no_network_for_the_same_student(self, method, home, tmp_path, call, capsys):
        command = (*distill(home), "--teacher", "none", "--method", method, "--out", tmp_path / "out")
        assert call(*command) == 2
        assert "the network of 'none' is not known: name the student's network by --student" in capsys.readouterr().err
