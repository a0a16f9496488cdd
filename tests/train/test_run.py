import errno
import json
import os
import shutil
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

    def test_goes_on_with_other_choices_of_where_and_how_and_says_so(self, run, caplog):
        """On another device, with less memory, from another place: none of them changes what is computed."""
        training = replace(BASE.training, device="cpu", keep_memory=False, checkpoint_minutes=1.0)
        student, data = replace(BASE.student, recompute="stages"), replace(BASE.data, data_dir="there")
        other = replace(BASE, student=student, training=training, data=data).written()
        run.start(other, resume=True)
        assert run.read("recipe") == json.loads(json.dumps(other))
        (said,) = caplog.messages
        assert "other settings than it was begun with (recompute was 'nothing', now 'stages'; " in said
        assert "device was 'auto', now" in said
        with pytest.raises(RunError, match=r"another recipe \(lr was 0\.1, now 0\.3\)"):
            run.start(replace(BASE, training=replace(training, lr=0.3)).written(), resume=True)
        assert run.read("recipe") == json.loads(json.dumps(other))

    def test_another_kind_of_run_is_refused(self, run):
        with pytest.raises(RunError, match="kind was 'distill', now 'teach'"):
            run.start({**RECIPE, "kind": "teach"}, resume=True)

    def test_there_must_be_something_to_resume(self, tmp_path):
        with pytest.raises(RunError, match=r"There is no run in '.*nothing' to resume"):
            Run(tmp_path / "nothing").start(RECIPE, resume=True)
        assert not (tmp_path / "nothing").exists()


class TestPlace:
    """A run is begun where nothing of anybody else's lies, and ends where it was begun."""

    @pytest.mark.parametrize(
        "files",
        [
            {"recipe.json": '{"flour": 500, "eggs": 3}'},
            {"recipe.json": "[]", "metrics.jsonl": "mine"},
            {"recipe.json": "Two eggs, 500 g of flour."},
            {"recipe.json": '{"kind": "cake"}'},
            {"metrics.jsonl": "mine"},
            {"model.safetensors": "weights"},
            {"thesis.tex": "text"},
            {"photos/cat/1.png": "cat"},
            {".git/HEAD": "ref"},
            {"results.json": "{}", "environment.json": "{}"},
            {"recipe.json": '{"kind": "teach", "dish": "soup"}'},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("kind", ["teach", "distill", "immunity"])
    def test_with_files_of_somebody_else_is_refused_untouched(self, files, kind, tmp_path):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        with pytest.raises(RunError, match=r"holds files \(.*\) but no run of spikedistill: choose an empty or a new"):
            Run(tmp_path).start({"kind": kind}, resume=False)
        found = {str(x.relative_to(tmp_path)): x.read_text() for x in tmp_path.rglob("*") if x.is_file()}
        assert found == files

    def test_with_a_recipe_of_somebody_else_is_not_resumed_either(self, tmp_path):
        (tmp_path / "recipe.json").write_text('{"flour": 500}')
        with pytest.raises(RunError, match="no run of spikedistill"):
            Run(tmp_path).start(RECIPE, resume=True)
        assert os.listdir(tmp_path) == ["recipe.json"]

    def test_that_is_empty_or_holds_hidden_files_will_do(self, tmp_path):
        (tmp_path / ".DS_Store").touch()
        Run(tmp_path).start(RECIPE, resume=False)

    @pytest.mark.parametrize("left", [["lock"], ["lock", "environment.json"], ["lock", "recipe.json.part"]])
    def test_where_a_run_was_killed_at_its_beginning_will_do(self, run, left):
        for file in run.path.iterdir():
            if file.name not in left:
                file.unlink()
        (run.path / left[-1]).touch()
        Run(run.path).start({**RECIPE, "kind": "teach"}, resume=False)

    @pytest.mark.parametrize("kind", ["teach", "immunity"])
    def test_of_another_command_is_refused_though_nothing_was_computed(self, run, kind):
        with pytest.raises(RunError, match=r"already holds a run, of 'distill': choose another --out"):
            run.start({"kind": kind}, resume=False)
        run.start(RECIPE, resume=False)

    def test_of_a_run_of_before_is_known_by_its_kind(self, run):
        old = json.loads((run.path / "recipe.json").read_text())
        (run.path / "recipe.json").write_text(json.dumps({name: old[name] for name in RECIPE}))
        run.start(RECIPE, resume=False)

    @pytest.mark.parametrize("out", ["photos", "photos/train", "photos/train/run", "photos/../photos/run"])
    def test_among_the_images_is_refused(self, out, tmp_path):
        (tmp_path / "photos").mkdir()
        recipe = {**RECIPE, "data": {"name": str(tmp_path / "photos")}}
        with pytest.raises(RunError, match=r"is inside the folder of the data, '.*photos': choose another --out"):
            Run(tmp_path / out).start(recipe, resume=False)
        assert os.listdir(tmp_path / "photos") == []
        Run(tmp_path / "photos-run").start(recipe, resume=False)

    @pytest.mark.parametrize("harm", ["removed", "replaced", "emptied", "another run"])
    @pytest.mark.parametrize("use", ["write", "append", "read", "lines", "checkpoint", "model"])
    def test_that_vanishes_is_noticed_at_the_next_use(self, run, harm, use, tmp_path):
        shutil.move(run.path, tmp_path / "moved")
        if harm != "removed":
            run.path.mkdir()
        if harm == "another run":
            shutil.copytree(tmp_path / "moved", run.path, dirs_exist_ok=True)
        uses = {
            "write": lambda: run.write("results", {}),
            "append": lambda: run.append("metrics", {"epoch": 1}),
            "read": lambda: run.read("recipe"),
            "lines": lambda: run.lines("metrics"),
            "checkpoint": lambda: run.checkpoint,
            "model": lambda: run.model,
        }
        with pytest.raises(RunError, match=r"run' was removed or replaced while this run worked in it.*start again"):
            uses[use]()
        assert run.path.exists() is (harm != "removed")

    def test_is_named_alike_for_the_same_recipe_on_the_same_machine_alone(self, tmp_path):
        names = []
        often = {**RECIPE, "training": {**RECIPE["training"], "checkpoint_minutes": 0.0}}
        other = {**RECIPE, "training": {**RECIPE["training"], "seed": 1}}
        for number, recipe in enumerate((RECIPE, often, other)):
            Run(tmp_path / str(number)).start(recipe, resume=False)
            names.append(json.loads((tmp_path / str(number) / "environment.json").read_text())["run"])
        assert names[0] == names[1] != names[2]


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


class TestDamagedLines:
    @pytest.mark.parametrize("damaged", [b'{"a": 2', b"[2]", b'"a"', b"", b"{'a': 2}", b'{"a": "\xff"}'])
    @pytest.mark.parametrize("name", ["metrics", "scores"])
    def test_are_named(self, run, name, damaged):
        run.append(name, {"a": 1})
        with (run.path / f"{name}.jsonl").open("ab") as file:
            file.write(damaged + b"\n")
        run.append(name, {"a": 3})
        with pytest.raises(RunError, match=rf"Line 2 of '.*{name}\.jsonl' is damaged .*delete that line; --resume"):
            run.lines(name)

    def test_of_line_ends_as_git_writes_them_for_windows_are_none(self, run):
        run.append("scores", {"a": 1})
        run.append("scores", {"a": 2})
        for file in (*run.path.glob("*.json"), run.path / "scores.jsonl"):
            file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
        assert run.lines("scores") == [{"a": 1}, {"a": 2}] and run.read("recipe")

    def test_of_scores_are_noticed_at_any_bit(self, run):
        for score in (91.25, 90.0):
            run.append("scores", {"accuracy": score})
        content, taken = (run.path / "scores.jsonl").read_bytes(), []
        for bit in range(8 * (len(content) - 1)):  # the last is the end of the line: without it the line is left out
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            (run.path / "scores.jsonl").write_bytes(damaged)
            try:
                taken.append(run.lines("scores"))
            except RunError:
                continue
        assert taken == []

    def test_of_scores_from_another_run_are_refused(self, run, tmp_path):
        run.append("scores", {"accuracy": 1.0})
        other = Run(tmp_path / "other")
        other.start({**RECIPE, "seed": 1}, resume=False)
        shutil.copy(run.path / "scores.jsonl", other.path)
        with pytest.raises(RunError, match=r"Line 1 of .* is damaged \(it was written by another run"):
            other.lines("scores")


class TestMending:
    LINES = tuple({"epoch": epoch, "loss": 1 / epoch, "lr": 1e-7} for epoch in (1, 2, 3))

    @pytest.fixture
    def logged(self, run):
        for line in self.LINES:
            run.append("metrics", line)
        return run

    def harm(self, run, harm):
        file = run.path / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        changed = {
            "gone": [],
            "shorter": lines[:2],
            "without its first": lines[1:],
            "twice": [*lines, lines[2]],
            "swapped": lines[::-1],
            "of another run": [lines[0], lines[1].replace(b"0.5", b"0.7"), lines[2]],
            "flipped": [lines[0].replace(b'"epoch": 1', b'"epoch": 3'), *lines[1:]],
            "broken": [lines[0], b'{"epoch": 2, \n', lines[2]],
            "no text": [lines[0], b"\xff\n", lines[2]],
            "no line": [lines[0], b"[2]\n", lines[2]],
        }
        file.write_bytes(b"".join(changed[harm]))
        if harm == "gone":
            file.unlink()

    HARMS = ("gone", "shorter", "without its first", "twice", "swapped", "flipped", "broken", "no text", "no line")

    @pytest.mark.parametrize("harm", [*HARMS, "of another run"])
    def test_gives_back_the_bytes_that_the_checkpoint_knows_and_says_so(self, logged, harm, caplog):
        before = (logged.path / "metrics.jsonl").read_bytes()
        self.harm(logged, harm)
        logged.rewind(3, self.LINES)
        assert (logged.path / "metrics.jsonl").read_bytes() == before
        (said,) = caplog.messages
        assert "metrics.jsonl' was shorter than the checkpoint, or damaged, and is repaired from it." in said

    def test_is_not_needed_after_a_kill_between_line_and_checkpoint(self, logged, caplog):
        logged.rewind(2, self.LINES[:2])
        assert logged.lines("metrics") == list(self.LINES[:2]) and not caplog.messages

    @pytest.mark.parametrize("harm", HARMS)
    def test_cannot_be_done_from_a_checkpoint_of_before(self, logged, harm):
        self.harm(logged, harm)
        with pytest.raises(RunError, match=r"metrics\.jsonl' holds epochs \[.*\], but 3 are done: .*restore a copy"):
            logged.rewind(3)

    @pytest.mark.parametrize("harm", HARMS)
    def test_is_asked_for_where_a_checkpoint_is_to_be_written(self, logged, harm):
        self.harm(logged, harm)
        with pytest.raises(RunError, match=r"metrics\.jsonl'.* --resume"):
            logged.history(3)

    def test_leaves_damaged_lines_of_timing_out(self, run):
        (run.path / "timing.jsonl").write_bytes(b'{"epoch": 1, "seconds": 2.0}\n{"ep\n{"epoch": 3, "seconds": 1.0}\n')
        run.rewind(0, [])
        assert run.lines("timing") == []


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
        message = r"run in '.*deep.run' was begun and not finished by an older version of spikedistill: finish it"
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
