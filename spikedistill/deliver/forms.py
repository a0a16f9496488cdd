"""Tables written to files as CSV, Markdown or LaTeX."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from spikedistill.deliver.latex import latex
from spikedistill.deliver.tables import Table, markdown
from spikedistill.files import check_replaceable, csv_text, write_text

TableFormat = Literal["csv", "markdown", "latex"]
"""The format of a table's file."""


def _in_markdown(table: Table) -> str:
    said = [table.caption, *(f"- {note}" for note in table.notes)]
    shown = markdown(table.columns, table.rows, table.bold)
    return "\n".join([shown, *(line + "\n" for line in said if line)])


FORMS: dict[TableFormat, Callable[[Table], str]] = {
    "csv": lambda table: csv_text(table.columns, table.rows),
    "markdown": lambda table: "<!-- Written by spikedistill -->\n\n" + _in_markdown(table),
    "latex": lambda table: "% Written by spikedistill\n" + latex(table),
}
"""Format -> the function that makes the file's text."""
MARKS: dict[TableFormat, str] = {"markdown": "<!-- Written by spikedistill", "latex": "% Written by spikedistill"}
"""The beginning of the first line of a file that may be replaced; for CSV it is the head of the first column."""


def check_table(path: Path, kind: TableFormat, first: str) -> None:
    """Refuse to replace a file that holds no such table.

    Args:
        path: the file.
        kind: the format of the new table.
        first: the head of its first column.

    Raises:
        RunError: if the file exists and holds something else.
    """
    check_replaceable(path, MARKS.get(kind, f"{first},"))


def write_table(path: Path, kind: TableFormat, table: Table) -> None:
    """Write a table to a file, atomically.

    Raises:
        RunError: if the file cannot be written, or exists and holds something else than such a table.
    """
    check_table(path, kind, table.columns[0])
    write_text(path, FORMS[kind](table))
