"""What a user sees of a run: a bar on a terminal; elsewhere a line per epoch and at least every minute; or nothing."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from spikedistill.errors import ConfigError
from spikedistill.files import note

BAR, LONGEST = 10, 32
"""Terminal columns of a bar, and of the name beside it."""
QUICK = 2.0
"""Seconds: an epoch that ends sooner after the last line has no line of its own."""
FIRST = (
    "loss",
    *(f"{part}_{what}" for what in ("accuracy", "agreement") for part in ("train", "validation")),
    "firing_rate",
)
"""The values that are shown first; the terms of the loss follow."""
Advance = Callable[..., None]
"""A function that is called with the amount of work just done, and perhaps a text (``facts``) with results."""


class Progress:
    """Shows a run on a console; use as a context manager.

    Args:
        console: where to write.
        label: name of the work, for instance ``teacher``.
        every: without a bar, a line is printed at least once in this number of seconds.
        clock: returns the time in seconds.
    """

    def __init__(
        self, console: Console, label: str = "", every: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.label, self.every, self.clock = console, label, every, clock
        self.began = self.said = clock()
        self.draws = console.is_terminal and not (console.is_dumb_terminal or console.quiet)
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=BAR),
            _Facts(console),
            console=console,
            transient=True,
            disable=not self.draws,
            get_time=clock,
            speed_estimate_period=300.0,
        )
        self.tasks: list[Task] = []
        self.lines: threading.Event | None = None

    @staticmethod
    def silent() -> "Progress":
        """Show nothing."""
        return Progress(Console(quiet=True))

    @staticmethod
    def stderr(label: str) -> "Progress":
        """Show the work on standard error, so that standard output holds only results."""
        return Progress(Console(file=sys.stderr, highlight=False), label)

    @staticmethod
    def as_lines(label: str) -> "Progress":
        """Lines on standard error, even on a terminal: for several runs at the same time."""
        return Progress(Console(file=sys.stderr, highlight=False, force_terminal=False), label)

    def __enter__(self) -> "Progress":
        """Start drawing, or printing lines."""
        if self.draws:  # rich of before 15 ends even a disabled bar with an empty line
            self.bars.start()
        if not (self.draws or self.console.quiet or self.lines):
            self.lines = threading.Event()
            threading.Thread(target=self._speak, args=(self.lines,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        if self.draws:
            self.bars.stop()
        if self.lines is not None:
            self.lines.set()
            self.lines = None

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.said = self.clock()
        self.console.print(f"{self.label}: {text}" if self.label else text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line that must not be missed. If nothing is shown, as from Python, it is logged."""
        if self.console.quiet:
            note(text)
        else:
            self.say(f"warning: {text}")

    def epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """A new epoch begins; ``done`` of its steps are done already."""
        self.began = self.clock()
        completed, total = (epoch - 1) * steps + done, epochs * steps  # the time left is for the whole run
        title = f"{_short(self.label)} {epoch}/{epochs}".strip()
        if not self.tasks:
            self._begin(title, total, completed)
        self._update(description=title, completed=completed, epoch=(epoch, epochs, steps))

    def step(self, means: Mapping[str, float]) -> None:
        """A step is done; ``means`` are those of the epoch so far."""
        self._update(advance=1, facts=_facts(means))

    def epoch_done(self, line: Mapping[str, Any]) -> None:
        """An epoch is done; ``line`` is its line in metrics.jsonl. Of many quick ones only some are printed."""
        epochs = self.tasks[-1].fields["epoch"][1] if self.tasks else None
        if epochs and 1 < line["epoch"] < epochs and self.clock() - self.said < QUICK:
            return
        of = f" of {epochs}" if epochs else ""
        head, seconds = f"epoch {line['epoch']}{of}", f"{self.clock() - self.began:.0f} s"
        room = self.console.width - len(f"{self.label}: {head}: , {seconds}") if self.draws else None
        facts = _facts(line)
        short = [fact.replace(" accuracy", "").replace(" agreement", "") for fact in facts]  # used if more values fit
        self.say(f"{head}: {', '.join([*max(_fitting(facts, room), _fitting(short, room), key=len), seconds])}")

    @contextmanager
    def part(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """A part of the work with its own bar; without bars a line says that it begins.

        Args:
            title: name of the part.
            total: amount of work; None if it is not known.

        Yields:
            A function to call when some of the work is done: with the amount (default: 1), and perhaps ``facts``, a
            text with results.
        """
        idle = not (self.bars.live.is_started or self.lines)
        if not self.draws:
            self.say(title)
        self._begin(title, total, 0)
        if idle:
            self.__enter__()
        try:
            yield lambda done=1, facts="": self._update(advance=done, facts=[facts] if facts else [])
        finally:
            self.bars.remove_task(self.tasks.pop().id)
            if self.tasks:
                self._update(visible=True)
            if idle:
                self.__exit__()

    def pulse(self) -> None:
        """Print the state of the work if nothing was printed for too long."""
        if self.clock() - self.said < self.every or not self.tasks:
            return
        task = self.tasks[-1]
        head, done = task.description, int(task.completed)
        if task.fields["epoch"]:
            epoch, epochs, steps = task.fields["epoch"]
            head = f"epoch {epoch} of {epochs}, step {done - (epoch - 1) * steps} of {steps}"
        elif task.total:
            head += f", {done} of {task.total:.0f}"
        told = [*task.fields["facts"], *_left(task)]
        self.say(f"{head}: {', '.join(told)}" if told else f"{head}: still running")

    def _speak(self, over: threading.Event) -> None:
        with suppress(OSError, ValueError):  # the pipe may be closed
            while not over.wait(min(1.0, self.every)):
                self.pulse()

    def _begin(self, title: str, total: int | None, completed: int) -> None:
        for task in self.tasks:
            self.bars.update(task.id, visible=False)
        number = self.bars.add_task(title, total=total, completed=completed, facts=[], epoch=None)
        self.tasks.append(next(task for task in self.bars.tasks if task.id == number))

    def _update(self, **changed: Any) -> None:
        if self.tasks:
            self.bars.update(self.tasks[-1].id, **changed)


class _Facts(ProgressColumn):
    """The text beside a bar: how much is done, the values that fit the width, and the time left."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        room = self.console.width - cell_len(task.description) - BAR - 3
        count = [f"{task.completed:.0f}/{task.total:.0f}"] if task.total else []
        facts, left = task.fields["facts"], _left(task)
        shown = _fitting([*left, *facts[:2], *count, *facts[2:]], room)
        return Text(", ".join(fact for fact in (*count, *facts, *left) if fact in shown), no_wrap=True)


class Events:
    """TensorBoard events of a run, one point per epoch.

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


def _facts(line: Mapping[str, Any]) -> list[str]:
    """The values of a line as text, the most important first. A loss with a single term is shown once."""
    terms = [name for name in line if name not in (*FIRST, "epoch", "step", "lr")]
    if [line[name] for name in terms] == [line.get("loss")]:
        terms = []
    shown = []
    for name in [*(name for name in FIRST if name in line), *terms]:
        percent = name.endswith(("accuracy", "agreement")) or name == "firing_rate"
        shown.append(f"{name.replace('_', ' ')} {line[name]:.2f}{' %' if percent else ''}")
    return shown


def _fitting(facts: Sequence[str], room: int | None) -> list[str]:
    """The first values, as many as fit into ``room`` columns with commas between them; all if ``room`` is None."""
    shown: list[str] = []
    for fact in facts:
        if room is not None and len(", ".join([*shown, fact])) > room:
            break
        shown.append(fact)
    return shown


def _left(task: Task) -> list[str]:
    """About how long a task still takes, if that is known."""
    seconds = task.time_remaining
    if not seconds:
        return []
    if seconds < 100:
        return [f"{seconds:.0f} s left"]
    return [f"{seconds / 60:.0f} min left" if seconds < 6000 else f"{seconds / 3600:.1f} h left"]


def _short(name: str) -> str:
    """A name with its middle left out if it is too long for a bar.

    >>> _short("resnet18-resnet18-kdsnn-response-t4-s0")
    'resnet18-resne...-response-t4-s0'
    """
    return name if len(name) <= LONGEST else f"{name[:14]}...{name[-15:]}"
