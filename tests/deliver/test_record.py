import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from spikedistill.compute import place as place_module
from spikedistill.data.images import load_images
from spikedistill.deliver import record as module
from spikedistill.deliver import teachers
from spikedistill.deliver.record import Record, evaluate, read_records, some_of
from spikedistill.deliver.teachers import find_teacher
from spikedistill.errors import ConfigError, DataError, RunError, SpikeDistillError
from spikedistill.files import read_tensors, write_tensors
from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.student.save import load_student
from spikedistill.student.student import Student
from spikedistill.teacher.load import Architecture, Teacher, load_teacher
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.05, precision="fp32", device="cpu")


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(train_home):
    """A folder with data, a teacher, and students of two and of three steps."""
    three = StudentChoice("resnet20", 4, timesteps=3, neuron="plif", learn_threshold=True, max_pool="average")
    return train_home(two=(StudentChoice(timesteps=2), Direct()), three=(three, KDSNN()))


@pytest.fixture
def images(home):
    return load_images(str(home / "blobs.npz"))


def measured(run):
    """What results.json holds, but for the method."""
    return {name: value for name, value in Run(run).read("results").items() if name not in ("method", "teacher")}


class TestPlace:
    """A run is measured where it computed, whatever 'auto' takes on this machine."""

    @pytest.fixture
    def copied(self, home, tmp_path):
        def copy(recipe, timing, **wished):
            run = tmp_path / "run"
            shutil.copytree(home / "two", run)
            changed = Run(run).read("recipe")
            changed["training"] |= recipe
            Run(run).write("recipe", changed)
            line = {**Run(run).lines("timing")[0], **timing}
            kept = {name: value for name, value in line.items() if value}
            (run / "timing.jsonl").write_text(json.dumps(kept) + "\n")
            return Record.read(run).place(**wished)

        return copy

    @pytest.mark.parametrize("flags", [{"avx512f", "avx512_bf16"}, {"avx2"}], ids=["bfloat16 here", "none here"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_is_what_the_run_wrote_down_where_the_recipe_left_it_open(self, copied, flags, dtype, monkeypatch):
        monkeypatch.setattr(place_module, "processor_flags", lambda: flags)
        found = copied({"precision": "auto", "device": "auto"}, {"dtype": dtype, "device": "cpu"})
        assert (str(found.dtype), found.device.type) == (f"torch.{dtype}", "cpu")

    def test_is_what_the_recipe_says_where_it_does(self, copied, monkeypatch):
        monkeypatch.setattr(place_module, "processor_flags", lambda: {"avx512_bf16"})
        assert copied({"precision": "fp32"}, {"dtype": "bfloat16"}).dtype is torch.float32

    def test_is_this_machines_own_where_nothing_is_known_or_the_device_is_not_here(self, copied, monkeypatch, caplog):
        monkeypatch.setattr(place_module, "processor_flags", lambda: {"avx512_bf16"})
        found = copied({"precision": "auto", "device": "auto"}, {"dtype": None, "device": "cuda:99"})
        assert "was computed on cuda:99, which cannot be used here: using" in caplog.text
        assert found.dtype is torch.bfloat16 and found.device.type in ("cpu", "cuda")

    @pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
    def test_is_what_is_wished_for_even_where_the_recipe_says_otherwise(self, copied, precision, dtype):
        assert copied({"precision": "bf16", "device": "cuda:99"}, {}, precision=precision, device="cpu").dtype is dtype

    def test_with_another_device_keeps_the_number_format_of_the_run(self, copied):
        found = copied({"precision": "auto", "device": "cuda:99"}, {"dtype": "bfloat16"}, device="cpu")
        assert (found.dtype, found.device.type) == (torch.bfloat16, "cpu")

    def test_that_is_wished_for_and_not_here_is_an_error(self, copied):
        with pytest.raises(ConfigError, match=r"The device 'cuda:99' cannot be used here"):
            copied({}, {}, device="cuda:99")


class TestRead:
    def test_gives_the_choices_of_a_student_and_of_its_teacher(self, home):
        student, teacher = Record.read(home / "three"), Record.read(str(home / "teacher"))
        assert (student.name, student.is_student, teacher.is_student) == ("three", True, False)
        assert StudentChoice(**student.recipe["student"]) == StudentChoice(
            "resnet20", 4, timesteps=3, neuron="plif", learn_threshold=True, max_pool="average"
        )
        assert student.training == teacher.training == TRAINING
        assert student.data == teacher.data == Data(str(home / "blobs.npz"))
        assert student.results() == Run(home / "three").read("results")

    def test_names_the_run_whose_directory_is_where_we_are(self, home, monkeypatch):
        monkeypatch.chdir(home / "two")
        assert Record.read(".").name == "two"

    @pytest.mark.parametrize(
        "recipe", [{}, {"kind": "immunity", "runs": []}, {"kind": "distill"}, {"kind": "distill", "who": None}]
    )
    def test_of_what_is_no_recipe_is_refused(self, recipe, tmp_path):
        Run(tmp_path).write("recipe", recipe)
        with pytest.raises(RunError, match=rf"'{tmp_path}' holds (no run that can be read|a run of kind)"):
            Record.read(tmp_path)

    def test_of_a_student_is_its_file_too(self, home):
        file = Record.read(home / "two" / "model.safetensors")
        assert file.recipe == Record.read(home / "two").recipe and isinstance(file.network(), Student)
        assert evaluate(home / "two" / "model.safetensors") == evaluate(home / "two")

    @pytest.mark.parametrize("format", [0, 3, "2"])
    def test_of_another_format_is_refused(self, home, format, tmp_path):
        Run(tmp_path).write("recipe", Run(home / "two").read("recipe") | {"format": format})
        with pytest.raises(RunError, match=rf"format {format!r}: this version reads"):
            Record.read(tmp_path)

    def test_of_a_field_that_is_not_known_is_refused(self, home, tmp_path):
        recipe = Run(home / "two").read("recipe")
        Run(tmp_path).write("recipe", recipe | {"training": {"epochs": 1, "speed": 7}})
        with pytest.raises(RunError, match=r"cannot be read .*'speed'.*newer version"):
            _ = Record.read(tmp_path).training


class TestNetwork:
    @pytest.mark.parametrize("name", ["two", "three"])
    def test_has_the_trained_tensors_bit_for_bit(self, home, name):
        student = Record.read(home / name).network()
        written, _ = read_tensors(home / name / "model.safetensors")
        assert isinstance(student, Student) and not student.training
        assert written.keys() == student.state_dict().keys()
        assert all(torch.equal(value, written[key]) for key, value in student.state_dict().items())

    def test_of_a_teacher_is_an_ann(self, home):
        teacher, written = Record.read(home / "teacher").network(), read_tensors(home / "teacher/model.safetensors")[0]
        assert isinstance(teacher, Teacher)
        assert all(torch.equal(value, written[key]) for key, value in teacher.network.state_dict().items())

    def test_of_a_teacher_is_no_student(self, home):
        with pytest.raises(RunError, match=r"teacher/model\.safetensors' holds teacher, not a student"):
            load_student(home / "teacher")

    def test_of_an_unfinished_run_is_refused(self, home, tmp_path):
        Run(tmp_path).write("recipe", Run(home / "two").read("recipe"))
        with pytest.raises(RunError, match=r"holds no finished run: finish it by the same command with --resume"):
            Record.read(tmp_path).network()

    def test_is_refused_where_the_weights_are_of_another_kind_than_the_recipe(self, home, tmp_path):
        shutil.copytree(home / "two", tmp_path / "mixed")
        shutil.copy(home / "teacher" / "model.safetensors", tmp_path / "mixed")
        with pytest.raises(RunError, match="was written by another run"):
            Record.read(tmp_path / "mixed").network()
        (tmp_path / "mixed" / "environment.json").unlink()  # then nothing says of which run the directory is
        with pytest.raises(RunError, match="holds teacher, not a student"):
            Record.read(tmp_path / "mixed").network()


class TestSeveralRuns:
    def test_are_read_with_their_data(self, home):
        records, images = read_records([home / "teacher", home / "two"])
        assert [record.name for record in records] == ["teacher", "two"] and len(images.test_images) == 24

    def test_that_see_other_frames_are_refused(self, home, tmp_path):
        recipe = Run(home / "two").read("recipe")
        for name, binning in (("a", "time"), ("b", "number")):
            shutil.copytree(home / "two", tmp_path / name)
            Run(tmp_path / name).write("recipe", {**recipe, "data": {**recipe["data"], "event_binning": binning}})
        with pytest.raises(ConfigError, match=r"trained on different data .*blobs\.npz, binning number"):
            read_records([tmp_path / "a", tmp_path / "b"])

    def test_none_is_refused(self):
        with pytest.raises(ConfigError, match="No runs were given"):
            read_records([])

    def test_some_of_their_images_are_evenly_spaced(self, images):
        pixels, labels = some_of(images, 4)
        assert torch.equal(pixels, images.test_images[[0, 8, 15, 23]])
        assert torch.equal(labels, images.test_labels[[0, 8, 15, 23]])
        assert torch.equal(some_of(images, None)[0], images.test_images)


class TestFindTeacher:
    def test_may_be_a_library_s_with_its_published_weights(self, home, images, monkeypatch):
        taught, _ = load_teacher(home / "teacher")
        published = (taught, Architecture("torchvision/resnet18", 3))
        monkeypatch.setattr(
            teachers, "load_published", lambda name: published if name == "torchvision/resnet18" else None
        )
        assert find_teacher(images, "torchvision/resnet18") == published

    def test_none_is_none(self, images):
        assert find_teacher(images, "none") == (None, None)

    def test_a_run_of_distill_is_a_spiking_teacher_with_its_architecture(self, home, images):
        teacher, architecture = find_teacher(images, str(home / "three"))
        assert isinstance(teacher, Student) and teacher.timesteps == 3
        assert architecture == Architecture("resnet20", 3, 3, 4)

    def test_a_spiking_teacher_of_other_classes_is_refused(self, home, images):
        four = dataclasses.replace(images, class_names=("red", "green", "blue", "black"))
        with pytest.raises(ConfigError, match=r"The spiking teacher '.*two' returns logits .* has 4 classes"):
            find_teacher(four, str(home / "two"))


class TestEvaluate:
    @pytest.mark.parametrize("name", ["two", "three"])
    def test_finds_the_results_of_the_run(self, home, name):
        assert evaluate(home / name) == measured(home / name)

    def test_finds_the_results_of_a_teacher(self, home):
        assert evaluate(home / "teacher") == Run(home / "teacher").read("results")

    @pytest.mark.parametrize("asked", [{"timesteps": 2}, {"confidence": 0.5}, {"schedule": "step-by-step"}])
    def test_of_a_teacher_knows_no_time(self, home, asked):
        with pytest.raises(ConfigError, match="holds a teacher, without time steps"):
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
        assert results == measured(home / "two")

    def test_with_a_confidence_that_is_none_is_refused_before_the_work(self, tmp_path):
        with pytest.raises(ConfigError, match=r"confidence \(=1\.5\)"):
            evaluate(tmp_path / "nowhere", confidence=1.5)

    def test_of_a_run_without_anything_is_refused(self, tmp_path):
        with pytest.raises(SpikeDistillError, match=r"recipe\.json' cannot be read"):
            evaluate(tmp_path)

    def test_leaves_the_teacher_out_where_it_is_gone(self, home):
        whole = evaluate(home / "two")
        shutil.move(home / "teacher", home / "moved")
        try:
            alone = evaluate(home / "two")
        finally:
            shutil.move(home / "moved", home / "teacher")
        about_teacher = {"teacher_accuracy", "agreement", "divergence"}
        assert alone == {name: value for name, value in whole.items() if name not in about_teacher}

    def test_of_a_student_without_a_teacher_compares_it_with_nobody(self, home, tmp_path):
        made = StudentChoice("vgg9", 4, timesteps=2)
        recipe = Distill(TeacherChoice("none"), made, Direct(), Data(str(home / "blobs.npz")), TRAINING)
        results = distill(recipe, tmp_path / "alone")
        assert not {"teacher_accuracy", "agreement", "divergence"} & results.keys()
        assert evaluate(tmp_path / "alone") == measured(tmp_path / "alone")

    @pytest.mark.parametrize("name", ["teacher", "two"])
    def test_says_nothing_where_it_finds_what_the_run_wrote_down(self, home, name, caplog):
        evaluate(home / name)
        evaluate(home / name / "model.safetensors") if name == "two" else None
        assert not caplog.messages

    def test_says_that_thresholds_belong_to_their_t(self, home, caplog):
        evaluate(home / "two", timesteps=2)
        assert not caplog.messages
        evaluate(home / "two", timesteps=1)
        (said,) = caplog.messages
        assert "thresholds were trained or calibrated for T=2" in said and "distill --timesteps 1" in said

    @pytest.mark.parametrize("name", ["teacher", "two"])
    @pytest.mark.parametrize(
        "moved, elsewhere, why",
        [
            (0.01, {}, "machine and device are those of the run, so images, weights or the file must have changed."),
            (30.0, {}, "machine and device are those of the run, so images, weights or the file must have changed."),
            (
                0.5,
                {"processor": "Z80"},
                r"it is computed elsewhere \(processor was 'Z80', now .*\), where rounding differs",
            ),
            (30.0, {"processor": "Z80"}, r"more than another machine explains \(processor was 'Z80', now .*images"),
            (0.5, {"versions": {"torch": "0.1"}}, r"computed elsewhere \(torch was '0\.1', now "),
        ],
    )
    def test_says_where_it_finds_another_accuracy(self, home, name, moved, elsewhere, why, tmp_path, caplog):
        shutil.copytree(home / name, tmp_path / "run")
        run = Run(tmp_path / "run")
        results = run.read("results")
        run.write("results", {**results, "test_accuracy": results["test_accuracy"] - moved})
        run.write("environment", {**run.read("environment"), **elsewhere})
        found = evaluate(tmp_path / "run")
        (said,) = caplog.messages
        assert found["test_accuracy"] == results["test_accuracy"]
        now, then = (f"{results['test_accuracy'] - each:.2f} %" for each in (0.0, moved))
        assert said.startswith(f"note: the test accuracy is {now}, but the run '{tmp_path / 'run'}' wrote {then}: ")
        assert re.search(why, said)

    def test_says_where_the_images_are_others(self, home, tmp_path, write_blobs, caplog):
        recipe = Run(home / "two").read("recipe")
        shutil.copytree(home / "two", tmp_path / "run")
        arrays = dict(np.load(home / "blobs.npz"))
        moved = {**recipe, "data": {**recipe["data"], "name": str(tmp_path / "blobs.npz")}}
        Run(tmp_path / "run").write("recipe", moved)
        for label in range(3):  # one of them is not a third of the predictions
            np.savez(tmp_path / "blobs.npz", **{**arrays, "test_labels": np.full(24, label)})
            evaluate(tmp_path / "run")
        assert caplog.messages and all("machine and device are those of the run" in said for said in caplog.messages)

    def test_a_file_that_was_moved_is_found_in_the_folder_that_is_given(self, home, tmp_path):
        shutil.copytree(home / "two", tmp_path / "run")
        recipe = Run(home / "two").read("recipe")
        gone = {**recipe, "data": {**recipe["data"], "name": str(tmp_path / "gone" / "blobs.npz")}}
        Run(tmp_path / "run").write("recipe", gone)
        with pytest.raises(DataError, match="gone"):
            evaluate(tmp_path / "run")
        for place in (home, home / "blobs.npz"):
            found = evaluate(tmp_path / "run", data_dir=str(place))
            assert found["test_accuracy"] == evaluate(home / "two")["test_accuracy"]

    @pytest.mark.parametrize("names", [["bird", "cat", "dog"], ["dog", "cat"], ["cat", "dog", "owl", "rat"]])
    def test_data_of_other_classes_are_refused(self, home, tmp_path, names):
        recipe, arrays = Run(home / "two").read("recipe"), dict(np.load(home / "blobs.npz"))
        shutil.copytree(home / "two", tmp_path / "run")
        tensors, facts = read_tensors(tmp_path / "run" / "model.safetensors")
        known = [str(name) for name in ("cat", "dog", "rat")][: len(facts["class_names"])]
        write_tensors(tmp_path / "run" / "model.safetensors", tensors, {**facts, "class_names": known})
        labels = {f"{part}_labels": arrays[f"{part}_labels"] % len(names) for part in ("train", "test")}
        np.savez(tmp_path / "blobs.npz", **{**arrays, **labels, "class_names": np.array(names)})
        Run(tmp_path / "run").write(
            "recipe", {**recipe, "data": {**recipe["data"], "name": str(tmp_path / "blobs.npz")}}
        )
        with pytest.raises(DataError, match=r"The classes of 'blobs' are .* trained on cat, dog"):
            Record.read(tmp_path / "run").images()

    def test_with_damaged_results_is_refused(self, home, tmp_path):
        shutil.copytree(home / "two", tmp_path / "run")
        file = tmp_path / "run" / "results.json"
        file.write_text(file.read_text().replace("test_accuracy", "test_accurary", 1))
        with pytest.raises(RunError, match=r"results\.json' cannot be read \(it was changed after it was written"):
            evaluate(tmp_path / "run")

    def test_changes_no_file(self, home):
        before = {file.name: file.read_bytes() for file in (home / "two").iterdir()}
        evaluate(home / "two", timesteps=3)
        assert {file.name: file.read_bytes() for file in (home / "two").iterdir()} == before

    def test_takes_the_place_of_the_data_that_it_is_told(self, home, monkeypatch):
        asked = []
        monkeypatch.setattr(Data, "load", lambda data: asked.append(data.data_dir) or load_images(data.name))
        evaluate(home / "teacher", data_dir="elsewhere")
        assert asked == ["elsewhere"]

    @pytest.mark.parametrize("name", ["teacher", "two"])
    def test_computes_where_the_run_computed(self, home, name, monkeypatch):
        asked = []
        for measure in ("measure_teacher", "measure_student"):
            monkeypatch.setattr(module, measure, lambda *given, **_: asked.extend(given) or {})
        evaluate(home / name)
        (place,) = [given for given in asked if hasattr(given, "dtype") and hasattr(given, "reason")]
        assert (place.dtype, place.reason) == (torch.float32, "float32 was asked for")
        asked.clear()
        evaluate(home / name, device="cpu", precision="bf16")
        assert [given.dtype for given in asked if hasattr(given, "reason")] == [torch.bfloat16]


def test_a_damaged_header_names_the_file(home, tmp_path):
    shutil.copytree(home / "two", tmp_path / "odd")
    tensors, facts = read_tensors(home / "two" / "model.safetensors")
    facts["network"] = json.loads(json.dumps(facts["network"]).replace('"vgg9"', "7"))
    write_tensors(tmp_path / "odd" / "model.safetensors", tensors, facts)
    with pytest.raises(RunError, match=r"description of the student in '.*odd/model\.safetensors' .*name \(='7'\)"):
        evaluate(tmp_path / "odd")


def test_a_run_of_another_machine_is_measured_here(home, tmp_path):
    shutil.copytree(home / "two", tmp_path / "run")
    recipe = Run(tmp_path / "run").read("recipe")
    Run(tmp_path / "run").write("recipe", {**recipe, "training": {**recipe["training"], "device": "cuda:7"}})
    assert evaluate(tmp_path / "run") == evaluate(home / "two")


def test_a_file_without_a_recipe_is_said_to_have_none(home, tmp_path):
    with pytest.raises(RunError, match=r"model\.safetensors' holds no recipe: give a run directory"):
        Record.read(home / "teacher" / "model.safetensors")
