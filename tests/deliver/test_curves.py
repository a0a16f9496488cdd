import pytest
from PIL import Image

from spikedistill.deliver.curves import draw_training, history, over_seeds
from spikedistill.deliver.record import Record
from spikedistill.deliver.results import Result
from spikedistill.errors import ConfigError, RunError
from spikedistill.recipes.distill import Distill
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run


def finished(path, seconds=(), accuracies=(), seed=0):
    """A finished run with these epochs on disk."""
    run = Run(path)
    path.mkdir()
    for epoch, (spent, accuracy) in enumerate(zip(seconds, accuracies), start=1):
        run.append("timing", {"epoch": epoch, "seconds": spent})
        run.append("metrics", {"epoch": epoch, **({} if accuracy is None else {"validation_accuracy": accuracy})})
    recipe = Distill(training=Training(epochs=len(seconds) or 1, seed=seed)).written()
    return Result(Record(path, recipe), {"test_accuracy": 50.0}, "vgg9", "inherited", {}, len(seconds), None)


def test_history_adds_up_minutes(tmp_path):
    assert history(finished(tmp_path / "run", (30.0, 90.0, 60.0), (10.0, 20.0, 30.0))) == [
        (0.5, 10.0),
        (2.0, 20.0),
        (3.0, 30.0),
    ]


def test_history_is_empty_without_validation(tmp_path):
    assert history(finished(tmp_path / "run", (30.0,), (None,))) == []


def test_over_seeds_is_the_mean_of_common_epochs():
    assert over_seeds([[(1.0, 10.0), (2.0, 30.0)], [(3.0, 20.0)]]) == [(2.0, 15.0)]


def test_picture_has_a_curve_for_each_recipe(tmp_path):
    runs = [finished(tmp_path / f"run-s{seed}", (60.0, 60.0), (40.0, 50.0), seed) for seed in (0, 1)]
    draw_training(tmp_path / "curves.png", runs)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    draw_training(tmp_path / "curves.png", runs)  # its own picture is replaced
    Image.new("RGB", (3, 3)).save(tmp_path / "holiday.png")
    with pytest.raises(RunError, match=r"holiday\.png' exists and is no picture of this command"):
        draw_training(tmp_path / "holiday.png", runs)


@pytest.mark.parametrize(
    ("name", "said"), [("curves.png", "None of these runs has a validation"), ("curves.jpg", "ends in .png")]
)
def test_refuses_runs_without_validation_and_other_formats(tmp_path, name, said):
    with pytest.raises(ConfigError, match=said):
        draw_training(tmp_path / name, [finished(tmp_path / "run", (30.0,), (None,))])
    assert not (tmp_path / name).exists()
