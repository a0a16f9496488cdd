import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from spikedistill.errors import ConfigError, WeightsError
from spikedistill.files import read_facts, write_tensors
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.code import import_object
from spikedistill.teacher.load import (
    Architecture,
    Teacher,
    TrainableANN,
    load_published,
    load_teacher,
    load_weights,
)
from spikedistill.teacher.weights import read_weights

TINY = Architecture("resnet20", classes=3, channels=1, width=4)


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def network():
    """A small network with everything that behaves differently in training."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    network.append(nn.Linear(2 * 2 * 2, 3))
    with torch.no_grad():
        network(torch.rand(16, 1, 4, 4))
    return network


@pytest.fixture
def tensors():
    return nn.Linear(3, 2).state_dict()


def assert_same(read, tensors):
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)


class TestArchitecture:
    def test_a_zoo_name_gives_that_network(self):
        network = TINY.build()
        assert network(torch.rand(2, 1, 8, 8)).shape == (2, 3)
        assert network.layer1[0].conv1.out_channels == 4

    def test_without_a_width_the_architectures_own_is_taken(self):
        with torch.device("meta"):
            assert Architecture("resnet20").build().layer1[0].conv1.out_channels == 16

    def test_a_torchvision_name_gives_that_network_with_fresh_weights(self):
        with torch.device("meta"):
            network = Architecture("torchvision/squeezenet1_1", classes=7).build()
            assert type(network).__module__ == "torchvision.models.squeezenet"
            assert network(torch.rand(1, 3, 32, 32)).shape == (1, 7)

    def test_a_timm_name_gives_that_network_with_any_channels(self):
        network = Architecture("timm/mobilenetv3_small_050", classes=7, channels=1).build()
        assert type(network).__module__ == "timm.models.mobilenetv3"
        assert network.eval()(torch.rand(1, 1, 32, 32)).shape == (1, 7)

    def test_a_function_of_ones_own_file_is_called_with_the_classes(self, tmp_path):
        (tmp_path / "own.py").write_text("from torch import nn\ndef tiny(classes):\n    return nn.Linear(2, classes)\n")
        assert Architecture(f"{tmp_path}/own.py:tiny", classes=7).build().out_features == 7

    def test_a_file_of_ones_own_may_import_its_neighbours_and_hold_dataclasses(self, tmp_path):
        (tmp_path / "own_layers.py").write_text("from torch import nn\ndef head(n):\n    return nn.Linear(2, n)\n")
        lines = ["from __future__ import annotations", "from dataclasses import dataclass", "import own_layers"]
        lines += ["@dataclass", "class Size:", "    classes: int = 3"]
        lines += ["def tiny(classes):", "    return own_layers.head(Size(classes).classes)"]
        (tmp_path / "own.py").write_text("\n".join(lines))
        before = list(sys.path)
        assert Architecture(f"{tmp_path}/own.py:tiny", classes=7).build().out_features == 7
        assert sys.path == before

    def test_its_facts_survive_json(self):
        assert Architecture(**json.loads(json.dumps(TINY.facts()))) == TINY

    @pytest.mark.parametrize(
        "name, message",
        [
            ("resnet81", r"no architecture 'resnet81'\. Did you mean 'resnet\d+'\?.* Also: torchvision/NAME"),
            ("torchvision/resnet81", r"no torchvision model 'resnet81'\. Did you mean 'resnet18'"),
            ("timm/resnet10x", r"no timm model 'resnet10x'\. Did you mean 'resnet10t'"),
            ("/nowhere/own.py:tiny", r"'/nowhere/own\.py' of '/nowhere/own\.py:tiny' does not exist: check the path"),
        ],
    )
    def test_an_unknown_name_is_refused(self, name, message):
        with pytest.raises(ConfigError, match=message):
            Architecture(name).build()

    def test_torchvisions_networks_take_coloured_images_only(self):
        with pytest.raises(ConfigError, match="take 3 input channels, the data have 1"):
            Architecture("torchvision/squeezenet1_1", channels=1).build()

    def test_a_missing_timm_is_named_with_its_remedy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(ConfigError, match=r"needs timm: pip install timm"):
            Architecture("timm/mobilenetv3_small_050").build()

    def test_an_absent_function_of_ones_own_file_is_told_the_nearest(self, tmp_path):
        (tmp_path / "own.py").write_text("def tiny(classes):\n    return None\n")
        with pytest.raises(ConfigError, match=r"'tinny'\. Did you mean 'tiny'"):
            Architecture(f"{tmp_path}/own.py:tinny").build()

    def test_a_function_that_makes_no_network_is_refused(self, tmp_path):
        (tmp_path / "own.py").write_text("def tiny(classes):\n    return 7\n")
        with pytest.raises(ConfigError, match=r"returned int: it must return a torch\.nn\.Module"):
            Architecture(f"{tmp_path}/own.py:tiny").build()

    @pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/mobilenetv3_small_050", "own.py:tiny"])
    def test_a_network_from_elsewhere_has_its_own_width(self, name):
        with pytest.raises(ConfigError, match=rf"width \(=32\) is for the zoo's networks, '{name}' has its own"):
            Architecture(name, width=32)

    @pytest.mark.parametrize("field", ["classes", "channels", "width"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_a_size_below_1_is_refused(self, field, value):
        with pytest.raises(ConfigError, match=rf"{field} \(={value}\) of 'resnet20' must be 1 or more"):
            Architecture("resnet20", **{field: value})


class TestPretrained:
    def test_torchvision_s_come_with_their_normalisation_and_classes(self, monkeypatch):
        source = torchvision.models.get_model("squeezenet1_1", num_classes=1000)
        kind = torchvision.models.SqueezeNet1_1_Weights
        asked = []
        monkeypatch.setattr(
            kind, "get_state_dict", lambda self, **options: asked.append(options) or source.state_dict()
        )
        teacher, architecture = load_published("torchvision/squeezenet1_1")
        assert architecture == Architecture("torchvision/squeezenet1_1", 1000)
        assert len(teacher.class_names) == 1000 and teacher.class_names[:2] == ("tench", "goldfish")
        assert_same(teacher.network.state_dict(), source.state_dict())
        assert teacher.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
        assert asked[0]["weights_only"] is True

    def test_timm_s_come_with_their_normalisation_and_classes(self, monkeypatch):
        source, create = timm.create_model("mobilenetv3_small_050", num_classes=11), timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: (name, pretrained) and source)
        teacher, architecture = load_published("timm/mobilenetv3_small_050")
        monkeypatch.setattr(timm, "create_model", create)
        assert architecture == Architecture("timm/mobilenetv3_small_050", 11)
        assert teacher.std.flatten().tolist() == pytest.approx(source.pretrained_cfg["std"])
        assert isinstance(architecture.build(), type(source))

    @pytest.mark.parametrize("name", ["torchvision/resnet81", "timm/resnet10x"])
    def test_those_that_cannot_be_had_are_named_with_the_reason(self, name):
        with pytest.raises(
            ConfigError, match=rf"published weights of '{name}' cannot be loaded \(.+\): check the name"
        ):
            load_published(name)


def test_a_network_that_returns_several_answers_in_training_is_refused():
    class Several(nn.Linear):
        def forward(self, x):
            answer = super().forward(x.flatten(1))
            return (answer, answer) if self.training else answer

    network = TrainableANN(Several(3, 2), (0.0,), (1.0,))
    assert network.eval()(torch.rand(4, 3, 1, 1)).shape == (1, 4, 2)
    with pytest.raises(ConfigError, match="Several returns tuple, not a tensor of logits: switch its auxiliary"):
        network.train()(torch.rand(4, 3, 1, 1))


def test_a_file_with_another_kind_of_architecture_is_refused(tmp_path, tensors):
    write_tensors(tmp_path / "w.safetensors", tensors, {"architecture": {"name": "resnet20", "depth": 20}})
    with pytest.raises(WeightsError, match=r"names its network in a way that this version does not know .*depth"):
        load_teacher(tmp_path / "w.safetensors")


class TestReadWeights:
    def test_safetensors_come_back_with_their_facts(self, tmp_path, tensors):
        write_tensors(tmp_path / "w.safetensors", tensors, {"data": "digits"})
        read, facts = read_weights(tmp_path / "w.safetensors")
        assert_same(read, tensors)
        assert facts == {"data": "digits"}

    def test_npz_comes_back(self, tmp_path, tensors):
        np.savez(tmp_path / "w.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
        read, facts = read_weights(tmp_path / "w.npz")
        assert_same(read, tensors)
        assert facts == {}

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_torch_file_of_a_state_dict_comes_back(self, tmp_path, tensors, zipped):
        torch.save(tensors, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        assert_same(read_weights(tmp_path / "w.pt")[0], tensors)

    @pytest.mark.parametrize("name", ["state_dict", "model", "net", "model_state_dict"])
    def test_a_checkpoints_state_dict_is_found(self, tmp_path, tensors, name):
        optimiser = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9).state_dict()
        torch.save({"epoch": 3, "acc": 91.2, name: tensors, "optimizer": optimiser}, tmp_path / "w.pth")
        assert_same(read_weights(tmp_path / "w.pth")[0], tensors)

    def test_of_several_state_dicts_the_one_of_that_name_is_taken_or_none(self, tmp_path, tensors):
        other = {name: tensor + 1 for name, tensor in tensors.items()}
        torch.save({"state_dict": tensors, "state_dict_ema": other}, tmp_path / "named.pth")
        assert_same(read_weights(tmp_path / "named.pth")[0], tensors)
        torch.save({"model": tensors, "model_ema": other}, tmp_path / "open.pth")
        with pytest.raises(WeightsError, match=r"holds several state_dicts \(model, model_ema\): save the one"):
            read_weights(tmp_path / "open.pth")

    @pytest.mark.parametrize("contents", [{"model": {}}, [1, 2], torch.zeros(2)])
    def test_a_torch_file_of_something_else_is_refused(self, tmp_path, contents):
        torch.save(contents, tmp_path / "w.pt")
        with pytest.raises(WeightsError, match=f"holds {type(contents).__name__}, not a state_dict"):
            read_weights(tmp_path / "w.pt")

    def test_names_that_are_no_text_are_refused(self, tmp_path, tensors):
        torch.save({0: tensors["weight"]}, tmp_path / "w.pt")
        with pytest.raises(WeightsError, match="not a state_dict"):
            read_weights(tmp_path / "w.pt")

    def test_arrays_of_the_other_order_of_bytes_are_read(self, tmp_path, tensors):
        np.savez(tmp_path / "w.npz", **{name: tensor.numpy().astype(">f4") for name, tensor in tensors.items()})
        assert_same(read_weights(tmp_path / "w.npz")[0], tensors)

    def test_a_pickled_module_is_refused(self, tmp_path):
        torch.save(nn.Linear(3, 2), tmp_path / "w.pt")
        with pytest.raises(WeightsError, match="pickled Python objects, which are never loaded"):
            read_weights(tmp_path / "w.pt")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_malicious_pickle_is_refused_and_never_run(self, tmp_path, zipped):
        torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError, match="pickled Python objects, which are never loaded"):
            read_weights(tmp_path / "w.pt")
        assert not (tmp_path / "sprung").exists()

    def test_a_malicious_object_in_an_npz_is_refused_and_never_run(self, tmp_path):
        np.savez(tmp_path / "w.npz", weight=np.array([Trap(tmp_path / "sprung")], dtype=object))
        with pytest.raises(WeightsError, match="pickled Python objects, which are never loaded"):
            read_weights(tmp_path / "w.npz")
        assert not (tmp_path / "sprung").exists()

    def test_the_trap_of_these_tests_would_spring(self, tmp_path):
        torch.save(Trap(tmp_path / "sprung"), tmp_path / "w.pt")
        torch.load(tmp_path / "w.pt", weights_only=False)
        assert (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("ending", ["safetensors", "npz", "pt", "old.pt"])
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97])
    def test_a_truncated_file_is_refused(self, tmp_path, tensors, ending, share):
        path = tmp_path / f"w.{ending}"
        if ending == "safetensors":
            write_tensors(path, tensors, {})
        elif ending == "npz":
            np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization=ending == "pt")
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(WeightsError, match="truncated"):
            read_weights(path)

    @pytest.mark.parametrize("ending", ["safetensors", "npz", "pt"])
    def test_a_text_under_that_ending_is_refused(self, tmp_path, ending):
        (tmp_path / f"w.{ending}").write_text("hello world")
        with pytest.raises(WeightsError, match="cannot be read"):
            read_weights(tmp_path / f"w.{ending}")

    def test_an_npz_of_words_is_refused(self, tmp_path):
        np.savez(tmp_path / "w.npz", weight=np.array(["many", "words"]))
        with pytest.raises(WeightsError, match="cannot be read"):
            read_weights(tmp_path / "w.npz")

    @pytest.mark.parametrize("ending", ["safetensors", "npz", "pt"])
    def test_a_missing_file_is_named(self, tmp_path, ending):
        with pytest.raises(WeightsError, match=rf"absent\.{ending}' does not exist"):
            read_weights(tmp_path / f"absent.{ending}")


class TestLoadWeights:
    def test_every_tensor_arrives(self, tensors):
        network = nn.Linear(3, 2)
        load_weights(network, tensors, "'w.pt'")
        assert_same(network.state_dict(), tensors)

    @pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda net: nn.DataParallel(torch.compile(net))])
    def test_the_prefix_of_a_wrapper_is_dropped(self, tensors, wrap):
        network, source = nn.Linear(3, 2), nn.Linear(3, 2)
        source.load_state_dict(tensors)
        wrapped = wrap(source).state_dict()
        assert not wrapped.keys() & tensors.keys()
        load_weights(network, wrapped, "'w.pt'")
        assert_same(network.state_dict(), tensors)

    def test_the_prefix_of_a_training_framework_and_what_lies_beside_are_dropped(self, tensors, caplog):
        network = nn.Linear(3, 2)
        others = {"loss.weight": torch.ones(4), "metric.count": torch.tensor(3)}
        load_weights(network, {f"net.{name}": value for name, value in tensors.items()} | others, "'w.ckpt'")
        assert_same(network.state_dict(), tensors)
        assert "'w.ckpt' holds 2 tensors beside those of the network, which are left out" in caplog.text

    def test_two_networks_in_one_file_are_refused(self, tensors):
        both = {f"{who}.{name}": value for who in ("net", "average") for name, value in tensors.items()}
        with pytest.raises(WeightsError, match=r"'w.ckpt' holds several such networks, under net\., average\.: save"):
            load_weights(nn.Linear(3, 2), both, "'w.ckpt'")

    def test_a_part_called_module_keeps_its_name(self):
        source, network = (nn.ModuleDict({"module": nn.Linear(3, 2)}) for _ in range(2))
        load_weights(network, source.state_dict(), "'w.pt'")
        assert_same(network.state_dict(), source.state_dict())

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda x: x.to(torch.float8_e4m3fn), "is float8_e4m3fn: expected ordinary tensors"),
            (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is quantised: expected"),
            (lambda x: x.to_sparse(), "is sparse_coo: expected"),
            (lambda x: x.to("meta"), "is without data: expected"),
            (lambda x: x.to(torch.complex64), "is complex64: expected"),
            (lambda x: (100 * x).to(torch.int8), "holds torch.int8, the network needs torch.float32"),
            (lambda x: x > 0, "holds torch.bool, the network needs torch.float32"),
        ],
    )
    def test_other_kinds_of_tensors_are_refused(self, tensors, change, message):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = {**tensors, "weight": change(tensors["weight"])}
        with pytest.raises(WeightsError, match=message):
            load_weights(nn.Linear(3, 2), other, "'w.pt'")

    def test_the_count_of_batches_may_be_missing(self, network):
        tensors = network.state_dict()
        del tensors["1.num_batches_tracked"]
        load_weights(network, tensors, "'w.pt'")

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"bias": None}, "missing key 'bias'"),
            ({"extra": torch.zeros(1)}, "unexpected key 'extra'"),
            ({"weight": torch.zeros(2, 4)}, r"size mismatch for 'weight': \(2, 4\), the network's is \(2, 3\)"),
            ({"bias": torch.tensor([0.0, torch.nan])}, "'bias' holds NaN or infinity"),
            ({"bias": torch.tensor([0.0, torch.inf])}, "'bias' holds NaN or infinity"),
            ({f"extra{number}": torch.zeros(1) for number in range(6)}, "; and 2 more"),
        ],
    )
    def test_what_does_not_fit_is_named_and_nothing_is_changed(self, tensors, change, message):
        network = nn.Linear(3, 2)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        wrong = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        with pytest.raises(WeightsError, match=rf"weights of 'w\.pt' do not fit Linear: .*{message}.*Give the"):
            load_weights(network, wrong, "'w.pt'")
        assert_same(network.state_dict(), before)


class TestTeacher:
    def test_it_normalises_what_it_is_given(self, network):
        images = torch.rand(3, 1, 4, 4)
        teacher = Teacher(network, [0.3], [0.2])
        torch.testing.assert_close(teacher(images), network.eval()((images - 0.3) / 0.2))

    def test_every_channel_has_its_own_normalisation(self):
        images = torch.rand(2, 2, 1, 1)
        teacher = Teacher(nn.Flatten(), [0.1, 0.2], [0.5, 0.25])
        expected = torch.stack([(images[:, 0] - 0.1) / 0.5, (images[:, 1] - 0.2) / 0.25], dim=1).flatten(1)
        torch.testing.assert_close(teacher(images), expected)

    def test_it_is_frozen(self, network):
        assert not any(weight.requires_grad for weight in Teacher(network, [0.3], [0.2]).parameters())

    def test_it_stays_in_evaluation_mode_whatever_is_asked(self, network):
        teacher = Teacher(network, [0.3], [0.2]).train()
        assert not any(module.training for module in teacher.modules())
        images = torch.rand(3, 1, 4, 4)
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        torch.testing.assert_close(teacher(images), teacher(images), rtol=0, atol=0)
        assert_same(teacher.state_dict(), before)

    @pytest.mark.parametrize("paths", [(), ("0", "2")])
    def test_its_answer_has_one_step_and_features_where_they_are_asked_for(self, network, paths):
        images, teacher = torch.rand(3, 1, 4, 4), Teacher(network, [0.3], [0.2])
        answer = teacher.observe(images, paths)
        torch.testing.assert_close(answer.logits, teacher(images)[None])
        assert answer.features.keys() == set(paths) and not answer.spikes and not answer.potentials
        for path in paths:
            inner = network[: int(path) + 1]
            torch.testing.assert_close(answer.features[path], inner((images - 0.3) / 0.2)[None])

    def test_every_module_is_a_path_and_no_layer_has_neurons(self, network):
        teacher = Teacher(network, [0.3], [0.2])
        assert (teacher.paths(), teacher.layers()) == ([str(number) for number in range(6)], [])

    @pytest.mark.parametrize("asked", ["spikes", "potentials"])
    def test_spikes_and_potentials_are_not_to_be_had(self, network, asked):
        with pytest.raises(ConfigError, match="Sequential is an ANN and has no spikes or potentials at 2: take a spik"):
            Teacher(network, [0.3], [0.2]).observe(torch.rand(3, 1, 4, 4), **{asked: ["2"]})

    @pytest.mark.parametrize("wrap", [Teacher, TrainableANN])
    def test_a_network_that_owns_its_normalisation_is_refused(self, network, wrap):
        student, _ = to_spiking(network, Conversion(timesteps=2, inherit=False))
        for owner in (student, Teacher(network, [0.3], [0.2])):
            with pytest.raises(
                ConfigError, match=f"A {type(owner).__name__} normalises its inputs itself.*as the teacher itself"
            ):
                wrap(owner, [0.3], [0.2])

    def test_logits_with_time_are_refused(self):
        class Steps(nn.Module):
            def forward(self, x):
                return x.flatten(1).expand(4, -1, -1)

        teacher = Teacher(Steps(), [0.0], [1.0])
        for ask in (teacher, teacher.observe):
            with pytest.raises(ConfigError, match=r"Steps returns logits of shape \(4, 3, 2\): expected \[B, K\]"):
                ask(torch.rand(3, 2, 1, 1))

    @pytest.mark.parametrize(
        "mean, std", [([0.0], [0.0]), ([0.0], [-1.0]), ([0.0, 0.0], [1.0]), ([0.0], [float("nan")])]
    )
    def test_a_normalisation_that_cannot_work_is_refused(self, network, mean, std):
        with pytest.raises(ConfigError, match="need one value per channel, std above 0"):
            Teacher(network, mean, std)

    @pytest.mark.parametrize(
        "mean, std",
        [
            ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
            ([0.49, 0.48, 0.45], [58.4, 57.1, 57.4]),
            ([123.7, 116.3, 103.5], [0.2, 0.2, 0.2]),
            ([0.5, 0.5, 1.5], [0.5, 0.5, 0.5]),
            ([-0.5], [0.5]),
            ([float("nan")], [0.5]),
        ],
    )
    def test_a_normalisation_for_bytes_is_refused_with_the_remedy(self, network, mean, std):
        with pytest.raises(ConfigError, match=r"do not fit images in 0\.\.1: .* Divide values for bytes by 255"):
            Teacher(network, mean, std)

    def test_what_its_outputs_mean_is_kept(self, network):
        assert Teacher(network, [0.5], [1.0], ["cat", "dog"]).class_names == ("cat", "dog")
        assert Teacher(network, [0.0], [1 / 255]).class_names == ()


class TestOneStep:
    def test_it_answers_as_the_normalised_network_with_one_step_of_time(self, network):
        images = torch.rand(3, 1, 4, 4)
        seen = TrainableANN(network, [0.3], [0.2]).eval()
        torch.testing.assert_close(seen(images), network((images - 0.3) / 0.2)[None])

    def test_its_features_have_one_step_of_time_too(self, network):
        images = torch.rand(3, 1, 4, 4)
        answer = TrainableANN(network, [0.3], [0.2]).eval().observe(images, ["2"])
        torch.testing.assert_close(answer.logits, network((images - 0.3) / 0.2)[None])
        torch.testing.assert_close(answer.features["2"], network[:3]((images - 0.3) / 0.2)[None])

    def test_it_stays_trainable(self, network):
        TrainableANN(network, [0.3], [0.2])(torch.rand(3, 1, 4, 4)).sum().backward()
        assert all(weight.grad is not None for weight in network.parameters())


class TestLoadTeacher:
    def write(self, path, **changes):
        """A file as ``teach`` writes it (without what is changed to None), and the network inside."""
        network = TINY.build().eval()
        known = {"architecture": TINY.facts(), "mean": (0.3,), "std": (0.2,), "class_names": ("a", "b", "c")}
        facts = {"kind": "teacher", **known, "data": "blobs", "test_accuracy": 97.5, **changes}
        write_tensors(path, network.state_dict(), {name: value for name, value in facts.items() if value is not None})
        return network

    @pytest.mark.parametrize("source", ["", "model.safetensors"])
    def test_a_run_directory_and_its_file_know_everything(self, tmp_path, source):
        network = self.write(tmp_path / "model.safetensors")
        teacher, architecture = load_teacher(tmp_path / source)
        assert architecture == TINY and teacher.class_names == ("a", "b", "c")
        images = torch.rand(2, 1, 8, 8)
        torch.testing.assert_close(teacher(images), network((images - 0.3) / 0.2))

    def test_what_is_given_goes_before_what_the_file_knows(self, tmp_path):
        network = self.write(tmp_path / "model.safetensors", architecture={"name": "vgg9"})
        teacher, architecture = load_teacher(str(tmp_path), architecture=TINY, mean=[0.5], std=[0.1])
        assert architecture == TINY
        images = torch.rand(2, 1, 8, 8)
        torch.testing.assert_close(teacher(images), network((images - 0.5) / 0.1))

    def test_weights_of_another_origin_need_architecture_and_normalisation(self, tmp_path):
        network = TINY.build().eval()
        torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pt")
        teacher, _ = load_teacher(tmp_path / "w.pt", architecture=TINY, mean=[0.3], std=[0.2])
        images = torch.rand(2, 1, 8, 8)
        torch.testing.assert_close(teacher(images), network((images - 0.3) / 0.2))

    def test_a_file_without_architecture_asks_for_it(self, tmp_path):
        self.write(tmp_path / "model.safetensors", architecture=None)
        with pytest.raises(ConfigError, match="does not say which network its weights belong to"):
            load_teacher(tmp_path)

    @pytest.mark.parametrize("name", ["mean", "std"])
    def test_a_file_without_normalisation_asks_for_it(self, tmp_path, name):
        self.write(tmp_path / "model.safetensors", **{name: None})
        with pytest.raises(ConfigError, match="does not say how its inputs were normalised: give mean and std"):
            load_teacher(tmp_path)

    def test_weights_of_another_network_are_refused(self, tmp_path):
        self.write(tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match="do not fit ResidualNet"):
            load_teacher(tmp_path, architecture=Architecture("resnet20", classes=4, channels=1, width=4))

    @pytest.mark.parametrize("known", [{"name": 7}, {"name": "resnet20", "classes": "3"}, "resnet20", None])
    def test_a_header_that_names_no_network_is_refused(self, tmp_path, known):
        self.write(tmp_path / "model.safetensors")
        tensors, facts = read_weights(tmp_path / "model.safetensors")
        write_tensors(tmp_path / "model.safetensors", tensors, {**facts, "architecture": known})
        with pytest.raises(WeightsError, match=r"(?s)this version does not know .*: name the architecture"):
            load_teacher(tmp_path)

    def test_an_empty_run_directory_is_named(self, tmp_path):
        with pytest.raises(WeightsError, match=r"model\.safetensors' does not exist"):
            load_teacher(tmp_path)


class TestCodeInAHeader:
    """A weights file of somebody else may name a file of Python code, which would run at once."""

    @pytest.fixture
    def run(self, tmp_path):
        """A run directory whose header names code that leaves a mark when it is executed."""
        lines = ["from pathlib import Path", "from torch import nn", f"Path({str(tmp_path / 'sprung')!r}).touch()"]
        lines += ["def tiny(classes):", "    return nn.Sequential(nn.Flatten(), nn.Linear(4, classes))"]
        (tmp_path / "own.py").write_text("\n".join(lines))
        network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        named = {"name": f"{tmp_path}/own.py:tiny", "classes": 3, "channels": 1, "width": None}
        facts = {"architecture": named, "mean": [0.3], "std": [0.2]}
        write_tensors(tmp_path / "model.safetensors", network.state_dict(), facts)
        return SimpleNamespace(path=tmp_path, network=network, architecture=Architecture(**named))

    def test_is_refused_and_never_run(self, run):
        with pytest.raises(ConfigError, match=r"names Python code as its network, '.*own\.py:tiny', .*trust_code=True"):
            load_teacher(run.path)
        assert not (run.path / "sprung").exists()

    @pytest.mark.parametrize("how", ["trust_code", "architecture"])
    def test_runs_where_the_user_trusts_it_or_names_it(self, run, how):
        options = {"trust_code": True} if how == "trust_code" else {"architecture": run.architecture}
        teacher, architecture = load_teacher(run.path, **options)
        assert (run.path / "sprung").exists() and architecture == run.architecture
        images = torch.rand(2, 1, 2, 2)
        torch.testing.assert_close(teacher(images), run.network((images - 0.3) / 0.2))

    def test_is_passed_over_where_the_user_names_another_network(self, run):
        with pytest.raises(WeightsError, match="do not fit ResidualNet"):
            load_teacher(run.path, architecture=TINY)
        assert not (run.path / "sprung").exists()


class TestImportObject:
    def test_gives_what_the_file_calls_by_that_name(self, tmp_path):
        (tmp_path / "own.py").write_text("class Own:\n    size = 7\n")
        assert import_object(f"{tmp_path}/own.py:Own").size == 7

    @pytest.mark.parametrize(
        "content, name, message",
        [
            (None, "own.py:Own", r"The file '.*own\.py' of '.*own\.py:Own' does not exist: check the path"),
            ("x = 1", "own.txt:x", r"own\.txt' .* does not exist"),
            (
                "import nowhere_at_all",
                "own.py:Own",
                r"cannot be imported \(ModuleNotFoundError: .*nowhere_at_all.*fix",
            ),
            ("def f(:", "own.py:f", r"cannot be imported \(SyntaxError: .*\): fix it"),
            ("def tiny(): ...", "own.py:tinny", r"no function or class in '.*own\.py' 'tinny'\. Did you mean 'tiny'"),
        ],
    )
    def test_what_cannot_be_had_is_named_with_its_remedy(self, tmp_path, content, name, message):
        if content is not None:
            (tmp_path / "own.py").write_text(content)
        before = list(sys.path)
        with pytest.raises(ConfigError, match=message):
            import_object(f"{tmp_path}/{name}")
        assert sys.path == before

    def test_what_is_no_function_is_no_network(self, tmp_path):
        (tmp_path / "own.py").write_text("tiny = 7\n")
        with pytest.raises(ConfigError, match=r"own\.py:tiny' cannot be called .*7 is not a callable"):
            Architecture(f"{tmp_path}/own.py:tiny").build()

    @pytest.mark.parametrize("body", ["nn.Linear(4, classes, foo=1)", "nn.Linear(-4, classes)", "1 / 0", "nowhere"])
    def test_a_fault_inside_a_function_is_told_with_its_line(self, tmp_path, body):
        (tmp_path / "own.py").write_text(f"from torch import nn\n\ndef tiny(classes):\n    return {body}\n")
        with pytest.raises(ConfigError, match=r"own\.py:tiny', called with classes=3, failed \(.*line \d+: fix it"):
            Architecture(f"{tmp_path}/own.py:tiny", classes=3).build()

    def test_a_function_that_takes_no_classes_is_refused(self, tmp_path):
        (tmp_path / "own.py").write_text("def tiny():\n    return None\n")
        with pytest.raises(ConfigError, match=r"cannot be called with classes=3 .*give it an argument 'classes'"):
            Architecture(f"{tmp_path}/own.py:tiny", classes=3).build()


@pytest.mark.parametrize(
    "damage",
    [
        {"mean": "abc"},
        {"mean": 0.5},
        {"std": [None]},
        {"class_names": 5},
        {"class_names": [1, 2]},
        {"architecture": {"name": "vgg9", "classes": 2.5}},
        {"architecture": {"name": "vgg9", "classes": 10**14}},
        {"architecture": "vgg9"},
    ],
)
def test_a_damaged_header_is_an_error_of_ours(tmp_path, damage):
    architecture = Architecture("vgg9", 3, 1, 4)
    facts = {"architecture": architecture.facts(), "mean": [0.5], "std": [0.2], "class_names": ["a", "b", "c"]}
    write_tensors(tmp_path / "w.safetensors", architecture.build().state_dict(), facts | damage)
    with pytest.raises(WeightsError, match=r"w\.safetensors"):
        load_teacher(tmp_path / "w.safetensors")


def test_a_header_without_end_is_an_error_of_ours(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", {"spikedistill": "[" * 200_000})
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        read_weights(tmp_path / "w.safetensors")
    assert read_facts(tmp_path / "w.safetensors") == {}
