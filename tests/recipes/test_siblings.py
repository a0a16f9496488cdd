"""The methods beside KDSNN, from the command line to a measured student."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from spikedistill.train.loop import Trainer
from spikedistill.train.run import Run

pytestmark = pytest.mark.usefixtures("without_compiler")
QUICK = ("--epochs", 1, "--batch-size", 16, "--lr", 0.05, "--device", "cpu", "--precision", "fp32")
SMALL = ("--student", "vgg9", "--student-width", 2, "--timesteps", 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs, call):
    """Images, an ANN, and a spiking network of four steps that learned from it."""
    folder = tmp_path_factory.mktemp("siblings")
    write_blobs(folder, 48, 24)
    data = ("--data", folder / "blobs.npz", *QUICK)
    assert call("teach", "--network", "vgg9", "--width", 5, *data, "--out", folder / "ann") == 0
    assert call("distill", "--teacher", folder / "ann", *data, "--timesteps", 4, "--out", folder / "snn") == 0
    return folder


def distill(call, home, out, *options):
    assert call("distill", "--data", home / "blobs.npz", *QUICK, *options, "--out", out) == 0
    return Run(out)


@pytest.mark.parametrize("options", [(), ("--window", 1, "--stride", 1, "--distance", "l1", "--alpha", 0.5)])
def test_spikes_teach_spikes(options, home, tmp_path, call):
    run = distill(
        call, home, tmp_path / "out", "--teacher", home / "snn", "--method", "distilling-spikes", *SMALL, *options
    )
    assert "distance" in run.lines("metrics")[-1] and run.recipe()["method"]["name"] == "distilling-spikes"
    assert run.read("results")["method"]["spike_pairs"][-1] == ["layer3.8", "layer3.8"]


def test_spikes_of_an_ann_are_refused(home, tmp_path, call, capsys):
    given = ("--data", home / "blobs.npz", *QUICK, "--teacher", home / "ann", "--method", "distilling-spikes", *SMALL)
    assert call("distill", *given, "--out", tmp_path / "out") == 2
    assert "needs a spiking teacher" in capsys.readouterr().err


def test_two_temperatures(home, tmp_path, call):
    method = ("--method", "heterogeneous-temperatures", "--temperature", 6, "--student-temperature", 1.5)
    run = distill(call, home, tmp_path / "out", "--teacher", home / "ann", "--timesteps", 2, *method)
    assert run.recipe()["method"]["student_temperature"] == 1.5 and "soft" in run.lines("metrics")[-1]


@pytest.mark.parametrize("target", ["--spikes", "--operations"])
def test_a_budget_without_labels_too(target, home, tmp_path, call):
    options = ("--teacher", home / "ann", "--timesteps", 2, "--method", "budget", target, 10, "--labels", "none")
    assert target[2:] in distill(call, home, tmp_path / "out", *options).lines("metrics")[-1]


def test_a_budget_without_a_target_is_refused(home, tmp_path, call, capsys):
    given = ("--data", home / "blobs.npz", *QUICK, "--teacher", home / "ann", "--method", "budget")
    assert call("distill", *given, "--out", tmp_path / "out") == 2
    assert "give --spikes, --operations or both" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [(("--gradient", "quantised"), "no operations"), (("--timesteps", 1, "--compile"), "count synaptic operations")],
)
def test_operations_need_the_exact_gradient_step_by_step(options, message, home, tmp_path, call, capsys):
    given = ("--data", home / "blobs.npz", *QUICK, "--teacher", home / "ann", "--method", "budget", "--operations", 9)
    assert call("distill", *given, *options, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def stages(call, home, out, *options):
    """What the command ends with that takes the spiking network as the teacher of a smaller one."""
    given = ("--data", home / "blobs.npz", *QUICK, "--teacher", home / "snn", "--method", "distilling-spikes")
    return call("distill", *given, *SMALL, *options, "--out", out)


@pytest.fixture(scope="module")
def finished(home, call):
    """Three stages of two epochs."""
    assert stages(call, home, home / "stages", "--assistants", 4, 3, "--epochs", 2) == 0
    return home / "stages"


class TestStages:
    NAMES = ("assistant-w4", "assistant-w3", "student")

    def test_each_is_taught_by_the_one_before_and_finished_ones_are_kept(self, home, tmp_path, call, capsys):
        assert stages(call, home, tmp_path / "out", "--assistants", 4, 3) == 0
        runs = [tmp_path / "out" / name for name in self.NAMES]
        recipes = [Run(path).recipe() for path in runs]
        assert [one["teacher"]["source"] for one in recipes] == [str(home / "snn"), *map(str, runs[:2])]
        assert [one["student"]["width"] for one in recipes] == [4, 3, 2]
        written = [(path / "results.json").read_bytes() for path in runs]
        shutil.rmtree(runs[2])
        capsys.readouterr()
        assert stages(call, home, tmp_path / "out", "--assistants", 4, 3) == 0
        shown = capsys.readouterr().err
        assert "stage 2 of 3 is finished and kept" in shown and "stage 3 of 3\n" in shown
        again = [(path / "results.json").read_bytes() for path in runs]
        assert again[:2] == written[:2] and Run(runs[2]).read("results")["test_accuracy"] >= 0

    def test_a_stage_is_the_run_that_distill_makes_alone(self, finished, home, tmp_path, call):
        taught = ("--teacher", finished / "assistant-w3", "--epochs", 2)
        assert stages(call, home, tmp_path / "alone", *taught) == 0
        assert_same_weights(tmp_path / "alone", finished / "student")

    def test_an_interrupted_one_goes_on_to_the_same_bits(self, finished, home, tmp_path, call, monkeypatch, capsys):
        save, given = Trainer.save, ("--assistants", 4, 3, "--epochs", 2)

        def saved_and_stopped(trainer, epoch, *more):
            save(trainer, epoch, *more)
            if (trainer.run.path.name, epoch) == ("assistant-w3", 1):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "save", saved_and_stopped)
            assert stages(call, home, tmp_path / "cut", *given) == 130
        assert [Run(tmp_path / "cut" / name).finished for name in self.NAMES] == [True, False, False]
        capsys.readouterr()
        assert stages(call, home, tmp_path / "cut", *given) == 0
        assert "assistant-w3: continuing after epoch 1, step 0" in capsys.readouterr().err
        for name in self.NAMES:
            assert_same_weights(tmp_path / "cut" / name, finished / name)
            assert Run(tmp_path / "cut" / name).lines("metrics") == Run(finished / name).lines("metrics")

    @pytest.mark.parametrize("resume", [(), ("--resume",)])
    def test_of_more_epochs_are_refused(self, resume, finished, home, call, capsys):
        assert stages(call, home, finished, "--assistants", 4, 3, "--epochs", 3, *resume) == 2
        said = "assistant-w4' holds a run of 2 epochs, and --epochs 3 was given: stages cannot be extended"
        assert said in capsys.readouterr().err
        assert [Run(finished / name).recipe()["training"]["epochs"] for name in self.NAMES] == [2, 2, 2]

    def test_a_fault_of_the_last_is_found_before_the_first_is_trained(self, home, tmp_path, call, capsys):
        pairs = ("--student", "resnet20", "--assistants", 4, "--spike-pairs", "layer3.8", "layer3.2.relu2")
        assert stages(call, home, tmp_path / "out", *pairs) == 2
        assert "needs spikes of layer3.8; the teacher's layers of neurons are: stem.2, " in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "options, message",
        [
            (("--assistants", 4, 4), "(=4 4) must be widths that fall from the teacher's 5 to the student's 2"),
            (("--assistants", 3, 4), "(=3 4) must be widths that fall from the teacher's 5 to the student's 2"),
            (("--assistants", 4, 2), "(=4 2) must be widths that fall from the teacher's 5 to the student's 2"),
            (("--assistants", 5, 3), "(=5 3) must be widths that fall from the teacher's 5 to the student's 2"),
            (("--assistants", 0), "(=0) must be widths that fall"),
            (("--assistants", 4, "--student-width", "None"), "to the student's 64, each smaller than the one before"),
            (("--assistants", 1, "--student", "resnet20"), "fall from the teacher's to the student's 2, each"),
            (("--assistants", 4, "--student", "same", "--student-width", "None"), "name it by --student"),
            (("--assistants", 4, "--student", "torchvision/resnet18"), "name it by --student"),
            (("--assistants", 4, "--seeds", 2), "one method and one seed"),
            (("--assistants", 4, "--method", "direct", "kdsnn"), "one method and one seed"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, message, home, tmp_path, call, capsys):
        assert stages(call, home, tmp_path / "out", *options) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def assert_same_weights(first, second):
    one, other = (load_file(path / "model.safetensors") for path in (first, second))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
