import io
import threading
import time

import pytest
from rich.console import Console

from spikedistill.train.progress import Progress

MEANS = {
    "loss": 0.5,
    "labels": 0.3,
    "logits": 0.2,
    "train_accuracy": 75.0,
    "firing_rate": 12.5,
    "validation_accuracy": 70.0,
}


class Watch:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def console(terminal, width=160):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def drawn(terminal, width=160, means=MEANS, label="teacher"):
    """What two epochs of 391 steps leave on a console: what was drawn, line by line."""
    screen = console(terminal, width)
    watch = Watch()
    progress = Progress(screen, label, clock=watch)
    with progress:
        for epoch in (1, 2):
            progress.epoch(epoch, 2, 391, 0)
            for _ in range(391):
                watch.now += 1
                progress.step(means)
            progress.bars.refresh()
            progress.epoch_done({"epoch": epoch, "step": 391 * epoch, "lr": 0.1, **means})
    return screen.file.getvalue().replace("\r", "\n").replace("\x1b[2K", "\n").splitlines()


@pytest.mark.parametrize("label", ["teacher", "resnet18-resnet18-kdsnn-response-t4-s0"])
@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_line_on_a_terminal_is_wider_than_it(width, label):
    lines = drawn(True, width, label=label)
    bars = [line for line in lines if "━" in line or "╸" in line]
    assert bars and max(map(len, lines)) <= width
    assert any("loss 0.50" in line or width == 60 for line in bars)


def test_a_terminal_of_80_columns_shows_loss_accuracy_and_time_left_and_a_wide_one_all():
    (narrow,) = [line for line in drawn(True, 80) if "391/782" in line and "min left" in line][-1:]
    assert "teacher 1/2" in narrow and narrow.rstrip().endswith(
        "391/782, loss 0.50, train accuracy 75.00 %, 7 min left"
    )
    ends = [line for line in drawn(True, 80) if line.startswith("teacher: epoch 1")]
    assert ends == ["teacher: epoch 1 of 2: loss 0.50, train 75.00 %, validation 70.00 %, 391 s"]
    (wide,) = [line for line in drawn(True, 160) if "391/782" in line and "min left" in line][-1:]
    assert "validation accuracy 70.00 %, firing rate 12.50 %, labels 0.30, logits 0.20, 7 min left" in wide


def test_where_there_is_no_terminal_a_line_an_epoch_stays_with_every_fact():
    facts = (
        "loss 0.50, train accuracy 75.00 %, validation accuracy 70.00 %, firing rate 12.50 %, labels 0.30, logits 0.20"
    )
    assert drawn(False, 80) == [f"teacher: epoch {epoch} of 2: {facts}, 391 s" for epoch in (1, 2)]


def test_a_loss_of_one_term_is_said_once():
    (first, _) = drawn(False, means={"loss": 0.5, "labels": 0.5, "train_accuracy": 75.0})
    assert first == "teacher: epoch 1 of 2: loss 0.50, train accuracy 75.00 %, 391 s"


def test_a_resumed_epoch_begins_where_it_was_left():
    progress = Progress.silent()
    progress.epoch(3, 5, 10, 4)
    (task,) = progress.bars.tasks
    assert (task.completed, task.total) == (24, 50)


def test_a_pipe_hears_where_a_long_epoch_stands_every_minute_and_not_more_often():
    watch, screen = Watch(), console(False)
    progress = Progress(screen, "kdsnn", clock=watch)
    progress.epoch(3, 4, 391, 0)
    for second in range(150):
        watch.now = float(second)
        progress.step({"loss": 0.52})
        progress.pulse()
    lines = screen.file.getvalue().splitlines()
    assert lines == [  # 330 and 270 steps at one a second, and the fourth epoch
        "kdsnn: epoch 3 of 4, step 61 of 391: loss 0.52, 12 min left",
        "kdsnn: epoch 3 of 4, step 121 of 391: loss 0.52, 11 min left",
    ]
    progress.say("an epoch's line")
    watch.now += 59
    progress.pulse()
    assert screen.file.getvalue().splitlines()[2:] == ["kdsnn: an epoch's line"]


def test_the_minute_passes_while_one_piece_of_work_takes_long():
    screen = console(False)
    with Progress(screen, "kdsnn", every=0.02) as progress:
        before = threading.active_count()
        with progress.part("calibrating thresholds"):
            end = time.monotonic() + 60
            while screen.file.getvalue().count("\n") < 3 and time.monotonic() < end:
                time.sleep(0.01)
    lines = screen.file.getvalue().splitlines()
    assert lines[0] == "kdsnn: calibrating thresholds" and lines[1] == "kdsnn: calibrating thresholds: still running"
    assert before > 1 and not progress.lines


def test_a_part_has_a_bar_of_its_own_and_gives_back_that_of_the_run():
    progress = Progress(console(True, 80), "kdsnn")
    with progress:
        progress.epoch(1, 2, 10, 0)
        with progress.part("measuring on 20 test images", 20) as seen:
            seen(15, "student, fog 3: 71.20 %")
            whole, part = progress.bars.tasks
            assert (whole.visible, part.visible, part.completed, part.total) == (False, True, 15, 20)
            progress.bars.refresh()
        assert [task.visible for task in progress.bars.tasks] == [True]
    assert "measuring on 20 test images" in (shown := progress.console.file.getvalue())
    assert "15/20, student, fog 3: 71.20 %" in shown


def test_a_part_alone_draws_and_ends_also_where_it_fails():
    progress = Progress(console(True, 80))
    with pytest.raises(KeyboardInterrupt), progress.part("measuring", 20):
        assert progress.bars.live.is_started
        raise KeyboardInterrupt
    assert not progress.bars.live.is_started and not progress.bars.tasks


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_bar_is_drawn_in_any_encoding(encoding):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with Progress(Console(file=file, force_terminal=True, width=80), "kdsnn") as progress:
        progress.epoch(1, 2, 3, 0)
        progress.step(MEANS)
        progress.bars.refresh()
    file.flush()
    assert b"1/6, loss 0.50" in file.buffer.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    watch = Watch()
    progress = Progress(console(True, 80), "kdsnn", clock=watch)
    with progress:
        progress.epoch(1, 1, 4, 0)
        watch.now = 61
        progress.pulse()
    assert progress.console.file.getvalue() == "kdsnn: epoch 1 of 1, step 0 of 4: still running\n"


@pytest.mark.parametrize(
    "seconds, printed",
    [
        (0.125, [1, 17, 33, 49, 50]),
        (1.0, [*range(1, 50, 2), 50]),
        (2.0, list(range(1, 51))),
        (60.0, list(range(1, 51))),
    ],
)
def test_of_many_quick_epochs_the_first_the_last_and_one_in_two_seconds_are_printed(seconds, printed):
    screen, watch = console(False), Watch()
    progress = Progress(screen, "teacher", every=1000.0, clock=watch)
    with progress:
        for epoch in range(1, 51):
            progress.epoch(epoch, 50, 3, 0)
            watch.now += seconds
            progress.epoch_done({"epoch": epoch, "step": 3 * epoch, "lr": 0.1, **MEANS})
    lines = screen.file.getvalue().splitlines()
    assert [int(line.split("epoch ")[1].split()[0]) for line in lines] == printed
