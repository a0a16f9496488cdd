"""Immunity and energy of finished runs."""

import csv
import dataclasses

import PIL.Image
import pytest

from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.immunity import Score
from spikedistill.files import write_csv
from spikedistill.recipes import immunity as module
from spikedistill.recipes.choices import Method, StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.energy import lines, measure_energy, table
from spikedistill.recipes.immunity import measure_immunity, summary
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.05, precision="fp32", device="cpu")


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs):
    """A folder with data, a teacher, and a student of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    write_blobs(folder, 48, 24)
    data = Data(str(folder / "blobs.npz"))
    teach(Teach("vgg9", width=4, data=data, training=TRAINING), folder / "teacher")
    who = TeacherChoice(str(folder / "teacher"))
    distill(Distill(who, StudentChoice(timesteps=2), Method("direct"), data, TRAINING), folder / "student")
    return folder


class TestImmunity:
    def test_writes_scores_a_table_and_a_picture_for_each_kind(self, home, tmp_path):
        runs = [home / "teacher", home / "student"]
        columns, rows = measure_immunity(runs, tmp_path, kinds=("noise", "hardware"), images=9, baseline="student")
        assert columns[:4] == ["network", "clean", "noise", "hardware"]
        assert [row[0] for row in rows] == ["teacher", "student"]
        with (tmp_path / "scores.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert {line["name"] for line in lines if line["kind"] == "noise"} == {
            *("gaussian", "uniform", "salt-and-pepper", "poisson", "speckle", "impulse", "erasing")
        }
        assert sum(line["network"] == "teacher" for line in lines) == 1 + 7 * 5 + 5  # of the faults only the weights'
        assert (tmp_path / "immunity.md").read_text().count("\n") == 4
        for kind in ("noise", "hardware"):
            with PIL.Image.open(tmp_path / f"{kind}.png") as picture:
                assert picture.size[0] > 500 and len(picture.convert("L").getcolors()) > 5

    def test_goes_on_where_it_was_interrupted_with_the_same_result(self, home, tmp_path, monkeypatch):
        runs = [home / "student"]
        whole = measure_immunity(runs, tmp_path / "whole", kinds=("noise",), images=6)
        said = []

        def interrupt(line):
            said.append(line)
            if len(said) == 10:
                raise KeyboardInterrupt

        options = {"kinds": ("noise",), "images": 6}
        with pytest.raises(KeyboardInterrupt):
            measure_immunity(runs, tmp_path / "cut", **options, say=interrupt)
        with pytest.raises(RunError, match="already holds a run: go on with it by --resume"):
            measure_immunity(runs, tmp_path / "cut", **options)
        with pytest.raises(RunError, match="begun with another recipe"):
            measure_immunity(runs, tmp_path / "cut", kinds=("noise",), images=7, resume=True)
        assert measure_immunity(runs, tmp_path / "cut", **options, say=said.append, resume=True) == whole
        assert len(said) == 1 + 7 * 5
        assert (tmp_path / "cut" / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()

    def test_counts_where_a_network_beats_the_baseline(self):
        def curve(who, name, kind, heights):
            return [Score(who, kind, name, severity, float(height)) for severity, height in enumerate(heights, 1)]

        scores = [Score("a", "clean", "clean", 0, 90.0), Score("b", "clean", "clean", 0, 90.0)]
        scores += curve("a", "gaussian", "noise", [80, 70, 60, 50, 40]) + curve("b", "gaussian", "noise", [81] * 5)
        scores += curve("a", "impulse", "noise", [80] * 5) + curve("b", "impulse", "noise", [79] * 5)
        columns, rows = summary(scores, ["a", "b"], ["noise"], "a")
        assert columns[-1] == "better than a"
        assert rows == [["a", "90.00", "70.00", "", ""], ["b", "90.00", "80.00", "", "1 of 2 noise"]]

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"baseline": "studnet"}, "studnet.*[Dd]id you mean.*student"),
            ({"kinds": ("nois",)}, "nois.*[Dd]id you mean.*noise"),
            ({"images": 0}, r"images \(=0\) must be 1 or more"),
            ({"attacked": 0}, r"attacked \(=0\)"),
        ],
    )
    def test_refuses_what_cannot_work(self, options, message, home, tmp_path):
        with pytest.raises(ConfigError, match=message):
            measure_immunity([home / "teacher", home / "student"], tmp_path / "x", **options)
        assert not (tmp_path / "x").exists()

    def test_refuses_runs_of_different_data_and_of_one_name(self, home, tmp_path, write_blobs):
        write_blobs(tmp_path, 48, 24)
        other = Data(str(tmp_path / "blobs.npz"))
        teach(Teach("vgg9", width=4, data=other, training=TRAINING), tmp_path / "teacher")
        with pytest.raises(ConfigError, match="trained on different data"):
            measure_immunity([home / "student", tmp_path / "teacher"], tmp_path / "x")
        with pytest.raises(ConfigError, match="Two of the runs have one name"):
            measure_immunity([home / "teacher", tmp_path / "teacher"], tmp_path / "x")

    def test_refuses_a_run_that_is_not_finished(self, home, tmp_path):
        run = Run(tmp_path / "begun")
        run.write("recipe", Run(home / "student").read("recipe"))
        with pytest.raises(RunError, match="holds no finished run"):
            measure_immunity([tmp_path / "begun"], tmp_path / "x")
        assert module.KINDS == ("noise", "natural", "hardware", "attack")


class TestEnergy:
    def test_bills_students_and_anns_side_by_side(self, home):
        teacher, student = measure_energy([home / "teacher", home / "student"], images=9)
        assert set(teacher.energy["memory"]) == {"ann"}
        assert set(student.energy["memory"]) == {"student", "quantised", "quantised-sparse"}
        # one network: the student's connections are the teacher's, and its neurons the teacher's activations twice
        assert student.cost.dense == teacher.cost.dense == pytest.approx(teacher.cost.macs, rel=0.9)
        assert student.cost.updates == 2 * teacher.cost.updates
        assert 0 < student.cost.spikes < student.cost.updates
        assert student.accuracy == pytest.approx(float(student.accuracy)) and 0 <= teacher.accuracy <= 100

    def test_the_table_sets_the_quantised_ann_below_each_student(self, home):
        columns, rows = table(measure_energy([home / "teacher", home / "student"], images=9))
        assert [row[0] for row in rows] == [
            *("teacher", "student", "  as an ANN of 2 bits", "  as an ANN of 2 bits, zeros skipped")
        ]
        assert all(len(row) == len(columns) for row in rows)

    def test_the_file_holds_every_figure(self, home, tmp_path):
        (bill,) = measure_energy([home / "student"], images=9)
        write_csv(tmp_path / "x.csv", ("network", "metric", "value"), lines([bill]))
        with (tmp_path / "x.csv").open() as file:
            found = {(line["network"], line["metric"]): float(line["value"]) for line in csv.DictReader(file)}
        assert found["student", "acs"] == bill.cost.acs
        assert found["student", "energy_memory_quantised"] == bill.energy["memory"]["quantised"]
        assert len(found) == len(dataclasses.fields(bill.cost)) - 1 + 9
