"""What a user sees of a run: a bar on a terminal, one line an epoch elsewhere, or nothing."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


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

    @classmethod
    def silent(cls) -> Self:
        """Show nothing."""
        return cls(Console(quiet=True))

    @classmethod
    def stderr(cls, label: str) -> Self:
        """Show the work on standard error, so that standard output holds results alone."""
        return cls(Console(file=sys.stderr, highlight=False), label)

    def __enter__(self) -> Self:
        """Start drawing."""
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self.bars.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(f"{self.label}: {text}" if self.label else text, markup=False)

    def epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """A new epoch begins, ``done`` of its steps lie behind."""
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.began = time.monotonic()
        title = f"{self.label} {epoch}/{epochs}"
        self.task = self.bars.add_task(title, total=steps, completed=done, facts="")

    def step(self, means: Mapping[str, float]) -> None:
        """One step lies behind; ``means`` are those of the epoch so far."""
        if self.task is not None:
            self.bars.update(self.task, advance=1, facts=_facts(means))

    def epoch_done(self, line: Mapping[str, Any]) -> None:
        """An epoch lies behind; ``line`` is what metrics.jsonl got."""
        seconds = time.monotonic() - self.began
        self.say(f"epoch {line['epoch']}: {_facts(line)}, {seconds:.0f} s")


def _facts(line: Mapping[str, float]) -> str:
    shown = []
    for name, value in line.items():
        if name in ("epoch", "step", "lr"):
            continue
        percent = "accuracy" in name or name == "firing_rate"
        shown.append(f"{name.replace('_', ' ')} {value:.2f}{' %' if percent else ''}")
    return ", ".join(shown)
