"""Several processes train one network as one process does; two of torchrun are started once for all tests here."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import cut_after, equal_cases, make_student, train, train_case

import spikedistill
from spikedistill.errors import ConfigError, ProcessError
from spikedistill.train.processes import Processes, join, launched
from spikedistill.train.run import Run

HERE = Path(__file__).parent / "support"
TASK = HERE / "small_task.py"
ADDRESS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "none"}
"""As torchrun says it, but for the port."""


def environment(**more):
    """Of processes that have one thread, compile nothing and say where they were when they abort."""
    path = os.pathsep.join([str(HERE), str(Path(spikedistill.__file__).parents[1])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONFAULTHANDLER": "1",
        **more,
    }


def distill(folder, out, *more):
    options = "--epochs 3 --batch-size 16 --timesteps 2 --lr 0.02 --precision fp32 --device cpu --checkpoint-minutes 0"
    who = ["--teacher", "none", "--method", f"{TASK}:Mortal", "--student", f"{TASK}:small"]
    return ["distill", "--data", f"{folder / 'blobs.npz'}", *who, *options.split(), "--out", str(folder / out), *more]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, write_blobs):
    """A run of two processes, the second of which is killed in mid-epoch: folder, seconds, and the end of the first."""
    folder = tmp_path_factory.mktemp("processes")
    write_blobs(folder, 96, 48)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "spikedistill", *distill(folder, "killed")]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "DIES": "1"}
    first, second = (
        subprocess.Popen(
            command, env=environment(**address, RANK=rank), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    )
    _, theirs = second.communicate(timeout=240)
    began = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert second.returncode == -9, theirs
    return folder, time.monotonic() - began, first.returncode, said


@pytest.fixture(scope="module")
def both(killed):
    """What two processes of torchrun leave, by case and rank: facts and weights."""
    folder = killed[0]
    shutil.copytree(folder / "killed", folder / "killed-two")
    cut_after(7, make_student(), folder / "from-one")
    commands = {
        "whole": distill(folder, "whole"),
        "resumed": distill(folder, "killed-two", "--resume"),
        "taken": distill(folder, "whole"),
        "odd": distill(folder, "odd", "--batch-size", "15"),
        "evaluate": ["evaluate", str(folder / "whole")],
    }
    (folder / "commands.json").write_text(json.dumps(commands))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*start, str(HERE / "two_processes.py"), str(folder)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    def of(case, rank):
        weights = folder / f"{case}-{rank}.safetensors"
        facts = json.loads((folder / f"{case}-{rank}.json").read_text())
        return facts, load_file(weights) if weights.exists() else {}

    return of


class TestLoop:
    """What ``fit`` leaves in each process."""

    @pytest.mark.parametrize("case", ["random-whole", "normed", "from-one", "clip-ema"])
    def test_all_processes_end_with_one_network_and_one_line(self, case, both):
        (facts, weights), (others, theirs) = both(case, 0), both(case, 1)
        assert facts == others
        assert_same(weights, theirs)

    def test_interrupted_and_resumed_equals_uninterrupted_with_dropout(self, both):
        assert both("random-cut", 0)[0] == both("random-whole", 0)[0]
        assert_same(both("random-cut", 0)[1], both("random-whole", 0)[1])

    def test_statistics_of_batch_norm_are_those_of_process_0_and_no_others(self, both, tmp_path):
        """Computed again: process 0 sees the first half of every batch, so its statistics are those of these images."""
        weights = both("normed", 0)[1]
        student = make_student(norm="trained")
        train(student, tmp_path / "run")
        names = [name for name in weights if name.endswith("running_mean")]
        assert names
        assert all((weights[name] - student.state_dict()[name]).abs().max() > 1e-4 for name in names)

    def test_what_is_drawn_differs_between_processes_and_is_that_of_one_in_process_0(self, both):
        join().reseed(5)
        assert both("drawn", 0)[0] == torch.rand(3).tolist() != both("drawn", 1)[0]

    def test_all_have_the_buffers_of_process_0_whatever_their_number_format(self, both):
        assert both("shared", 0)[0] == both("shared", 1)[0] == [0, 0]

    def test_a_run_goes_on_with_more_processes_and_with_fewer(self, both, killed, tmp_path):
        whole = make_student()
        line = train(whole, tmp_path / "whole")
        facts, weights = both("from-one", 1)
        assert facts == pytest.approx(line, rel=1e-4)
        assert_close(weights, whole.state_dict())
        alone = make_student()
        assert train(alone, killed[0] / "for-one") == pytest.approx(line, rel=1e-4)
        assert_close(alone.state_dict(), whole.state_dict())

    def test_what_is_not_finite_in_one_process_ends_all_with_one_message(self, both):
        (first, _), (second, _) = both("broken", 0), both("broken", 1)
        assert first["message"] == second["message"]
        assert first["message"].startswith(
            "The loss became {'labels': nan, 'soft': nan} in epoch 2, step 1: check the images"
        )
        assert (first["cause"], second["cause"]) == ("NoneType", "Heard")

    @pytest.mark.parametrize("case, who", [("first-refuses", 0), ("last-refuses", 1)])
    def test_what_one_refuses_all_refuse_and_process_0_prints(self, case, who, both):
        for rank, cause in ((0, "NoneType"), (1, "Heard")):
            assert both(case, rank)[0] == {"kind": "ConfigError", "message": f"process {who} refuses", "cause": cause}

    def test_a_batch_that_they_cannot_share_is_refused(self, both):
        assert "(=15) must be at most the 86 training samples and a multiple of" in both("uneven", 1)[0]["message"]


class TestCommand:
    """What the command line does where torchrun starts it."""

    def test_process_0_writes_and_prints_and_the_others_are_silent(self, both, killed):
        (first, _), (second, _) = both("whole", 0), both("whole", 1)
        assert (first["code"], second["code"]) == (0, 0)
        assert first["said"].count("epoch 3") == 1 and second["said"] == ""
        run = Run(killed[0] / "whole")
        assert len(run.lines("metrics")) == 3 and run.finished
        assert run.read("environment")["processes"] == 2
        assert {line["processes"] for line in run.lines("timing")} == {2}

    @pytest.mark.parametrize(
        "case, message",
        [
            ("taken", "whole' already holds a run: continue it with --resume"),
            ("odd", "batch_size (=15) must be at most the 86 training samples and a multiple of the number of"),
            ("evaluate", "'evaluate' runs in one process, but 2 were started: start it without torchrun, and"),
        ],
    )
    def test_a_refusal_ends_all_with_code_2_and_is_printed_once(self, case, message, both, killed):
        (first, _), (second, _) = both(case, 0), both(case, 1)
        assert (first["code"], second["code"]) == (2, 2)
        assert message in first["said"] and second["said"] == ""
        assert not (killed[0] / "odd").exists()


class TestEnd:
    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_no_thread_of_a_connection_lives_when_python_ends(self, both):
        """Such a thread, if it holds a tensor then, aborts the process after all work is done."""
        for rank in (0, 1):
            assert both("serving", rank)[0] > 0 == both("ended", rank)[0]


class TestKill:
    def test_the_other_ends_at_once_with_a_message(self, killed):
        _, seconds, code, said = killed
        assert code == 2 and seconds < 30
        assert "spikedistill: Process 0 of 2 ends: another one has ended or cannot be reached (" in said
        assert "the same command with --resume" in said

    def test_resume_goes_on_with_two_and_gives_the_same_bits(self, killed, both):
        folder = killed[0]
        assert both("resumed", 0)[0]["code"] == 0
        assert "continuing after epoch 1, step 3" in both("resumed", 0)[0]["said"]
        two, whole = folder / "killed-two", folder / "whole"
        assert (two / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert_same(load_file(two / "model.safetensors"), load_file(whole / "model.safetensors"))

    def test_resume_goes_on_alone_and_gives_the_same_to_rounding(self, killed, both, call, monkeypatch):
        folder = killed[0]
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
        assert call(*distill(folder, "killed", "--resume")) == 0
        lines, expected = (Run(folder / name).lines("metrics") for name in ("killed", "whole"))
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert lines[-1] == pytest.approx(expected[-1], rel=1e-3)
        alone, whole = (load_file(folder / name / "model.safetensors") for name in ("killed", "whole"))
        assert_close(alone, whole)


class TestStart:
    @pytest.mark.parametrize("changed", [{}, {"RANK": "x"}, {"WORLD_SIZE": "all"}, {"WORLD_SIZE": "1"}])
    def test_an_environment_that_names_no_others_is_of_one_process(self, changed, monkeypatch):
        for name, value in (ADDRESS | changed).items():
            monkeypatch.setenv(name, value)
        if not changed:
            assert launched() == 2
            monkeypatch.delenv("MASTER_ADDR")  # as batch systems leave it
        assert launched() == 1 and join() == Processes()

    def test_others_that_do_not_come_are_named(self, monkeypatch):
        for name, value in ADDRESS.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=r"process 0 of 2 by .* did not meet at 127\.0\.0\.1:none \(.*start all"):
            join()

    def test_a_second_signal_does_not_cut_the_message_short(self):
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(ProcessError, match="Process 1 of 2 ends: it got SIGTERM"):
                Processes(1, 2).terminate()
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGTERM, before)


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("case", equal_cases())
def test_two_processes_equal_one_to_rounding_at_equal_global_batch(case, both, tmp_path):
    weights, line = train_case(case, tmp_path)
    for rank in (0, 1):
        facts, theirs = both(case, rank)
        assert facts == pytest.approx(line, rel=1e-4)
        assert_close(theirs, weights)
