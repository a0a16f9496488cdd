"""The command line as tests call it."""

import sys

import pytest

from spikedistill.cli import main


def run_command(*arguments: object) -> object:
    """Run the command line in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spikedistill", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code or 0
    return 0
