import csv
import dataclasses
import shutil

import pytest
import torch

from spikedistill.compute import place
from spikedistill.deliver import energy as module
from spikedistill.deliver.energy import lines, measure_energy, table
from spikedistill.files import write_csv
from spikedistill.objective.direct import Direct
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
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
    choice = TeacherChoice(str(folder / "teacher"))
    distill(Distill(choice, StudentChoice(timesteps=2), Direct(), data, TRAINING), folder / "student")
    return folder


@pytest.fixture
def elsewhere(home, tmp_path, monkeypatch):
    """A copy of the student whose recipe leaves the number format to a processor that computes bfloat16."""
    monkeypatch.setattr(place, "_processor_flags", lambda: {"avx512_bf16"})
    shutil.copytree(home / "student", tmp_path / "elsewhere")
    recipe = Run(home / "student").read("recipe")
    recipe["training"] |= {"precision": "auto", "channels_last": False}
    Run(tmp_path / "elsewhere").write("recipe", recipe)
    return tmp_path / "elsewhere"


def test_bills_students_and_anns_side_by_side(home):
    teacher, student = measure_energy([home / "teacher", home / "student"], images=9)
    assert set(teacher.energy["memory"]) == {"ann"}
    assert set(student.energy["memory"]) == {"student", "quantised", "quantised-sparse"}
    # one network: the student's connections are the teacher's, and its neurons the teacher's activations twice
    assert student.cost.dense == teacher.cost.dense == pytest.approx(teacher.cost.macs, rel=0.9)
    assert student.cost.updates == 2 * teacher.cost.updates
    assert 0 < student.cost.spikes < student.cost.updates
    assert student.accuracy == pytest.approx(float(student.accuracy)) and 0 <= teacher.accuracy <= 100


def test_the_table_sets_the_quantised_ann_below_each_student(home):
    columns, rows = table(measure_energy([home / "teacher", home / "student"], images=9))
    assert [row[0] for row in rows] == [
        *("teacher", "student", "  as an ANN of 2 bits", "  as an ANN of 2 bits, zeros skipped")
    ]
    assert all(len(row) == len(columns) for row in rows)


def test_the_file_holds_every_figure(home, tmp_path):
    (bill,) = measure_energy([home / "student"], images=9)
    write_csv(tmp_path / "x.csv", ("network", "metric", "value"), lines([bill]))
    with (tmp_path / "x.csv").open() as file:
        found = {(line["network"], line["metric"]): float(line["value"]) for line in csv.DictReader(file)}
    assert found["student", "acs"] == bill.cost.acs
    assert found["student", "energy_memory_quantised"] == bill.energy["memory"]["quantised"]
    assert len(found) == len(dataclasses.fields(bill.cost)) - 1 + 9


def test_measures_every_run_where_it_was_trained(home, elsewhere, monkeypatch):
    asked, bill_of = {}, module.bill_of

    def remember(name, network, pixels, labels, dtype):
        asked[name] = dtype, network.core.get_submodule("layer1.0").weight.is_contiguous()
        return bill_of(name, network, pixels, labels, dtype)

    monkeypatch.setattr(module, "bill_of", remember)
    measure_energy([home / "student", elsewhere], images=3)
    assert asked == {"student": (torch.float32, False), "elsewhere": (torch.bfloat16, True)}
