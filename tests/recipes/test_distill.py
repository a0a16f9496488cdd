import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from scores import percent_right

from spikedistill.data.images import NAMED, load_images
from spikedistill.deliver.record import Record, evaluate
from spikedistill.deliver.results import Result
from spikedistill.deliver.teachers import find_teacher
from spikedistill.errors import ConfigError, RunError, UnsupportedError, WeightsError
from spikedistill.evaluate.accuracy import predict
from spikedistill.files import read_tensors
from spikedistill.neuron.dynamics import Neuron, Reset
from spikedistill.neuron.surrogate import ATan, Rectangle, Triangle
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature
from spikedistill.recipes import STUDENTS, TEACHERS
from spikedistill.recipes import distill as module
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.methods import CONVERSIONS, METHODS
from spikedistill.recipes.teach import Teach, teach
from spikedistill.student.save import load_student, save_student
from spikedistill.student.substeps import step_by_step
from spikedistill.teacher.load import load_teacher
from spikedistill.teacher.zoo import ZOO
from spikedistill.train.recipe import Data, Training, check
from spikedistill.train.run import Run

TERMS = {
    "direct": {"labels"},
    "tet": {"labels", "spread"},
    "kdsnn-response": {"labels", "soft"},
    "kdsnn-feature": {"labels", "features"},
    "kdsnn": {"labels", "soft", "features"},
}
TRAINING = Training(epochs=1, batch_size=16, lr=0.02, precision="fp32", device="cpu")


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs):
    """A folder with blobs.npz (three classes, each bright in a channel of its own) and a trained teacher."""
    folder = tmp_path_factory.mktemp("distill")
    write_blobs(folder, 96, 48)
    training = dataclasses.replace(TRAINING, epochs=3, lr=0.1)
    teach(Teach("resnet20", width=4, data=Data(str(folder / "blobs.npz")), training=training), folder / "teacher")
    return folder


def recipe(home, name="kdsnn", student="same", **changes):
    choice = StudentChoice(student, width=None if student == "same" else 4, timesteps=2, calibration=32)
    choice = dataclasses.replace(choice, rule=CONVERSIONS.get(name, choice.rule))
    what = None if name in CONVERSIONS else METHODS[name]()
    made = Distill(TeacherChoice(str(home / "teacher")), choice, what, Data(str(home / "blobs.npz")), TRAINING)
    return dataclasses.replace(made, **changes)


def build(made, images):
    """The student of a recipe, before training."""
    return module.build_student(made, *find_teacher(images, made.teacher.source), images)


@pytest.mark.parametrize("student", ["same", "vgg9"])
@pytest.mark.parametrize("method", TERMS)
class TestEveryMethod:
    def test_goes_from_teacher_to_measured_student(self, home, method, student, tmp_path):
        results = distill(recipe(home, method, student), tmp_path / "run")
        run = Run(tmp_path / "run")
        assert run.read("results") == results
        assert results.keys() == {
            *("test_accuracy", "accuracy_by_step", "firing_rate", "firing_rate_by_layer"),
            *("teacher_accuracy", "agreement", "divergence", "method", "teacher"),
            *("timesteps", "levels", "schedule", "latency", "longest_path", "buffers"),
        }
        record = Record.read(tmp_path / "run")
        images, teacher = record.images(), load_teacher(home / "teacher")[0]
        for name, network in (("test_accuracy", record.network()), ("teacher_accuracy", teacher)):
            found = percent_right(network, images.test_images, images.test_labels)
            assert results[name] == pytest.approx(found)
        assert results["agreement"] == pytest.approx(
            percent_right(record.network(), images.test_images, predict(teacher, images.test_images).argmax(-1)[0])
        )
        assert len(results["accuracy_by_step"]) == 2 and results["accuracy_by_step"][-1] == results["test_accuracy"]
        rates = results["firing_rate_by_layer"].values()
        assert min(rates) < results["firing_rate"] < max(rates)
        line = run.lines("metrics")[-1]
        assert line.keys() == {
            *("epoch", "step", "lr", "loss", "train_accuracy", "firing_rate", "validation_accuracy"),
            *TERMS[method],
        }
        inherited = student == "same"
        assert run.read("conversion")["inherited"] is inherited
        assert run.read("before").keys() == results.keys() - {"test_accuracy", "method", "teacher"} | {"train_accuracy"}


class TestConversion:
    @pytest.mark.parametrize("method", CONVERSIONS)
    def test_trains_nothing_and_takes_the_rule_of_its_name(self, home, method, tmp_path):
        results = distill(recipe(home, method), tmp_path)
        assert not (tmp_path / "metrics.jsonl").exists()
        student, kept = load_student(tmp_path), Run(tmp_path).read("recipe")
        assert student.conversion.rule == kept["student"]["rule"] == method.removeprefix("conversion-")
        assert results["method"] == kept["method"] == {"name": method}
        teacher = load_teacher(home / "teacher")[0].network.state_dict()
        ours = {name.removeprefix("core."): value for name, value in student.state_dict().items()}
        assert all(torch.equal(ours[name], value) for name, value in teacher.items())
        assert len({float(layer.threshold.mean()) for layer in student.neurons.values()}) > 1

    def test_corrects_biases_where_asked(self, home, tmp_path):
        made = recipe(home, "conversion-max")
        corrected = dataclasses.replace(made, student=dataclasses.replace(made.student, correct="biases"))
        distill(made, tmp_path / "plain")
        distill(corrected, tmp_path / "corrected")
        plain, changed = (load_student(tmp_path / name).state_dict() for name in ("plain", "corrected"))
        names = {name for name in plain if not torch.equal(plain[name], changed[name])}
        assert names and all(name.endswith("bias") for name in names)

    def test_qcfs_trains_the_quantised_stand_in_and_answers_in_spikes(self, home, tmp_path):
        results = distill(recipe(home, "conversion-qcfs"), tmp_path)
        (line,) = Run(tmp_path).lines("metrics")
        assert "labels" in line and "firing_rate" not in line and results["firing_rate"] > 0
        student = load_student(tmp_path)
        assert student.gradient == "quantised" and student.conversion.neuron.learn_threshold
        assert Run(tmp_path).read("recipe")["student"]["learn_threshold"]
        longer = evaluate(tmp_path, timesteps=9)["accuracy_by_step"]
        assert len(longer) == 9 and longer[:2] == results["accuracy_by_step"]

    def test_needs_the_weights_of_the_teacher(self, home, tmp_path):
        with pytest.raises(ConfigError, match=r"method \(=conversion-max\) keeps the teacher's weights"):
            distill(recipe(home, "conversion-max", "vgg9"), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"gradient": "quantised", "neuron": "lif"},
            "gradient=quantised trains all steps as one, which is for neuron=if",
        ),
        (
            {"gradient": "quantised", "initial": 0.0},
            "gradient=quantised trains all steps as one, which is for neuron=if",
        ),
        (
            {"gradient": "quantised", "coding": "rate"},
            "gradient=quantised trains all steps as one, which is for neuron=if",
        ),
        ({"levels": 0}, "levels (=0) must be 1 or more"),
        ({"levels": 2, "reset": "zero"}, "levels (=2) above 1 need reset=subtract"),
        ({"levels": 2, "neuron": "plif"}, "the reset of plif is zero"),
        ({"levels": 2, "surrogate": "atan"}, "surrogate (=atan) is for levels=1"),
        ({"decay_input": True}, "decay_input is for lif and plif"),
        (
            {"gradient": "quantised", "learn_initial": True},
            "gradient=quantised trains all steps as one, which is for neuron=if",
        ),
        ({"gradient": "rate", "learn_initial": True}, "the rate-based gradient does not train thresholds"),
        ({"gradient": "rate", "neuron": "plif"}, "the rate-based gradient does not train thresholds"),
        ({"correct": "biases", "network": "vgg9"}, "correct (='biases') needs inherited weights"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(changes, message):
    choice = StudentChoice(**changes)
    assert message in "; ".join(choice.problems() + Distill(student=choice).problems())


def test_the_neuron_is_its_fields():
    neuron = StudentChoice(neuron="lif", decay_input=True, reset="zero", initial=0.0, surrogate="atan").make_neuron()
    spikingjelly = dict(leak=0.5, decay_input=True, reset=Reset.ZERO, initial=0.0, surrogate=ATan())
    assert neuron == Neuron(**spikingjelly)
    assert StudentChoice(neuron="plif").make_neuron().decay_input
    assert not StudentChoice(neuron="plif", decay_input=False).make_neuron().decay_input


def test_a_compiled_step_is_for_anns_and_for_students_whose_training_has_one_step():
    compiled = Distill(training=Training(compile=True))
    assert any(fault.startswith("compile is for ANNs") for fault in compiled.problems())
    for choice in (StudentChoice(gradient="quantised"), StudentChoice(timesteps=1, levels=4)):
        assert not dataclasses.replace(compiled, student=choice).problems()


@pytest.fixture(scope="module")
def finished(home):
    return home / "finished", distill(recipe(home), home / "finished")


class TestResults:
    def test_are_what_the_loaded_student_answers(self, home, finished):
        out, results = finished
        student, images = load_student(out), Record.read(out).images()
        pixels, labels = images.test_images.float() / 255, images.test_labels
        emitted = {name: [] for name in student.neurons}
        for name, layer in student.neurons.items():
            layer.register_forward_hook(lambda _, __, output, name=name: emitted[name].append(output[0]))
        with torch.no_grad():
            logits = student(pixels)
        for steps, accuracy in enumerate(results["accuracy_by_step"], start=1):
            right = logits[:steps].mean(0).argmax(1) == labels
            assert accuracy == pytest.approx(100 * right.double().mean().item())
        for name, rate in results["firing_rate_by_layer"].items():
            assert rate == pytest.approx(100 * (emitted[name][0] != 0).double().mean().item(), abs=0.02)
        teacher, _ = load_teacher(home / "teacher")
        theirs = teacher(pixels)
        assert results["teacher_accuracy"] == pytest.approx(100 * (theirs.argmax(1) == labels).double().mean().item())
        agreed = (theirs.argmax(1) == logits.mean(0).argmax(1)).double().mean().item()
        assert results["agreement"] == pytest.approx(100 * agreed)
        p, q = theirs.double().softmax(1), logits.double().mean(0).softmax(1)
        assert results["divergence"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-3, abs=1e-6)

    def test_are_given_again_by_evaluate(self, finished):
        out, results = finished
        assert evaluate(out) == {name: value for name, value in results.items() if name not in ("method", "teacher")}

    def test_stand_in_the_weights_with_recipe_and_normalisation(self, home, finished):
        out, results = finished
        student = load_student(out / "model.safetensors")
        _, facts = read_tensors(out / "model.safetensors")
        assert (facts["recipe"], facts["results"]) == (Run(out).read("recipe"), results)
        teacher, _ = load_teacher(home / "teacher")
        torch.testing.assert_close(student.mean, teacher.mean)
        torch.testing.assert_close(student.std, teacher.std)
        assert Run(out).read("recipe")["student"]["timesteps"] == student.timesteps == 2

    def test_a_student_learns_what_its_teacher_knows(self, home, tmp_path):
        results = distill(recipe(home, training=dataclasses.replace(TRAINING, epochs=4)), tmp_path)
        assert results["teacher_accuracy"] > 90 and results["test_accuracy"] > 60


class TestCalibration:
    """Thresholds and normalisation come from training images, never from test images."""

    def thresholds(self, made, images):
        layers = build(made, images)[0].neurons.values()
        return torch.cat([layer.threshold.flatten() for layer in layers])

    def test_never_looks_at_test_images(self, home):
        made, images = recipe(home), load_images(str(home / "blobs.npz"))
        spoilt = dataclasses.replace(images, test_images=images.test_images ^ 255)
        assert torch.equal(self.thresholds(made, images), self.thresholds(made, spoilt))
        other = dataclasses.replace(images, train_images=images.train_images ^ 255)
        assert not torch.equal(self.thresholds(made, images), self.thresholds(made, other))

    def test_of_fresh_weights_takes_the_deviation_of_training_images_alone(self, home):
        made = dataclasses.replace(recipe(home, "direct", "vgg9"), teacher=TeacherChoice("none"))
        images = load_images(str(home / "blobs.npz"))
        spoilt = dataclasses.replace(images, test_images=images.test_images ^ 255)
        first, second = (build(made, some)[0] for some in (images, spoilt))
        assert torch.equal(first.mean, second.mean) and torch.equal(first.std, second.std)


class TestWeightsBeforeTraining:
    def equal(self, home, **choice):
        made = recipe(home)
        made = dataclasses.replace(made, student=dataclasses.replace(made.student, **choice))
        student, report, _ = build(made, load_images(made.data.name))
        weights = {name.removeprefix("core."): value for name, value in student.state_dict().items()}
        teacher = load_file(home / "teacher" / "model.safetensors")
        return report.inherited, [torch.equal(weights[name], teacher[name]) for name in teacher if "conv1" in name]

    def test_are_the_teachers_for_the_same_network(self, home):
        inherited, equal = self.equal(home)
        assert inherited and equal and all(equal)

    def test_are_fresh_where_inheriting_is_declined(self, home):
        inherited, equal = self.equal(home, inherit=False)
        assert not inherited and equal and not any(equal)


def test_the_surrogate_is_a_triangle_just_where_weights_are_fresh_and_none_is_named():
    assert StudentChoice().make_neuron().surrogate == Rectangle()
    assert StudentChoice("vgg9").make_neuron().surrogate == Triangle()
    assert StudentChoice("vgg9", surrogate="rectangle").make_neuron().surrogate == Rectangle()


def test_the_reset_is_left_out_of_the_gradient_just_where_weights_are_fresh_and_it_goes_through_time():
    assert StudentChoice("vgg9").make_neuron().detach_reset and not StudentChoice().make_neuron().detach_reset
    assert not StudentChoice("vgg9", gradient="rate").make_neuron().detach_reset
    assert StudentChoice("vgg9", gradient="rate", detach_reset=True).make_neuron().detach_reset


class TestLearningRate:
    def settled(self, **choice) -> float:
        made = Distill(student=StudentChoice(**choice))
        assert made.written()["training"]["lr"] == made.settled().training.lr
        return made.settled().training.lr

    def test_is_small_where_something_is_inherited(self):
        assert self.settled() == self.settled(network="vgg9", start="runs/first") == 0.02
        assert self.settled(network="vgg9") == self.settled(inherit=False) == 0.1

    def test_of_adamw_is_small_everywhere(self):
        for choice in (StudentChoice(), StudentChoice("vgg9")):
            made = Distill(student=choice, training=Training(optimizer="adamw")).settled()
            assert made.training.lr == 1e-3
        assert Teach(training=Training(optimizer="adamw")).written()["training"]["lr"] == 1e-3

    def test_that_was_given_is_kept(self):
        assert Distill(training=Training(lr=0.5)).settled().training.lr == 0.5

    def test_of_a_teacher_is_written_down(self):
        assert Teach().written()["training"]["lr"] == 0.1


class TestStart:
    """A student that begins as another one ended."""

    def test_is_the_finished_student_at_another_number_of_steps(self, home, finished):
        out, _ = finished
        made = dataclasses.replace(recipe(home), student=StudentChoice(timesteps=3, calibration=32, start=str(out)))
        images = load_images(str(home / "blobs.npz"))
        student, _, _ = build(made, images)
        ended = load_student(out)
        ended.set_timesteps(3)
        pixels = images.test_images.float() / 255
        assert torch.equal(student.eval()(pixels), ended(pixels))

    def test_of_single_spikes_from_graded_ones_is_their_network_step_by_step(self, home, tmp_path):
        images, made = load_images(str(home / "blobs.npz")), recipe(home)
        graded = dataclasses.replace(made, student=StudentChoice(timesteps=1, levels=4, calibration=32))
        began = build(graded, images)[0].eval()
        save_student(tmp_path / "graded.safetensors", began)
        choice = StudentChoice(timesteps=4, calibration=16, start=str(tmp_path / "graded.safetensors"))
        student, _, _ = build(dataclasses.replace(made, student=choice), images)
        pixels = images.test_images.float() / 255
        assert torch.equal(student.eval()(pixels), step_by_step(began)(pixels))
        back = dataclasses.replace(choice, timesteps=1, levels=4)
        again, _, _ = build(dataclasses.replace(made, student=back), images)
        assert torch.equal(again.eval()(pixels), began(pixels))

    def test_with_other_levels_keeps_what_a_neuron_emits_at_most(self, home, finished):
        out, _ = finished
        choice = StudentChoice(timesteps=1, levels=3, calibration=32, start=str(out))
        student, _, _ = build(dataclasses.replace(recipe(home), student=choice), load_images(str(home / "blobs.npz")))
        for name, ended in load_student(out).neurons.items():
            torch.testing.assert_close(3 * student.neurons[name].threshold, ended.threshold)

    def test_may_begin_to_learn_initial_potentials(self, home, finished, tmp_path):
        out, _ = finished
        made = recipe(home)
        choice = dataclasses.replace(made.student, start=str(out), learn_initial=True)
        made = dataclasses.replace(made, student=choice)
        images = load_images(str(home / "blobs.npz"))
        student, _, _ = build(made, images)
        pixels = images.test_images.float() / 255
        assert torch.equal(student.eval()(pixels), load_student(out)(pixels))
        results = distill(made, tmp_path)
        again = load_student(tmp_path)
        for layer in again.neurons.values():
            assert layer.initial.shape == layer.threshold.shape
            assert not torch.equal(layer.initial, torch.full_like(layer.initial, 0.5))
        assert evaluate(tmp_path).items() <= results.items()

    def test_is_corrected_layer_by_layer(self, home, finished, tmp_path):
        out, _ = finished
        made = recipe(home, training=dataclasses.replace(TRAINING, lr=1e-9))
        choice = StudentChoice(timesteps=1, levels=4, calibration=90, start=str(out), correct="layers")
        results = distill(dataclasses.replace(made, student=choice), tmp_path)
        held = json.loads((tmp_path / "conversion.json").read_text())
        assert held["start"] == str(out) and held["corrected"]
        assert all(one["after"] <= one["before"] for one in held["corrected"])
        thresholds = [float(layer.threshold.mean()) for layer in load_student(tmp_path).neurons.values()]
        assert [site["threshold"] for site in held["sites"]] == pytest.approx(thresholds, rel=1e-3)
        assert Result.read(Record.read(tmp_path)).weights == "from a student"
        assert evaluate(tmp_path).items() <= results.items()

    def test_keeps_biases_as_they_are(self):
        faults = "; ".join(StudentChoice(start="runs/first", correct="biases").problems())
        assert "correct (='biases') is for the ANN's own weights, not for those of start" in faults

    def test_is_not_needed_once_the_run_is_finished(self, home, finished, tmp_path):
        begin, _ = finished
        shutil.copytree(begin, tmp_path / "begin")
        made = recipe(home)
        made = dataclasses.replace(made, student=dataclasses.replace(made.student, start=str(tmp_path / "begin")))
        results = distill(made, tmp_path / "run")
        shutil.rmtree(tmp_path / "begin")
        assert evaluate(tmp_path / "run").items() <= results.items()

    def test_of_another_network_is_refused(self, home, finished, tmp_path):
        made = recipe(home, student="vgg9")
        made = dataclasses.replace(made, student=dataclasses.replace(made.student, start=str(finished[0])))
        with pytest.raises(WeightsError, match=r"model.safetensors' do not fit Student"):
            distill(made, tmp_path / "run")

    def test_with_a_teacher_is_refused(self, home, tmp_path):
        made = recipe(home)
        made = dataclasses.replace(made, student=dataclasses.replace(made.student, start=str(home / "teacher")))
        with pytest.raises(RunError, match="holds teacher, not a student"):
            distill(made, tmp_path / "run")

    def test_of_a_conversion_is_refused(self):
        made = Distill(student=StudentChoice(start="runs/first", rule="max"), method=None)
        assert "start (=runs/first) is for methods that train, not for conversion-max" in "; ".join(made.problems())


class TestTeacher:
    def test_a_bare_weights_file_needs_network_and_normalisation(self, home, tmp_path):
        tensors = load_file(home / "teacher" / "model.safetensors")
        torch.save(tensors, tmp_path / "weights.pt")
        choice = TeacherChoice(str(tmp_path / "weights.pt"))
        with pytest.raises(ConfigError, match="name the architecture"):
            distill(recipe(home, teacher=choice), tmp_path / "run")
        choice = dataclasses.replace(choice, network="resnet20", width=4)
        with pytest.raises(ConfigError, match="give mean and std"):
            distill(recipe(home, teacher=choice), tmp_path / "run")
        teacher, _ = load_teacher(home / "teacher")
        mean, std = (tuple(value.flatten().tolist()) for value in (teacher.mean, teacher.std))
        choice = dataclasses.replace(choice, mean=mean, std=std)
        bare, _ = find_teacher(load_images(str(home / "blobs.npz")), **dataclasses.asdict(choice))
        images = torch.rand(2, 3, 8, 8)
        assert torch.equal(bare(images), teacher(images))


class TestPairs:
    def test_the_ends_of_stages_are_matched_from_the_last_backwards(self, home, tmp_path):
        teacher, architecture = load_teacher(home / "teacher")
        images = load_images(str(home / "blobs.npz"))
        made = recipe(home, student="vgg11")
        student, _, _ = module.build_student(made, teacher, architecture, images)
        pairs = made.method.settled(teacher, student, inherits=False).pairs
        assert pairs == (("layer1", "layer3"), ("layer2", "layer4"), ("layer3", "layer5"))

    def test_given_ones_are_taken_at_their_word(self, home, tmp_path):
        method = KDSNNFeature(pairs=(("layer2", "layer1"),))
        distill(recipe(home, student="vgg9", method=method), tmp_path / "run")
        names = load_file(tmp_path / "run" / "checkpoint.safetensors")
        assert names["lesson.adapters.0.weight"].shape == (8, 4, 1, 1)


def _content(run):
    """What the files of a run hold, but for those that tell of time and machine."""
    files = [file for file in run.iterdir() if file.stem not in ("timing", "environment")]
    return {file.name: read_tensors(file) if file.suffix == ".safetensors" else file.read_text() for file in files}


def _same(first, second):
    assert first.keys() == second.keys()
    for name, content in first.items():
        if name.endswith(".safetensors"):
            (tensors, facts), (others, other_facts) = content, second[name]
            assert tensors.keys() == others.keys() and facts == other_facts
            assert all(torch.equal(value, others[key]) for key, value in tensors.items()), name
        else:
            assert content == second[name], name


class TestResume:
    @pytest.mark.parametrize("moment", ["measure_student", "fit", "save_student"])
    def test_after_an_interruption_gives_the_same_files(self, home, finished, moment, tmp_path, monkeypatch):
        whole, _ = finished
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, moment, _interrupted)
            distill(recipe(home), tmp_path / "cut")
        assert not (tmp_path / "cut" / "results.json").exists()
        distill(recipe(home), tmp_path / "cut", resume=True)
        _same(_content(whole), _content(tmp_path / "cut"))

    def test_of_a_finished_run_changes_nothing(self, home, finished, tmp_path):
        whole, results = finished
        shutil.copytree(whole, tmp_path / "again")
        assert distill(recipe(home), tmp_path / "again", resume=True) == results
        _same(_content(whole), _content(tmp_path / "again"))


def _interrupted(*_, **__):
    raise KeyboardInterrupt


class TestRefusals:
    @pytest.mark.parametrize("train, made", [(distill, Distill()), (teach, Teach())])
    def test_of_place_and_device_come_before_data_are_read(self, train, made, tmp_path):
        made = dataclasses.replace(made, data=Data(str(tmp_path / "nothing.npz")), training=TRAINING)
        began = Run(tmp_path / "run")
        began.start(made.written(), resume=False)
        began.checkpoint.touch()
        with pytest.raises(RunError, match="already holds a run: continue it with --resume"):
            train(made, tmp_path / "run")
        absent = dataclasses.replace(made, training=dataclasses.replace(TRAINING, device="cuda:99"))
        with pytest.raises(ConfigError, match="'cuda:99' cannot be used here"):
            train(absent, tmp_path / "other")

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"training": dataclasses.replace(TRAINING, epochs=0)}, r"epochs \(=0\)"),
            ({"training": dataclasses.replace(TRAINING, batch_size=1000)}, r"batch_size \(=1000\)"),
            ({"method": KDSNNFeature(pairs=(("layer1", "layer9"),))}, r"'layer9'.*Did you mean"),
        ],
        ids=["value", "batch", "pairs"],
    )
    def test_can_be_put_right_in_the_same_directory(self, home, changes, message, tmp_path):
        with pytest.raises(ConfigError, match=message):
            distill(recipe(home, **changes), tmp_path / "run")
        assert distill(recipe(home, "direct", "vgg9"), tmp_path / "run")["test_accuracy"] > 0

    def test_a_teacher_without_stages_asks_for_pairs(self, home, tmp_path):
        own = "from torch import nn\ndef make(classes):\n"
        own += "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))\n"
        (tmp_path / "own.py").write_text(own)
        with pytest.raises(ConfigError, match="give --pairs TEACHER-PATH STUDENT-PATH"):
            distill(
                dataclasses.replace(recipe(home), student=StudentChoice(f"{tmp_path / 'own.py'}:make")),
                tmp_path / "run",
            )

    def test_a_teacher_that_cannot_be_a_student_teaches_another_network(self, home, tmp_path):
        own = "from torch import nn\ndef make(classes):\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(),"
        own += " nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, classes))\n"
        (tmp_path / "own.py").write_text(own)
        network = f"{tmp_path / 'own.py'}:make"
        teach(Teach(network, data=Data(str(home / "blobs.npz")), training=TRAINING), tmp_path / "teacher")
        taught = recipe(home, "kdsnn-response", teacher=TeacherChoice(str(tmp_path / "teacher")))
        with pytest.raises(UnsupportedError, match=r"(?s)GELU.*LayerNorm.*can teach another network as it is"):
            distill(taught, tmp_path / "run", trust_code=True)
        student = dataclasses.replace(recipe(home, student="vgg9").student)
        results = distill(dataclasses.replace(taught, student=student), tmp_path / "run", trust_code=True)
        assert "teacher_accuracy" in results

    def test_a_teacher_that_is_gone(self, home, tmp_path):
        shutil.copytree(home / "teacher", tmp_path / "teacher")
        (tmp_path / "teacher" / "model.safetensors").unlink()
        with pytest.raises(WeightsError, match=r"teacher/model\.safetensors' does not exist"):
            distill(recipe(home, teacher=TeacherChoice(str(tmp_path / "teacher"))), tmp_path / "run")


class TestNamedRecipes:
    @pytest.mark.parametrize("name", TEACHERS)
    def test_a_teacher_can_be_built_and_has_no_fault(self, name):
        made = TEACHERS[name]()
        check(made.data, made.training)
        assert made.network in ZOO
        assert made.data.name in NAMED
        assert f"spikedistill teach {name}" in TEACHERS[name].__doc__

    @pytest.mark.parametrize("name", STUDENTS)
    def test_a_student_can_be_built_and_has_no_fault(self, name):
        made = STUDENTS[name]()
        check(made.student, made.data, made.training)
        assert made.method.needs.teacher and not made.problems()
        assert f"spikedistill distill {name}" in STUDENTS[name].__doc__

    @pytest.mark.parametrize("name", STUDENTS)
    def test_a_student_learns_from_where_teach_puts_its_teacher_and_from_the_same_data(self, name):
        teacher, student = TEACHERS[name](), STUDENTS[name]()
        assert student.teacher == TeacherChoice(f"runs/{name}-teacher")
        assert student.data == teacher.data
        assert student.student.network == "same"

    def test_every_student_has_a_teacher(self):
        assert STUDENTS.keys() <= TEACHERS.keys()


class TestWhatIsWrittenDown:
    """recipe.json keeps the method as it was given, results.json with its open fields closed."""

    def test_is_the_recipe_in_format_2_part_by_part(self, home, finished):
        made, found = recipe(home), Run(finished[0]).read("recipe")
        assert list(found) == ["kind", "format", "teacher", "student", "method", "data", "training"]
        assert (found["kind"], found["format"]) == ("distill", 2)
        for part in ("teacher", "student", "data", "training"):
            assert found[part] == json.loads(json.dumps(dataclasses.asdict(getattr(made, part))))
        assert found["method"] == {"name": "kdsnn", **json.loads(json.dumps(dataclasses.asdict(KDSNN())))}

    def test_is_a_method_with_open_fields_and_then_closed(self, home, finished):
        out, results = finished
        given, closed = Run(out).read("recipe")["method"], Run(out).read("results")["method"]
        assert (given["pairs"], given["adapt"]) == ([], None)
        assert closed["pairs"] == [["layer1", "layer1"], ["layer2", "layer2"], ["layer3", "layer3"]]
        assert closed["adapt"] is False
        assert closed == {**given, "pairs": closed["pairs"], "adapt": False} == results["method"]

    def test_of_a_teacher_has_the_same_format(self, home):
        found = Run(home / "teacher").read("recipe")
        assert (found["kind"], found["format"], found["data"]["name"]) == ("teach", 2, str(home / "blobs.npz"))

    def test_a_recipe_without_a_method_is_a_conversion_by_its_rule(self):
        made = Distill(student=StudentChoice(rule="percentile"), method=None)
        assert made.written()["method"] == {"name": "conversion-percentile"}
        assert made.written()["student"]["rule"] == "percentile"
