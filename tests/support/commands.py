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


def remember_recipes(monkeypatch, keep) -> list:
    """What ``keep(recipe, out, resume)`` returns for each recipe that 'teach' and 'distill' are asked for, undone."""
    seen: list = []

    def remember(recipe, out, resume, progress, trust_code=False):
        seen.append(keep(recipe, out, resume))
        return {"test_accuracy": 12.5}

    monkeypatch.setattr("spikedistill.cli.teach.teach", remember)
    monkeypatch.setattr("spikedistill.cli.distill.distill", remember)
    monkeypatch.setattr("spikedistill.cli.distill.print_table", lambda paths: None)
    return seen
