import shutil
import statistics

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.deliver.compare import compare, table
from spikedistill.deliver.record import Record
from spikedistill.deliver.results import Result, lines, read_results, runs_in
from spikedistill.errors import ConfigError, RunError
from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNResponse
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.teach import Teach
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.05, precision="fp32", device="cpu")
METHODS = {"direct": Direct(), "kdsnn-response": KDSNNResponse(), "kdsnn": KDSNN()}
STEPS = ["t=1 (%)", "t=2 (%)", "t=3 (%)"]
STATISTICS = ["difference (points)", "s.e. (points)", "95 % interval", "p", "positive in"]


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(train_home):
    """A folder with data, a teacher, and students of two and of three steps."""
    three = StudentChoice("resnet20", 4, timesteps=3)
    return train_home(two=(StudentChoice(timesteps=2), Direct()), three=(three, KDSNN()))


def made(tmp_path, method="direct", seed=0, accuracy=90.0, name=None, found=(), minutes=(), **choices):
    """A finished run as ``table`` sees it, of a recipe that no other choice names; nothing is on disk."""
    training = Training(epochs=8, seed=seed, **choices.pop("training", {}))
    choice = StudentChoice(timesteps=choices.pop("timesteps", 2), **choices.pop("student", {}))
    data, teacher = choices.pop("data", Data()), TeacherChoice(choices.pop("teacher", "ann"))
    recipe = Distill(teacher, choice, METHODS[method], data, training).written()
    path = tmp_path / (name or f"{method}-t{choice.timesteps}-s{seed}")
    results = {"test_accuracy": accuracy, "accuracy_by_step": [accuracy / 2, accuracy], **dict(found)}
    return Result(Record(path, recipe), results, "vgg9", "inherited", {}, 8, sum(minutes) if minutes else None)


def over_seeds(tmp_path, **accuracies):
    """Methods with an accuracy a seed."""
    return [
        made(tmp_path, name.replace("_", "-"), seed, accuracy)
        for name, found in accuracies.items()
        for seed, accuracy in enumerate(found)
    ]


def rows(shown):
    """Rows of a table by their name, each by column."""
    return {row[0]: dict(zip(shown.columns, row, strict=True)) for row in shown.rows}


class TestSingleRuns:
    def test_are_set_side_by_side_and_the_shorter_are_padded(self, home):
        shown = compare([home / "teacher", home / "two", home / "three"])
        last = ["teacher (%)", "epochs", "minutes", "firing rate (%)", "agreement (%)", *STEPS]
        first = ["run", "accuracy (%)", "method", "network", "T x D", "latency", "weights"]
        assert shown.columns == [*first, *last]
        first, second, third = rows(shown).values()
        assert (first["run"], first["network"], first["method"]) == ("teacher", "vgg9", "teacher (ANN)")
        empty = (*STEPS, "T x D", "latency", "weights", "firing rate (%)", "agreement (%)", "teacher (%)")
        assert [first[name] for name in empty] == [""] * 9
        assert [row["latency"] for row in (second, third)] == ["9", "21"]
        assert (second["network"], second["T x D"], second["weights"]) == ("vgg9", "2x1", "inherited")
        assert second["t=3 (%)"] == "" and third["t=3 (%)"] != "" and second["method"] == "direct"
        assert (third["network"], third["T x D"], third["weights"]) == ("resnet20", "3x1", "fresh")
        assert [row["epochs"] for row in (first, second, third)] == ["1"] * 3

    def test_of_graded_spikes_say_t_times_d(self, tmp_path):
        found = [made(tmp_path, timesteps=1, student={"levels": 4}, name="graded"), made(tmp_path, timesteps=4)]
        shown = rows(table(found))
        assert [row["T x D"] for row in shown.values()] == ["1x4", "4x1"]
        columns, (graded, single) = lines(found)
        places = [columns.index(name) for name in ("timesteps", "levels")]
        assert [[row[place] for place in places] for row in (graded, single)] == [[1, 4], [4, 1]]

    def test_have_a_latency_where_a_run_has_recorded_it(self, tmp_path):
        """An earlier version recorded none. With D = 1 the latency step by step is T, which stands beside it."""
        graded = made(tmp_path, student={"levels": 4}, found={"latency": {"layer-by-layer": 36}}, name="graded")
        both = {"layer-by-layer": 9, "step-by-step": 2}
        single, old = made(tmp_path, found={"latency": both}, name="single"), made(tmp_path, "kdsnn", name="old")
        shown = table([old, graded, single])
        assert [row["latency"] for row in rows(shown).values()] == ["", "36", "9"]
        assert "Latency: sub-steps until the answer, layer by layer." in shown.caption
        without = table([old])
        assert "latency" not in without.columns and "Latency" not in without.caption

    @pytest.mark.parametrize("name", ["two", "three"])
    def test_show_the_numbers_of_the_results(self, home, name):
        (shown,), results = rows(compare([home / name])).values(), Run(home / name).read("results")
        assert shown["accuracy (%)"] == f"{results['test_accuracy']:.2f}"
        assert shown["agreement (%)"] == f"{results['agreement']:.2f}"
        assert shown["firing rate (%)"] == f"{results['firing_rate']:.2f}"
        teacher = Run(home / "teacher").read("results")["test_accuracy"]
        assert results["teacher"]["doubts"] and shown["teacher (%)"] == f"{teacher:.2f} ?"
        assert [shown[step] for step in STEPS[:2]] == [f"{value:.2f}" for value in results["accuracy_by_step"][:2]]
        (timing,) = Run(home / name).lines("timing")
        assert float(shown["minutes"]) == pytest.approx(timing["seconds"] / 60, abs=0.05)

    def test_need_no_weights(self, home, tmp_path):
        shutil.copytree(home / "two", tmp_path / "two")
        for file in (tmp_path / "two").glob("*.safetensors"):
            file.unlink()
        assert compare([tmp_path / "two"]) == compare([home / "two"])

    @pytest.mark.parametrize("file", ["recipe.json", "results.json", "conversion.json"])
    @pytest.mark.parametrize("content", ["{", "{}", "[]"])
    def test_with_a_broken_file_are_refused(self, home, file, content, tmp_path):
        shutil.copytree(home / "two", tmp_path / "broken")
        (tmp_path / "broken" / file).write_text(content)
        with pytest.raises(RunError, match="broken"):
            compare([tmp_path / "broken"])

    def test_of_many_steps_show_powers_of_two_and_the_last(self, tmp_path):
        long = made(tmp_path, found={"accuracy_by_step": [float(t) for t in range(1, 13)]}, name="long")
        short = made(tmp_path, found={"accuracy_by_step": [float(t) for t in range(1, 7)]}, name="short", timesteps=6)
        shown = rows(table([long, short]))
        assert [name for name in shown["long"] if name.startswith("t=")] == [f"t={t} (%)" for t in (1, 2, 4, 6, 8, 12)]
        assert (shown["long"]["t=8 (%)"], shown["short"]["t=6 (%)"], shown["short"]["t=8 (%)"]) == ("8.00", "6.00", "")


class TestTheTeacher:
    @pytest.mark.parametrize(
        "found, said",
        [
            ({"teacher_accuracy": 93.258, "teacher": {"doubts": []}}, "93.26"),
            ({"teacher_accuracy": 93.258, "teacher": {"doubts": ["odd"]}}, "93.26 ?"),
            ({"teacher": {"accuracy": 99.0, "images": 5, "doubts": []}}, "99.00 on 5 other images"),
            ({}, ""),
        ],
    )
    def test_has_its_accuracy_on_the_test_set_where_that_is_known(self, tmp_path, found, said):
        shown = table([made(tmp_path, found=found)])
        assert shown.rows[0][shown.columns.index("teacher (%)")] == said
        assert shown.notes == (["Check the teacher of direct-t2-s0: odd."] if "?" in said else [])

    def test_that_is_doubted_by_several_rows_is_named_once(self, tmp_path):
        doubts = {"teacher": {"doubts": ["odd"]}, "teacher_accuracy": 90.0}
        shown = table([made(tmp_path, "direct", found=doubts), made(tmp_path, "kdsnn", found=doubts)])
        assert shown.notes == ["Check the teacher of direct-t2-s0, kdsnn-t2-s0: odd."]

    def test_that_was_trained_again_in_between_is_pointed_out(self, tmp_path):
        found = [made(tmp_path, seed=seed, found={"teacher_accuracy": 90.0 + seed}) for seed in (0, 1)]
        (note,) = [note for note in table(found).notes if "same accuracy" in note]
        assert note.startswith("The teacher 'ann' did not have the same accuracy in all runs (90.00, 91.00 %)")
        assert rows(table(found))["direct-t2"]["teacher (%)"] == "90.00, 91.00"


class TestRunsOverSeeds:
    def test_are_a_row_with_mean_and_sample_deviation(self, tmp_path):
        shown = rows(table(over_seeds(tmp_path, direct=[90.0, 91.0, 95.0], kdsnn=[93.0, 94.0, 96.0])))
        assert list(shown) == ["direct-t2", "kdsnn-t2"]
        assert [row["n"] for row in shown.values()] == ["3", "3"]
        assert [row["accuracy (%)"] for row in shown.values()] == ["92.00 ± 2.65", "94.33 ± 1.53"]
        assert [row["t=1 (%)"] for row in shown.values()] == ["46.00", "47.17"]
        assert [row["t=2 (%)"] for row in shown.values()] == ["92.00", "94.33"]

    @settings(max_examples=25)
    @given(
        st.lists(st.tuples(*[st.integers(0, 1000).map(lambda n: n / 10)] * 2), min_size=2, max_size=6).filter(
            lambda pairs: len({round(a - b, 6) for a, b in pairs}) > 1
        )
    )
    def test_have_the_paired_difference_error_and_p_that_scipy_finds(self, tmp_path_factory, pairs):
        theirs, ours = zip(*pairs)
        folder = tmp_path_factory.getbasetemp()
        row = rows(table(over_seeds(folder, direct=theirs, kdsnn=ours)))["kdsnn-t2"]
        gains = [a - b for a, b in zip(ours, theirs)]
        assert row["difference (points)"] == f"{statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}"
        assert float(row["s.e. (points)"]) == pytest.approx(scipy.stats.sem(gains), abs=0.0051)
        ends = scipy.stats.t.interval(0.95, len(gains) - 1, statistics.mean(gains), scipy.stats.sem(gains))
        assert [float(end) for end in row["95 % interval"].split(" to ")] == pytest.approx(ends, abs=0.0051)
        p = scipy.stats.ttest_rel(ours, theirs).pvalue
        assert p < 0.00101 if row["p"] == "< 0.001" else float(row["p"]) == pytest.approx(p, abs=0.00051)
        assert row["positive in"] == f"{sum(gain > 0 for gain in gains)} of {len(gains)}"

    @settings(max_examples=25)
    @given(st.randoms(use_true_random=False))
    def test_do_not_depend_on_the_order_in_which_they_are_given(self, tmp_path_factory, random_):
        found = over_seeds(
            tmp_path_factory.getbasetemp(), direct=[90.0, 91.0], kdsnn=[93.0, 95.5], kdsnn_response=[92.0]
        )
        shown = rows(table(found))
        random_.shuffle(found)
        assert rows(table(found)) == shown

    def test_are_compared_in_the_seeds_that_both_have(self, tmp_path):
        found = over_seeds(tmp_path, direct=[90.0, 91.0, 92.0], kdsnn=[93.0, 95.0])
        row = rows(table(found))["kdsnn-t2"]
        assert (row["difference (points)"], row["positive in"]) == ("+3.50 ± 0.71", "2 of 2")
        other = [*found[:3], made(tmp_path, "kdsnn", seed=7)]
        shown = table(other)
        assert [rows(shown)["kdsnn-t2-s7"][name] for name in STATISTICS] == [""] * 5
        assert "kdsnn-t2-s7 has no difference: it shares no seed with direct-t2." in shown.notes

    def test_say_what_is_significant_and_that_the_teacher_is_one(self, tmp_path):
        notes = table(over_seeds(tmp_path, direct=[90.0, 91.0, 92.0], kdsnn=[95.0, 96.1, 97.0])).notes
        assert "each teacher was trained once, so ± does not include the variation of teachers" in notes[0]
        assert "points above direct-t2" in notes[0] and "1 of 1 (kdsnn-t2)" in notes[-1]

    def test_of_which_one_differs_in_more_than_the_seed_are_another_row(self, tmp_path):
        one, two = made(tmp_path), made(tmp_path, seed=1)
        for changed in ({"training": {"lr": 0.7}}, {"student": {"leak": 0.3, "neuron": "lif"}}, {"timesteps": 4}):
            names = list(rows(table([one, two, made(tmp_path, seed=2, name="x", **changed)])))
            assert names == ["direct-t2", "x"], changed
        ways = ({"checkpoint_minutes": 9.0, "tensorboard": True}, {"device": "cpu", "keep_memory": False})
        ways = (*({"training": way} for way in ways), {"student": {"recompute": "stages"}})
        for same in (*ways, {"data": Data(data_dir="there")}):
            assert rows(table([one, two, made(tmp_path, seed=2, **same)]))["direct-t2"]["n"] == "3", same

    def test_with_the_same_seed_count_once(self, tmp_path):
        shown = table([made(tmp_path), made(tmp_path, seed=1), made(tmp_path, seed=1, name="again", accuracy=10.0)])
        assert rows(shown)["direct-t2"]["n"] == "2" and rows(shown)["direct-t2"]["accuracy (%)"] == "90.00 ± 0.00"
        assert (
            f"'{tmp_path}/again' has the same recipe and seed as '{tmp_path}/direct-t2-s1' and is left out."
            in shown.notes
        )

    @pytest.mark.parametrize(
        "names, row",
        [
            (["kdsnn-t4-s0", "kdsnn-t4-s11"], "kdsnn-t4"),
            (["a_seed1", "a_seed2"], "a"),
            (["run3", "run4"], "run"),
            (["0", "1"], "0"),
            (["one", "two"], "one"),
        ],
    )
    def test_have_the_name_of_their_directories_without_the_seed(self, tmp_path, names, row):
        found = [made(tmp_path, seed=seed, name=name) for seed, name in enumerate(names)]
        assert list(rows(table(found))) == list(rows(table(found[::-1]))) == [row]

    def test_of_one_name_in_several_folders_keep_what_tells_them_apart(self, tmp_path):
        folders = ("a", "b", "c/d", "e/d")
        found = [
            made(tmp_path / folder, name="run", training={"lr": number / 10})
            for number, folder in enumerate(folders, 1)
        ]
        assert list(rows(table(found[:2]))) == ["a/run", "b/run"]
        assert list(rows(table(found))) == ["a/run", "b/run", f"{tmp_path}/c/d/run", f"{tmp_path}/e/d/run"]


class TestTheBaseline:
    def test_is_cross_entropy_only_else_the_first_student(self, tmp_path):
        found = over_seeds(tmp_path, kdsnn=[93.0, 94.0], direct=[90.0, 91.0])
        assert rows(table(found))["direct-t2"]["difference (points)"] == "baseline"
        others = over_seeds(tmp_path, kdsnn=[93.0, 94.0], kdsnn_response=[90.0, 91.0])
        assert rows(table(others))["kdsnn-t2"]["difference (points)"] == "baseline"

    @pytest.mark.parametrize("asked", ["kdsnn-t2", "kdsnn"])
    def test_can_be_named_by_row_or_method(self, tmp_path, asked):
        found = over_seeds(tmp_path, kdsnn=[93.0, 94.0], direct=[90.0, 91.5])
        shown = rows(table(found, asked))
        assert shown["kdsnn-t2"]["difference (points)"] == "baseline"
        assert shown["direct-t2"]["difference (points)"] == "-2.75 ± 0.35"
        assert shown["direct-t2"]["positive in"] == "0 of 2"

    def test_that_is_none_of_the_rows_or_several_is_refused(self, tmp_path):
        found = [made(tmp_path), made(tmp_path, timesteps=4)]
        with pytest.raises(ConfigError, match=r"no row to compare with 'direkt-t2-s0'. Did you mean 'direct-t2-s0'"):
            table(found, "direkt-t2-s0")
        with pytest.raises(ConfigError, match=r"method of several rows \(direct-t2-s0, direct-t4-s0\)"):
            table(found, "direct")

    def test_that_is_a_teacher_is_refused_where_there_are_students(self, home):
        with pytest.raises(ConfigError, match=r"baseline \(=teacher\) is a teacher, and students are compared with a"):
            compare([home / "teacher", home / "two"], "teacher")
        assert len(compare([home / "teacher"], "teacher").rows) == 1

    @pytest.mark.parametrize(
        "change, said",
        [
            ({"teacher": "other"}, "its teacher (other) is not that of direct-t2 (ann)"),
            ({"data": Data("mnist")}, "its data (mnist) are not those of direct-t2 (digits)"),
        ],
    )
    def test_of_other_data_or_another_teacher_gives_no_difference(self, tmp_path, change, said):
        found = over_seeds(tmp_path, direct=[90.0, 91.0])
        found += [made(tmp_path, "kdsnn", seed, 95.0, **change) for seed in (0, 1)]
        shown = table(found)
        assert [rows(shown)["kdsnn-t2"][name] for name in STATISTICS] == [""] * 5
        assert f"kdsnn-t2 has no difference: {said}." in shown.notes

    def test_without_a_teacher_may_be_compared(self, tmp_path):
        found = [made(tmp_path, "direct", seed, 90.0, teacher="none") for seed in (0, 1)]
        found += [made(tmp_path, "kdsnn", seed, 95.0 + seed) for seed in (0, 1)]
        assert rows(table(found))["kdsnn-t2"]["positive in"] == "2 of 2"

    def test_of_students_is_not_compared_with_teachers(self, tmp_path):
        found = over_seeds(tmp_path, direct=[90.0, 91.0])
        recipe = Teach("vgg9", data=Data(), training=Training(seed=0)).written()
        ann = Result(Record(tmp_path / "ann", recipe), {"test_accuracy": 97.0}, "vgg9", "", {}, 1, 2.0)
        shown = table([ann, *found])
        assert [rows(shown)["ann"][name] for name in STATISTICS] == [""] * 5
        assert not any("ann" in note for note in shown.notes) and shown.bold == frozenset()


class TestTheBest:
    def test_student_by_its_mean_is_bold(self, tmp_path):
        shown = table(over_seeds(tmp_path, direct=[90.0, 97.0], kdsnn=[95.0, 94.0], kdsnn_response=[1.0, 2.0]))
        assert shown.bold == {(1, shown.columns.index("accuracy (%)"))}
        assert "highest mean accuracy of a student, significant or not" in shown.caption

    def test_are_all_of_one_mean_and_none_of_one_run_or_several_sets(self, tmp_path):
        place = table([made(tmp_path)]).columns.index("accuracy (%)")
        assert table([made(tmp_path), made(tmp_path, "kdsnn")]).bold == {(0, place), (1, place)}
        assert table([made(tmp_path)]).bold == frozenset()
        several = table([made(tmp_path), made(tmp_path, "kdsnn", data=Data("mnist"))])
        assert several.bold == frozenset() and "different sets (digits, mnist)" in several.notes[-1]


class TestWhatIsRead:
    def test_an_unfinished_run_is_named_with_its_epoch_and_the_others_are_shown(self, home, tmp_path):
        shutil.copytree(home / "two", tmp_path / "half")
        (tmp_path / "half" / "results.json").unlink()
        shown = compare([home / "two", tmp_path / "half"])
        assert list(rows(shown)) == ["two"]
        assert shown.notes[0] == "'half' is unfinished and left out: epoch 1 of 1, and it is not measured yet."
        recipe = Run(tmp_path / "half").read("recipe")
        for method, said in (("direct", "epoch 1 of 3"), ("conversion-max", "it is not measured yet")):
            changed = {"training": {**recipe["training"], "epochs": 3}, "method": {"name": method}}
            Run(tmp_path / "half").write("recipe", {**recipe, **changed})
            with pytest.raises(RunError, match=f"'half' is unfinished and left out: {said}. Finish a run first"):
                compare([tmp_path / "half"])

    def test_a_folder_means_the_runs_in_it_each_once(self, home, tmp_path):
        for name in ("s10", "s9", "noise"):
            shutil.copytree(home / "two", tmp_path / name)
        Run(tmp_path / "noise").write("recipe", {"kind": "immunity"})
        (tmp_path / "notes").mkdir()
        found = runs_in([tmp_path, tmp_path / "s9", tmp_path / "notes" / ".." / "s10", home / "teacher"])
        assert found == [tmp_path / "s9", tmp_path / "s10", home / "teacher"]
        refused = {
            "notes": "is not a run of 'teach' or 'distill' and holds none",
            "s9/recipe.json": "is a file",
            "no": "does not exist",
        }
        for name, said in refused.items():
            with pytest.raises(RunError, match=f"{name}' {said}"):
                runs_in([tmp_path / name])

    def test_csv_has_a_line_a_run_with_all_digits(self, home):
        results, _ = read_results([home / "teacher", home / "two", home / "three"])
        columns, found = lines(results)
        teacher, two, three = (dict(zip(columns, row, strict=True)) for row in found)
        for row, name in ((two, "two"), (three, "three")):
            stored = Run(home / name).read("results")
            figures = ("test_accuracy", "teacher_accuracy", "agreement", "divergence", "firing_rate")
            assert {figure: row[figure] for figure in figures} == {figure: stored[figure] for figure in figures}
            steps = [row[f"accuracy_t{t}"] for t in (1, 2, 3) if row[f"accuracy_t{t}"] is not None]
            assert steps == stored["accuracy_by_step"]
            assert (row["run"], row["seed"], row["epochs"]) == (name, 0, 1)
        assert [row["levels"] for row in (teacher, two, three)] == [None, 1, 1]
        assert teacher["method"] == "teacher (ANN)" and teacher["timesteps"] is teacher["accuracy_t1"] is None


def test_a_run_over_seeds_is_read_as_such_from_its_directories(home, tmp_path):
    recipe = Run(home / "two").read("recipe")
    for seed in (0, 1):
        shutil.copytree(home / "two", tmp_path / f"two-s{seed}")
        Run(tmp_path / f"two-s{seed}").write("recipe", {**recipe, "training": {**recipe["training"], "seed": seed}})
    assert rows(compare([tmp_path]))["two"]["n"] == "2"
