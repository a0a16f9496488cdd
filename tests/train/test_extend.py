"""A finished run that goes on to more epochs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from spikedistill.deliver.record import Record
from spikedistill.deliver.teachers import find_teacher
from spikedistill.errors import RunError, WeightsError
from spikedistill.recipes.config import read_config
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.loop import Trainer
from spikedistill.train.optimise import learning_rate
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

SMALL = f"{Path(__file__).parents[1] / 'support' / 'small_task.py'}:small"
STEPS = 5


class Cut(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def recipe(tmp_path, write_blobs):
    write_blobs(tmp_path, 96, 48)
    usual = {"batch_size": 16, "lr": 0.05, "precision": "fp32", "device": "cpu", "checkpoint_minutes": 0.0}
    return lambda epochs: Teach(
        network=SMALL, data=Data(name=str(tmp_path / "blobs.npz")), training=Training(epochs=epochs, **usual)
    )


@pytest.fixture
def finished(recipe, tmp_path):
    """A run of two epochs."""
    path = tmp_path / "run"
    return path, teach(recipe(2), path)


def cut_after(monkeypatch, steps, work):
    """Let a run end after so many steps."""
    original, left = Trainer.step, [steps]

    def counted(*given):
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        return original(*given)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Trainer, "step", counted)
        work()


class TestAFinishedRun:
    def test_goes_on_as_in_a_run_of_the_new_number_of_epochs(self, finished, recipe, caplog):
        path, _ = finished
        before = Run(path).lines("metrics")
        teach(recipe(4), path, resume=True)
        lines = Run(path).lines("metrics")
        assert lines[:2] == before and [line["epoch"] for line in lines] == [1, 2, 3, 4]
        config = recipe(4).training
        assert [line["lr"] for line in lines[2:]] == [
            learning_rate(epoch * STEPS - 1, 4 * STEPS, config) for epoch in (3, 4)
        ]
        assert lines[2]["lr"] > before[1]["lr"]
        assert "is extended from 2 to 4 epochs, epochs done: 2. From here on, learning rate" in caplog.text

    def test_keeps_what_it_measured_and_learnt_before(self, finished, recipe):
        path, results = finished
        weights = load_file(path / "model.safetensors")
        teach(recipe(3), path, resume=True)
        again = teach(recipe(4), path, resume=True)
        found = Record.read(path).results()
        assert found == json.loads(json.dumps(again))
        assert found["earlier"].keys() == {"2", "3"} and found["earlier"]["2"] == results
        assert "earlier" not in found["earlier"]["3"]
        old = load_file(path / "model-2-epochs.safetensors")
        assert all((old[name] == value).all() for name, value in weights.items())
        assert any((load_file(path / "model.safetensors")[name] != value).any() for name, value in weights.items())
        extended = Record.read(path).recipe["extended"]
        assert extended == [{"epochs": 2, "done": 2, "step": 0}, {"epochs": 3, "done": 3, "step": 0}]
        assert Record.read(path).training.epochs == 4
        assert read_config(path, Teach) == replace(recipe(4), training=replace(recipe(4).training, lr=0.05))

    def test_interrupted_after_that_it_goes_on_by_the_new_number_alone(self, finished, recipe, tmp_path, monkeypatch):
        path, _ = finished
        cut_after(monkeypatch, 3, lambda: teach(recipe(3), path, resume=True))
        with pytest.raises(RunError, match=r"run' is not finished \(2 of 3 epochs\): finish it by the same command"):
            Record.read(path).results()
        with pytest.raises(RunError, match="holds no finished run"):
            Record.read(path).network()
        with pytest.raises(RunError, match=r"The teacher '.*run' is not finished \(2 of 3 epochs\)"):
            find_teacher(recipe(3).data.load(), str(path))
        with pytest.raises(RunError, match=r"has 3 epochs, 2 of them done, and --epochs 2 was given"):
            teach(recipe(2), path, resume=True)
        teach(recipe(3), path, resume=True)
        whole = tmp_path / "whole"
        teach(recipe(2), whole)
        teach(recipe(3), whole, resume=True)
        assert (whole / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()
        weights = load_file(path / "model.safetensors")
        assert all((load_file(whole / "model.safetensors")[name] == value).all() for name, value in weights.items())

    def test_without_its_checkpoint_is_not_extended(self, finished, recipe):
        path, _ = finished
        for file in path.glob("checkpoint*"):
            file.unlink()
        with pytest.raises(
            RunError, match=r"holds no checkpoint to continue from, so it cannot be extended to 3 epochs"
        ):
            teach(recipe(3), path, resume=True)
        assert Record.read(path).results() and Record.read(path).training.epochs == 2

    def test_a_damaged_checkpoint_is_noticed_before_anything_is_touched(self, finished, recipe):
        path, results = finished
        newest, before = path / "checkpoint.safetensors", path / "checkpoint.previous.safetensors"
        whole = before.read_bytes()
        for file in (newest, before):
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(WeightsError, match="So is the previous one"):
            teach(recipe(3), path, resume=True)
        assert Record.read(path).results() == results and Record.read(path).training.epochs == 2
        before.write_bytes(whole)
        teach(recipe(3), path, resume=True)
        assert Record.read(path).recipe["extended"] == [{"epochs": 2, "done": 1, "step": 5}]
        assert [line["epoch"] for line in Run(path).lines("metrics")] == [1, 2, 3]

    @pytest.mark.parametrize("epochs", [1])
    def test_fewer_epochs_are_refused_and_nothing_is_touched(self, epochs, finished, recipe):
        path, results = finished
        with pytest.raises(
            RunError, match=r"has 2 epochs, 2 of them done, and --epochs 1 was given: a run can be extended"
        ):
            teach(recipe(epochs), path, resume=True)
        assert Record.read(path).results() == results

    def test_another_change_beside_it_is_refused_and_nothing_is_touched(self, finished, recipe):
        path, results = finished
        other = replace(recipe(3), training=replace(recipe(3).training, lr=0.1))
        with pytest.raises(RunError, match=r"begun with another recipe \(lr was 0\.05, now 0\.1\)"):
            teach(other, path, resume=True)
        assert Record.read(path).results() == results and "extended" not in Record.read(path).recipe


def test_fewer_epochs_beside_another_device_change_nothing(recipe, tmp_path, monkeypatch):
    path = tmp_path / "run"
    cut_after(monkeypatch, 7, lambda: teach(recipe(2), path))
    before = (path / "recipe.json").read_bytes()
    other = replace(recipe(1), training=replace(recipe(1).training, keep_memory=False))
    with pytest.raises(RunError, match="a run can be extended but not shortened"):
        teach(other, path, resume=True)
    assert (path / "recipe.json").read_bytes() == before


def test_an_unfinished_run_is_extended_from_where_it_is(recipe, tmp_path, monkeypatch):
    path = tmp_path / "run"
    cut_after(monkeypatch, 7, lambda: teach(recipe(2), path))
    teach(recipe(3), path, resume=True)
    assert Record.read(path).recipe["extended"] == [{"epochs": 2, "done": 1, "step": 2}]
    assert [line["epoch"] for line in Run(path).lines("metrics")] == [1, 2, 3]
    assert "earlier" not in Record.read(path).results()
