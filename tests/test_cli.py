import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from commands import remember_recipes
from commands import run_command as call
from safetensors.torch import load_file

from spikedistill.cli import COMMANDS
from spikedistill.cli.evaluate import lines
from spikedistill.cli.parse import FEW, SECOND_STREAM
from spikedistill.deliver.tables import Table
from spikedistill.objective.direct import TET
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes import STUDENTS, TEACHERS, digits, teach
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.methods import CONVERSIONS, METHODS
from spikedistill.recipes.teach import Teach
from spikedistill.train.loop import Trainer
from spikedistill.train.recipe import Data, Training
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
    return remember_recipes(monkeypatch, lambda *asked: asked)


class TestHelp:
    @pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)], ids=repr)
    def test_of_the_whole_names_every_command(self, arguments, capsys):
        assert call(*arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in COMMANDS)
        assert max(map(len, shown.splitlines())) <= 80

    @pytest.mark.parametrize(
        "command, options",
        [
            ("teach", {"--network", "--width", "--data", "--epochs", "--lr", "--resume", "--out", "--seed"}),
            ("distill", {"--timesteps", "--method", "--temperature", "--resume", "--teacher", "--neuron", "--pairs"}),
            ("evaluate", {"Run directory", "--timesteps", "--data-dir", "--confidence"}),
            ("compare", {"Run directories"}),
            ("demo", {"--out", "--seeds", "--csv"}),
            ("energy", {"Run directories", "--images", "--out"}),
            ("immunity", {"Run directories", "--kinds", "--images", "--baseline", "--resume", "--out"}),
            ("reproduce", {"--budget", "--runs", "--seeds", "--out"}),
            ("recipes", {"ready recipes"}),
            ("export", {"RUN", "--format", "--form", "--out", "--int8", "--trust-code"}),
            ("report", {"Run directories", "--out", "--images", "--data-dir"}),
            ("pretrained", {"trained students"}),
            ("check", {"--data", "--timesteps", "--image-size", "NETWORK"}),
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
    def test_of_all_has_an_option_for_every_field_of_a_recipe(self, command, kind, capsys):
        call(command, "--help-all")
        shown = capsys.readouterr().out
        for field in dataclasses.fields(kind):
            part = getattr(kind(), field.name)
            names = options_of(part) if dataclasses.is_dataclass(part) else [field.name.replace("_", "-")]
            assert names and all(re.search(rf"--(no-)?{name} ", shown) for name in names)

    @pytest.mark.parametrize("command", ["teach", "distill"])
    def test_is_short_readable_and_fits_eighty_columns(self, command, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        assert call(command, "--help") == 0
        short = capsys.readouterr().out
        assert call(command, "--help-all") == 0
        whole = capsys.readouterr().out
        words = {text: set(re.findall(r"--[a-z][a-z-]*", text)) for text in (short, whole)}
        assert words[short] < words[whole] and len(words[short]) < 0.7 * len(words[whole])
        for shown in (short, whole):
            assert max(map(len, shown.splitlines())) <= 80
            assert "None" not in shown and "[" not in shown.replace("[RECIPE] [-h] [OPTIONS]", "")
            assert f"\n  spikedistill {command} digits" in shown.partition("examples:")[2]
        groups = re.findall(r"(?m)^\W+([a-z]+) options\W*$", short)
        assert groups[:3] == ["data", "training", "method" if command == "distill" else "network"]

    def test_has_one_column_on_a_wide_terminal_and_leaves_its_width_alone(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")
        assert call("distill", "--help-all") == 0
        lines = capsys.readouterr().out.splitlines()
        assert 100 < max(map(len, lines)) <= 120 and os.environ["COLUMNS"] == "300"
        assert not any(line.count(" options ") > 1 for line in lines)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_fits_eighty_columns_and_says_no_none(self, command, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        assert call(command, "--help") == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        assert "None}" not in shown and "(default: None)" not in shown and "``" not in shown

    def test_of_a_recipe_shows_its_values(self, capsys):
        call("distill", "cifar10", "--help")
        shown = capsys.readouterr().out
        assert (
            "runs/cifar10-teacher" in shown
            and "--no-flip" in shown
            and "(on by default; this turns it off)" in " ".join(shown.split())
        )

    def test_names_only_fields_that_there_are_as_those_that_most_people_need(self):
        kinds = {"data": Data, "training": Training, "teacher": TeacherChoice, "student": StudentChoice}
        assert kinds.keys() == FEW.keys()
        for title, names in FEW.items():
            assert set(names) < {field.name for field in dataclasses.fields(kinds[title])}
        assert set(SECOND_STREAM) < {field.name for field in dataclasses.fields(Data)} - {*FEW["data"]}

    @pytest.mark.parametrize("method", METHODS)
    def test_shows_what_a_second_stream_needs_for_methods_that_have_one(self, method, capsys):
        assert call("distill", "--method", method, "--help") == 0
        shown = capsys.readouterr().out
        events = {f"--event-{name}" for name in ("frames", "duration", "binning")}
        wanted = {"--source", "--paired", "--events", "--sensor", *events}
        found = wanted & set(re.findall(r"(?m)^\W (--[a-z-]+)", shown))
        assert found == (wanted if method == "cross-kd" else set())
        told = " ".join(shown.replace("│", " ").split()).partition("--image-size INT ")[2]
        assert "each image of a folder is resized to it, in --data and in --source." in told

    def test_says_defaults_in_words_where_the_recipe_leaves_them_open(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        call("teach", "digits", "--help")
        assert "else 0.1; 0.001 for AdamW)." in " ".join(capsys.readouterr().out.replace("│", " ").split())
        call("teach", "cifar10", "--help")
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "Peak learning rate. (default: 0.15)" in shown and "else 0.1;" not in shown


class TestOptions:
    def test_without_any_the_recipe_is_taken_as_it_is(self, asked, capsys):
        assert call("teach", "digits") == call("distill", "digits") == 0
        first, second = asked
        assert first == (digits.teacher(), Path("runs/digits-teacher"), False)
        assert second == (digits.student(), Path("runs/digits-kdsnn-t4"), False)
        assert "12.50 %" in capsys.readouterr().out

    def test_the_teacher_lands_where_its_student_looks_for_it(self, asked):
        for name in STUDENTS:
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
            ("kdsnn --alpha 2", "alpha (=2.0) is a weight: give a value from 0 to 1"),
            ("kdsnn-response --temperature 0", "temperature (=0.0) must be above 0 and finite"),
            ("kdsnn-feature --weight -1", "weight (=-1.0) must be 0 or more and finite"),
            ("tet --lam 1.5", "lam (=1.5) is a weight"),
            ("direct --label-smoothing -0.1", "label_smoothing (=-0.1) is a weight"),
            ("conversion-max --rule percentile", "rule (=percentile) is not that of --method conversion-max"),
        ],
    )
    def test_refuses_a_value_out_of_range_in_the_words_of_the_objective(self, options, message, asked, capsys):
        assert call("distill", "--method", *options.split()) == 2
        caught = capsys.readouterr()
        assert caught.err.startswith(f"spikedistill: {message}") and not caught.out and not asked


class TestSeveral:
    """Several methods or seeds in one command."""

    @pytest.fixture
    def many(self, monkeypatch, asked):
        """What is asked for several students, instead of training them."""
        seen = []
        monkeypatch.setattr("spikedistill.recipes.several.several", lambda *given: seen.append(given) or [Path("x")])
        return seen

    def test_methods_share_the_recipe_and_a_folder(self, many, asked):
        methods = ("direct", "kdsnn", "conversion-max")
        assert call("distill", "digits", "--method", *methods, "--seeds", 3, "--timesteps", 2, "--resume") == 0
        ((recipe, named, seeds, out, resume, *_),) = many
        base = digits.student()
        assert recipe == dataclasses.replace(base, student=dataclasses.replace(base.student, timesteps=2))
        assert (list(named), seeds, out, resume) == (list(methods), 3, Path("runs/digits-students"), True)
        assert not asked

    def test_methods_need_no_seeds(self, many):
        assert call("distill", "--method", "direct", "tet", "--out", "x") == 0
        assert many[0][1:4] == (("direct", "tet"), 1, Path("x"))

    def test_seeds_of_one_method_keep_its_fields(self, many):
        assert call("distill", "--method", "kdsnn-response", "--temperature", 3, "--seeds", 1) == 0
        ((recipe, named, seeds, *_),) = many
        assert (recipe.method.temperature, list(named), seeds) == (3.0, ["kdsnn-response"], 1)

    def test_methods_have_no_options_of_their_own(self, many, capsys):
        assert call("distill", "--method", "direct", "kdsnn", "--temperature=3") == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "--temperature=3 is an option of one method, and 2 are given (direct, kdsnn)" in said and not many

    def test_no_method_is_an_error(self, many, asked, capsys):
        assert call("distill", "--timesteps", 2, "--method") == 2
        assert "No method was given: name one or more after --method." in capsys.readouterr().err
        assert not many and not asked

    def test_methods_are_checked_by_name(self, many, capsys):
        assert call("distill", "--method", "direct", "kdsn") == 2
        assert "Did you mean 'kdsnn'" in capsys.readouterr().err and not many

    def test_train_a_run_each(self, home, tmp_path, capsys):
        options = ("--data", home / "blobs.npz", "--teacher", home / "teacher", "--timesteps", 1, "--out", tmp_path)
        assert call("distill", *options, *QUICK.split(), "--method", "direct", "conversion-max", "--seeds", 2) == 0
        caught = capsys.readouterr()
        names = [f"{method}-t1-s{seed}" for method in ("direct", "conversion-max") for seed in (0, 1)]
        assert all(Run(tmp_path / name).finished for name in names)
        assert caught.out.splitlines()[-1] == f"the students are in {tmp_path}"

    @pytest.mark.parametrize("command, name", [("teach", "digits-teacher"), ("distill", "digits-kdsnn-t4")])
    def test_a_seed_of_its_own_stands_in_the_name_of_the_directory(self, command, name, asked):
        assert call(command, "digits", "--seed", 0) == call(command, "digits", "--seed", 7) == 0
        assert [str(out) for _, out, _ in asked] == [f"runs/{name}", f"runs/{name}-s7"]


class TestTruthValues:
    """Only the option that changes a default is listed; both are understood, and the last one counts."""

    @pytest.mark.parametrize(
        "words, expected",
        [
            ("", (False, True)),
            ("--flip --no-channels-last", (True, False)),
            ("--no-flip --channels-last", (False, True)),
            ("--flip --no-flip", (False, True)),
            ("--no-flip --flip", (True, True)),
            ("--no-channels-last --channels-last", (False, True)),
            ("--channels-last --no-channels-last", (False, False)),
        ],
    )
    def test_are_set_by_either_option(self, words, expected, asked):
        assert call("teach", "digits", *words.split()) == 0
        recipe = asked[0][0]
        assert (recipe.data.flip, recipe.training.channels_last) == expected


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
            ("evaluate", "Run directory"),
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
        lines = capsys.readouterr().out.splitlines()
        commands = [f"spikedistill teach {name}" for name in TEACHERS]
        assert lines[::2] == commands + [f"spikedistill distill {name}" for name in STUDENTS]
        assert all(re.fullmatch(r"    [A-Z][^`]*\.", line) for line in lines[1::2])

    def test_compare_prints_the_table_and_nothing_else(self, home, capsys):
        assert call("compare", home / "teacher", home / "student") == 0
        caught = capsys.readouterr()
        head, teacher, student, *_ = caught.out.splitlines()
        assert head.split()[:4] == ["run", "accuracy", "(%)", "method"] and "t=2" in head
        accuracy = Run(home / "teacher").read("results")["test_accuracy"]
        results = Run(home / "student").read("results")
        assert teacher.split()[:2] == ["teacher", f"{accuracy:.2f}"]
        assert student.split()[:2] == ["student", f"{results['test_accuracy']:.2f}"]
        assert f"{results['firing_rate']:.2f}" in student.split()
        assert not caught.err

    def test_evaluate_prints_every_measure(self, home, capsys):
        assert call("evaluate", home / "student", "--timesteps", 3) == 0
        caught = capsys.readouterr()
        results = Run(home / "student").read("results")
        layers = list(results["firing_rate_by_layer"])
        lines = [re.split(r"  +", line.strip()) for line in caught.out.splitlines()]
        assert [line[0] for line in lines] == [
            *("test accuracy", "accuracy at t=1..3, %", "teacher's test accuracy", "agreement with teacher"),
            *("divergence from teacher", "firing rate", "T x D", "latency in sub-steps"),
            *("firing rate by layer", *layers),
        ]
        assert lines[2][1] == f"{results['teacher_accuracy']:.2f} %" and len(lines[1][1].split()) == 3
        assert lines[6][1] == "3x1" and lines[7][1].startswith("10 layer by layer, 3 step by step (longest path: 8")
        assert "evaluate: measuring on" in caught.err and "thresholds were trained" in caught.err

    def test_evaluate_names_schedule_latency_and_what_waits(self):
        buffers = [
            {"layer": "stem", "where": "add", "before": "layer1", "sub_steps": 4, "bits": 4000},
            {"layer": "layer1", "where": "add_1", "before": "layer2", "sub_steps": 8, "bits": 800},
        ]
        results = {"test_accuracy": 90.0, "timesteps": 2, "levels": 4, "schedule": "layer-by-layer"}
        results |= {"longest_path": 19, "latency": {"layer-by-layer": 80}, "buffers": buffers}
        assert lines(results) == [
            "test accuracy         90.00 %",
            "T x D                 2x4, layer by layer",
            "latency in sub-steps  80 layer by layer (longest path: 19 layers of neurons)",
            "spike buffers         4,800 bits in 2 buffers, layer by layer; the largest, of stem before layer1: 4,000"
            " bits for 4 sub-steps",
        ]
        single = {**results, "timesteps": 8, "levels": 1, "schedule": "step-by-step", "buffers": []}
        assert lines({**single, "latency": {"step-by-step": 8}})[1] == "T x D                 8x1, step by step"

    def test_evaluate_prints_the_accuracy_of_a_teacher(self, home, capsys):
        assert call("evaluate", home / "teacher") == 0
        caught = capsys.readouterr()
        accuracy = Run(home / "teacher").read("results")["test_accuracy"]
        assert caught.out == f"test accuracy  {accuracy:.2f} %\n"
        assert "measuring on" in caught.err and "note" not in caught.err

    def test_evaluate_says_where_the_teacher_is_gone(self, home, tmp_path, capsys):
        shutil.copytree(home / "student", tmp_path / "student")
        recipe = Run(home / "student").read("recipe")
        recipe["teacher"]["source"] = "nowhere"
        Run(tmp_path / "student").write("recipe", recipe)
        assert call("evaluate", tmp_path / "student") == 0
        assert "Agreement was not measured: the teacher has moved" in capsys.readouterr().err

    def test_evaluate_prints_early_exit_where_it_is_asked_for(self, home, capsys):
        assert call("evaluate", home / "student", "--confidence", 0) == 0
        lines = dict(re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines() if "  " in line)
        first = Run(home / "student").read("results")["accuracy_by_step"][0]
        assert lines["early exit accuracy"] == f"{first:.2f} %" and lines["early exit steps"] == "1.00 (mean)"

    def test_results_go_to_standard_output_and_the_work_to_standard_error(self, home, tmp_path, capsys):
        out = tmp_path / "run"
        options = ("--data", home / "blobs.npz", *QUICK.split(), "--teacher", home / "teacher", "--timesteps", 1)
        assert call("distill", *options, "--method", "direct", "--out", out) == 0
        caught = capsys.readouterr()
        assert caught.out.splitlines()[-1] == f"the student is in {out}"
        assert "epoch 1" not in caught.out and "direct: epoch 1 of 1: " in caught.err
        assert "direct: test accuracy " in caught.err and f"next:\n  spikedistill evaluate {out}\n" in caught.err
        assert "direct: cpu, float32, channels_last, torch convolutions: float32 was asked for" in caught.err
        assert "rate-based" not in caught.err

    def test_neurons_that_do_not_suit_the_rate_based_gradient_are_pointed_out(self, home, tmp_path, capsys):
        options = ("--data", home / "blobs.npz", *QUICK.split(), "--teacher", home / "teacher", "--gradient", "rate")
        for neuron, said in (("if", True), ("lif", False)):
            fresh = ("--inherit", False, "--neuron", neuron, "--timesteps", 1)
            assert call("distill", *options, "--method", "direct", *fresh, "--out", tmp_path / neuron) == 0
            assert ("consider --neuron lif" in capsys.readouterr().err) is said

    def test_demo_shows_what_it_made(self, home, tmp_path, monkeypatch, capsys):
        asked, out = [], tmp_path / "demo.csv"
        monkeypatch.setattr("spikedistill.cli.demo.run_demo", lambda *given: asked.append(given) or [home / "student"])
        monkeypatch.setattr("spikedistill.cli.demo.shown", lambda paths: Table(["run"], [[p.name] for p in paths]))
        monkeypatch.setattr("spikedistill.cli.demo.figures", lambda paths: Table(["method", "seed"], [["kdsnn", 7]]))
        monkeypatch.setattr("spikedistill.cli.demo.report", lambda paths, page, **_: page)
        assert call("demo", "--out", "somewhere", "--seeds", 3, "--csv", out) == 0
        assert asked == [(Path("somewhere"), 3)]
        table, _, told = capsys.readouterr().out.partition("pictures")
        assert table.split() == ["run", "student"] and "somewhere/report.html" in told
        assert out.read_text() == "method,seed\nkdsnn,7\n"
        out.write_text("mine")
        assert call("demo", "--csv", out) == 2 and len(asked) == 1 and out.read_text() == "mine"


def train_two_epochs(home, out, *options):
    return call(
        *("teach", "--network", "vgg9", "--width", 4, "--data", home / "blobs.npz", "--out", out),
        *QUICK.replace("--epochs 1", "--epochs 2").split(),
        *options,
    )


class TestControlC:
    def test_ends_with_130_and_says_how_to_go_on(self, home, tmp_path, monkeypatch, capsys):
        step, left = Trainer.step, [3]

        def interrupted(*args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", interrupted)
            assert train_two_epochs(home, tmp_path / "run") == 130
        caught = capsys.readouterr()
        assert "--resume" in caught.err.splitlines()[-1] and "Traceback" not in caught.err
        assert train_two_epochs(home, tmp_path / "run", "--resume") == 0
        assert "continuing after epoch 1, step 0" in capsys.readouterr().err
        assert [line["epoch"] for line in Run(tmp_path / "run").lines("metrics")] == [1, 2]

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB in all."),
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 9"),
            MemoryError("Unable to allocate 9 GiB"),
        ],
    )
    def test_that_ran_out_of_memory_says_what_takes_less_and_goes_on_with_it(
        self, home, tmp_path, monkeypatch, capsys, error
    ):

        def full(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", full)
            assert train_two_epochs(home, tmp_path / "run") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"memory ran out ({str(error).partition('. GPU')[0]}). Give a smaller --batch-size in another" in said
        assert train_two_epochs(home, tmp_path / "run", "--resume", "--no-keep-memory") == 0
        assert "keep_memory was True, now False" in capsys.readouterr().err


class TestWhileItRuns:
    """What happens to a run directory while a command works in it."""

    def at_step(self, patch, number, do):
        step, left = Trainer.step, [number]

        def counted(*args):
            left[0] -= 1
            if left[0] == 0:
                do()
            return step(*args)

        patch.setattr(Trainer, "step", counted)

    @pytest.mark.parametrize("minutes", [0, 5], ids=["at the next checkpoint", "at the next epoch"])
    @pytest.mark.parametrize("replaced", [False, True])
    @pytest.mark.parametrize("step", [1, 4])
    def test_that_it_vanishes_is_an_error(self, home, tmp_path, monkeypatch, capsys, minutes, replaced, step):
        out = tmp_path / "run"
        vanish = lambda: (shutil.rmtree(out), out.mkdir() if replaced else None)  # noqa: E731
        with monkeypatch.context() as patch:
            self.at_step(patch, step, vanish)
            assert train_two_epochs(home, out, "--checkpoint-minutes", minutes) == 2
        caught = capsys.readouterr()
        assert f"The run directory '{out}' was removed or replaced while this run worked in it" in caught.err
        assert "the teacher is in" not in caught.out and out.exists() is replaced
        assert not replaced or list(out.iterdir()) == []

    def test_that_it_vanishes_when_all_is_measured_is_an_error(self, home, tmp_path, monkeypatch, capsys):
        out, measure = tmp_path / "run", teach.measure_teacher
        with monkeypatch.context() as patch:
            patch.setattr(teach, "measure_teacher", lambda *given: shutil.rmtree(out) or measure(*given))
            assert train_two_epochs(home, out) == 2
        assert "was removed or replaced" in capsys.readouterr().err and not out.exists()

    def test_a_damaged_checkpoint_and_a_shorter_log_are_mended_to_the_same_bits(
        self, home, tmp_path, monkeypatch, capsys
    ):
        def interrupted():
            raise KeyboardInterrupt

        whole, out = tmp_path / "whole", tmp_path / "cut"
        assert train_two_epochs(home, whole) == 0
        with monkeypatch.context() as patch:
            self.at_step(patch, 4, interrupted)
            assert train_two_epochs(home, out, "--checkpoint-minutes", 0) == 130
        newest, log = out / "checkpoint.safetensors", out / "metrics.jsonl"
        content = newest.read_bytes()
        newest.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        log.write_bytes(b"")
        capsys.readouterr()
        assert train_two_epochs(home, out, "--checkpoint-minutes", 0, "--resume") == 0
        said = capsys.readouterr().err
        assert f"note: '{newest}' is damaged" in said and "Going on from the previous one." in said
        assert f"note: '{log}' was shorter than the checkpoint, or damaged, and is repaired from it." in said
        for name in ("metrics.jsonl", "results.json"):
            assert (whole / name).read_bytes() == (out / name).read_bytes()
        first, second = (load_file(path / "model.safetensors") for path in (whole, out))
        assert all(torch.equal(value, second[name]) for name, value in first.items())

    def test_a_checkpoint_that_is_gone_gives_way_to_the_one_before(self, home, tmp_path, capsys):
        out = tmp_path / "run"
        assert train_two_epochs(home, out, "--checkpoint-minutes", 0) == 0
        for name in ("checkpoint.safetensors", "results.json"):
            (out / name).unlink()
        assert train_two_epochs(home, out, "--checkpoint-minutes", 0) == 2  # it still holds a run
        assert train_two_epochs(home, out, "--checkpoint-minutes", 0, "--resume") == 0
        said = capsys.readouterr().err
        assert "checkpoint.safetensors' is missing: continuing from the previous checkpoint." in said
        assert "continuing after epoch 1, step" in said

    def test_the_checkpoint_of_another_run_is_refused(self, home, tmp_path, capsys):
        for number in (0, 1):
            assert train_two_epochs(home, tmp_path / str(number), "--seed", number) == 0
        shutil.copy(tmp_path / "0" / "checkpoint.safetensors", tmp_path / "1")
        assert train_two_epochs(home, tmp_path / "1", "--seed", 1, "--resume") == 2
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


BY_RICH = """
import sys, rich.console, spikedistill.cli
spikedistill.cli.run = lambda command: rich.console.Console().print("x\\n" * 9999)
sys.argv = ["spikedistill", "recipes"]
spikedistill.cli.main()
"""


@pytest.mark.parametrize(
    "words", [["-m", "spikedistill", "--help"], ["-m", "spikedistill", "distill", "--help"], ["-c", BY_RICH]]
)
def test_it_ends_without_a_word_where_nobody_reads_its_output(words):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, *words], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("given", ["photos", "photos/", "elsewhere/photos.npz"])
def test_a_teacher_goes_below_runs_under_the_name_of_its_data(given, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "spikedistill.cli.teach.teach", lambda recipe, out, *_: asked.append(out) or {"test_accuracy": 1.0}
    )
    assert call("teach", "--data", f"{tmp_path}/{given}") == 0
    assert asked == [Path("runs/photos-teacher")]
