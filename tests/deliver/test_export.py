"""Exported files do what the student does, in other programs too; files that do not, or are not ours, are refused."""

import copy
import functools
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from spikedistill.deliver.export import check, export, export_student, on_threshold
from spikedistill.deliver.onnx import OnnxStudent, onnx_model, traced
from spikedistill.errors import ConfigError, RunError, WeightsError
from spikedistill.files import weights_file
from spikedistill.neuron.dynamics import LIF, Neuron
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import Conversion
from spikedistill.student.save import load_student
from spikedistill.teacher import zoo

SHIPPED = "digits-resnet20-1x4"
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_student.py"
FACTS = {"spikedistill": "0", "timesteps": "2", "levels": "1", "data": "{}"}
LEARNED = Neuron(initial=0.5, learn_threshold=True, learn_initial=True)
CASES = {
    "vgg9 with max pooling, learned": ("vgg9", 3, Conversion(timesteps=2, neuron=LEARNED)),
    "resnet18": ("resnet18", 3, Conversion(timesteps=2, neuron=Neuron(initial=0.5))),
    "graded": ("vgg9", 3, Conversion(timesteps=1, neuron=Neuron(initial=0.5, levels=4))),
    "leaky": ("vgg9", 1, Conversion(timesteps=3, neuron=LIF)),
    "event frames": ("vgg9", 2, Conversion(timesteps=3, neuron=Neuron(initial=0.5), coding=FrameCoding())),
}

pytestmark = pytest.mark.usefixtures("without_compiler", "symbolic_shapes")


@functools.cache
def made(case):
    """A student of a case, and 67 samples as it takes them."""
    network, channels, conversion = CASES[case]
    torch.manual_seed(0)
    samples = torch.rand(67, channels, 16, 16)
    ann = getattr(zoo, network)(classes=5, channels=channels, width=4)
    student, _ = to_spiking(ann, conversion, calibration_images=samples[:32])
    if conversion.neuron.learn_initial:  # one value per channel
        with torch.no_grad():
            for layer in student.neurons.values():
                layer.initial.add_(0.1 * torch.rand_like(layer.initial))
    if isinstance(conversion.coding, FrameCoding):
        samples = torch.stack([samples, samples.flip(-1), samples.flip(-2)])
    return student.eval(), samples


def some(samples, count):
    return samples[:, :count] if samples.ndim == 5 else samples[:count]


@functools.cache
def content(case, form):
    student, samples = made(case)
    facts = {**FACTS, "timesteps": str(student.timesteps)}
    return onnx_model(student, some(samples, 2), form, facts, int8=False)


@pytest.mark.parametrize("form", ["sequence", "step"])
@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_does_what_the_student_does_at_any_batch(case, form):
    student, samples = made(case)
    runs = OnnxStudent(content(case, form), threads=1)
    for count in (1, 3, 64):
        given = some(samples, count)
        with torch.no_grad():
            expected = student(given)
        assert torch.allclose(runs(given), expected, atol=1e-4), count
    assert expected.std() > 0.01, "a student that says nothing would equal anything"


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_state_begins_a_stream(case):
    student, samples = made(case)
    image = student.coding.frame(some(samples, 3), 0, student.timesteps)
    fresh = student.initial_state(image)
    assert len(fresh) == student.states
    begun, expected = student.step(image, fresh), student.step(image)
    assert torch.equal(begun[0], expected[0])
    assert all(map(torch.equal, begun[1], expected[1]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both forms of a student that comes with the package."""
    folder = tmp_path_factory.mktemp("exported")
    return export(Path(SHIPPED), out=folder)


def test_a_shipped_student_is_written_in_both_forms(files):
    assert [file.path.name for file in files] == [f"{SHIPPED}.onnx", f"{SHIPPED}-step.onnx"]
    for file in files:
        assert (file.images, file.same_class) == (256, 1.0)
        assert file.difference <= 1e-4 and file.on_threshold < 26
        facts = OnnxStudent(file.path).facts
        assert (facts["timesteps"], facts["levels"], facts["form"]) == ("1", "4", file.form)
        assert json.loads(facts["classes"]) == [str(number) for number in range(10)]
        assert json.loads(facts["data"])["data_dir"] is None
        assert str(Path.cwd()).encode() not in file.path.read_bytes(), "it names this machine's folders"


def test_a_student_in_memory_is_written_and_stays_as_it_is(tmp_path, call, capsys):
    student, samples = copy.deepcopy(made("graded")[0]).train(), made("graded")[1]
    pixels = (255 * samples).round().to(torch.uint8)
    whole, step = export_student(student, pixels, tmp_path / "files", "mine", classes=tuple("abcde"))
    assert [whole.path, step.path] == [tmp_path / "files" / name for name in ("mine.onnx", "mine-step.onnx")]
    assert student.training and (whole.images, whole.same_class) == (67, 1.0)
    runs = OnnxStudent(whole.path)
    assert json.loads(runs.facts["classes"]) == [*"abcde"] and runs.facts["student"] == "mine"
    with torch.no_grad():
        assert torch.allclose(runs(pixels / 255), student.eval()(pixels / 255), atol=1e-4)
    assert call("evaluate", whole.path) == 2
    assert "mine.onnx' names no data set, since it was not exported from a run" in capsys.readouterr().err
    export_student(student, pixels, tmp_path / "files", "mine", form="sequence")  # its own file is replaced
    for wrong, said in ((pixels[:1], "1 samples of uint8"), (samples, "67 samples of float32")):
        with pytest.raises(ConfigError, match=f"{said} were given for the check: expected two or more, as bytes"):
            export_student(student, wrong, tmp_path / "other")


def test_a_process_without_torch_gives_the_same_answers(files, tmp_path):
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[:40, None] * 255 / 16).astype(np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.modules['spikedistill'] = None;"
        f"sys.argv = ['x', {str(files[1].path)!r}, {str(tmp_path / 'images.npy')!r}];"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    student = load_student(SHIPPED).eval()
    with torch.no_grad():
        expected = student(torch.from_numpy(pixels) / 255).mean(0).argmax(-1)
    said = [line.split("\t")[1] for line in done.stdout.splitlines()]
    assert said == [str(label) for label in expected.tolist()]


def test_evaluate_takes_the_file(files, call, capsys):
    assert call("evaluate", SHIPPED) == 0
    (expected,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test accuracy")]
    for file in files:
        assert call("evaluate", file.path) == 0
        assert expected in capsys.readouterr().out.splitlines()
    assert call("evaluate", files[0].path, "--timesteps", 3) == 2
    assert "runs as it is, by onnxruntime: give --data-dir alone" in capsys.readouterr().err


def test_int8_weights_are_rounded_per_channel_and_a_quarter_of_the_size():
    student, samples = made("graded")
    small = onnx.load_model_from_string(onnx_model(student, samples[:2], "sequence", FACTS, int8=True))
    large = onnx.load_model_from_string(content("graded", "sequence"))
    whole = {one.name: onnx.numpy_helper.to_array(one) for one in large.graph.initializer}
    rounded = {one.name: onnx.numpy_helper.to_array(one) for one in small.graph.initializer}
    names = [name.removesuffix(".int8") for name in rounded if name.endswith(".int8")]
    assert len(names) >= 6 and all(name not in rounded for name in names)
    for name in names:
        weights, scales = rounded[f"{name}.int8"], rounded[f"{name}.scale"]
        (axis,) = [axis for axis in (0, weights.ndim - 1) if weights.shape[axis] == len(scales)][:1]
        wide = scales.reshape([-1 if place == axis else 1 for place in range(weights.ndim)])
        assert weights.dtype == np.int8 and np.abs(weights * wide - whole[name]).max() <= 0.51 * scales.max()
    runs = OnnxStudent(small.SerializeToString(), threads=1)
    assert torch.nn.functional.cosine_similarity(runs(samples).flatten(), student(samples).flatten(), 0) > 0.9


def test_int8_that_changes_classes_is_refused():
    student, samples = made("graded")
    other = (samples * 255).to(torch.uint8)
    with pytest.raises(RunError, match=r"int8 weights the most likely class of .* changes"):
        check(student, lambda x: student(x).roll(1, -1), other, "x", kept=0.98)


def test_only_an_export_of_the_same_student_is_replaced(files, tmp_path):
    given, name = {"form": "step", "out": tmp_path}, f"{SHIPPED}-step.onnx"
    earlier = files[1].path.read_bytes()
    (tmp_path / name).write_bytes(earlier)
    export(Path(SHIPPED), **given)
    shutil.copyfile(weights_file(SHIPPED), tmp_path / "other.safetensors")
    for file, content, student in (
        ("other-step.onnx", earlier, tmp_path / "other.safetensors"),
        (name, b"notes of mine", Path(SHIPPED)),
    ):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(RunError, match="exists and is no export of"):
            export(student, **given)
        assert (tmp_path / file).read_bytes() == content


def test_a_program_of_torch_does_the_same(tmp_path):
    student, samples = made("graded")
    written = io.BytesIO()
    torch.export.save(traced(student, samples[:2], "sequence"), written)
    runs = torch.export.load(io.BytesIO(written.getvalue())).module()
    assert torch.allclose(runs(samples[:3]), student(samples[:3]), atol=1e-4)
    (file,) = export(Path(SHIPPED), format="torch", form="step", out=tmp_path)
    assert file.path.name == f"{SHIPPED}-step.pt2" and file.same_class == 1.0


def test_a_file_that_does_something_else_is_not_written(tmp_path, monkeypatch):
    def wrong(student, example, form, facts, int8):
        with torch.no_grad():
            next(iter(student.neurons.values())).threshold.mul_(0.5)
        return onnx_model(student, example, form, facts, int8)

    student = load_student(SHIPPED)
    monkeypatch.setattr("spikedistill.deliver.export.onnx_model", lambda *given: wrong(student.eval(), *given[1:]))
    with pytest.raises(RunError, match=r"does not do what the student does: at test image \d+ .* time step 1, the log"):
        export(Path(SHIPPED), form="sequence", out=tmp_path / "no")
    assert not (tmp_path / "no").exists() or not [*(tmp_path / "no").iterdir()]


@pytest.mark.parametrize("weight, near", [(0.5, True), (0.4, False)])
def test_an_image_on_a_threshold_is_known_by_changes_of_the_last_bits(weight, near):
    """A neuron with the threshold 1 and the potential 0.5 before the current: 0.5 more is exactly a spike."""
    ann = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    student, _ = to_spiking(
        ann, Conversion(timesteps=1, neuron=Neuron(initial=0.5)), calibration_images=torch.ones(2, 1, 1, 1)
    )
    with torch.no_grad():
        linear = next(layer for layer in student.modules() if isinstance(layer, nn.Linear) and layer.out_features == 1)
        linear.weight.fill_(weight)
        linear.bias.zero_()
        next(iter(student.neurons.values())).threshold.fill_(1.0)
        assert on_threshold(student.eval(), torch.ones(1, 1, 1, 1)) == near


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, call, capsys, monkeypatch):
    assert call("export", SHIPPED, "--format", "torch", "--int8", "--out", tmp_path) == 2
    assert "int8 is for --format onnx" in capsys.readouterr().err
    assert call("export", tmp_path / "nothing", "--out", tmp_path) == 2
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert call("export", SHIPPED, "--out", tmp_path) == 2
    assert "pip install 'spikedistill[export]'" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


class TestHostileFiles:
    """No file is run that is damaged, foreign, or asks for code or files of its own."""

    @pytest.fixture
    def good(self):
        return content("graded", "step")

    def test_the_file_itself_is_taken(self, good):
        assert OnnxStudent(good).timesteps == 1

    def test_cut_and_damaged_files_are_refused(self, good):
        for broken in (b"", good[: len(good) // 2], b"no protobuf at all", good[:100] + bytes(40) + good[140:]):
            with pytest.raises(WeightsError, match=r"export it again|give a file that"):
                OnnxStudent(broken)

    def test_a_missing_file_is_said(self, tmp_path):
        with pytest.raises(WeightsError, match=r"none\.onnx' cannot be read"):
            OnnxStudent(tmp_path / "none.onnx")

    def changed(self, good, change):
        model = onnx.load_model_from_string(good)
        change(model)
        return model.SerializeToString()

    @pytest.mark.parametrize(
        "name, domain, message",
        [
            ("Steal", "com.evil", r"com\.evil"),
            ("Gelu", "com.microsoft", r"needs operations of com\.microsoft"),  # which onnxruntime has
        ],
    )
    def test_operations_that_export_never_writes_are_refused(self, good, name, domain, message):
        def change(model):
            model.graph.node.insert(0, helper.make_node(name, ["image"], ["loot"], domain=domain))
            model.opset_import.append(helper.make_opsetid(domain, 1))

        with pytest.raises(WeightsError, match=message):
            OnnxStudent(self.changed(good, change))

    def test_functions_are_refused(self, good):
        def change(model):
            body = [helper.make_node("Relu", ["x"], ["y"])]
            opsets = [helper.make_opsetid("", 18)]
            model.functions.append(helper.make_function("", "Own", ["x"], ["y"], body, opsets))

        with pytest.raises(WeightsError, match="needs functions"):
            OnnxStudent(self.changed(good, change))

    def test_weights_in_a_file_that_is_there_are_refused(self, good, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def change(model):
            tensor = next(one for one in model.graph.initializer if one.raw_data)
            Path("w.bin").write_bytes(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="w.bin")

        with pytest.raises(WeightsError, match="weights in other files"):
            OnnxStudent(self.changed(good, change))

    def test_weights_in_other_files_are_refused(self, good):
        def change(model):
            tensor = model.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="../../etc/passwd")

        with pytest.raises(WeightsError):
            OnnxStudent(self.changed(good, change))

    def test_files_of_other_programs_are_refused(self, good):
        with pytest.raises(WeightsError, match="has no spikedistill, form"):
            OnnxStudent(self.changed(good, lambda model: model.ClearField("metadata_props")))

    @pytest.mark.parametrize("key, value", [("form", "__import__('os')"), ("timesteps", "1e9"), ("timesteps", "-3")])
    def test_metadata_are_only_read(self, good, key, value):
        def change(model):
            (entry,) = [one for one in model.metadata_props if one.key == key]
            entry.value = value

        with pytest.raises(WeightsError, match="names the form"):
            OnnxStudent(self.changed(good, change))

    def test_another_data_set_than_the_students_is_said(self, good, tmp_path, call, capsys):
        (tmp_path / "x.onnx").write_bytes(good)  # its metadata name no data set, which are the digits
        assert call("evaluate", tmp_path / "x.onnx") == 2
        assert "of shape (64, 1, 8, 8) were given to" in capsys.readouterr().err

    def test_teachers_are_sent_to_torch(self, tmp_path, call, capsys, write_blobs):
        write_blobs(tmp_path, 48, 24)
        quick = ("--epochs", 1, "--batch-size", 16, "--device", "cpu", "--out", tmp_path / "ann")
        assert call("teach", "--network", "vgg9", "--width", 2, "--data", tmp_path / "blobs.npz", *quick) == 0
        with pytest.raises(ConfigError, match=r"holds a teacher: torch\.onnx\.export writes an ANN"):
            export(tmp_path / "ann")
