"""What a user sees of a run: a bar on a terminal, one line an epoch elsewhere, or nothing."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from spikedistill.errors import ConfigError


class Progress:
    """Shows a run on a console; use as a context manager.

    Args:
        console: where to write.
        label: what is being done, for instance ``teacher``.
    """

    def __init__(self, console: Console, label: str = "") -> None:
        self.console = console
        self.label = label
        self.began = time.monotonic()
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    @staticmethod
    def silent() -> "Progress":
        """Show nothing."""
        return Progress(Console(quiet=True))

    @staticmethod
    def stderr(label: str) -> "Progress":
        """Show the work on standard error, so that standard output holds results alone."""
        return Progress(Console(file=sys.stderr, highlight=False), label)

    @staticmethod
    def lines(label: str) -> "Progress":
        """One line an epoch on standard error, on a terminal too: for work side by side with other work."""
        return Progress(Console(file=sys.stderr, highlight=False, force_terminal=False), label)

    def __enter__(self) -> "Progress":
        """Start drawing."""
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self.bars.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(f"{self.label}: {text}" if self.label else text, markup=False, soft_wrap=True)

    def epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """A new epoch begins, ``done`` of its steps lie behind."""
        self.began = time.monotonic()
        title, total = f"{self.label} {epoch}/{epochs}", epochs * steps  # the time left is that of the run
        if self.task is None:
            self.task = self.bars.add_task(title, total=total, facts="")
        self.bars.update(self.task, description=title, completed=(epoch - 1) * steps + done)

    def step(self, means: Mapping[str, float]) -> None:
        """One step lies behind; ``means`` are those of the epoch so far."""
        if self.task is not None:
            self.bars.update(self.task, advance=1, facts=_facts(means))

    def epoch_done(self, line: Mapping[str, Any]) -> None:
        """An epoch lies behind; ``line`` is what metrics.jsonl got."""
        seconds = time.monotonic() - self.began
        self.say(f"epoch {line['epoch']}: {_facts(line)}, {seconds:.0f} s")


class Events:
    """TensorBoard events of a run, one point an epoch.

    Raises:
        ConfigError: if TensorBoard is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--tensorboard needs TensorBoard: pip install tensorboard.") from error
        self.writer = SummaryWriter(str(path / "tensorboard"))

    def add(self, line: Mapping[str, Any]) -> None:
        """Write every number of a line of metrics.jsonl."""
        for name, value in line.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, line["epoch"])
        self.writer.flush()


def _facts(line: Mapping[str, Any]) -> str:
    shown = []
    for name, value in line.items():
        if name in ("epoch", "step", "lr"):
            continue
        percent = "accuracy" in name or name == "firing_rate"
        shown.append(f"{name.replace('_', ' ')} {value:.2f}{' %' if percent else ''}")
    return ", ".join(shown)
