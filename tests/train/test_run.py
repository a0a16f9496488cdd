import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spikedistill.errors import RunError
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.recipes.choices import StudentChoice
from spikedistill.recipes.distill import Distill
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

BASE = Distill(method=KDSNN(pairs=(("layer1", "layer1"),)), training=Training(lr=0.1))
RECIPE = BASE.written()


@pytest.fixture
def run(tmp_path):
    begun = Run(tmp_path / "deep" / "run")
    begun.start(RECIPE, resume=False)
    return begun


class TestStart:
    def test_writes_recipe_and_environment(self, run):
        assert run.read("recipe") == json.loads(json.dumps(RECIPE))
        environment = run.read("environment")
        assert {"python", "processor", "threads", "versions"} <= environment.keys()
        assert environment["versions"].keys() >= {"spikedistill", "torch"}

    def test_over_a_run_with_a_checkpoint_is_refused_and_names_both_ways_out(self, run):
        run.checkpoint.touch()
        before = (run.path / "recipe.json").read_bytes()
        with pytest.raises(RunError, match=r"run' already holds a run.*--resume.*--out"):
            run.start(RECIPE, resume=False)
        assert (run.path / "recipe.json").read_bytes() == before

    def test_the_same_recipe_is_resumed(self, run):
        before = (run.path / "recipe.json").read_bytes()
        run.start(RECIPE, resume=True)
        assert (run.path / "recipe.json").read_bytes() == before

    @pytest.mark.parametrize(
        "changed, field, untouched",
        [
            ({"training": Training(lr=0.25)}, r"lr was 0\.1, now 0\.25", "momentum"),
            ({"student": StudentChoice(timesteps=8)}, r"timesteps was 4, now 8", "surrogate"),
            ({"method": KDSNN(pairs=(("layer1", "layer2"),))}, r"pairs was .*layer1.*, now .*layer2", "temperature"),
        ],
    )
    def test_a_changed_recipe_is_refused_and_names_the_field_alone(self, run, changed, field, untouched):
        with pytest.raises(RunError, match=field) as caught:
            run.start(replace(BASE, **changed).written(), resume=True)
        assert untouched not in str(caught.value)

    def test_another_kind_of_run_is_refused(self, run):
        with pytest.raises(RunError, match="kind was 'distill', now 'teach'"):
            run.start({**RECIPE, "kind": "teach"}, resume=True)

    def test_there_must_be_something_to_resume(self, tmp_path):
        with pytest.raises(RunError, match=r"There is no run in '.*nothing' to resume"):
            Run(tmp_path / "nothing").start(RECIPE, resume=True)
        assert not (tmp_path / "nothing").exists()


WORKING = """
import sys
from pathlib import Path
from spikedistill.train.run import Run
run = Run(Path(sys.argv[1]))
run.start({}, resume=False)
print("working", flush=True)
input()
"""


class TestLock:
    def test_another_process_is_kept_out_until_the_first_is_gone(self, tmp_path):
        other = subprocess.Popen(
            [sys.executable, "-c", WORKING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert other.stdout.readline() == b"working\n"
            with pytest.raises(RunError, match=r"Another process works in '.*': wait for it or end it, or choose"):
                Run(tmp_path).start({}, resume=True)
        finally:
            other.kill()
            other.communicate()
        Run(tmp_path).start({}, resume=True)

    def test_this_process_may_begin_again_after_a_failure(self, run):
        again = Run(run.path)
        again.start(RECIPE, resume=True)
        assert again == run

    @pytest.mark.filterwarnings("ignore:flock not supported")
    def test_a_file_system_without_locks_will_do(self, tmp_path, monkeypatch):
        def missing(*_):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", missing)
        Run(tmp_path / "run").start(RECIPE, resume=False)
        assert Run(tmp_path / "run").read("recipe")["kind"] == "distill"


class TestRead:
    @pytest.mark.parametrize("content", ["{", "", "[]", "3"])
    def test_a_broken_file_is_named(self, run, content):
        (run.path / "recipe.json").write_text(content)
        with pytest.raises(RunError, match=r"recipe\.json' cannot be read"):
            run.read("recipe")

    def test_a_missing_file_is_named(self, run):
        with pytest.raises(RunError, match=r"results\.json' cannot be read"):
            run.read("results")

    def test_bytes_that_are_no_text_are_refused(self, run):
        (run.path / "results.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RunError, match=r"results\.json' cannot be read"):
            run.read("results")


class TestLines:
    def test_come_back_as_they_were_appended(self, run):
        lines = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-300}]
        for line in lines:
            run.append("metrics", line)
        assert run.lines("metrics") == lines

    def test_of_a_file_that_is_not_there_are_none(self, run):
        assert run.lines("metrics") == []

    @pytest.mark.parametrize("half", ['{"epoch": 2, "lo', "{", '{"epoch": 2}'])
    def test_a_last_line_without_its_end_is_left_out(self, run, half):
        run.append("metrics", {"epoch": 1})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write(half)
        assert run.lines("metrics") == [{"epoch": 1}]

    def test_a_line_cut_short_gives_way_to_the_next(self, run):
        run.append("scores", {"a": 1})
        with (run.path / "scores.jsonl").open("a") as file:
            file.write('{"a": ')
        run.append("scores", {"a": 2})
        assert run.lines("scores") == [{"a": 1}, {"a": 2}]

    def test_a_directory_is_made_where_there_is_none(self, tmp_path):
        Run(tmp_path / "new").append("metrics", {"epoch": 1})
        assert Run(tmp_path / "new").lines("metrics") == [{"epoch": 1}]

    def test_a_full_disk_is_an_error_with_a_name(self, run, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(RunError, match=r"metrics\.jsonl' could not be written.*No space left"):
            run.append("metrics", {"epoch": 1})


class TestRewind:
    def test_drops_the_epochs_after_the_checkpoint_and_keeps_the_bytes_before(self, run):
        for epoch in (1, 2):
            run.append("metrics", {"epoch": epoch, "loss": 1 / 3, "lr": 1e-7})
            run.append("timing", {"epoch": epoch, "seconds": 0.1})
        before = {name: (run.path / f"{name}.jsonl").read_bytes() for name in ("metrics", "timing")}
        run.append("metrics", {"epoch": 3, "loss": 2.0})
        run.rewind(2)
        assert {name: (run.path / f"{name}.jsonl").read_bytes() for name in before} == before

    def test_drops_a_half_written_line(self, run):
        run.append("metrics", {"epoch": 1})
        before = (run.path / "metrics.jsonl").read_bytes()
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 2, "lo')
        run.rewind(1)
        assert (run.path / "metrics.jsonl").read_bytes() == before

    def test_to_the_beginning_leaves_nothing(self, run):
        run.append("metrics", {"epoch": 1})
        run.rewind(0)
        assert run.lines("metrics") == []


def test_a_choice_that_an_older_version_did_not_know_counts_as_its_default(tmp_path):
    run = Run(tmp_path / "old")
    run.start({"kind": "teach", "format": 2, "training": {"lr": 0.1}}, resume=False)
    now = {"kind": "teach", "format": 2, "training": {"lr": 0.1, "border": "zeros"}}
    run.start(now, resume=True, defaults={"training": {"lr": 0.5, "border": "zeros"}})
    with pytest.raises(RunError, match="border was 'zeros', now 'mirror'"):
        run.start({**now, "training": {"lr": 0.1, "border": "mirror"}}, resume=True, defaults=now)


class TestARunOfFormatOne:
    """Its recipe has other names, and its checkpoint and bits are not this version's."""

    @pytest.fixture
    def old(self, run):
        recipe = {
            "kind": "distill",
            "who": {"teacher": "runs/digits-teacher", "teacher_network": None},
            "student": {"student": "same", "timesteps": 4},
            "what": {"method": "kdsnn", "pairs": [["layer1", "layer1"]], "feature_weight": 1.0, "lam": 0.001},
            "data": {"data": "digits", "crop": 0},
            "training": {"lr": 0.1},
        }
        run.write("recipe", recipe)
        run.checkpoint.touch()
        return run

    def test_that_is_not_finished_is_refused_by_name(self, old):
        message = r"run in '.*deep.run' was begun, and not finished, by an older version of spikedistill: finish it"
        with pytest.raises(RunError, match=message):
            old.start(RECIPE, True, Distill().written())

    def test_that_is_finished_is_the_same_run_and_its_recipe_stays(self, old):
        old.write("results", {})
        before = old.read("recipe")
        old.start(RECIPE, True, Distill().written())
        assert old.read("recipe") == before

    @pytest.mark.parametrize(
        "changed, field",
        [
            ({"data": Data(name="mnist")}, "name was 'digits', now 'mnist'"),
            ({"data": Data(source="digits")}, "source was None, now 'digits'"),
            ({"method": replace(BASE.method, weight=2.0)}, "weight was 1.0, now 2.0"),
            ({"student": StudentChoice("vgg9", timesteps=4)}, "network was 'same', now 'vgg9'"),
        ],
    )
    def test_is_compared_under_the_names_of_this_format(self, old, changed, field):
        now = replace(BASE, **changed).written()
        assert field in old.changes(now, Distill().written())
        old.write("results", {})
        with pytest.raises(RunError, match=f"begun with another recipe .*{field}"):
            old.start(now, True, Distill().written())
