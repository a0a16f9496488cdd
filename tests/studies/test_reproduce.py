import csv
import dataclasses
import re
import shutil
import statistics
from collections import Counter

import PIL.Image
import pytest
import torch

from spikedistill.errors import ConfigError, RunError
from spikedistill.evaluate.accuracy import predict
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.methods import CONVERSIONS, METHODS
from spikedistill.recipes.teach import Teach
from spikedistill.student.save import load_student
from spikedistill.studies import STUDIES
from spikedistill.studies import reproduce as module
from spikedistill.studies.reproduce import reproduce
from spikedistill.studies.study import Cell, Study
from spikedistill.train.recipe import Data, Training, check
from spikedistill.train.run import Run

TRAINING = Training(epochs=1, batch_size=16, lr=0.05, precision="fp32", device="cpu")
COLUMNS = ["study", "teacher", "student", "method", "setting", "seed", "timesteps", "metric", "value"]


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_blobs):
    path = tmp_path_factory.mktemp("studies")
    write_blobs(path, 48, 24)
    return path


def study(folder, kind, methods, seeds=1, timesteps=(2,)):
    """A study of one like pair on blobs, its runs below ``folder/runs``."""
    data, runs = Data(str(folder / "blobs.npz")), folder / "runs"
    cells = [
        Cell(
            "vgg9",
            "vgg9",
            method,
            seed,
            Distill(
                TeacherChoice(str(runs / "teacher")),
                StudentChoice(timesteps=steps, rule=CONVERSIONS.get(method, "least-squares")),
                None if method in CONVERSIONS else METHODS[method](),
                data,
                dataclasses.replace(TRAINING, seed=seed),
            ),
            runs / f"{method}-t{steps}-s{seed}",
        )
        for method in methods
        for seed in range(seeds)
        for steps in timesteps
    ]
    teachers = {"vgg9": (Teach("vgg9", width=4, data=data, training=TRAINING), runs / "teacher")}
    return Study("kdsnn-test", "A test", "none", kind, "small", teachers, tuple(cells), seeds)


def read(out, name="kdsnn-test"):
    with (out / f"{name}.csv").open() as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert reader.fieldnames == COLUMNS
    return lines


def test_pairs_give_every_seed_and_a_table_of_means(folder):
    out = folder / "pairs"
    report = reproduce(study(folder, "pairs", ("direct", "kdsnn-response"), seeds=2), out)
    lines = read(out)
    assert Counter(line["method"] for line in lines) == {"teacher": 1, "direct": 2, "kdsnn-response": 2}
    for line in lines:
        run = "teacher" if line["method"] == "teacher" else f"{line['method']}-t2-s{line['seed']}"
        results = Run(folder / "runs" / run).read("results")
        assert (line["metric"], float(line["value"])) == ("accuracy", pytest.approx(results["test_accuracy"], abs=0.01))
    direct = [float(line["value"]) for line in lines if line["method"] == "direct"]
    assert f"{sum(direct) / 2:.2f} ± " in report
    assert (out / "kdsnn-test.md").read_text() == report
    assert "](pairs/kdsnn-test.png)" in (folder / "pairs.md").read_text()
    with PIL.Image.open(out / "kdsnn-test.png") as picture:
        assert picture.size[0] > 500


def test_pairs_say_whether_features_beat_answers(folder):
    report = reproduce(study(folder, "pairs", ("kdsnn-response", "kdsnn-feature"), seeds=2), folder / "features")
    found = {(line["method"], line["seed"]): float(line["value"]) for line in read(folder / "features")}
    more = [found["kdsnn-feature", seed] - found["kdsnn-response", seed] for seed in "01"]
    won = int(statistics.mean(more) > 0)
    said = f"in {won} of 1 pairs (vgg9 -> vgg9: {statistics.mean(more):+.2f} ± {statistics.stdev(more):.2f})."
    assert f"Feature-based gains more than response-based {said}" in report


def test_a_report_says_the_seeds_it_was_asked_for_and_when_its_runs_began(folder):
    whole = study(folder, "pairs", ("direct", "kdsnn-response"), seeds=2)
    reproduce(whole, folder / "dates")
    for day, cell in enumerate(whole.cells, 1):
        run = Run(cell.path)
        run.write("environment", run.read("environment") | {"date": f"2020-01-{day:02}"})
    today = Run(folder / "runs" / "teacher").read("environment")["date"]
    report = reproduce(whole, folder / "dates")
    assert f"kdsnn-test --budget small`, runs begun 2020-01-01 to {today}, report of " in report
    assert "kdsnn-test --budget small --seeds 1`" in reproduce(whole, folder / "dates", seeds=1)


def test_a_spiking_network_may_teach(folder):
    usual = study(folder, "pairs", ("direct", "distilling-spikes"))
    snn, (first, *_) = folder / "runs" / "snn", usual.cells
    made = dataclasses.replace(first.recipe, student=StudentChoice(timesteps=3), method=METHODS["kdsnn-response"]())
    teachers = {"ann": usual.teachers["vgg9"], "vgg9": (made, snn)}
    student = StudentChoice("vgg9", width=2, timesteps=2)
    cells = [
        dataclasses.replace(
            cell,
            recipe=dataclasses.replace(cell.recipe, teacher=TeacherChoice(str(snn)), student=student),
            path=folder / "runs" / f"small-{cell.method}",
        )
        for cell in usual.cells
    ]
    reproduce(dataclasses.replace(usual, teachers=teachers, cells=tuple(cells)), folder / "spiking")
    rows = {(line["teacher"], line["method"]): line for line in read(folder / "spiking")}
    assert rows["vgg9", "teacher"]["timesteps"] == "3" and rows["ann", "teacher"]["timesteps"] == "1"
    assert "distance" in Run(cells[1].path).lines("metrics")[-1]
    assert rows["vgg9", "distilling-spikes"]["value"] == str(Run(cells[1].path).read("results")["test_accuracy"])


def test_gains_have_an_error_over_seeds_and_samples_and_students_leave_early(folder):
    whole = study(folder, "samples", ("direct", "kdsnn-response"), seeds=2)
    report = reproduce(whole, folder / "samples")
    images = whole.cells[0].recipe.data.load()
    right = {}
    for cell in whole.cells:
        answers = predict(load_student(cell.path), images.test_images).mean(0).argmax(-1)
        right[cell.method, cell.seed] = (answers == images.test_labels).double()
    gains = torch.stack([right["kdsnn-response", seed] - right["direct", seed] for seed in (0, 1)])
    over_seeds, over_samples = gains.mean(1).std() / 2**0.5, gains.mean(0).std() / gains.shape[1] ** 0.5
    rows = read(folder / "samples")
    (error,) = [line for line in rows if line["metric"] == "gain_error"]
    assert error["seed"] == "-1" and error["method"] == "kdsnn-response"
    assert float(error["value"]) == pytest.approx(100 * float(torch.hypot(over_seeds, over_samples)))
    assert f"{100 * float(gains.mean()):+.2f} ± {float(error['value']):.2f}" in report
    steps = [float(line["value"]) for line in rows if line["metric"] == "early_exit_steps"]
    assert len(steps) == 4 and all(1 <= value <= 2 for value in steps)


def test_a_study_prepares_its_data_before_it_trains(folder):
    done = []
    whole = dataclasses.replace(study(folder, "pairs", ("direct",)), prepare=lambda: done.append(1))
    reproduce(whole, folder / "prepared")
    assert done == [1]


def test_what_is_finished_is_not_trained_again(folder, monkeypatch):
    whole = study(folder, "pairs", ("direct", "kdsnn-response"), seeds=2)
    first = reproduce(whole, folder / "pairs")
    for name in ("teach", "distill"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("trained again"))
    assert reproduce(whole, folder / "pairs") == first


def test_goes_on_from_finished_runs_whose_weights_were_not_kept(folder, tmp_path):
    shutil.copy(folder / "blobs.npz", tmp_path)
    whole = study(tmp_path, "pairs", ("direct",), seeds=2)
    reproduce(whole, tmp_path / "out", seeds=1)
    first = read(tmp_path / "out")
    for file in (tmp_path / "runs").rglob("*.safetensors"):
        file.unlink()
    reproduce(whole, tmp_path / "out", seeds=1)
    assert read(tmp_path / "out") == first and not (tmp_path / "runs" / "teacher" / "model.safetensors").exists()
    reproduce(whole, tmp_path / "out")
    assert read(tmp_path / "out")[:2] == first and len(read(tmp_path / "out")) == 3
    assert len(Run(tmp_path / "runs" / "teacher").lines("metrics")) == 1


def test_time_steps_say_where_conversion_catches_up(folder):
    out = folder / "steps"
    whole = study(folder, "timesteps", ("kdsnn", "conversion-qcfs"))
    converted = study(folder, "timesteps", ("conversion-max", "conversion-percentile"), timesteps=(1, 8, 64)).cells
    report = reproduce(dataclasses.replace(whole, cells=whole.cells + converted), out)
    lines = read(out)
    found = [int(line["timesteps"]) for line in lines if line["method"] == "conversion-qcfs"]
    assert found == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for method in ("conversion-max", "conversion-percentile"):
        assert [line["timesteps"] for line in lines if line["method"] == method] == ["1", "8", "64"]
    assert [line["timesteps"] for line in lines if line["method"] == "kdsnn"] == ["2"]
    assert len(re.findall(r"conversion-\S+ reaches the T=2 student", report)) == 3


def test_noise_is_written_as_settings_and_gains_seed_by_seed(folder):
    out = folder / "noise"
    report = reproduce(study(folder, "noise", ("direct", "kdsnn"), seeds=2), out)
    lines = read(out)
    settings = {line["setting"] for line in lines}
    assert "clean" in settings and {f"gaussian:{severity}" for severity in range(1, 6)} <= settings
    assert len(settings) == 1 + 21 * 5
    assert Counter(line["method"] for line in lines) == {"teacher": 106, "direct": 212, "kdsnn": 212}
    found = {(line["method"], line["setting"], line["seed"]): float(line["value"]) for line in lines}

    def gains(*settings):
        both = [
            [statistics.fmean(found[method, setting, seed] for setting in settings) for seed in "01"]
            for method in ("kdsnn", "direct")
        ]
        return [ours - theirs for ours, theirs in zip(*both)]

    for title, names in (("clean", ["clean"]), ("fog", [f"fog:{severity}" for severity in range(1, 6)])):
        expected = f"{statistics.fmean(gains(*names)):+.2f} ± {statistics.stdev(gains(*names)):.2f}"
        (line,) = [line for line in report.splitlines() if line.startswith(f"| {title} |")]
        assert line.split("|")[-3].strip().startswith(expected)
    assert "falls less than direct" in report and "of 7 noise" in report and (out / "kdsnn-test-natural.png").exists()


def test_energy_is_written_with_its_quantised_ann(folder):
    out = folder / "energy"
    reproduce(study(folder, "energy", ("kdsnn",)), out)
    lines = read(out)
    metrics = {line["metric"] for line in lines if line["method"] == "kdsnn" and not line["setting"]}
    assert metrics == {
        "accuracy",
        "spikes",
        "synops",
        *(f"energy_uJ_{model}" for model in ("float32", "int8", "memory")),
    }
    assert {line["setting"] for line in lines} == {"", "quantised-ann", "quantised-sparse-ann"}


def test_students_side_by_side_learn_what_they_do_one_after_another(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # other processes spare the compilation in this way
    shutil.copy(folder / "blobs.npz", tmp_path)
    whole, wild = study(tmp_path, "pairs", ("direct", "kdsnn-response"), seeds=2), study(tmp_path, "pairs", ("tet",))
    both = dataclasses.replace(whole, cells=whole.cells + changed(wild, lr=1e30).cells)
    report = reproduce(both, tmp_path / "out", jobs=2)
    assert "Left out: `tet-t2-s0` (" in report and "The loss became" in report
    alone = study(folder, "pairs", ("direct", "kdsnn-response"), seeds=2)
    reproduce(alone, folder / "alone")
    for beside, cell in zip(whole.cells, alone.cells):
        assert Run(beside.path).read("environment")["threads"] == max(1, torch.get_num_threads() // 2)
        (line,), (expected,) = Run(beside.path).lines("metrics"), Run(cell.path).lines("metrics")
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    with pytest.raises(ConfigError, match=r"jobs \(=0\) must be 1 or more"):
        reproduce(whole, tmp_path / "out", jobs=0)


def test_fewer_seeds_can_be_asked_for_but_not_none_or_more(folder):
    whole = study(folder, "pairs", ("direct", "kdsnn-response"), seeds=2)
    report = reproduce(whole, folder / "one", seeds=1)
    assert {line["seed"] for line in read(folder / "one")} == {"0"} and not re.search(r"± \d", report)
    for seeds in (0, 3):
        with pytest.raises(ConfigError, match=rf"seeds \(={seeds}\) must be 1 or more, and at most the 2 of"):
            reproduce(whole, folder / "x", seeds=seeds)


def changed(whole, **training):
    """The study with other training of its students."""
    cells = [
        dataclasses.replace(
            cell,
            recipe=dataclasses.replace(cell.recipe, training=dataclasses.replace(cell.recipe.training, **training)),
        )
        for cell in whole.cells
    ]
    return dataclasses.replace(whole, cells=tuple(cells))


def test_finished_runs_of_another_recipe_are_refused(folder):
    whole = study(folder, "pairs", ("direct",))
    reproduce(whole, folder / "same")
    with pytest.raises(
        RunError, match=r"has another recipe than the study \(epochs was 1, now 7\): move it away, or give another"
    ):
        reproduce(changed(whole, epochs=7), folder / "same")


def test_a_student_whose_loss_diverges_is_left_out_and_named(folder):
    whole = study(folder, "pairs", ("direct", "kdsnn-response"))
    wild = changed(study(folder, "pairs", ("tet",)), lr=1e30)
    report = reproduce(dataclasses.replace(whole, cells=whole.cells + wild.cells), folder / "wild")
    assert "Left out: `tet-t2-s0` (" in report and "The loss became" in report
    assert {line["method"] for line in read(folder / "wild")} == {"teacher", "direct", "kdsnn-response"}
    with pytest.raises(ConfigError, match="No student of 'kdsnn-test' could be trained"):
        reproduce(wild, folder / "wild")


@pytest.mark.parametrize("budget", ["full", "small"])
@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_are_recipes_that_can_work(name, budget, tmp_path):
    made = STUDIES[name](budget, "data", tmp_path)
    assert made.name == name and made.cells
    assert len({cell.path for cell in made.cells}) == len(made.cells)
    for cell in made.cells:
        recipe = cell.recipe.settled()
        check(recipe, recipe.student, recipe.data, recipe.training)
        assert recipe.teacher.source in ("none", *(str(path) for _, path in made.teachers.values()))
        assert cell.teacher in made.teachers
        assert recipe.training.seed == cell.seed < made.seeds


def test_equal_cells_of_two_studies_are_one_run(tmp_path):
    pairs, noise = (STUDIES[name]("small", None, tmp_path) for name in ("kdsnn-pairs", "kdsnn-noise"))
    runs = {cell.path: cell.recipe for cell in pairs.cells}
    assert all(runs[cell.path] == cell.recipe for cell in noise.cells)
