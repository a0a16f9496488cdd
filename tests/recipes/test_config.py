"""A recipe that was written down and read back is the same recipe."""

import dataclasses
import json
import shutil
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from commands import remember_recipes
from commands import run_command as call
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.errors import ConfigError, RunError
from spikedistill.objective.direct import Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature
from spikedistill.objective.schedule import Constant, Ramp, Switch
from spikedistill.objective.terms import Sum
from spikedistill.recipes import STUDENTS, TEACHERS
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.config import read_config, read_distill, read_teach
from spikedistill.recipes.distill import Distill
from spikedistill.recipes.methods import CONVERSIONS, METHODS
from spikedistill.recipes.teach import Teach
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

pytestmark = pytest.mark.usefixtures("without_compiler")

OWN = """
from dataclasses import dataclass
from spikedistill import Needs, Objective
from spikedistill.objective.logits import cross_entropy_of_mean

@dataclass(frozen=True)
class Own(Objective):
    strength: float = 0.5

    def __call__(self, batch, modules):
        return {"labels": self.strength * cross_entropy_of_mean(batch.student.logits, batch.labels, 0.0)}
"""


def none(name, digest):
    raise AssertionError("no class of the user's is asked for")


def through_json(recipe):
    return json.loads(json.dumps(recipe.written()))


def values_of(hint):
    """Values that JSON keeps for an annotation of a recipe's field."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        least, most = (0, 3) if kinds[-1] is ... else (len(kinds), len(kinds))
        return st.lists(values_of(kinds[0]), min_size=least, max_size=most).map(tuple)
    if get_args(hint):
        return st.one_of([values_of(part) for part in get_args(hint)])
    plain = {bool: st.booleans(), int: st.integers(0, 99), float: st.floats(0, 1), str: st.text(max_size=5)}
    return plain.get(hint, st.none())


def fields(kind):
    """Fields by name; the value is made in the test, as its checks of types draw random numbers."""
    return st.fixed_dictionaries({name: values_of(hint) for name, hint in get_type_hints(kind).items()})


OBJECTIVES = st.one_of(
    *(st.just(kind()) for kind in METHODS.values()),
    st.none(),
    st.just(KDSNN(pairs=(("layer1", "layer2"), ("a", "b")), adapt=True, alpha=0.25)),
    st.just(Sum(((0.5, Direct()), (Ramp(power=2.0), KDSNNFeature()), (Switch(), Sum(((Constant(2.0), Direct()),)))))),
)


class TestRoundTrip:
    @pytest.mark.parametrize("make", [*TEACHERS.values(), *STUDENTS.values(), Teach, Distill])
    def test_of_every_ready_recipe(self, make):
        recipe = make()
        read = (
            read_teach(through_json(recipe)) if isinstance(recipe, Teach) else read_distill(through_json(recipe), none)
        )
        assert read.written() == recipe.written()
        settled = recipe.settled() if isinstance(recipe, Distill) else recipe
        assert dataclasses.replace(read, training=settled.training) == settled

    @settings(max_examples=60)
    @given(fields(TeacherChoice), fields(StudentChoice), OBJECTIVES, fields(Data), fields(Training))
    def test_of_any_student(self, teacher, student, method, data, training):
        parts = TeacherChoice(**teacher), StudentChoice(**student), method, Data(**data), Training(**training)
        recipe = Distill(*parts)
        assert read_distill(through_json(recipe), none) == recipe.settled()

    @settings(max_examples=30)
    @given(st.text(), st.none() | st.integers(1, 9), st.floats(0, 1), fields(Data), fields(Training))
    def test_of_any_teacher(self, network, width, smoothing, data, training):
        recipe = Teach(network, width, smoothing, Data(**data), Training(**training))
        closed = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, lr=recipe.training.peak))
        assert read_teach(through_json(recipe)) == closed

    @pytest.mark.parametrize("name", [*METHODS, *CONVERSIONS])
    def test_of_every_method_through_a_file(self, name, tmp_path):
        recipe = Distill().with_method(name)
        Run(tmp_path).write("recipe", recipe.written())
        assert read_config(tmp_path, Distill) == read_config(tmp_path / "recipe.json", Distill) == recipe.settled()

    def test_of_a_run_of_the_first_format(self, tmp_path):
        old = {
            "kind": "distill",
            "who": {"teacher": "t"},
            "what": {"method": "kdsnn-feature", "feature_weight": 2.0},
            "student": {"student": "vgg9", "timesteps": 2},
            "data": {"data": "digits"},
            "training": {"epochs": 3},
        }
        Run(tmp_path).write("recipe", old)
        recipe = read_config(tmp_path, Distill)
        assert recipe == Distill(
            TeacherChoice("t"), StudentChoice("vgg9", timesteps=2), KDSNNFeature(weight=2.0), Data(), Training(epochs=3)
        )


class TestWrong:
    @pytest.mark.parametrize(
        "change, message",
        [
            ({"training": {"epochs": "ten"}}, r"epochs \(='ten'\) has the wrong type: expected int"),
            ({"training": {"epoch": 10}}, r"Training has unknown fields, 'epoch'"),
            ({"teacher": {"mean": [0.5, "x"]}}, r"mean \(=.*expected tuple\[float"),
            ({"data": {"sensor": [34]}}, r"sensor \(=.*expected tuple\[int, int\]"),
            ({"student": 5}, r"its part StudentChoice is '5'"),
            ({"method": {"name": "kdsn"}}, r"'kdsn'. Did you mean 'kdsnn'"),
            ({"method": {"name": "kdsnn", "heat": 2.0}}, r"'kdsnn' has no field heat"),
            ({"method": {"name": "kdsnn", "alpha": "x"}}, r"'kdsnn' cannot be created"),
            ({"method": {"name": "kdsnn", "alpha": 7.5}}, r"alpha \(=7\.5\) is a weight"),
            ({"method": None}, r"There is no method 'None'"),
        ],
    )
    def test_values_are_named(self, change, message, tmp_path):
        Run(tmp_path).write("recipe", {**Distill().written(), **change})
        with pytest.raises(ConfigError, match=rf"The recipe in '{tmp_path}' cannot be used: .*{message}"):
            read_config(tmp_path, Distill)

    def test_file_that_is_no_recipe_is_named(self, tmp_path):
        Run(tmp_path).write("results", {"test_accuracy": 90.0})
        with pytest.raises(RunError, match=rf"'{tmp_path}/results.json' holds no recipe: give a run directory"):
            read_config(tmp_path / "results.json", Distill)

    def test_kind_names_the_other_command(self, tmp_path):
        Run(tmp_path).write("recipe", Teach().written())
        with pytest.raises(RunError, match="holds a recipe of 'teach', but this command is 'distill'"):
            read_config(tmp_path, Distill)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("distill --config nowhere", "'nowhere' does not exist: give a run directory"),
            ("distill --config nowhere.json", "'nowhere.json' cannot be read"),
            ("distill digits --config runs", "Two recipes are given, 'digits' and --config runs"),
            ("teach --config {file}", "holds list, not names and values"),
        ],
    )
    def test_files_are_refused(self, arguments, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "list.json").write_text("[1, 2]")
        assert call(*arguments.format(file="list.json").split()) == 2
        caught = capsys.readouterr()
        assert message in caught.err and "Traceback" not in caught.err


@pytest.fixture
def asked(monkeypatch):
    """What the recipes are asked for, instead of doing it."""
    return remember_recipes(monkeypatch, lambda recipe, out, resume: recipe)


class TestOption:
    def test_takes_a_recipe_and_options_come_before_it(self, asked, tmp_path):
        recipe = dataclasses.replace(STUDENTS["cifar10"](), method=KDSNN(temperature=3.0))
        Run(tmp_path).write("recipe", recipe.written())
        assert call("distill", "--config", tmp_path, "--alpha", 0.5, "--no-flip", "--lr", 0.5, "--timesteps", 8) == 0
        settled = recipe.settled()
        assert asked == [
            dataclasses.replace(
                settled,
                student=dataclasses.replace(settled.student, timesteps=8),
                method=KDSNN(temperature=3.0, alpha=0.5),
                data=dataclasses.replace(settled.data, flip=False),
                training=dataclasses.replace(settled.training, lr=0.5),
            )
        ]

    def test_of_a_teacher_is_its_recipe(self, asked, tmp_path):
        recipe = TEACHERS["cifar10"]()
        Run(tmp_path).write("recipe", recipe.written())
        assert call("teach", f"--config={tmp_path / 'recipe.json'}", "--epochs", 3) == 0
        assert asked == [dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, epochs=3))]

    def test_with_another_method_leaves_that_of_the_run(self, asked, tmp_path):
        Run(tmp_path).write("recipe", Distill(method=KDSNN(temperature=3.0)).written())
        assert call("distill", "--config", tmp_path, "--method", "direct") == 0
        assert call("distill", "--config", tmp_path, "--method", "kdsnn") == 0
        assert call("distill", "--config", tmp_path, "--method", "conversion-max") == 0
        assert [recipe.method for recipe in asked] == [Direct(), KDSNN(temperature=3.0), None]
        assert asked[-1].student.rule == "max"

    def test_trains_the_same_run_again(self, tmp_path, write_blobs):
        write_blobs(tmp_path, 48, 24)
        quick = ("--epochs", 1, "--batch-size", 16, "--device", "cpu", "--precision", "fp32")
        data = ("--data", tmp_path / "blobs.npz", *quick)
        assert call("teach", "--network", "vgg9", "--width", 4, "--out", tmp_path / "teacher", *data) == 0
        options = ("--teacher", tmp_path / "teacher", "--method", "tet", "--timesteps", 2, "--lam", 0.01)
        assert call("distill", *options, *data, "--out", tmp_path / "first") == 0
        assert call("distill", "--config", tmp_path / "first", "--out", tmp_path / "second") == 0
        first, second = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("first", "second"))
        assert first == second
        assert Run(tmp_path / "first").read("recipe") == Run(tmp_path / "second").read("recipe")


class TestCode:
    """What a past run names as code is executed only where the user says so."""

    @pytest.fixture
    def run(self, tmp_path):
        """A run directory whose method is a class of the user's, with the copy of its file."""
        (tmp_path / "own.py").write_text(OWN)
        recipe = Distill().with_method(f"{tmp_path / 'own.py'}:Own")
        recipe = dataclasses.replace(recipe, method=dataclasses.replace(recipe.method, strength=2.0))
        Run(tmp_path / "run").write("recipe", recipe.written())
        shutil.copyfile(tmp_path / "own.py", tmp_path / "run" / "method.py")
        return tmp_path / "run"

    def test_is_refused_unasked(self, run, asked, capsys):
        (run / "method.py").write_text("raise AssertionError('this file was executed')")
        assert call("distill", "--config", run) == 2
        said = capsys.readouterr().err
        assert "'own.py:Own', which is not executed by default: give --method FILE.py:Own, or --trust-code" in said
        assert not asked

    def test_is_that_of_the_users_own_file(self, run, asked, capsys):
        assert call("distill", "--config", run, "--method", f"{run.parent / 'own.py'}:Own") == 0
        assert asked[0].method.strength == 2.0 and "is not the file" not in capsys.readouterr().err
        (run.parent / "own.py").write_text(OWN + "\n# changed")
        assert call("distill", "--config", run, "--method", f"{run.parent / 'own.py'}:Own", "--strength", 3) == 0
        assert asked[1].method.strength == 3.0

    def test_is_the_copy_beside_the_recipe_where_it_is_trusted_and_unchanged(self, run, asked, capsys):
        assert call("distill", "--config", run / "recipe.json", "--trust-code") == 0
        assert asked[0].method.strength == 2.0
        (run / "method.py").write_text(OWN + "\n# changed")
        assert call("distill", "--config", run, "--trust-code") == 2
        assert "is not next to it" in capsys.readouterr().err

    def test_is_not_needed_for_another_method(self, run, asked):
        (run / "method.py").unlink()
        assert call("distill", "--config", run, "--method", "direct") == 0
        assert asked[0].method == Direct()

    @pytest.mark.parametrize("command", ["teach", "distill"])
    def test_of_a_network_is_refused_unasked(self, command, asked, tmp_path, capsys):
        name = f"{tmp_path / 'net.py'}:net"
        recipe = Teach(name) if command == "teach" else Distill(student=StudentChoice(name))
        Run(tmp_path).write("recipe", recipe.written())
        assert call(command, "--config", tmp_path) == 2
        assert f"names Python code as a network, '{name}'" in capsys.readouterr().err
        assert call(command, "--config", tmp_path, "--trust-code") == 0
        option = "--network" if command == "teach" else "--student"
        assert call(command, "--config", tmp_path, option, "vgg9") == 0
        assert len(asked) == 2
