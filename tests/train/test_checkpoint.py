import copy

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from spikedistill import files
from spikedistill.errors import RunError, WeightsError
from spikedistill.files import read_tensors, write_json, write_tensors
from spikedistill.train.checkpoint import load_checkpoint, previous, save_checkpoint
from spikedistill.train.muon import Muon

FACTS = {"epoch": 3, "step": 2, "meters": {"sums": {"labels": 0.1 + 0.2}}, "rate": None}


def muon(given):
    """Muon for kernels of convolutions, SGD for all else, of parameters or groups of them."""
    parameters = [one for part in given for one in (part["params"] if isinstance(part, dict) else [part])]
    others = [{"params": [one], "weight_decay": 0.0} for one in parameters if one.ndim != 4]
    return Muon({"params": [one for one in parameters if one.ndim == 4]}, others, 0.01, 0.9)


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "sgd without momentum": lambda p: torch.optim.SGD(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "muon": muon,
}
STATEFUL = {name: make for name, make in OPTIMISERS.items() if name != "sgd without momentum"}


def network():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2)]
    made = nn.Sequential(*layers)
    made(torch.zeros(2, 3, 5, 5))
    made.register_parameter("threshold", nn.Parameter(torch.ones(())))
    return made.to(memory_format=torch.channels_last)


def walk(network, optimiser, steps):
    for _ in range(steps):
        loss = (network(torch.rand(4, 3, 5, 5)) * network.threshold).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
class TestRoundTrip:
    def test_what_follows_has_the_same_bits(self, make, tmp_path):
        first = network()
        twin = copy.deepcopy(first)
        optimiser = make(first.parameters())
        walk(first, optimiser, 2)
        save_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, optimiser, FACTS)
        walk(first, optimiser, 3)

        torch.manual_seed(99)
        again = make(twin.parameters())
        assert load_checkpoint(tmp_path / "c.safetensors", {"lesson": twin}, again) == FACTS
        walk(twin, again, 3)
        for name, value in first.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name
        for before, after in zip(optimiser.state.values(), again.state.values(), strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before if before[key] is not None)

    def test_saving_changes_nothing(self, make, tmp_path):
        first = network()
        optimiser = make(first.parameters())
        walk(first, optimiser, 1)
        before, random = copy.deepcopy(first.state_dict()), torch.get_rng_state()
        save_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, optimiser, FACTS)
        assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
class TestState:
    def test_keeps_the_memory_order_of_its_parameter(self, make, tmp_path):
        first = network()
        optimiser = make(first.parameters())
        walk(first, optimiser, 1)
        assert optimiser.state
        save_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, optimiser, FACTS)
        again = make(first.parameters())
        load_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, again)
        kept = [
            (value.stride(), parameter.stride())
            for parameter, state in again.state.items()
            for value in state.values()
            if value is not None and value.ndim > 0 and value.shape == parameter.shape
        ]
        each = {"momentum_buffer", "exp_avg", "exp_avg_sq"} & set().union(*optimiser.state.values())
        assert len(kept) == len(each) * (len(list(first.parameters())) - 1)  # the threshold is a scalar
        assert all(found == wanted for found, wanted in kept)

    def test_finds_its_parameter_by_name_whatever_the_optimiser_s_order(self, make, tmp_path):
        first = network()
        optimiser = make(first.parameters())
        walk(first, optimiser, 2)
        assert optimiser.state
        save_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, optimiser, FACTS)
        turned = make([{"params": [p]} for p in reversed(list(first.parameters()))])
        load_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, turned)
        assert_same_state(optimiser, turned)


@pytest.mark.parametrize("make", [STATEFUL["sgd"], STATEFUL["adamw"]], ids=["sgd", "adamw"])
def test_state_of_an_earlier_version_is_numbered_and_found(make, tmp_path):
    first = network()
    optimiser = make(first.parameters())
    walk(first, optimiser, 2)
    assert optimiser.state
    save_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, optimiser, FACTS)
    tensors, facts = read_tensors(tmp_path / "c.safetensors")
    for number, (name, _) in enumerate(first.named_parameters()):
        for key in [key for key in tensors if key.startswith(f"optimiser.lesson.{name}.")]:
            tensors[f"optimiser.{number}.{key.rpartition('.')[2]}"] = tensors.pop(key)
    assert not any(key.startswith("optimiser.lesson") for key in tensors)
    write_tensors(tmp_path / "c.safetensors", tensors, facts)
    again = make(first.parameters())
    load_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, again)
    assert_same_state(optimiser, again)


def assert_same_state(first, second):
    """The same state for every parameter of two optimisers."""
    for parameter, state in first.state.items():
        kept = {key: value for key, value in state.items() if value is not None}
        assert kept.keys() <= second.state[parameter].keys()
        assert all(torch.equal(value, second.state[parameter][key]) for key, value in kept.items())


class TestFile:
    @pytest.fixture
    def saved(self, tmp_path):
        first = network()
        optimiser = OPTIMISERS["sgd"](first.parameters())
        walk(first, optimiser, 1)
        path = tmp_path / "c.safetensors"
        save_checkpoint(path, {"lesson": first}, optimiser, FACTS)
        return path, first, optimiser

    def test_holds_modules_optimiser_and_random_state_as_plain_tensors(self, saved):
        path, first, _ = saved
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
        assert {f"lesson.{name}" for name in first.state_dict()} <= names
        assert "random.cpu" in names and "optimiser.lesson.0.weight.momentum_buffer" in names

    @pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
    def test_a_failed_write_leaves_the_old_one_and_no_rest(self, saved, monkeypatch, failure):
        path, first, optimiser = saved
        before = path.read_bytes()

        def half(tensors, part, metadata):
            part.write_bytes(b"half")
            raise failure

        monkeypatch.setattr(files, "save_file", half)
        with pytest.raises(RunError, match=r"c\.safetensors' could not be written .* untouched"):
            save_checkpoint(path, {"lesson": first}, optimiser, FACTS)
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]

    def test_of_another_network_is_refused(self, saved):
        path, _, optimiser = saved
        with pytest.raises(RunError, match="belongs to another network or optimiser"):
            load_checkpoint(path, {"lesson": nn.Linear(2, 2)}, optimiser)

    def test_of_a_run_without_averaged_weights_is_refused_by_one_with_them(self, saved):
        path, first, optimiser = saved
        with pytest.raises(RunError, match="belongs to another network or optimiser"):
            load_checkpoint(path, {"lesson": first, "averaged": copy.deepcopy(first)}, optimiser)

    def test_of_sgd_is_refused_by_adamw(self, saved):
        path, first, _ = saved
        with pytest.raises(RunError, match="belongs to another network or optimiser"):
            load_checkpoint(path, {"lesson": first}, OPTIMISERS["adamw"](first.parameters()))

    def test_of_adamw_is_refused_by_sgd(self, saved):
        path, first, _ = saved
        adamw = OPTIMISERS["adamw"](first.parameters())
        walk(first, adamw, 1)
        save_checkpoint(path, {"lesson": first}, adamw, FACTS)
        with pytest.raises(RunError, match="belongs to another network or optimiser"):
            load_checkpoint(path, {"lesson": first}, OPTIMISERS["sgd"](first.parameters()))

    def test_of_more_parameters_is_refused(self, saved):
        path, first, _ = saved
        with pytest.raises(RunError, match="belongs to another network or optimiser"):
            load_checkpoint(path, {"lesson": first}, OPTIMISERS["sgd"](list(first.parameters())[:2]))

    def test_that_is_missing_or_cut_short_is_refused(self, saved):
        path, first, optimiser = saved
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(WeightsError, match="truncated"):
            load_checkpoint(path, {"lesson": first}, optimiser)
        path.unlink()
        with pytest.raises(WeightsError, match="does not exist"):
            load_checkpoint(path, {"lesson": first}, optimiser)


class TestTheOneBefore:
    @pytest.fixture
    def twice(self, tmp_path):
        """Two checkpoints of one training."""
        first = network()
        optimiser = OPTIMISERS["sgd"](first.parameters())
        for step in (1, 2):
            walk(first, optimiser, 1)
            save_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, optimiser, {"step": step})
        return tmp_path / "c.safetensors", first, optimiser

    def load(self, twice):
        path, first, optimiser = twice
        return load_checkpoint(path, {"lesson": first}, optimiser)["step"]

    def test_waits_while_the_newest_is_whole(self, twice, caplog):
        assert previous(twice[0]).name == "c.previous.safetensors"
        assert self.load(twice) == 2 and not caplog.messages

    @pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
    def test_is_taken_with_a_note_where_the_newest_is_damaged(self, twice, harm, caplog):
        path = twice[0]
        damage(path, harm)
        assert self.load(twice) == 1
        (said,) = caplog.messages
        assert said.startswith("note: ") and f"'{path}' " in said and said.endswith(" Going on from the previous one.")

    def test_is_not_replaced_by_the_damaged_one_at_the_next_save(self, twice):
        path, first, optimiser = twice
        damage(path, "flip")
        assert self.load(twice) == 1
        save_checkpoint(path, {"lesson": first}, optimiser, {"step": 3})
        assert self.load(twice) == 3
        damage(path, "flip")
        assert self.load(twice) == 1

    @pytest.mark.parametrize("harm", ["flip", "cut"])
    def test_that_is_damaged_too_ends_it(self, twice, harm):
        path, first, _ = twice
        weights = {name: value.clone() for name, value in first.state_dict().items()}
        for file in (path, previous(path)):
            damage(file, harm)
        with pytest.raises(
            WeightsError, match=r"c\.safetensors' .* So is the previous one, .*another --out\."
        ) as caught:
            self.load(twice)
        assert len(str(caught.value)) < 600
        assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())

    def test_does_not_stand_in_for_one_of_another_run(self, twice):
        path = twice[0]
        write_json(path.parent / "environment.json", {}, run="mine")
        with pytest.raises(RunError, match="and lies in the directory of the run mine"):
            self.load(twice)


def damage(path, harm):
    content = path.read_bytes()
    changed = {"flip": content[:-3] + bytes([content[-3] ^ 4]) + content[-2:], "cut": content[:-1], "empty": b""}
    path.unlink()
    if harm in changed:
        path.write_bytes(changed[harm])
