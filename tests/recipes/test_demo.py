import csv
import dataclasses
import json
import math
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from spikedistill.errors import ConfigError, RunError
from spikedistill.recipes import demo, digits
from spikedistill.train.run import Run

pytestmark = pytest.mark.usefixtures("without_compiler")
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "demo.csv"


def rows(images, labels):
    """Images with their labels, as a multiset of bytes."""
    return Counter(zip((np.asarray(image, np.uint8).tobytes() for image in images), np.asarray(labels).tolist()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo of two seeds and one epoch each, on a narrow teacher."""
    with pytest.MonkeyPatch.context() as patch:
        teacher, student = digits.teacher(), demo.student
        small = dataclasses.replace(teacher, width=4, training=dataclasses.replace(teacher.training, epochs=1))
        patch.setattr(digits, "teacher", lambda: small)

        def quick(data, source):
            made = student(data, source)
            return dataclasses.replace(made, training=dataclasses.replace(made.training, epochs=1))

        patch.setattr(demo, "student", quick)
        out = tmp_path_factory.mktemp("demo")
        paths = demo.demo(out, seeds=2)
        yield out, paths


class TestData:
    def test_is_the_whole_set_and_the_students_have_a_part_of_the_teachers(self, tmp_path):
        many, few = (np.load(path) for path in demo.write_data(tmp_path))
        known = load_digits()
        everything = rows(np.round(known.images * (255 / 16))[:, None], known.target)
        tested = rows(many["test_images"], many["test_labels"])
        taught = rows(many["train_images"], many["train_labels"])
        learned = rows(few["train_images"], few["train_labels"])
        assert taught + tested == everything and tested == rows(few["test_images"], few["test_labels"])
        assert tested.total() == 1000 and learned.total() == 100 and learned <= taught
        assert set(Counter(few["train_labels"].tolist()).values()) <= {9, 10, 11}

    def test_is_written_once(self, tmp_path):
        paths = demo.write_data(tmp_path)
        written = [path.stat().st_mtime_ns for path in paths]
        assert [path.stat().st_mtime_ns for path in demo.write_data(tmp_path)] == written

    @pytest.mark.parametrize("part", ["train_images", "train_labels", "test_images", "test_labels"])
    def test_does_not_replace_other_images(self, part, tmp_path):
        few = demo.write_data(tmp_path)[1]
        arrays = dict(np.load(few))
        np.savez(few, **arrays | {part: arrays[part][::-1]})
        with pytest.raises(RunError, match=r"digits-100\.npz' holds other images than the demo's: choose"):
            demo.write_data(tmp_path)


class TestDemo:
    def test_students_differ_in_method_and_seed_alone(self, finished):
        out, paths = finished
        assert paths[0] == out / "teacher" and all(path.parent == out / "students" for path in paths[1:])
        recipes = [Run(path).read("recipe") for path in paths[1:]]
        made = [(recipe["method"].pop("name"), recipe["training"].pop("seed")) for recipe in recipes]
        assert made == [
            ("conversion-least-squares", 0),
            *(("direct", 0), ("direct", 1)),
            *(("kdsnn", 0), ("kdsnn", 1)),
        ]
        shared = [{name: part for name, part in recipe.items() if name != "method"} for recipe in recipes]
        assert all(recipe == shared[0] for recipe in shared)
        assert all(Run(path).read("conversion")["inherited"] for path in paths[1:])

    def test_a_second_call_keeps_what_is_finished_and_finishes_the_rest(self, finished):
        out, paths = finished
        before = {path: (path / "results.json").read_bytes() for path in paths}
        (paths[-1] / "results.json").unlink()
        times = [(path / "results.json").stat().st_mtime_ns for path in paths[:-1]]
        assert demo.demo(out, seeds=2) == paths
        assert times == [(path / "results.json").stat().st_mtime_ns for path in paths[:-1]]
        again, first = (json.loads(text) for text in ((paths[-1] / "results.json").read_bytes(), before[paths[-1]]))
        assert again["accuracy_by_step"] == first["accuracy_by_step"]

    def test_refuses_a_teacher_that_may_know_the_test_images(self, finished, monkeypatch):
        known = digits.teacher()
        more = dataclasses.replace(known, training=dataclasses.replace(known.training, epochs=2))
        monkeypatch.setattr(digits, "teacher", lambda: more)
        with pytest.raises(RunError, match=r"teacher' holds another teacher than the demo's \(epochs was 1, now 2\)"):
            demo.demo(finished[0], seeds=2)

    def test_needs_a_seed(self, tmp_path):
        with pytest.raises(ConfigError, match=r"seeds \(=0\) must be 1 or more"):
            demo.demo(tmp_path, seeds=0)
        assert not list(tmp_path.iterdir())


class TestTable:
    def test_has_mean_deviation_and_paired_difference(self, finished):
        shown = demo.shown(finished[1])
        cells = {row[0]: dict(zip(shown.columns, row)) for row in shown.rows}
        assert list(cells) == ["converted, not trained", "cross-entropy only", "KDSNN"]
        found = [Run(path).read("results") for path in finished[1][1:]]
        for name, results in (("cross-entropy only", found[1:3]), ("KDSNN", found[3:])):
            both = [result["test_accuracy"] for result in results]
            expected = f"{statistics.mean(both):.2f} ± {abs(both[0] - both[1]) / math.sqrt(2):.2f}"
            assert cells[name]["accuracy (%)"] == expected and cells[name]["n"] == "2"
            assert cells[name]["t=1 (%)"] == f"{statistics.mean(r['accuracy_by_step'][0] for r in results):.2f}"
        gains = [found[3 + seed]["test_accuracy"] - found[1 + seed]["test_accuracy"] for seed in (0, 1)]
        assert cells["KDSNN"]["difference (points)"].startswith(f"{statistics.mean(gains):+.2f} ± ")
        alone = demo.shown([path for path in finished[1] if not path.name.endswith("s1")])
        assert alone.columns == ["student", "accuracy (%)", "t=1 (%)"] and "; 1 seed does not tell" in alone.notes[1]
        assert f"has {found[1]['teacher_accuracy']:.2f} % on the same 1,000 test images" in shown.notes[0]

    def test_figures_are_those_of_the_runs(self, finished):
        made = demo.figures(finished[1])
        teacher, *students = [dict(zip(made.columns, row)) for row in made.rows]
        expected = Run(finished[1][0]).read("results")["test_accuracy"]
        assert teacher == {"method": "teacher", "seed": 0, "t": "", "accuracy": expected}
        for path, both in zip(finished[1][1:], zip(students[::2], students[1::2]), strict=True):
            assert [row["accuracy"] for row in both] == Run(path).read("results")["accuracy_by_step"]
            assert [f"{row['method']}-t2-s{row['seed']}" for row in both] == [path.name] * 2
            assert [row["t"] for row in both] == [1, 2]

    @pytest.mark.parametrize(
        "direct, kdsnn, said, sure",
        [
            ((70, 73), (80, 82), r"+9.50 points for KDSNN over cross-entropy only", True),  # t = 19, p = 0.033
            ((70, 79), (80, 82), r"+6.50 points for KDSNN over cross-entropy only", False),  # t = 1.86
            ((80, 82), (70, 73), r"-9.50 points for KDSNN over cross-entropy only", True),
        ],
    )
    def test_says_what_is_shown(self, finished, direct, kdsnn, said, sure):
        _, paths = finished
        kept = {path: Run(path).read("results") for path in paths[2:]}
        try:
            for path, accuracy in zip(paths[2:], [*direct, *kdsnn]):
                Run(path).write("results", kept[path] | {"test_accuracy": float(accuracy)})
            (line,) = [note for note in demo.shown(paths).notes if note.startswith("What this shows")]
        finally:
            for path, results in kept.items():
                Run(path).write("results", results)
        assert said in line and "with 100 images, T=2 and 1 epochs" in line
        assert ("do not tell this from chance" not in line) is sure


class TestPublished:
    def test_the_gain_is_above_chance_in_every_seed(self):
        with RESULTS.open(encoding="utf-8") as file:
            last = [row for row in csv.DictReader(file) if row["t"] == "2"]
        by_seed = {
            method: {int(row["seed"]): float(row["accuracy"]) for row in last if row["method"] == method}
            for method in ("direct", "kdsnn")
        }
        assert list(by_seed["direct"]) == list(by_seed["kdsnn"]) == [0, 1, 2, 3, 4]
        gains = [by_seed["kdsnn"][seed] - by_seed["direct"][seed] for seed in range(5)]
        assert min(gains) > 0
        assert statistics.mean(gains) > 4 * statistics.stdev(gains) / math.sqrt(5)
        assert all(
            1000 * accuracy / 100 == pytest.approx(round(10 * accuracy)) for accuracy in by_seed["kdsnn"].values()
        )
