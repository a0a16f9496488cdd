"""The exceptions of spikedistill.

SpikeDistillError
 ├── ConfigError        a recipe or an argument has a value that cannot work
 ├── DataError          a data set is missing, empty, broken or of the wrong shape
 ├── WeightsError       a weights file is missing, truncated, unsafe, or does not fit its network
 ├── ConversionError    a network cannot be converted
 │    └── UnsupportedError  a network has a part with no spiking equivalent, or cannot be traced
 ├── ShapeError         a tensor does not have the shape that the call needs
 └── RunError           a run directory cannot be read, resumed or written
      └── ProcessError  another process of the run has ended, and this one cannot go on

Every message says what happened (with the values), what was expected, and what to do.
"""

import difflib
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path


class SpikeDistillError(Exception):
    """An error that the user can mend. The command line prints it as one message and exits with code 2."""


class ConfigError(SpikeDistillError):
    """A recipe or an argument has a value that cannot work."""


class DataError(SpikeDistillError):
    """A data set is missing, empty, broken or of the wrong shape."""


class WeightsError(SpikeDistillError):
    """A weights file is missing, truncated, unsafe, or does not fit its network."""


class ConversionError(SpikeDistillError):
    """A network cannot be converted."""


class UnsupportedError(ConversionError):
    """A network has a part with no spiking equivalent, or cannot be traced."""


class ShapeError(SpikeDistillError):
    """A tensor does not have the shape that the call needs."""


class RunError(SpikeDistillError):
    """A run directory cannot be read, resumed or written."""


class ProcessError(RunError):
    """Another process of the run has ended, and this one cannot go on."""


class Heard(Exception):
    """The ``__cause__`` of an error that process 0 raises too and prints, so that no other process has to."""


def is_heard(error: BaseException) -> bool:
    """Whether another process prints this error."""
    cause = error.__cause__
    return cause is not None and (isinstance(cause, Heard) or is_heard(cause))


MANY = 60
"""If there are more names than this, a message says how many and does not list them."""


def unknown(kind: str, name: object, options: Iterable[str]) -> str:
    """The message for a name that is not among the options. It suggests the most similar option.

    >>> unknown("surrogate", "triangel", ["sigmoid", "triangle"])
    "There is no surrogate 'triangel'. Did you mean 'triangle'? Known: sigmoid, triangle."
    """
    known = sorted(options)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    if len(known) > MANY:
        return f"There is no {kind} '{name}'.{hint} {len(known)} are known, from {known[0]} to {known[-1]}."
    return f"There is no {kind} '{name}'.{hint} Known: {', '.join(known)}."


def one_of(kind: str, value: str, options: Iterable[str]) -> None:
    """Check a name.

    Raises:
        ConfigError: if it is not among the options.
    """
    known = list(options)
    if value not in known:
        raise ConfigError(unknown(kind, value, known))


def out_of_memory(error: BaseException) -> str:
    """What torch or Python says if memory has run out, in one line; empty for any other error.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("shapes differ"))
    ('MemoryError', '')
    """
    said = next(iter(str(error).splitlines()), "").partition(". GPU ")[0]
    ours = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return (said or type(error).__name__) if ours or "can't allocate memory" in said else ""


def ended_by(error: BaseException, parser: str) -> str | None:
    """Where code outside this package ended the process, for instance a user's network that calls ``sys.exit``.

    Args:
        error: the exception that was caught.
        parser: path of a file of the library that parses options. That library may end the process.

    Returns:
        File and line, as words for a message. None if that library or this package raised the error.
    """
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    ours = [number for number, (file, _) in enumerate(frames) if file.startswith(str(Path(__file__).parent))]
    below = frames[max(ours, default=-1) + 1 :]
    libraries = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<")
    theirs = [frame for frame in below if not frame[0].startswith(libraries)]
    if not below or (not theirs and below[0][0].startswith(str(Path(parser).parent))):
        return None
    file, line = (theirs or below)[-1]
    return f"'{file}', line {line},"
