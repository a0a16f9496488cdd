import dataclasses

import pytest

from spikedistill.recipes import demo, digits
from spikedistill.train.run import Run

pytestmark = pytest.mark.usefixtures("without_compiler")


def test_four_networks_are_trained_and_measured_and_a_second_call_finds_them(tmp_path, monkeypatch):
    teacher, student = digits.teacher(), digits.student()
    quick = dataclasses.replace(teacher.training, epochs=1)
    small = dataclasses.replace(teacher, width=4, training=quick)
    monkeypatch.setattr(digits, "teacher", lambda: small)
    monkeypatch.setattr(digits, "student", lambda: dataclasses.replace(student, training=quick))
    paths = demo.demo(tmp_path)
    assert [path.name for path in paths] == ["teacher", "scratch", "direct", "kdsnn"]
    results = [Run(path).read("results") for path in paths]
    assert all(0 <= result["test_accuracy"] <= 100 for result in results)
    kinds = [
        (Run(path).read("conversion")["inherited"], Run(path).read("recipe")["method"]["name"]) for path in paths[1:]
    ]
    assert kinds == [(False, "direct"), (True, "direct"), (True, "kdsnn")]
    rates = [Run(path).read("recipe")["training"]["lr"] for path in paths]
    assert rates == [0.1, 0.1, 0.02, 0.02]
    written = {path: (path / "results.json").stat().st_mtime_ns for path in paths}
    demo.demo(tmp_path)
    assert written == {path: (path / "results.json").stat().st_mtime_ns for path in paths}
