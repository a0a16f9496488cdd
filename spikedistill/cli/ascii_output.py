"""Terminals and files that cannot hold every character: what stands in place of one, instead of a traceback."""

import codecs
import io
import os
import sys

INSTEAD = {"±": "+/-", "×": "x", "†": "*", "…": "...", "—": "-", "–": "-", "→": "->", "µ": "u", "μ": "u"}
"""Character -> what is read as the same."""


def write_plainly() -> None:
    """Let standard output and error write what their encoding lacks in other characters."""
    codecs.register_error("plain", _instead)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _instead(error: UnicodeError) -> tuple[str, int]:
    """What stands in place of the characters that an encoding lacks; lines of boxes become - and |, others ?."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if "\u2500" <= character <= "\u257f":  # box drawing
        return "-" if character in "─━╌╴╶╸╺" else "|" if character in "│┃╎" else "+"
    return INSTEAD.get(character, "?")
