import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from commands import run_command as call
from safetensors.torch import load_file

from spikedistill.cli import COMMANDS
from spikedistill.objective.direct import TET
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes import STUDENTS, TEACHERS, demo, digits, distill, teach
from spikedistill.recipes.choices import TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.methods import CONVERSIONS, METHODS
from spikedistill.recipes.teach import Teach
from spikedistill.train.loop import Course
from spikedistill.train.recipe import Training
from spikedistill.train.run import Run

QUICK = "--epochs 1 --batch-size 16 --lr 0.05 --device cpu --precision fp32"


pytestmark = pytest.mark.usefixtures("without_compiler")


def options_of(part):
    """The options that the fields of a value become, without dashes before them."""
    hints = get_type_hints(type(part), include_extras=True)
    marks = {name: [mark.name for mark in getattr(hint, "__metadata__", ())] for name, hint in hints.items()}
    return [(marks[each.name] or [each.name])[0].replace("_", "-") for each in dataclasses.fields(part)]


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs):
    """A folder with data, a teacher and a student, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    write_blobs(folder, 48, 24)
    data = ("--data", folder / "blobs.npz", *QUICK.split())
    assert call("teach", "--network", "vgg9", "--width", 4, "--out", folder / "teacher", *data) == 0
    who = ("--teacher", folder / "teacher", "--timesteps", 2)
    assert call("distill", *who, "--out", folder / "student", *data) == 0
    return folder


@pytest.fixture
def asked(monkeypatch):
    """What the recipes are asked for, instead of doing it."""
    seen = []

    def remember(recipe, out, resume, progress, trust_code=False):
        seen.append((recipe, out, resume))
        return {"test_accuracy": 12.5}

    monkeypatch.setattr(teach, "teach", remember)
    monkeypatch.setattr(distill, "distill", remember)
    monkeypatch.setattr("spikedistill.cli._print_table", lambda paths: None)
    return seen


class TestHelp:
    @pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)], ids=repr)
    def test_of_the_whole_names_every_command(self, arguments, capsys):
        assert call(*arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in COMMANDS)

    @pytest.mark.parametrize(
        "command, options",
        [
            ("teach", {"--network", "--width", "--data", "--epochs", "--lr", "--resume", "--out", "--seed"}),
            ("distill", {"--timesteps", "--method", "--temperature", "--resume", "--teacher", "--neuron", "--pairs"}),
            ("evaluate", {"run directory", "--timesteps", "--data-dir", "--confidence"}),
            ("compare", {"run directories"}),
            ("demo", {"--out"}),
            ("energy", {"run directories", "--images", "--out"}),
            ("immunity", {"run directories", "--kinds", "--images", "--baseline", "--resume", "--out"}),
            ("reproduce", {"--budget", "--runs", "--seeds", "--out"}),
            ("recipes", {"ready recipes"}),
        ],
    )
    def test_of_a_command_names_its_options(self, command, options, capsys):
        assert call(command, "--help") == 0
        caught = capsys.readouterr()
        assert f"usage: spikedistill {command}" in caught.out and not caught.err
        assert all(option in caught.out for option in options)

    def test_covers_every_command(self):
        (mark,) = [m for m in self.test_of_a_command_names_its_options.pytestmark if m.name == "parametrize"]
        assert {command for command, _ in mark.args[1]} == set(COMMANDS)

    @pytest.mark.parametrize("command, kind", [("teach", Teach), ("distill", Distill)])
    def test_has_an_option_for_every_field_of_a_recipe(self, command, kind, capsys):
        call(command, "--help")
        shown = capsys.readouterr().out
        for field in dataclasses.fields(kind):
            part = getattr(kind(), field.name)
            names = options_of(part) if dataclasses.is_dataclass(part) else [field.name.replace("_", "-")]
            assert names and all(f"--{name} " in shown or f"--{name}," in shown for name in names)

    def test_of_a_recipe_shows_its_values(self, capsys):
        call("distill", "cifar10", "--help")
        shown = capsys.readouterr().out
        assert "runs/cifar10-teacher" in shown and "(default: 0.02)" in shown


class TestOptions:
    def test_without_any_the_recipe_is_taken_as_it_is(self, asked, capsys):
        assert call("teach", "digits") == call("distill", "digits") == 0
        first, second = asked
        assert first == (digits.teacher(), Path("runs/digits-teacher"), False)
        assert second == (digits.student(), Path("runs/digits-kdsnn-t4"), False)
        assert "12.50 %" in capsys.readouterr().out

    def test_the_teacher_lands_where_its_student_looks_for_it(self, asked):
        for name in TEACHERS:
            call("teach", name)
            assert STUDENTS[name]().teacher.source == str(asked[-1][1])

    def test_reach_the_recipe(self, asked):
        options = "--timesteps 7 --alpha 0.5 --lr 0.5 --neuron lif --leak 0.75 --flip --pairs a b c d --out x --resume"
        assert call("distill", "digits", *options.split(), "--teacher-mean", "0.5", "--seed", "-3") == 0
        ((recipe, out, resume),) = asked
        base, change = digits.student(), dataclasses.replace
        assert (out, resume) == (Path("x"), True)
        assert recipe == Distill(
            change(base.teacher, mean=(0.5,)),
            change(base.student, timesteps=7, neuron="lif", leak=0.75),
            change(base.method, alpha=0.5, pairs=(("a", "b"), ("c", "d"))),
            change(base.data, flip=True),
            change(base.training, lr=0.5, seed=-3),
        )

    def test_without_a_recipe_change_the_defaults(self, asked):
        assert call("distill", "--teacher", "t", "--data", "some/set.npz", "--no-channels-last") == 0
        ((recipe, out, _),) = asked
        expected = dataclasses.replace(Distill(), teacher=TeacherChoice("t"), training=Training(channels_last=False))
        assert recipe == dataclasses.replace(expected, data=dataclasses.replace(expected.data, name="some/set.npz"))
        assert out == Path("runs/set-kdsnn-t4")


class TestMethod:
    """--method NAME offers the fields of that class, and no others."""

    @pytest.mark.parametrize("name", METHODS)
    def test_offers_the_fields_of_its_class_and_no_others(self, name, capsys):
        assert call("distill", "--method", name, "--help") == 0
        shown = capsys.readouterr().out.split()
        fields = {name: {f"--{option}" for option in options_of(kind())} for name, kind in METHODS.items()}
        assert fields[name] == set().union(*fields.values()) & {word.rstrip(",") for word in shown}

    @pytest.mark.parametrize("name", ["direct", "tet", *CONVERSIONS])
    @pytest.mark.parametrize("option", ["--temperature", "--alpha", "--weight"])
    def test_refuses_an_option_of_another_method(self, name, option, asked, capsys):
        assert call("distill", "--method", name, option, "0.5") == 2
        assert option in capsys.readouterr().err and not asked

    def test_takes_its_options_in_any_order(self, asked):
        assert call("distill", "digits", "--lam", "0.05", "--method", "tet", "--label-smoothing", 0.1) == 0
        assert call("distill", "digits", "--method=tet", "--target", 2) == 0
        (first, out, _), (second, *_) = asked
        assert (first.method, out) == (TET(label_smoothing=0.1, lam=0.05), Path("runs/digits-tet-t4"))
        assert second.method == TET(target=2.0)

    def test_that_is_the_recipe_s_keeps_the_recipe_s_fields(self, asked):
        assert call("distill", "cifar10", "--method", "kdsnn", "--weight", 3) == 0
        assert asked[0][0].method == dataclasses.replace(STUDENTS["cifar10"]().method, weight=3.0)

    def test_that_is_another_begins_with_the_defaults_of_its_class(self, asked, monkeypatch):
        own = dataclasses.replace(digits.student(), method=KDSNN(temperature=7.0))
        monkeypatch.setitem(STUDENTS, "digits", lambda: own)
        assert call("distill", "digits", "--method", "kdsnn-response") == call("distill", "digits") == 0
        assert [recipe.method.temperature for recipe, *_ in asked] == [2.0, 7.0]

    @pytest.mark.parametrize("name", CONVERSIONS)
    def test_that_is_a_conversion_is_a_rule_and_no_objective(self, name, asked):
        assert call("distill", "digits", "--method", name) == 0
        ((recipe, out, _),) = asked
        assert recipe.method is None and recipe.student.rule == CONVERSIONS[name] and recipe.method_name == name
        assert out == Path(f"runs/digits-{name}-t4")

    def test_that_is_a_conversion_works_from_the_teacher_on(self, home, tmp_path, capsys):
        options = ("--data", home / "blobs.npz", "--teacher", home / "teacher", "--timesteps", 2)
        assert call("distill", *options, "--method", "conversion-max", "--out", tmp_path / "run") == 0
        assert "conversion-max" in capsys.readouterr().out
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    @pytest.mark.parametrize(
        "options, message",
        [
            ("kdsnn --alpha 2", "alpha (=2.0) mixes two terms: give a value from 0 to 1"),
            ("kdsnn-response --temperature 0", "temperature (=0.0) must be above 0 and finite"),
            ("kdsnn-feature --weight -1", "weight (=-1.0) must be 0 or more and finite"),
            ("tet --lam 1.5", "lam (=1.5) mixes two terms"),
            ("direct --label-smoothing -0.1", "label_smoothing (=-0.1) mixes two terms"),
            ("conversion-max --rule percentile", "rule (=percentile) is not that of --method conversion-max"),
        ],
    )
    def test_refuses_a_value_out_of_range_in_the_words_of_the_objective(self, options, message, asked, capsys):
        assert call("distill", "--method", *options.split()) == 2
        caught = capsys.readouterr()
        assert caught.err.startswith(f"spikedistill: {message}") and not caught.out and not asked


class TestWhatIsUnknown:
    @pytest.mark.parametrize(
        "arguments, hint",
        [
            ("distil", r"There is no command 'distil'. Did you mean 'distill'?"),
            ("teach cifr10", "There is no recipe 'cifr10'. Did you mean 'cifar10'?"),
            ("distill digit", "There is no recipe 'digit'. Did you mean 'digits'?"),
            ("distill --timestep 3", "--timesteps"),
            ("distill --method kdsn", "kdsnn"),
            ("distill --neuron liff", "plif"),
            ("teach --optimizer adam", "adamw"),
            ("distill --timesteps four", "four"),
            ("evaluate", "run directory"),
            ("compare --run x", "--run"),
            ("recipes extra", "extra"),
        ],
    )
    def test_is_refused_with_what_was_probably_meant(self, arguments, hint, capsys):
        assert call(*arguments.split()) == 2
        caught = capsys.readouterr()
        assert hint in caught.err and not caught.out
        assert "Traceback" not in caught.err


class TestOutput:
    def test_recipes_lists_all_with_the_commands_that_take_them(self, capsys):
        assert call("recipes") == 0
        shown = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
        assert shown == [["teach", name] for name in TEACHERS] + [["distill", name] for name in STUDENTS]

    def test_compare_prints_the_table_and_nothing_else(self, home, capsys):
        assert call("compare", home / "teacher", home / "student") == 0
        caught = capsys.readouterr()
        head, teacher, student = caught.out.splitlines()
        assert head.split()[:2] == ["run", "network"] and "t=2" in head
        accuracy = Run(home / "teacher").read("results")["test_accuracy"]
        results = Run(home / "student").read("results")
        assert teacher.split()[:2] == ["teacher", "vgg9"] and f"{accuracy:.2f} %" in teacher
        assert f"{results['test_accuracy']:.2f} %" in student and f"{results['firing_rate']:.2f} %" in student
        assert not caught.err

    def test_evaluate_prints_every_measure(self, home, capsys):
        assert call("evaluate", home / "student", "--timesteps", 3) == 0
        lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
        results = Run(home / "student").read("results")
        assert lines["teacher_accuracy"] == [f"{results['teacher_accuracy']:.2f}", "%"]
        assert len(lines["accuracy_by_step"]) == 3
        assert lines.keys() >= results.keys() - {"firing_rate_by_layer", "method", "teacher"}

    def test_evaluate_prints_the_accuracy_of_a_teacher(self, home, capsys):
        assert call("evaluate", home / "teacher") == 0
        caught = capsys.readouterr()
        accuracy = Run(home / "teacher").read("results")["test_accuracy"]
        assert caught.out.split() == ["measure", "value", "test_accuracy", f"{accuracy:.2f}", "%"]
        assert not caught.err

    def test_evaluate_says_where_the_teacher_is_gone(self, home, tmp_path, capsys):
        shutil.copytree(home / "student", tmp_path / "student")
        recipe = Run(home / "student").read("recipe")
        recipe["teacher"]["source"] = "nowhere"
        Run(tmp_path / "student").write("recipe", recipe)
        assert call("evaluate", tmp_path / "student") == 0
        assert "agreement with it is left out" in capsys.readouterr().err

    def test_evaluate_prints_early_exit_where_it_is_asked_for(self, home, capsys):
        assert call("evaluate", home / "student", "--confidence", 0) == 0
        lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
        first = Run(home / "student").read("results")["accuracy_by_step"][0]
        assert lines["early_exit_accuracy"] == [f"{first:.2f}", "%"] and lines["early_exit_steps"] == ["1.00"]

    def test_results_go_to_standard_output_and_the_work_to_standard_error(self, home, tmp_path, capsys):
        out = tmp_path / "run"
        options = ("--data", home / "blobs.npz", *QUICK.split(), "--teacher", home / "teacher", "--timesteps", 1)
        assert call("distill", *options, "--method", "direct", "--out", out) == 0
        caught = capsys.readouterr()
        assert caught.out.splitlines()[-1] == f"the student is in {out}"
        assert "epoch 1: " not in caught.out and "direct: epoch 1: " in caught.err
        assert "direct: cpu, float32, channels_last, torch convolutions: float32 was asked for" in caught.err
        assert "rate-based" not in caught.err

    def test_neurons_that_do_not_suit_the_rate_based_gradient_are_pointed_out(self, home, tmp_path, capsys):
        options = ("--data", home / "blobs.npz", *QUICK.split(), "--teacher", home / "teacher", "--gradient", "rate")
        for neuron, said in (("if", True), ("lif", False)):
            fresh = ("--inherit", False, "--neuron", neuron, "--timesteps", 1)
            assert call("distill", *options, "--method", "direct", *fresh, "--out", tmp_path / neuron) == 0
            assert ("consider --neuron lif" in capsys.readouterr().err) is said

    def test_demo_compares_what_it_made(self, home, monkeypatch, capsys):
        asked = []
        monkeypatch.setattr(demo, "demo", lambda out: asked.append(out) or [home / "teacher", home / "student"])
        assert call("demo", "--out", "somewhere") == 0
        assert asked == [Path("somewhere")]
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "teacher", "student"]


class TestControlC:
    def test_ends_with_130_and_says_how_to_go_on(self, home, tmp_path, monkeypatch, capsys):
        arguments = (
            "teach",
            "--network",
            "vgg9",
            "--width",
            4,
            "--data",
            home / "blobs.npz",
            "--out",
            tmp_path / "run",
        )
        arguments += tuple(QUICK.replace("--epochs 1", "--epochs 2").split())
        step, left = Course.step, [3]

        def interrupted(*args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Course, "step", interrupted)
            assert call(*arguments) == 130
        caught = capsys.readouterr()
        assert "--resume" in caught.err.splitlines()[-1] and "Traceback" not in caught.err
        assert call(*arguments, "--resume") == 0
        assert "going on after epoch 1, step 0" in capsys.readouterr().err
        assert [line["epoch"] for line in Run(tmp_path / "run").lines("metrics")] == [1, 2]


class TestWhileItRuns:
    """What happens to a run directory while a command works in it."""

    def train(self, home, out, *options):
        return call(
            *("teach", "--network", "vgg9", "--width", 4, "--data", home / "blobs.npz", "--out", out),
            *QUICK.replace("--epochs 1", "--epochs 2").split(),
            *options,
        )

    def at_step(self, patch, number, do):
        step, left = Course.step, [number]

        def counted(*args):
            left[0] -= 1
            if left[0] == 0:
                do()
            return step(*args)

        patch.setattr(Course, "step", counted)

    @pytest.mark.parametrize("minutes", [0, 5], ids=["at the next checkpoint", "at the next epoch"])
    @pytest.mark.parametrize("replaced", [False, True])
    @pytest.mark.parametrize("step", [1, 4])
    def test_that_it_vanishes_is_an_error(self, home, tmp_path, monkeypatch, capsys, minutes, replaced, step):
        out = tmp_path / "run"
        vanish = lambda: (shutil.rmtree(out), out.mkdir() if replaced else None)  # noqa: E731
        with monkeypatch.context() as patch:
            self.at_step(patch, step, vanish)
            assert self.train(home, out, "--checkpoint-minutes", minutes) == 2
        caught = capsys.readouterr()
        assert f"The run directory '{out}' was removed or replaced while this run worked in it" in caught.err
        assert "the teacher is in" not in caught.out and out.exists() is replaced
        assert not replaced or list(out.iterdir()) == []

    def test_that_it_vanishes_when_all_is_measured_is_an_error(self, home, tmp_path, monkeypatch, capsys):
        out, measure = tmp_path / "run", teach.measure_teacher
        with monkeypatch.context() as patch:
            patch.setattr(teach, "measure_teacher", lambda *given: shutil.rmtree(out) or measure(*given))
            assert self.train(home, out) == 2
        assert "was removed or replaced" in capsys.readouterr().err and not out.exists()

    def test_a_damaged_checkpoint_and_a_shorter_log_are_mended_to_the_same_bits(
        self, home, tmp_path, monkeypatch, capsys
    ):
        def interrupted():
            raise KeyboardInterrupt

        whole, out = tmp_path / "whole", tmp_path / "cut"
        assert self.train(home, whole) == 0
        with monkeypatch.context() as patch:
            self.at_step(patch, 4, interrupted)
            assert self.train(home, out, "--checkpoint-minutes", 0) == 130
        newest, log = out / "checkpoint.safetensors", out / "metrics.jsonl"
        content = newest.read_bytes()
        newest.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        log.write_bytes(b"")
        capsys.readouterr()
        assert self.train(home, out, "--checkpoint-minutes", 0, "--resume") == 0
        said = capsys.readouterr().err
        assert f"note: '{newest}' is damaged" in said and "Going on from the one before it." in said
        assert f"note: '{log}' was shorter than the checkpoint, or damaged, and is mended from it." in said
        for name in ("metrics.jsonl", "results.json"):
            assert (whole / name).read_bytes() == (out / name).read_bytes()
        first, second = (load_file(path / "model.safetensors") for path in (whole, out))
        assert all(torch.equal(value, second[name]) for name, value in first.items())

    def test_a_checkpoint_that_is_gone_gives_way_to_the_one_before(self, home, tmp_path, capsys):
        out = tmp_path / "run"
        assert self.train(home, out, "--checkpoint-minutes", 0) == 0
        for name in ("checkpoint.safetensors", "results.json"):
            (out / name).unlink()
        assert self.train(home, out, "--checkpoint-minutes", 0) == 2  # it still holds a run
        assert self.train(home, out, "--checkpoint-minutes", 0, "--resume") == 0
        said = capsys.readouterr().err
        assert "checkpoint.safetensors' is gone: going on from the one before it." in said
        assert "going on after epoch 1, step" in said

    def test_the_checkpoint_of_another_run_is_refused(self, home, tmp_path, capsys):
        for number in (0, 1):
            assert self.train(home, tmp_path / str(number), "--seed", number) == 0
        shutil.copy(tmp_path / "0" / "checkpoint.safetensors", tmp_path / "1")
        assert self.train(home, tmp_path / "1", "--seed", 1, "--resume") == 2
        assert "1/checkpoint.safetensors' was written by another run (" in capsys.readouterr().err


def test_a_process_of_its_own_behaves_the_same(home, tmp_path):
    out = tmp_path / "run"
    arguments = ("teach", "--network", "vgg9", "--width", 4, "--out", out, "--data", home / "blobs.npz", *QUICK.split())
    command = [sys.executable, "-m", "spikedistill", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    accuracy = Run(out).read("results")["test_accuracy"]
    assert done.stdout == f"test accuracy {accuracy:.2f} %; the teacher is in {out}\n"
    assert accuracy == Run(home / "teacher").read("results")["test_accuracy"]


def test_it_ends_without_a_word_where_nobody_reads_its_output():
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "spikedistill", "distill", "--help"], stdout=writes, stderr=subprocess.PIPE, text=True
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("given", ["photos", "photos/", "elsewhere/photos.npz"])
def test_a_teacher_goes_below_runs_under_the_name_of_its_data(given, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(teach, "teach", lambda recipe, out, *_: asked.append(out) or {"test_accuracy": 1.0})
    assert call("teach", "--data", f"{tmp_path}/{given}") == 0
    assert asked == [Path("runs/photos-teacher")]
