import dataclasses
import json
import shutil

import pytest
import torch

from spikedistill.errors import ConfigError, RunError, SpikeDistillError
from spikedistill.files import read_tensors, write_tensors
from spikedistill.recipes.choices import Method, StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.runs import evaluate, load_student, table, to_recipe
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.05, precision="fp32", device="cpu")


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs):
    """A folder with data, a teacher, and students of two and of three steps."""
    folder = tmp_path_factory.mktemp("runs")
    write_blobs(folder, 48, 24)
    data = Data(str(folder / "blobs.npz"))
    teach(Teach("vgg9", width=4, data=data, training=TRAINING), folder / "teacher")
    who = TeacherChoice(str(folder / "teacher"))
    distill(Distill(who, StudentChoice(timesteps=2), Method("direct"), data, TRAINING), folder / "two")
    choice = StudentChoice("resnet20", 4, timesteps=3, neuron="plif", learn_threshold=True, max_pool="average")
    distill(Distill(who, choice, Method("kdsnn"), data, TRAINING), folder / "three")
    return folder


class TestLoad:
    @pytest.mark.parametrize("name", ["two", "three"])
    def test_gives_the_trained_tensors_bit_for_bit(self, home, name):
        student, _ = load_student(home / name)
        written, _ = read_tensors(home / name / "model.safetensors")
        assert written.keys() == student.state_dict().keys()
        assert all(torch.equal(value, written[key]) for key, value in student.state_dict().items())
        assert not student.training

    def test_gives_the_recipe_that_made_it(self, home):
        _, recipe = load_student(home / "three")
        assert recipe.student == StudentChoice(
            "resnet20", 4, timesteps=3, neuron="plif", learn_threshold=True, max_pool="average"
        )
        assert recipe.training == TRAINING

    def test_of_a_teacher_is_refused(self, home):
        with pytest.raises(RunError, match=r"teacher/model\.safetensors' holds no student but teacher"):
            load_student(home / "teacher")

    def test_of_weights_from_elsewhere_is_refused(self, tmp_path):
        write_tensors(tmp_path / "w.safetensors", {"x": torch.zeros(1)}, {})
        with pytest.raises(RunError, match="weights of unknown origin"):
            load_student(tmp_path / "w.safetensors")

    @pytest.mark.parametrize("facts", [{}, {"recipe": {}}, {"recipe": {"who": {"nobody": 1}}}, {"recipe": None}])
    def test_of_a_student_without_its_recipe_is_refused(self, home, facts, tmp_path):
        tensors, whole = read_tensors(home / "two" / "model.safetensors")
        whole.pop("recipe")
        write_tensors(tmp_path / "w.safetensors", tensors, {**whole, **facts})
        with pytest.raises(RunError, match="recipe"):
            load_student(tmp_path / "w.safetensors")

    def test_of_a_run_without_weights_is_refused(self, tmp_path):
        with pytest.raises(SpikeDistillError, match=r"model\.safetensors' does not exist"):
            load_student(tmp_path)


def test_a_recipe_survives_the_way_through_json():
    recipe = Distill(
        TeacherChoice("x", teacher_mean=(0.1, 0.2), teacher_std=(1.0, 2.0)),
        StudentChoice("vgg9", timesteps=7, leak=0.25, neuron="lif", reset="zero"),
        Method("kdsnn", pairs=(("a", "b"), ("c", "d"))),
        Data("digits", crop=2),
        Training(lr=0.3),
    )
    assert to_recipe(json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


class TestEvaluate:
    @pytest.mark.parametrize("name", ["two", "three"])
    def test_finds_the_results_of_the_run(self, home, name):
        assert evaluate(home / name) == Run(home / name).read("results")

    def test_finds_the_results_of_a_teacher(self, home):
        assert evaluate(home / "teacher") == Run(home / "teacher").read("results")

    @pytest.mark.parametrize("asked", [{"timesteps": 2}, {"confidence": 0.5}])
    def test_of_a_teacher_knows_no_time(self, home, asked):
        with pytest.raises(ConfigError, match="holds a teacher, which has no time steps"):
            evaluate(home / "teacher", **asked)

    def test_with_more_steps_begins_with_the_same_steps(self, home):
        results, longer = Run(home / "two").read("results"), evaluate(home / "two", timesteps=5)
        assert len(longer["accuracy_by_step"]) == 5
        assert longer["accuracy_by_step"][:2] == results["accuracy_by_step"]
        assert longer["test_accuracy"] == longer["accuracy_by_step"][4]
        assert longer["teacher_accuracy"] == results["teacher_accuracy"]

    def test_with_a_single_step(self, home):
        assert len(evaluate(home / "three", timesteps=1)["accuracy_by_step"]) == 1

    def test_with_no_step_is_refused(self, home):
        with pytest.raises(ConfigError, match=r"timesteps \(=0\) must be 1 or more"):
            evaluate(home / "two", timesteps=0)

    @pytest.mark.parametrize("confidence, steps", [(0.0, 1), (1.0, 2)])
    def test_with_early_exit_adds_its_accuracy_and_steps(self, home, confidence, steps):
        results = evaluate(home / "two", confidence=confidence)
        assert results.pop("early_exit_steps") == steps
        assert results.pop("early_exit_accuracy") == results["accuracy_by_step"][steps - 1]
        assert results == Run(home / "two").read("results")

    def test_with_a_confidence_that_is_none_is_refused_before_the_work(self, tmp_path):
        with pytest.raises(ConfigError, match=r"confidence \(=1\.5\)"):
            evaluate(tmp_path / "nowhere", confidence=1.5)

    def test_leaves_the_teacher_out_where_it_is_gone(self, home):
        whole = evaluate(home / "two")
        shutil.move(home / "teacher", home / "moved")
        try:
            alone = evaluate(home / "two")
        finally:
            shutil.move(home / "moved", home / "teacher")
        about_teacher = {"teacher_accuracy", "agreement", "divergence"}
        assert alone == {name: value for name, value in whole.items() if name not in about_teacher}

    def test_changes_no_file(self, home):
        before = {file.name: file.read_bytes() for file in (home / "two").iterdir()}
        evaluate(home / "two", timesteps=3)
        assert {file.name: file.read_bytes() for file in (home / "two").iterdir()} == before


class TestTable:
    def test_sets_runs_side_by_side_and_pads_the_shorter(self, home):
        columns, rows = table([home / "teacher", home / "two", home / "three"])
        steps = ["t=1", "t=2", "t=3"]
        assert columns == ["run", "network", "weights", "method", "accuracy", *steps, "firing rate", "agreement"]
        assert [len(row) for row in rows] == [len(columns)] * 3
        first, second, third = (dict(zip(columns, row)) for row in rows)
        assert (first["run"], first["network"], first["method"]) == ("teacher", "vgg9", "teacher (ANN)")
        assert [first[name] for name in (*steps, "firing rate", "agreement")] == [""] * 5
        assert (second["network"], second["weights"], second["method"]) == ("vgg9 T=2", "inherited", "direct")
        assert second["t=3"] == "" and third["t=3"] != ""
        assert (third["network"], third["weights"], third["method"]) == ("resnet20 T=3", "fresh", "kdsnn")

    @pytest.mark.parametrize("name", ["two", "three"])
    def test_shows_the_numbers_of_the_results(self, home, name):
        columns, (row,) = table([home / name])
        shown, results = dict(zip(columns, row)), Run(home / name).read("results")
        assert shown["accuracy"] == f"{results['test_accuracy']:.2f} %"
        assert shown["agreement"] == f"{results['agreement']:.2f} %"
        assert shown["firing rate"] == f"{results['firing_rate']:.2f} %"
        assert [shown[f"t={t}"] for t in (1, 2)] == [f"{value:.2f}" for value in results["accuracy_by_step"][:2]]

    def test_of_an_unfinished_run_is_refused(self, home, tmp_path):
        shutil.copytree(home / "two", tmp_path / "half")
        (tmp_path / "half" / "results.json").unlink()
        with pytest.raises(RunError, match=r"half/results\.json' cannot be read"):
            table([home / "two", tmp_path / "half"])

    @pytest.mark.parametrize("file", ["recipe.json", "results.json", "conversion.json"])
    @pytest.mark.parametrize("content", ["{", "{}", "[]"])
    def test_of_a_run_with_a_broken_file_is_refused(self, home, file, content, tmp_path):
        shutil.copytree(home / "two", tmp_path / "broken")
        (tmp_path / "broken" / file).write_text(content)
        with pytest.raises(RunError, match="broken"):
            table([tmp_path / "broken"])
