"""The command line: parses, calls, prints. Results go to standard output, everything else to standard error.

Every command is a file here. It is imported when it is asked for, so that the list of commands is there at once.
"""

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from spikedistill import __version__
from spikedistill.cli.ascii_output import write_plainly
from spikedistill.errors import ProcessError, SpikeDistillError, ended_by, is_heard, one_of, out_of_memory

USAGE = """usage: spikedistill COMMAND [OPTIONS] | --help | --version

A trained ANN becomes a deep spiking student, by knowledge distillation.

  demo                 what a student gains from its teacher, in two minutes
  teach [RECIPE]       train a teacher (an ANN)
  distill [RECIPE]     turn a teacher into a spiking student, and train it
  check NETWORK        what conversion would do to a network, without training
  evaluate RUN         measure a finished run again
  compare RUN...       finished runs in one table
  immunity RUN...      accuracy under noise, corruptions, faults and attacks
  energy RUN...        spikes, synaptic operations and estimated energy
  export RUN           a student as ONNX or .pt2, for other programs
  report RUN...        a page of what was built and what happened, with pictures
  reproduce STUDY      a published comparison, measured here: table, figure, CSV
  recipes              the ready recipes, with the commands that run them
  pretrained           the trained students that come with the package

'spikedistill COMMAND --help' lists the options of a command.
Begin with: spikedistill demo"""

AGAIN = dict.fromkeys(
    ("distill", "immunity", "teach"), "the same command with --resume continues the run, if it had begun"
)
AGAIN |= dict.fromkeys(("demo", "reproduce"), "the same command continues it")
"""What an interrupted command leaves, if anything."""

LESS = {
    "distill": (
        "To use less, repeat the command with --resume and --recompute neurons, then --recompute stages, on a CPU also"
        " with --no-keep-memory (without --resume if the run had not begun). If that is not enough, start a new run"
        " with a smaller --batch-size."
    ),
    "teach": "Give a smaller --batch-size in another --out. On a CPU --no-keep-memory and --resume may be enough.",
}
"""What to do when memory has run out, by command."""

TO_STDERR = logging.lastResort or logging.StreamHandler()
"""Prints notes as they are to standard error."""

COMMANDS = (
    *("check", "compare", "demo", "distill", "energy", "evaluate", "export", "immunity"),
    *("pretrained", "recipes", "report", "reproduce", "teach"),
)


def main() -> None:
    """Run the command that the arguments name; end with code 2 and one message where something is wrong."""
    write_plainly()
    arguments = sys.argv[1:] or ["--help"]
    try:
        if arguments[0] in ("-h", "--help"):
            print(USAGE)
        elif arguments[0] in ("-V", "--version"):
            print(f"spikedistill {__version__}")
        else:
            begin(arguments)
        sys.stdout.flush()
    except SpikeDistillError as error:
        from rich.console import Console

        if not is_heard(error):
            Console(file=sys.stderr, soft_wrap=True, highlight=False).print(f"spikedistill: {error}", markup=False)
        if isinstance(error, ProcessError):  # gloo may abort a process that takes broken connections down
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        sys.exit(2)
    except BrokenPipeError:
        leave_pipe()
    except OSError as error:
        if not is_heard(error):
            print(f"spikedistill: {error}: check the path and its permissions.", file=sys.stderr)
        sys.exit(2)
    except BaseException as error:  # Ctrl-C, an option that is wrong, or whatever code of the user's ends us with
        if type(error) is KeyboardInterrupt:
            print(f"\nspikedistill: interrupted; {AGAIN.get(arguments[0], 'nothing was kept')}.", file=sys.stderr)
            sys.exit(130)
        if said := out_of_memory(error):
            less = LESS.get(arguments[0], "Give fewer images, a smaller network, or another --device.")
            print(f"spikedistill: memory ran out ({said}). {less}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error.__context__, BrokenPipeError):  # rich has left
            leave_pipe()
        import tyro

        if isinstance(error, Exception) or (place := ended_by(error, parser=tyro.__file__)) is None:
            raise
        said = f"ended the process by {type(error).__name__}({error}) before the command had finished"
        print(f"spikedistill: {place} {said}: let that code return, or raise an Exception.", file=sys.stderr)
        sys.exit(2)


def leave_pipe() -> None:
    """End quietly: who read our output has left, as head does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def begin(arguments: Sequence[str]) -> None:
    """Run a command, alone or as one of several processes."""
    logging.getLogger("spikedistill").addHandler(TO_STDERR)
    one_of("command", arguments[0], COMMANDS)
    if "WORLD_SIZE" in os.environ:
        from spikedistill.train.processes import speaking

        with speaking(arguments[0]):
            run(*arguments)
    else:
        run(*arguments)


def run(command: str, *arguments: str) -> None:
    """Run a command: the ``main`` of its file, which parses for itself, or else its function of the same name."""
    module = importlib.import_module(f"spikedistill.cli.{command}")
    if hasattr(module, "main"):
        module.main(arguments)
    else:
        from spikedistill.cli.options import ask

        ask(command, getattr(module, command), arguments)
