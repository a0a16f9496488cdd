import io
import re

from rich.console import Console

from spikedistill.train.progress import Progress


def drawn(terminal: bool) -> str:
    """What two epochs of three steps leave on a console."""
    file = io.StringIO()
    progress = Progress(Console(file=file, force_terminal=terminal, width=160, color_system=None), "teacher")
    with progress:
        for epoch in (1, 2):
            progress.epoch(epoch, 2, 3, 0)
            for _ in range(3):
                progress.step({"loss": 0.5, "labels": 0.5, "train_accuracy": 75.0, "firing_rate": 12.5})
            progress.bars.refresh()
            progress.epoch_done({"epoch": epoch, "step": 3 * epoch, "lr": 0.1, "loss": 0.5, "train_accuracy": 75.0})
    return file.getvalue()


def test_the_bar_shows_the_whole_run_with_terms_accuracy_rate_and_time():
    shown = drawn(terminal=True)
    assert re.search(
        r"teacher 1/2 .* 3/6 loss 0\.50, labels 0\.50, train accuracy 75\.00 %, firing rate 12\.50 %", shown
    )
    assert re.search(r"teacher 2/2 .* 6/6 .* 0:00:00 0:00:00", shown)


def test_where_there_is_no_terminal_a_line_an_epoch_stays():
    lines = drawn(terminal=False).splitlines()
    assert [line.rpartition(",")[0] for line in lines] == [
        f"teacher: epoch {epoch}: loss 0.50, train accuracy 75.00 %" for epoch in (1, 2)
    ]


def test_a_resumed_epoch_begins_where_it_was_left():
    progress = Progress.silent()
    progress.epoch(3, 5, 10, 4)
    (task,) = progress.bars.tasks
    assert (task.completed, task.total) == (24, 50)
