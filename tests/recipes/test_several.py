import dataclasses
import json
import shutil

import pytest

from spikedistill.errors import ConfigError, RunError
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature
from spikedistill.recipes import several as module
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.several import several, variants
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.02, precision="fp32", device="cpu", seed=5)
METHODS = ("direct", "kdsnn-response")


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs):
    """A folder with data, a teacher, and two methods over two seeds in ``runs``."""
    folder = tmp_path_factory.mktemp("several")
    write_blobs(folder, 48, 24)
    teach(Teach("vgg9", width=4, data=Data(str(folder / "blobs.npz")), training=TRAINING), folder / "teacher")
    several(recipe(folder), METHODS, 2, folder / "runs")
    return folder


def recipe(home, **changes):
    """Cross-entropy with the teacher's logits, in the recipe's own temperature."""
    data = Data(str(home / "blobs.npz"))
    made = Distill(TeacherChoice(str(home / "teacher")), StudentChoice(timesteps=2), KDSNN(), data, TRAINING)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def runs(home, tmp_path):
    """A copy of the runs, to be changed."""
    return shutil.copytree(home / "runs", tmp_path / "runs")


def trained(monkeypatch, call, *arguments, **options):
    """Which runs a call trains, and from where: name -> whether it resumes; nothing is trained."""
    found = {}
    monkeypatch.setattr(module, "distill", lambda made, path, resume, *rest: found.update({path.name: resume}))
    call(*arguments, **options)
    return found


class TestNames:
    def test_have_t_and_d_of_graded_spikes_in_their_names(self, home):
        graded = recipe(home, student=StudentChoice(timesteps=1, levels=4))
        assert list(variants(graded, ["direct"], 1)) == ["direct-t1d4-s5"]

    def test_carry_method_steps_and_seed_from_the_recipe_s_own_upwards(self, home):
        made = variants(recipe(home), METHODS, 2)
        assert list(made) == ["direct-t2-s5", "direct-t2-s6", "kdsnn-response-t2-s5", "kdsnn-response-t2-s6"]
        assert [one.training.seed for one in made.values()] == [5, 6, 5, 6]

    def test_nothing_but_method_and_seed_differs(self, home):
        base, made = recipe(home), variants(recipe(home), METHODS, 2)
        assert {dataclasses.replace(one, method=base.method, training=base.training) for one in made.values()} == {base}
        assert {dataclasses.replace(one.training, seed=5) for one in made.values()} == {base.training}

    def test_the_recipe_s_own_method_keeps_its_fields(self, home):
        made = variants(recipe(home, method=KDSNN(temperature=9.0)), ["kdsnn", "kdsnn-feature"], 1)
        assert [one.method for one in made.values()] == [KDSNN(temperature=9.0), KDSNNFeature()]

    @pytest.mark.parametrize(
        "methods, seeds, said",
        [
            ([], 1, "No method was given"),
            (["direct"], 0, r"seeds \(=0\) must be 1 or more"),
            (["direct", "direct"], 1, "Two of the methods .direct, direct. are called 'direct': give each once"),
            (["direct", "kdsn"], 1, "no method 'kdsn'. Did you mean 'kdsnn'"),
        ],
    )
    def test_that_cannot_be_are_refused(self, home, methods, seeds, said):
        with pytest.raises(ConfigError, match=said):
            variants(recipe(home), methods, seeds)


class TestRuns:
    def test_are_those_that_distill_makes_alone(self, home, tmp_path):
        name = "kdsnn-response-t2-s6"
        distill(variants(recipe(home), METHODS, 2)[name], tmp_path / name)
        alone, one_of_many = Run(tmp_path / name), Run(home / "runs" / name)
        assert one_of_many.read("results") == alone.read("results")
        assert one_of_many.lines("metrics") == alone.lines("metrics")
        assert one_of_many.recipe() == alone.recipe()

    def test_differ_from_seed_to_seed(self, home):
        first, second = (Run(home / "runs" / f"direct-t2-s{seed}").lines("metrics") for seed in (5, 6))
        assert first != second

    def test_come_back_in_the_order_of_methods_and_seeds_and_finished_ones_are_kept(self, home, monkeypatch):
        monkeypatch.setattr(module, "distill", None)
        paths = several(recipe(home), METHODS[::-1], 2, home / "runs")
        assert [path.name for path in paths] == [f"{name}-t2-s{seed}" for name in METHODS[::-1] for seed in (5, 6)]

    def test_each_has_a_label_and_a_number(self, home, tmp_path, monkeypatch, capsys):
        trained(monkeypatch, several, recipe(home), METHODS, 1, tmp_path, progress=Progress.stderr)
        said = capsys.readouterr().err.splitlines()
        assert said == ["direct-t2-s5: run 1 of 2", "kdsnn-response-t2-s5: run 2 of 2"]

    def test_that_are_kept_are_counted(self, home, runs, monkeypatch, capsys):
        (runs / "direct-t2-s6" / "results.json").unlink()
        trained(monkeypatch, several, recipe(home), METHODS, 2, runs, progress=Progress.stderr)
        said = capsys.readouterr().err.splitlines()
        assert said == ["runs: 3 of 4 runs are finished and kept", "direct-t2-s6: run 1 of 1"]

    def test_that_are_interrupted_go_on_and_new_ones_begin(self, home, runs, monkeypatch):
        (runs / "direct-t2-s6" / "results.json").unlink()
        found = trained(monkeypatch, several, recipe(home), [*METHODS, "tet"], 2, runs)
        assert found == {"direct-t2-s6": True, "tet-t2-s5": False, "tet-t2-s6": False}
        found = trained(monkeypatch, several, recipe(home), ["direct"], 3, runs)
        assert found == {"direct-t2-s6": True, "direct-t2-s7": False}


class TestAnotherRecipe:
    def test_is_refused_before_anything_is_trained(self, home, runs, monkeypatch):
        changed = recipe(home, training=dataclasses.replace(TRAINING, lr=0.5))
        monkeypatch.setattr(module, "distill", None)
        with pytest.raises(RunError, match=r"direct-t2-s5' holds a run with another recipe \(lr was 0.02, now 0.5\)"):
            several(changed, ["tet", "direct"], 1, runs, resume=True)
        assert not (runs / "tet-t2-s5").exists()

    def test_of_more_epochs_is_left_to_the_run_where_resume_is_given(self, home, runs, monkeypatch):
        longer = recipe(home, training=dataclasses.replace(TRAINING, epochs=3))
        with pytest.raises(RunError, match="epochs was 1, now 3"):
            several(longer, ["direct"], 1, runs)
        assert trained(monkeypatch, several, longer, ["direct"], 1, runs, resume=True) == {"direct-t2-s5": True}

    def test_of_fewer_epochs_is_refused_before_anything_is_trained(self, home, runs, monkeypatch):
        longer = recipe(home, training=dataclasses.replace(TRAINING, epochs=3))
        (name, made), *_ = variants(longer, ["direct"], 1).items()
        Run(runs / name).write("recipe", made.written())
        monkeypatch.setattr(module, "distill", None)
        with pytest.raises(RunError, match=r"direct-t2-s5' holds a run with another recipe \(epochs was 3, now 1\)"):
            several(recipe(home), ["tet", "direct"], 1, runs, resume=True)

    def test_of_other_epochs_is_the_same_where_nothing_is_trained(self, home, tmp_path):
        conversion = ["conversion-max"]
        (path,) = several(recipe(home), conversion, 1, tmp_path)
        longer = recipe(home, training=dataclasses.replace(TRAINING, epochs=3))
        for resume in (False, True):
            assert several(longer, conversion, 1, tmp_path, resume) == [path]
        (path / "results.json").unlink()
        several(longer, conversion, 1, tmp_path)
        assert Run(path).finished

    def test_that_was_extended_already_is_kept(self, home, runs, monkeypatch):
        longer = recipe(home, training=dataclasses.replace(TRAINING, epochs=3))
        (name, made), *_ = variants(longer, ["direct"], 1).items()
        Run(runs / name).write("recipe", {**made.written(), "extended": [{"epochs": 1, "done": 1, "step": 0}]})
        for resume in (False, True):
            assert trained(monkeypatch, several, longer, ["direct"], 1, runs, resume=resume) == {}

    def test_a_run_is_no_place_for_several(self, home):
        with pytest.raises(RunError, match="is the directory of a run"):
            several(recipe(home), METHODS, 1, home / "teacher")


class TestFaults:
    @pytest.mark.parametrize(
        "method, changes, said",
        [
            ("kdsnn", {"teacher": TeacherChoice("none")}, "needs a teacher"),
            ("kdsnn", {"teacher": TeacherChoice("nowhere")}, "no teacher at 'nowhere'"),
            ("kdsnn", {"data": Data("nothing.npz")}, "nothing.npz"),
            ("conversion-max", {"student": StudentChoice("vgg9", 4, timesteps=2)}, "keeps the teacher's weights"),
            ("kdsnn", {"training": dataclasses.replace(TRAINING, batch_size=500)}, "500"),
        ],
    )
    def test_of_the_last_method_are_found_before_the_first_is_trained(self, home, tmp_path, method, changes, said):
        with pytest.raises(Exception, match=said):
            several(recipe(home, **changes), ["direct", method], 1, tmp_path / "runs")
        assert not (tmp_path / "runs").exists()

    def test_that_only_the_built_student_shows_are_found_too(self, home, tmp_path):
        made = recipe(home, method=KDSNNFeature(pairs=(("nowhere", "nothing"),)))
        with pytest.raises(ConfigError, match="nowhere"):
            several(made, ["direct", "kdsnn-feature"], 1, tmp_path / "runs")
        assert not (tmp_path / "runs").exists()

    def test_of_a_training_name_the_run_and_leave_the_finished_ones(self, home, runs):
        diverging = recipe(home, training=dataclasses.replace(TRAINING, lr=1e30, epochs=2))
        with pytest.raises(ConfigError, match=r"tet-t2-s5' cannot go on: .* 1 of 2 runs are finished"):
            several(diverging, ["conversion-max", "tet"], 1, runs)
        assert Run(runs / "conversion-max-t2-s5").finished and not Run(runs / "tet-t2-s5").finished
        kept = json.loads((runs / "tet-t2-s5" / "recipe.json").read_text())
        assert kept["training"]["lr"] == 1e30
