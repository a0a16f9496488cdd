import csv
import dataclasses
import io

import pytest
import torch
from rich.console import Console
from scores import percent_right

from spikedistill.deliver import energy as module
from spikedistill.deliver.energy import lines, measure_energy, table
from spikedistill.deliver.record import Record
from spikedistill.errors import ConfigError
from spikedistill.files import write_csv
from spikedistill.train.progress import Progress

pytestmark = pytest.mark.usefixtures("without_compiler")


def test_bills_students_and_anns_side_by_side(home):
    teacher, student = measure_energy([home / "teacher", home / "student"], images=9)
    assert set(teacher.energy["memory"]) == {"ann"}
    assert set(student.energy["memory"]) == {"student", "quantised", "quantised-sparse"}
    # one network: the student's connections are the teacher's, and its neurons the teacher's activations twice
    assert student.cost.dense == teacher.cost.dense == pytest.approx(teacher.cost.macs, rel=0.9)
    assert student.cost.updates == 2 * teacher.cost.updates
    assert 0 < student.cost.spikes < student.cost.updates
    images, few = Record.read(home / "student").images(), [0, 3, 6, 8, 11, 14, 17, 20, 23]
    for estimate in (teacher, student):
        network = Record.read(home / estimate.network).network()
        found = percent_right(network, images.test_images[few], images.test_labels[few])
        assert estimate.accuracy == pytest.approx(found) and estimate.images == 9


def test_the_table_sets_the_quantised_ann_below_each_student(home):
    columns, rows = table(measure_energy([home / "teacher", home / "student"], images=9))
    assert [row[0] for row in rows] == [
        *("teacher", "student", "  as an ANN of 2 bits", "  as an ANN of 2 bits, zeros skipped")
    ]
    assert all(len(row) == len(columns) for row in rows)


def test_the_file_holds_every_figure(home, tmp_path):
    (estimate,) = measure_energy([home / "student"], images=9)
    write_csv(tmp_path / "x.csv", ("network", "metric", "value"), lines([estimate]))
    with (tmp_path / "x.csv").open() as file:
        found = {(line["network"], line["metric"]): float(line["value"]) for line in csv.DictReader(file)}
    assert found["student", "acs"] == estimate.cost.acs
    assert found["student", "energy_uJ_memory_quantised"] == estimate.energy["memory"]["quantised"]
    assert (found["student", "images"], found["student", "format_bits"]) == (9, 32)
    assert found["student", "accuracy"] == estimate.accuracy and found["student", "accuracy_error"] == estimate.error


def test_table_and_file_have_the_same_figures(home, tmp_path):
    estimates = measure_energy([home / "teacher", home / "student"], images=9)
    columns, rows = table(estimates)
    found = {(network, metric): value for network, metric, value in lines(estimates)}
    ends = ("", "", "_quantised", "_quantised-sparse")
    for row, network, end in zip(rows, ("teacher", *["student"] * 3), ends):
        shown = dict(zip(columns, row))
        for column, metric, unit in (("MACs (M)", "macs", 1e6), ("ACs (M)", "acs", 1e6), ("spikes", "spikes", 1)):
            assert ((network, metric + end) in found) == bool(shown[column])
            if shown[column]:
                assert float(shown[column]) == pytest.approx(
                    found[network, metric + end] / unit, abs=0.51 / (1e2 if unit > 1 else 1)
                )
        for model in ("float32", "int8", "memory"):
            kind = end[1:] or ("ann" if network == "teacher" else "student")
            assert float(shown[f"µJ, {model}"]) == pytest.approx(found[network, f"energy_uJ_{model}_{kind}"], rel=5e-3)
    assert found["student", "macs_quantised-sparse"] == estimates[1].cost.active < estimates[1].cost.dense
    # every connection is one for the teacher, however many of its inputs were zero
    assert found["teacher", "macs"] == found["student", "macs_quantised"] == estimates[0].cost.dense


def test_sets_the_student_beside_each_ann(home):
    estimates = measure_energy([home / "teacher", home / "student"], images=9)
    columns, (teacher, student, *anns) = table(estimates)
    place = columns.index("student / ANN")
    assert teacher[place] == student[place] == ""
    energy = estimates[1].energy
    for row, kind in zip(anns, ("quantised", "quantised-sparse")):
        ratios = [energy[model]["student"] / energy[model][kind] for model in ("float32", "int8", "memory")]
        assert [float(found) for found in row[place].split(", ")] == pytest.approx(ratios, abs=0.006)


def test_shows_each_run_and_how_far_it_is(home):
    told = io.StringIO()
    measure_energy([home / "student"], images=9, progress=Progress(Console(file=told, width=80), "energy"))
    assert told.getvalue() == "energy: 1 of 1, student, 9 images\n"


def test_says_how_many_images_in_what_format_and_with_what_error(home):
    (estimate,) = measure_energy([home / "student"], images=9)
    columns, (row, *_) = table([estimate])
    shown = dict(zip(columns, row))
    assert (shown["images"], shown["format"]) == ("9", "float32")
    assert shown["accuracy"] == f"{estimate.accuracy:.2f} ± {estimate.error:.2f} %"
    # 900 of 1000 right: the root of 0.9 x 0.1 / 1000, a hair more with one more right and one more wrong
    thousand = dataclasses.replace(estimate, accuracy=90.0, images=1000)
    assert thousand.error == pytest.approx(100 * (0.9 * 0.1 / 1000) ** 0.5, rel=0.01)
    assert dataclasses.replace(estimate, accuracy=100.0, images=9).error > 5


def test_a_network_that_answers_with_nan_has_no_accuracy(home):
    network = Record.read(home / "student").network()
    network.core.get_submodule("layer1.0").weight.data.fill_(torch.nan)
    pixels, labels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ConfigError, match="The logits of 3 of 3 samples hold NaN"):
        module.estimate_energy("broken", network, pixels, labels, torch.float32)


def test_measures_every_run_where_it_was_trained(home, elsewhere, monkeypatch):
    asked, estimate_energy = {}, module.estimate_energy

    def remember(name, network, pixels, labels, dtype, seen):
        asked[name] = dtype, network.core.get_submodule("layer1.0").weight.is_contiguous()
        return estimate_energy(name, network, pixels, labels, dtype, seen)

    monkeypatch.setattr(module, "estimate_energy", remember)
    measure_energy([home / "student", elsewhere], images=3)
    assert asked == {"student": (torch.float32, False), "elsewhere": (torch.bfloat16, True)}
    estimates = measure_energy([home / "student", elsewhere], images=3, device="cpu", precision="fp32")
    assert [estimate.dtype for estimate in estimates] == [torch.float32] * 2
