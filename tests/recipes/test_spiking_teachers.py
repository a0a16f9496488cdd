"""Runs of 'distill' as teachers, and students without one, from the command line."""

import pytest
import torch
from scores import percent_right

from spikedistill.data.images import load_images
from spikedistill.deliver.record import Record
from spikedistill.student.save import load_student
from spikedistill.train.run import Run

QUICK = ("--epochs", 1, "--batch-size", 16, "--lr", 0.05, "--device", "cpu", "--precision", "fp32")
SMALL = ("--student", "vgg9", "--student-width", 4, "--timesteps", 4)


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs, call):
    """A folder with data and a student of T=8 that learned without a teacher."""
    folder = tmp_path_factory.mktemp("spiking")
    write_blobs(folder, 48, 24)
    large = ("--student", "resnet20", "--student-width", 8, "--timesteps", 8, "--method", "direct")
    known = ("distill", "--data", folder / "blobs.npz", *QUICK)
    assert call(*known, "--teacher", "none", *large, "--out", folder / "large") == 0
    return folder


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
