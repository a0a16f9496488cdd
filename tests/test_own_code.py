"""Code of the user's own: objectives by --method FILE.py:CLASS, and networks that a weights file names."""

import hashlib
import json
import shutil

import pytest
import torch

from spikedistill.files import read_facts
from spikedistill.train.run import Run

OBJECTIVE = '''
from dataclasses import dataclass

from spikedistill import Needs, Objective


@dataclass(frozen=True)
class StepError(Objective):
    """The mean squared error of the logits at every step."""

    strength: float = 1.0
    """What the error is multiplied by."""

    @property
    def needs(self):
        return Needs(teacher=True, every_step=True)

    def __call__(self, batch, modules):
        error = batch.student.logits - batch.require_teacher().logits
        return {"steps": self.strength * error.square().mean()}
'''
WRONG = """
from dataclasses import dataclass

from spikedistill import Direct, Objective


@dataclass(frozen=True)
class NoObjective:
    strength: float = 1.0


@dataclass(frozen=True)
class Needy(Objective):
    strength: float

    def __call__(self, batch, modules):
        return {}
""" + "".join(
    f"""

@dataclass(frozen=True)
class Takes_{name}(Direct):
    {name}: float = 1.0
"""
    for name in ("timesteps", "teacher", "teacher_width", "data", "method", "out", "trust_code", "help")
)
NETWORK = """
from torch import nn


def small(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))
"""
RAISES = 'raise AssertionError("this file was executed")\n'
QUICK = ("--epochs", 1, "--batch-size", 16, "--lr", 0.02, "--device", "cpu", "--precision", "fp32")


pytestmark = pytest.mark.usefixtures("without_compiler")


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs, call):
    """A folder with data, a teacher, and a student that an objective of one's own taught."""
    folder = tmp_path_factory.mktemp("own")
    write_blobs(folder, 48, 24)
    (folder / "steps.py").write_text(OBJECTIVE)
    (folder / "wrong.py").write_text(WRONG)
    data = ("--data", folder / "blobs.npz", *QUICK)
    assert call("teach", "--network", "vgg9", "--width", 4, "--out", folder / "teacher", *data) == 0
    assert call(*distill(folder), "--out", folder / "run") == 0
    return folder


def distill(home, kind="StepError", file="steps.py"):
    """The command that teaches with an objective of one's own."""
    known = ("--data", home / "blobs.npz", *QUICK, "--teacher", home / "teacher", "--timesteps", 2)
    return ("distill", *known, "--method", f"{home / file}:{kind}")


class TestObjective:
    def test_teaches_by_its_own_terms_and_is_kept_with_its_hash(self, home):
        run, file = Run(home / "run"), home / "steps.py"
        (line,) = run.lines("metrics")
        assert line["loss"] == line["steps"] > 0 and "labels" not in line
        expected = {"name": "steps.py:StepError", "sha256": sha256(file), "strength": 1.0}
        assert run.read("recipe")["method"] == run.read("results")["method"] == expected
        assert (home / "run" / "method.py").read_text() == OBJECTIVE

    def test_gives_its_fields_as_options(self, home, tmp_path, call, capsys):
        assert call(*distill(home), "--help") == 0
        shown = capsys.readouterr().out
        assert "--strength" in shown and "What the error is multiplied by." in shown and "--alpha" not in shown
        assert call(*distill(home), "--strength", 0.5, "--out", tmp_path / "half") == 0
        (whole,), (half,) = (Run(run).lines("metrics") for run in (home / "run", tmp_path / "half"))
        assert half["steps"] == pytest.approx(whole["steps"] / 2, rel=0.05)

    def test_gives_its_name_to_the_directory_and_the_table(self, home, tmp_path, monkeypatch, call, capsys):
        monkeypatch.chdir(tmp_path)
        assert call(*distill(home)) == 0
        assert (tmp_path / "runs" / "blobs-StepError-t2" / "results.json").exists()
        assert "steps.py:StepError" in capsys.readouterr().out

    def test_is_never_executed_by_what_reads_the_run(self, home, tmp_path, call, capsys):
        for name in ("run", "teacher"):
            shutil.copytree(home / name, tmp_path / name)
        (tmp_path / "run" / "method.py").write_text(RAISES)
        assert call("compare", tmp_path / "run") == 0
        assert "steps.py:StepError" in capsys.readouterr().out
        assert call("evaluate", tmp_path / "run", "--data-dir", tmp_path) == 0
        assert call("energy", tmp_path / "run", "--images", 3) == 0
        chosen = ("--kinds", "noise", "--images", 3, "--out", tmp_path / "immunity")
        assert call("immunity", tmp_path / "run", *chosen) == 0
        assert (
            call("distill", "--method", f"{tmp_path / 'run' / 'method.py'}:StepError") == 2
        )  # who names it has it executed
        assert "(AssertionError: this file was executed)" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "kind, message",
        [
            ("NoObjective", r"wrong.py:NoObjective' is not an objective: expected a class @dataclass(frozen=True)"),
            ("Nobody", "wrong.py' 'Nobody'. Known: "),
            ("NoObjectiv", "Did you mean 'NoObjective'?"),
            ("Needy", "wrong.py:Needy' cannot be created (Needy.__init__() missing"),
            ("Needy", "give each of its fields a default"),
            *(
                (f"Takes_{name}", f"The field '{name}' of wrong.py:Takes_{name} is an option already, --")
                for name in ("timesteps", "teacher", "teacher_width", "data", "method", "out", "trust_code")
            ),
        ],
    )
    def test_that_cannot_be_one_is_refused(self, kind, message, home, tmp_path, call, capsys):
        assert call(*distill(home, kind, "wrong.py"), "--out", tmp_path / "out") == 2
        caught = capsys.readouterr()
        assert caught.err.startswith("spikedistill: ") and message in caught.err and not caught.out
        assert not (tmp_path / "out").exists()

    def test_whose_file_has_changed_does_not_go_on(self, home, tmp_path, call, capsys):
        (tmp_path / "steps.py").write_text(OBJECTIVE)
        command = (*distill(home)[:-1], f"{tmp_path / 'steps.py'}:StepError", "--out", tmp_path / "run")
        assert call(*command) == 0
        assert call(*command, "--resume") == 0
        (tmp_path / "steps.py").write_text(OBJECTIVE.replace("square()", "abs()"))
        capsys.readouterr()
        assert call(*command, "--resume") == 2
        assert "begun with another recipe (sha256 was '" in capsys.readouterr().err
        assert (tmp_path / "run" / "method.py").read_text() == OBJECTIVE

    def test_is_kept_though_another_file_has_its_name(self, home, tmp_path, call):
        (tmp_path / "steps.py").write_text(NETWORK)
        student = ("--student", f"{tmp_path / 'steps.py'}:small", "--out", tmp_path / "run")
        assert call(*distill(home), *student) == 0
        assert (tmp_path / "run" / "method.py").read_text() == OBJECTIVE


@pytest.fixture(scope="module")
def named(home, call):
    """A teacher and a student whose files name code, and a student of the zoo that such a teacher taught."""
    (home / "net.py").write_text(NETWORK)
    data = ("--data", home / "blobs.npz", *QUICK)
    assert call("teach", "--network", f"{home / 'net.py'}:small", "--out", home / "own-teacher", *data) == 0
    known = ("distill", *data, "--teacher", home / "own-teacher", "--method", "direct", "--timesteps", 2)
    assert call(*known, "--trust-code", "--out", home / "own-student") == 0
    assert call(*known, "--trust-code", "--student", "vgg9", "--student-width", 4, "--out", home / "zoo-student") == 0
    return home


@pytest.fixture
def executed(named):
    """Replaces the file of the network by one that raises, and puts it back."""
    (named / "net.py").write_text(RAISES)
    yield
    (named / "net.py").write_text(NETWORK)


class TestNetworkOfAFile:
    COMMANDS = (("evaluate",), ("energy", "--images", 3), ("immunity", "--kinds", "noise", "--images", 3, "--out"))

    def command(self, name, run, folder):
        (words,) = [words for words in self.COMMANDS if words[0] == name]
        return (*words, folder / "out", run) if words[-1] == "--out" else (words[0], run, *words[1:])

    @pytest.mark.parametrize("run", ["own-teacher", "own-student"])
    @pytest.mark.parametrize("name", ["evaluate", "energy", "immunity"])
    def test_is_not_executed_unasked(self, name, run, named, executed, tmp_path, call, capsys):
        assert call(*self.command(name, named / run, tmp_path)) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"spikedistill: '{named / run / 'model.safetensors'}' names Python code")
        assert "net.py:small" in message and "trust_code=True" in message
        assert call(*self.command(name, named / run, tmp_path), "--trust-code") == 2
        assert "this file was executed" in capsys.readouterr().err

    @pytest.mark.parametrize("run", ["own-teacher", "own-student"])
    @pytest.mark.parametrize("name", ["evaluate", "energy", "immunity"])
    def test_is_measured_where_it_is_trusted(self, name, run, named, tmp_path, call, capsys):
        assert call(*self.command(name, named / run, tmp_path), "--trust-code") == 0
        if name == "evaluate":
            accuracy = Run(named / run).read("results")["test_accuracy"]
            assert f"{accuracy:.2f} %" in capsys.readouterr().out

    def test_is_compared_unexecuted(self, named, executed, monkeypatch, call, capsys):
        monkeypatch.setenv("COLUMNS", "400")
        assert call("compare", named / "own-teacher", named / "own-student") == 0
        assert capsys.readouterr().out.count("net.py:small") == 2

    def test_of_a_teacher_alone_leaves_the_teacher_out_unasked(self, named, executed, call, capsys):
        assert call("evaluate", named / "zoo-student") == 0
        caught = capsys.readouterr()
        assert "firing rate" in caught.out and "agreement" not in caught.out
        assert "Agreement was not measured: the teacher has moved" in caught.err

    def test_of_a_teacher_is_compared_with_where_it_is_trusted(self, named, call, capsys):
        assert call("evaluate", named / "zoo-student", "--trust-code") == 0
        assert f"{Run(named / 'zoo-student').read('results')['agreement']:.2f} %" in capsys.readouterr().out

    @pytest.mark.parametrize("run", ["own-teacher", "own-student"])
    def test_of_a_teacher_teaches_only_where_it_is_trusted(self, run, named, executed, tmp_path, call, capsys):
        known = ("distill", "--data", named / "blobs.npz", *QUICK, "--teacher", named / run, "--out", tmp_path / "out")
        assert call(*known, "--student", "vgg9", "--student-width", 4, "--method", "kdsnn-response") == 2
        message = capsys.readouterr().err
        assert "names Python code" in message and "trust_code=True" in message and not (tmp_path / "out").exists()

    def test_is_in_the_header_as_it_was_named(self, named):
        facts = read_facts(named / "own-student" / "model.safetensors")
        assert facts["network"]["name"] == f"{named / 'net.py'}:small"
        assert json.dumps(facts) and torch.tensor(facts["mean"]).shape == (3,)


ENDS = {
    "sys.exit(0)": "SystemExit(0)",
    "sys.exit()": "SystemExit()",
    "raise SystemExit": "SystemExit()",
    "argparse.ArgumentParser().parse_args(['--wrong'])": "SystemExit(2)",
    "raise Stop('now')": "Stop(now)",
    "raise Done": "Done()",
    "raise GeneratorExit": "GeneratorExit()",
}
"""What code may do that ends a process, and how the message calls it."""
ENDING = """
import argparse, sys
from dataclasses import dataclass

from torch import nn

from spikedistill import Direct


class Stop(KeyboardInterrupt):
    pass


class Done(BaseException):
    pass


CALLS = [0]


def end_at(moment, calls=1):
    if moment == "MOMENT":
        CALLS[0] += 1
        if CALLS[0] == calls:
            END


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))

    def forward(self, x):
        end_at("forward")
        end_at("training", calls=4)
        return self.layers(x)


def net(classes):
    end_at("made")
    return Net(classes)


@dataclass(frozen=True)
class Taught(Direct):
    def __post_init__(self):
        end_at("objective made")

    def __call__(self, batch, modules):
        end_at("objective")
        return super().__call__(batch, modules)


end_at("import")
"""


PICKY = """
import sys
from dataclasses import dataclass

from spikedistill import Direct

@dataclass(frozen=True)
class Picky(Direct):
    strength: float = 1.0

    def __post_init__(self):
        if self.strength == 2:
            # as one that tells the user what is wrong
            sys.exit(0)
"""


class TestThatEndsTheProcess:
    """It is never success: code 2, and a message that names the file."""

    def write(self, folder, moment, end):
        file = folder / "ends.py"
        file.write_text(ENDING.replace("MOMENT", moment).replace("END\n", f"{end}\n"))
        return file

    @pytest.mark.parametrize("end", ENDS)
    @pytest.mark.parametrize("moment", ["import", "made", "forward", "training"])
    def test_of_a_network(self, end, moment, home, tmp_path, call, capsys):
        file = self.write(tmp_path, moment, end)
        command = ("teach", "--network", f"{file}:net", "--data", home / "blobs.npz", *QUICK, "--out", tmp_path / "out")
        assert call(*command) == 2
        self.check(file, moment, end, capsys)

    @pytest.mark.parametrize("moment", ["import", "objective made", "objective"])
    def test_of_an_objective(self, moment, home, tmp_path, call, capsys):
        file = self.write(tmp_path, moment, "sys.exit(0)")
        command = (*distill(home, "Taught", file), "--out", tmp_path / "out")
        assert call(*command) == 2
        self.check(file, moment, "sys.exit(0)", capsys)

    def test_of_an_objective_that_the_options_make(self, home, tmp_path, call, capsys):
        file = tmp_path / "picky.py"
        file.write_text(PICKY)
        assert call(*distill(home, "Picky", file), "--strength", 2, "--out", tmp_path / "out") == 2
        assert f"'{file}', line 14, ended the process by SystemExit(0)" in capsys.readouterr().err

    def check(self, file, moment, end, capsys):
        caught = capsys.readouterr()
        message = caught.err.splitlines()[-1]
        assert message.startswith("spikedistill: ") and str(file) in message and "Traceback" not in caught.err
        if moment != "import" or "SystemExit" not in ENDS[end]:
            assert f"line {self.line(file, end)}, ended the process by {ENDS[end]}" in message
        assert "the teacher is in" not in caught.out and "the student is in" not in caught.out

    def line(self, file, end):
        (number,) = [n for n, line in enumerate(file.read_text().splitlines(), 1) if line.strip() == end]
        return number

    @pytest.mark.parametrize("command", ["evaluate", "energy", "immunity"])
    def test_of_a_trusted_network(self, command, named, tmp_path, call, capsys):
        shutil.copytree(named / "own-teacher", tmp_path / "run")
        (named / "net.py").write_text("import sys\n\ndef small(classes):\n    sys.exit(0)\n")
        try:
            out = ("--out", tmp_path / "out") if command == "immunity" else ()
            assert call(command, tmp_path / "run", "--trust-code", *out) == 2
        finally:
            (named / "net.py").write_text(NETWORK)
        assert f"'{named / 'net.py'}', line 4, ended the process by SystemExit(0)" in capsys.readouterr().err

    def test_leaves_control_c_and_wrong_options_as_they_are(self, home, tmp_path, call, capsys):
        file = self.write(tmp_path, "training", "raise KeyboardInterrupt")
        command = ("teach", "--network", f"{file}:net", "--data", home / "blobs.npz", *QUICK, "--out", tmp_path / "out")
        assert call(*command) == 130
        assert call(*command, "--help") == 0
        assert call(*command, "--nothing") == 2
        assert "ended this command" not in capsys.readouterr().err


class TestKept:
    def test_a_run_resumes_with_its_own_copy(self, home, tmp_path, call):
        shutil.copytree(home / "run", tmp_path / "run")
        (tmp_path / "run" / "results.json").unlink()
        copy, given = tmp_path / "run" / "method.py", f"{home / 'steps.py'}:StepError"
        options = [f"{copy}:StepError" if option == given else option for option in distill(home)]
        recipe = Run(tmp_path / "run").read("recipe")
        recipe["method"]["name"] = "method.py:StepError"
        Run(tmp_path / "run").write("recipe", recipe)
        assert call(*options, "--out", tmp_path / "run", "--resume") == 0
        assert copy.read_text() == OBJECTIVE
