import shutil

import pytest

from spikedistill.deliver.tables import compare, markdown
from spikedistill.errors import RunError
from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes.choices import StudentChoice
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.05, precision="fp32", device="cpu")


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(train_home):
    """A folder with data, a teacher, and students of two and of three steps."""
    three = StudentChoice("resnet20", 4, timesteps=3)
    return train_home(two=(StudentChoice(timesteps=2), Direct()), three=(three, KDSNN()))


class TestCompare:
    def test_sets_runs_side_by_side_and_pads_the_shorter(self, home):
        columns, rows = compare([home / "teacher", home / "two", home / "three"])
        steps = ["t=1", "t=2", "t=3"]
        assert columns == [
            "run",
            "network",
            "weights",
            "method",
            "accuracy",
            *steps,
            "firing rate",
            "agreement",
            "teacher",
        ]
        assert [len(row) for row in rows] == [len(columns)] * 3
        first, second, third = (dict(zip(columns, row)) for row in rows)
        assert (first["run"], first["network"], first["method"]) == ("teacher", "vgg9", "teacher (ANN)")
        assert [first[name] for name in (*steps, "firing rate", "agreement", "teacher")] == [""] * 6
        assert (second["network"], second["weights"], second["method"]) == ("vgg9 T=2", "inherited", "direct")
        assert second["t=3"] == "" and third["t=3"] != ""
        assert (third["network"], third["weights"], third["method"]) == ("resnet20 T=3", "fresh", "kdsnn")

    @pytest.mark.parametrize("name", ["two", "three"])
    def test_shows_the_numbers_of_the_results(self, home, name):
        columns, (row,) = compare([home / name])
        shown, results = dict(zip(columns, row)), Run(home / name).read("results")
        assert shown["accuracy"] == f"{results['test_accuracy']:.2f} %"
        assert shown["agreement"] == f"{results['agreement']:.2f} %"
        assert shown["firing rate"] == f"{results['firing_rate']:.2f} %"
        assert [shown[f"t={t}"] for t in (1, 2)] == [f"{value:.2f}" for value in results["accuracy_by_step"][:2]]

    def test_shows_the_teacher_of_each_student_with_its_doubts(self, home, tmp_path):
        found = Run(home / "two").read("results")["teacher"]
        assert found["images"] == 5 and found["held_out"]
        shutil.copytree(home / "two", tmp_path / "two")
        for doubts, mark in (([], ""), (["something"], " ?")):
            results = Run(home / "two").read("results")
            Run(tmp_path / "two").write("results", {**results, "teacher": {**found, "doubts": doubts}})
            assert compare([tmp_path / "two"])[1][0][-1] == f"{found['accuracy']:.2f} % (5){mark}"
        del results["teacher"]  # a run of an earlier version
        Run(tmp_path / "two").write("results", results)
        assert compare([tmp_path / "two"])[1][0][-1] == ""

    def test_needs_no_weights(self, home, tmp_path):
        shutil.copytree(home / "two", tmp_path / "two")
        for file in (tmp_path / "two").glob("*.safetensors"):
            file.unlink()
        assert compare([tmp_path / "two"]) == compare([home / "two"])

    def test_of_an_unfinished_run_is_refused(self, home, tmp_path):
        shutil.copytree(home / "two", tmp_path / "half")
        (tmp_path / "half" / "results.json").unlink()
        with pytest.raises(RunError, match=r"half/results\.json' cannot be read"):
            compare([home / "two", tmp_path / "half"])

    @pytest.mark.parametrize("file", ["recipe.json", "results.json", "conversion.json"])
    @pytest.mark.parametrize("content", ["{", "{}", "[]"])
    def test_of_a_run_with_a_broken_file_is_refused(self, home, file, content, tmp_path):
        shutil.copytree(home / "two", tmp_path / "broken")
        (tmp_path / "broken" / file).write_text(content)
        with pytest.raises(RunError, match="broken"):
            compare([tmp_path / "broken"])


def test_markdown_has_a_line_a_row_below_two_of_the_head():
    assert markdown(["a", "b"], [["1", ""], ["2", "x"]]) == "| a | b |\n| --- | --- |\n| 1 |  |\n| 2 | x |\n"
