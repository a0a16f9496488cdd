import csv
import dataclasses

import pytest
import torch

from spikedistill.deliver import energy as module
from spikedistill.deliver.energy import lines, measure_energy, table
from spikedistill.files import write_csv

pytestmark = pytest.mark.usefixtures("without_compiler")


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
