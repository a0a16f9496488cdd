"""The methods beside KDSNN, from the command line to a measured student."""

import shutil

import pytest

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
    assert call("teach", "--network", "vgg9", "--width", 4, *data, "--out", folder / "ann") == 0
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


class TestStages:
    def call(self, call, home, out, *options):
        given = ("--data", home / "blobs.npz", *QUICK, "--teacher", home / "snn", "--method", "distilling-spikes")
        return call("distill", *given, *SMALL, *options, "--out", out)

    def test_each_is_taught_by_the_one_before_and_finished_ones_are_kept(self, home, tmp_path, call, capsys):
        assert self.call(call, home, tmp_path / "out", "--assistants", 4, 3) == 0
        runs = [tmp_path / "out" / name for name in ("assistant-w4", "assistant-w3", "student")]
        recipes = [Run(path).recipe() for path in runs]
        assert [one["teacher"]["source"] for one in recipes] == [str(home / "snn"), *map(str, runs[:2])]
        assert [one["student"]["width"] for one in recipes] == [4, 3, 2]
        written = [(path / "results.json").read_bytes() for path in runs]
        shutil.rmtree(runs[2])
        capsys.readouterr()
        assert self.call(call, home, tmp_path / "out", "--assistants", 4, 3) == 0
        shown = capsys.readouterr().err
        assert "stage 2 of 3 is finished and kept" in shown and "stage 3 of 3\n" in shown
        again = [(path / "results.json").read_bytes() for path in runs]
        assert again[:2] == written[:2] and Run(runs[2]).read("results")["test_accuracy"] >= 0

    @pytest.mark.parametrize(
        "options, message",
        [
            (("--assistants", 4, 4), "must be different widths"),
            (("--assistants", 0), "must be different widths of 1 or more"),
            (("--assistants", 4, "--student", "same", "--student-width", "None"), "name it by --student"),
            (("--assistants", 4, "--seeds", 2), "one method and one seed"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, message, home, tmp_path, call, capsys):
        assert self.call(call, home, tmp_path / "out", *options) == 2
        assert message in capsys.readouterr().err
