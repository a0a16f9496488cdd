import copy

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from spikedistill import files
from spikedistill.errors import RunError, WeightsError
from spikedistill.train.checkpoint import load_checkpoint, save_checkpoint

FACTS = {"epoch": 3, "step": 2, "meters": {"sums": {"labels": 0.1 + 0.2}}, "rate": None}
OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "sgd without momentum": lambda p: torch.optim.SGD(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


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

    def test_state_keeps_the_memory_order_of_its_parameter(self, make, tmp_path):
        first = network()
        optimiser = make(first.parameters())
        walk(first, optimiser, 1)
        save_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, optimiser, FACTS)
        again = make(first.parameters())
        load_checkpoint(tmp_path / "c.safetensors", {"lesson": first}, again)
        for parameter, state in again.state.items():
            for value in state.values():
                assert value is None or value.shape != parameter.shape or value.stride() == parameter.stride()


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
        assert "random.cpu" in names and "optimiser.0.momentum_buffer" in names

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
