import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from spikedistill.errors import ConfigError, RunError, WeightsError
from spikedistill.files import read_tensors, write_tensors
from spikedistill.neuron.dynamics import IF, PLIF
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding, RateCoding
from spikedistill.student.conversion import INHERITED_NEURON, Conversion
from spikedistill.student.save import load_student, save_student, start_from
from spikedistill.teacher.load import Architecture, Teacher

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "resnet20_t4"
OWN = """
from pathlib import Path
import torch
from torch import nn

Path(__file__).with_name("executed").touch()

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))
"""
ZOO = Architecture("resnet20", 3, 1, 4)


def made(neuron=None, **fields):
    """A student of the zoo after a step of training; a copy, for its training takes a second."""
    return copy.deepcopy(trained(neuron, **fields))


@functools.cache
def trained(neuron, **fields):
    given = torch.rand(16, 1, 8, 8)
    ann = Teacher(ZOO.build(), (0.4,), (0.3,))
    student, _ = to_spiking(ann, Conversion(timesteps=3, neuron=neuron, **fields), calibration_images=given)
    for layer in student.neurons.values():
        layer.backend = "reference"
    optimiser = torch.optim.SGD(student.train().parameters(), 0.05)
    inputs = given if student.coding != FrameCoding() else torch.rand(3, 4, 1, 8, 8)
    student(inputs).square().mean().backward()
    optimiser.step()
    return student.eval()


def inputs_of(student):
    return torch.rand(student.timesteps, 2, 1, 8, 8) if student.coding == FrameCoding() else torch.rand(2, 1, 8, 8)


def same_bits(student, loaded):
    for layer in loaded.neurons.values():
        layer.backend = "reference"
    given = inputs_of(student)
    assert torch.equal(student(given), loaded(given))
    assert list(loaded.state_dict()) == list(student.state_dict())
    assert all(map(torch.equal, loaded.state_dict().values(), student.state_dict().values()))


CASES = {
    "usual": {},
    "learned": {"neuron": dataclasses.replace(INHERITED_NEURON, learn_threshold=True, learn_initial=True)},
    "plif": {"neuron": dataclasses.replace(PLIF, learn_threshold=True)},
    "per layer": {"per_channel": False, "neuron": dataclasses.replace(IF, learn_initial=True)},
    "fresh": {"inherit": False},
    "frames": {"coding": FrameCoding()},
    "rate coding": {"coding": RateCoding(seed=4)},
    "corrected": {"correct": "biases", "rule": "max"},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_student_comes_back_as_it_was(fields, tmp_path):
    student = made(**fields)
    save_student(tmp_path / "model.safetensors", student, architecture=ZOO)
    loaded = load_student(tmp_path)
    same_bits(student, loaded)
    assert loaded.conversion == student.conversion and not loaded.training
    assert loaded.layers() == student.layers() and loaded.paths() == student.paths()


@pytest.mark.parametrize("gradient, recompute", [("quantised", "nothing"), ("rate", "nothing"), ("exact", "stages")])
def test_with_what_was_set_since(gradient, recompute, tmp_path):
    student = made(dataclasses.replace(INHERITED_NEURON, learn_threshold=True))
    student.gradient, student.recompute = gradient, recompute
    student.set_timesteps(6)
    save_student(tmp_path / "it.safetensors", student, architecture=ZOO, facts={"results": {"test_accuracy": 1.5}})
    loaded = load_student(tmp_path / "it.safetensors")
    assert (loaded.gradient, loaded.recompute, loaded.timesteps) == (gradient, recompute, 6)
    assert loaded.conversion.timesteps == 3 and read_tensors(tmp_path / "it.safetensors")[1]["results"]
    same_bits(student, loaded)
    given = torch.rand(4, 1, 8, 8)
    assert torch.equal(student.train()(given), loaded.train()(given))


def test_learned_thresholds_below_zero_come_back(tmp_path):
    student = made(dataclasses.replace(INHERITED_NEURON, learn_threshold=True)).eval()
    given = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        next(iter(student.neurons.values())).threshold.sub_(10)
    expected = student(given)
    save_student(tmp_path / "it", student, architecture=ZOO)
    assert torch.equal(load_student(tmp_path / "it")(given), expected)


def test_a_second_save_writes_the_same(tmp_path):
    save_student(tmp_path / "a", made(), architecture=ZOO)
    save_student(tmp_path / "b", load_student(tmp_path / "a"), architecture=ZOO)
    assert read_tensors(tmp_path / "a")[1] == read_tensors(tmp_path / "b")[1]


def test_double_precision_is_not_rounded(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    student, _ = to_spiking(network, calibration_images=torch.rand(8, 1, 8, 8, dtype=torch.float64))
    save_student(tmp_path / "it", student.eval())
    loaded = load_student(tmp_path / "it", copy.deepcopy(network).float())
    given = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(loaded(given), student(given))


def test_the_header_s_own_names_are_refused_as_facts(tmp_path):
    with pytest.raises(ConfigError, match="facts may not hold kind, std: the header uses these names"):
        save_student(tmp_path / "it", made(), facts={"kind": 1, "std": 2, "results": 3})


class TestANetworkOfOnesOwn:
    def files(self, folder):
        (folder / "own_net.py").write_text(OWN)
        program = "\n".join(
            [
                "import torch, own_net",
                "from spikedistill.student.build import to_spiking",
                "from spikedistill.student.save import save_student",
                "torch.manual_seed(0)",
                "images = torch.rand(16, 1, 4, 4)",
                "student, _ = to_spiking(own_net.Own(), calibration_images=images, mean=(0.4,), std=(0.3,))",
                "for layer in student.neurons.values(): layer.backend = 'reference'",
                "student.train()(torch.rand(8, 1, 4, 4))",
                "save_student('it.safetensors', student)",
                "given = torch.rand(5, 1, 4, 4)",
                "torch.save((given, student.eval()(given)), 'answer.pt')",
            ]
        )
        subprocess.run([sys.executable, "-c", program], cwd=folder, env=self.environment(folder), check=True)
        (folder / "executed").unlink()
        return torch.load(folder / "answer.pt")

    def environment(self, folder):
        return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}

    def answer(self, student, given):
        for layer in student.neurons.values():
            layer.backend = "reference"
        with torch.no_grad():
            return student(given)

    def test_written_by_another_process_is_given_trusted_or_refused(self, tmp_path, monkeypatch):
        given, expected = self.files(tmp_path)
        file = tmp_path / "it.safetensors"
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "own_net", raising=False)
        with pytest.raises(
            ConfigError, match=r"names Python code .*'own_net:Own'.* give the network, .* trust_code=True if"
        ):
            load_student(file)
        assert "own_net" not in sys.modules and not (tmp_path / "executed").exists()
        assert torch.equal(self.answer(load_student(file, trust_code=True), given), expected)
        assert (tmp_path / "executed").exists()
        (tmp_path / "executed").unlink()
        network = sys.modules["own_net"].Own()
        assert torch.equal(self.answer(load_student(file, network), given), expected)
        assert not (tmp_path / "executed").exists()
        monkeypatch.delitem(sys.modules, "own_net")

    @pytest.mark.parametrize(
        "code, said",
        [
            ("__main__:Net", "was defined in a script or a function and cannot be imported: pass network="),
            ("a.b:f.<locals>.Net", "was defined in a script or a function"),
            ("torch.nn:Linear", r"cannot be imported and called without arguments \(TypeError.*: pass network="),
            ("no_such_module:Net", "cannot be imported and called without arguments .ModuleNotFoundError"),
            ("torch.nn:", "cannot be imported and called"),
            ("collections:OrderedDict", "returned OrderedDict, not a torch.nn.Module: pass network="),
        ],
    )
    def test_that_code_cannot_build_is_refused(self, code, said, tmp_path):
        student = made()
        student.origin = {"code": code}
        save_student(tmp_path / "it", student)
        with pytest.raises(ConfigError, match=said):
            load_student(tmp_path / "it", trust_code=True)
        same_bits(student, load_student(tmp_path / "it", ZOO.build()))

    def test_that_does_not_fit_is_refused(self, tmp_path):
        save_student(tmp_path / "it", made())
        with pytest.raises(WeightsError, match="do not fit Student"):
            load_student(tmp_path / "it", Architecture("vgg9", 3, 1, 4).build())


class TestTheFirstFormat:
    def test_the_shipped_student_loads_trusted_or_given_and_never_else(self, monkeypatch):
        monkeypatch.chdir(ROOT)
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        with pytest.raises(ConfigError, match=r"names Python code .*'examples/resnet20_cifar\.py:resnet20'"):
            load_student(EXAMPLE)
        trusted = load_student(EXAMPLE, trust_code=True)
        from resnet20_cifar import resnet20

        given = load_student(EXAMPLE, resnet20())
        images = torch.rand(2, 3, 32, 32)
        for student in (trusted, given):
            for layer in student.neurons.values():
                layer.backend = "reference"
            assert student.conversion.neuron_model.learn_initial and student.timesteps == 4
        assert torch.equal(trusted(images), given(images))

    def test_a_header_of_a_run_of_then_loads(self, tmp_path):
        student = made(inherit=False)
        parts = {"who": {}, "what": {"method": "direct"}, "data": {}, "training": {}}
        recipe = {**parts, "student": {"student": "resnet20", "timesteps": 3, "gradient": "rate"}}
        facts = {"kind": "student", "architecture": ZOO.facts(), "recipe": recipe, "mean": [0.4], "std": [0.3]}
        write_tensors(tmp_path / "it", student.state_dict(), facts)
        loaded = load_student(tmp_path / "it")
        assert loaded.gradient == "rate" and not loaded.conversion.inherit
        assert loaded.mean.flatten().tolist() == student.mean.flatten().tolist()


def test_what_starts_from_a_student_sees_images_as_that_student_did(tmp_path):
    before, images = made(), torch.rand(6, 1, 8, 8)
    save_student(tmp_path / "it", before, architecture=ZOO)
    student, _ = to_spiking(ZOO.build(), Conversion(timesteps=3), calibration_images=images, mean=(0.1,), std=(0.9,))
    for layer in student.neurons.values():
        layer.backend = "reference"
    start_from(student, tmp_path / "it")
    assert torch.equal(student.eval()(images), before(images))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("saved") / "it"
    save_student(file, made(), architecture=ZOO)
    return read_tensors(file)


HOSTILE = [
    {"network": None},
    {"network": {}},
    {"network": {"name": 5, "classes": 3, "channels": 1, "width": 4}},
    {"network": {"name": "resnet20", "classes": "3", "channels": 1, "width": 4}},
    {"network": {"name": "resnet20", "classes": -3, "channels": 1, "width": 4}},
    {"network": {"name": "resnet2000", "classes": 3, "channels": 1, "width": 4}},
    {"network": {"name": "torchvision/../evil", "classes": 3, "channels": 3, "width": None}},
    {"network": {"name": "timm/hf-hub:some/one", "classes": 3, "channels": 3, "width": None}},
    {"network": {"name": "torchvision/x.py:run", "classes": 3, "channels": 3, "width": None}},
    {"network": {"name": "x.py:run", "classes": 3, "channels": 1, "width": None, "code": "os:abort"}},
    {"network": {"code": "os:abort"}},
    {"network": {"code": 3}},
    {"conversion": 7},
    {"conversion": {}},
    {"gradient": "exactly"},
    {"gradient": ["exact"]},
    {"recompute": None},
    {"timesteps": "4"},
    {"timesteps": 0},
    {"timesteps": True},
    {"mean": "0.4"},
    {"mean": [0.4, 0.4]},
    {"mean": []},
    {"std": [0.0]},
    {"std": [10**400]},
    {"std": [float("nan")]},
    {"mean": None},
    {"format": 3},
    {"format": None},
    {"format": "2"},
    {"kind": "teacher"},
    {"kind": None},
]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: json.dumps(change)[:60])
def test_a_hostile_header_is_refused(change, written, tmp_path):
    tensors, facts = written
    write_tensors(tmp_path / "it", tensors, {**facts, **change})
    with pytest.raises((RunError, ConfigError, WeightsError)):
        load_student(tmp_path / "it")


@pytest.mark.parametrize(
    "name", ["kind", "format", "network", "conversion", "gradient", "recompute", "timesteps", "mean"]
)
def test_a_header_that_lacks_something_is_refused(name, written, tmp_path):
    tensors, facts = written
    write_tensors(tmp_path / "it", tensors, {key: value for key, value in facts.items() if key != name})
    with pytest.raises(RunError):
        load_student(tmp_path / "it")


@pytest.mark.parametrize("facts", [[], 3, "student", {"kind": "student"}, {"kind": "student", "recipe": 4}], ids=str)
def test_a_header_of_another_kind_is_refused(facts, written, tmp_path):
    write_tensors(tmp_path / "it", written[0], facts)
    with pytest.raises(RunError):
        load_student(tmp_path / "it")


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_file_that_is_cut_is_refused(length, written, tmp_path):
    write_tensors(tmp_path / "it", *written)
    whole = (tmp_path / "it").read_bytes()
    (tmp_path / "it").write_bytes(whole[:length])
    with pytest.raises(WeightsError, match="truncated or of another kind"):
        load_student(tmp_path / "it")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        load_student(tmp_path / "nothing")


@pytest.mark.parametrize("value", [torch.zeros(4), torch.ones(2, 2), torch.full((4,), torch.nan)], ids=str)
def test_thresholds_that_cannot_be_are_refused(value, written, tmp_path):
    tensors, facts = written
    name = next(name for name in tensors if name.endswith(".threshold"))
    write_tensors(tmp_path / "it", {**tensors, name: value}, facts)
    with pytest.raises(WeightsError):
        load_student(tmp_path / "it")


def test_a_student_of_the_zoo_keeps_its_network_when_it_is_saved_again(tmp_path):
    architecture = Architecture("resnet20", classes=3, channels=3, width=4)
    student, _ = to_spiking(architecture.build(), Conversion(timesteps=2, inherit=False))
    save_student(tmp_path / "first.safetensors", student, architecture=architecture)
    save_student(tmp_path / "second.safetensors", load_student(tmp_path / "first.safetensors"))
    assert read_tensors(tmp_path / "second.safetensors")[1]["network"] == architecture.facts()
    load_student(tmp_path / "second.safetensors")


def small():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def test_a_student_in_bfloat16_answers_as_it_did(tmp_path):
    student, _ = to_spiking(small(), Conversion(timesteps=2, inherit=False), mean=(0.3,), std=(0.4,))
    student.to(torch.bfloat16).eval()
    save_student(tmp_path / "it.safetensors", student)
    given = torch.rand(5, 1, 4, 4).to(torch.bfloat16)
    assert torch.equal(load_student(tmp_path / "it.safetensors", small())(given), student(given))


def test_loading_leaves_the_random_generator_as_it_was(tmp_path):
    student, _ = to_spiking(small(), Conversion(timesteps=2, inherit=False))
    save_student(tmp_path / "it.safetensors", student)
    network, before = small(), torch.get_rng_state()
    load_student(tmp_path / "it.safetensors", network)
    assert torch.equal(torch.get_rng_state(), before)


class TestStored:
    """Weights rounded to float16 in the file."""

    def test_in_half_the_bytes_only_weights_are_rounded(self, tmp_path):
        architecture = Architecture("resnet20", 3, 1, 16)
        student, _ = to_spiking(architecture.build(), Conversion(timesteps=2, inherit=False))
        for name, stored in (("whole", None), ("half", torch.float16)):
            save_student(tmp_path / name, student, architecture=architecture, stored=stored)
        assert (tmp_path / "half").stat().st_size < 0.6 * (tmp_path / "whole").stat().st_size
        loaded, own = load_student(tmp_path / "half").state_dict(), student.state_dict()
        large = {name for name, value in own.items() if value.ndim > 1}
        assert len(large) > 20 and all(value.dtype == own[name].dtype for name, value in loaded.items())
        for name, value in own.items():
            assert torch.equal(loaded[name], value.half().float() if name in large else value), name

    def test_a_second_save_of_it_rounds_nothing_more(self, tmp_path):
        save_student(tmp_path / "a", made(), architecture=ZOO, stored=torch.float16)
        first = load_student(tmp_path / "a")
        save_student(tmp_path / "b", first, architecture=ZOO)
        same_bits(first, load_student(tmp_path / "b"))

    def test_another_format_and_weights_too_large_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="stored format 'int8'"):
            save_student(tmp_path / "it", made(), architecture=ZOO, stored=torch.int8)
        large = made()
        next(value for value in large.parameters() if value.ndim == 4).data.mul_(1e9)
        with pytest.raises(ConfigError, match=r"too large for torch\.float16"):
            save_student(tmp_path / "it", large, architecture=ZOO, stored=torch.float16)
        assert not (tmp_path / "it").exists()
