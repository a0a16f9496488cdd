"""Tables as Markdown and plain text, and how columns fit into a width."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

Row = Sequence[str]
Place = tuple[int, int]
"""Row and column of a cell, from 0."""
NARROW = 10
"""A head that is wider than its cells is broken at spaces, into lines of at most this width or its longest word."""
GAP = 2
"""Columns of a terminal between those of a table."""


@dataclass(frozen=True)
class Table:
    """A table with its caption and notes.

    Args:
        columns: heads, with units.
        rows: cells as text, one for each column.
        caption: what columns and signs mean.
        notes: notes on single rows.
        bold: cells to be set in bold, if the format supports it.
    """

    columns: Row
    rows: Sequence[Row]
    caption: str = ""
    notes: Sequence[str] = ()
    bold: frozenset[Place] = frozenset()


def markdown(columns: Row, rows: Sequence[Row], bold: Collection[Place] = ()) -> str:
    r"""A table in Markdown; a bar inside a cell is escaped.

    >>> print(markdown(["run", "accuracy (%)"], [["a|b", "91.60"]], bold=[(0, 1)]), end="")
    | run | accuracy (%) |
    | --- | --- |
    | a\|b | **91.60** |
    """
    marked = [["**{}**" if (i, j) in bold else "{}" for j in range(len(row))] for i, row in enumerate(rows)]
    told = [[mark.format(_escaped(cell)) for mark, cell in zip(marks, row)] for marks, row in zip(marked, rows)]
    lines = [list(map(_escaped, columns)), ["---"] * len(columns), *told]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def one_line(cell: str) -> str:
    """Text without line breaks."""
    return " ".join(cell.split())


def _escaped(cell: str) -> str:
    return one_line(cell).replace("\\", "\\\\").replace("|", "\\|")


def blocks(widths: Sequence[int], room: int) -> list[list[int]]:
    """The indices of columns in groups that fit into a width; each group begins with the first column.

    >>> blocks([4, 5, 5, 9], 20)
    [[0, 1, 2], [0, 3]]
    """
    found: list[list[int]] = []
    left = -1
    for place, width in enumerate(widths[1:], 1):
        if left < width + GAP:
            found.append([0])
            left = room - widths[0]
        found[-1].append(place)
        left -= width + GAP
    return found or [[0]]


def head_width(head: str, cells: Iterable[str]) -> int:
    """The width that a column needs for its cells and for its head, which may be broken at spaces."""
    words = max(map(cell_len, head.split()), default=0)
    return max([words, min(cell_len(head), NARROW), *map(cell_len, cells), 1])


def text_table(columns: Row, rows: Sequence[Row]) -> str:
    """Columns two spaces apart, each as wide as its widest cell; one line per row, however long."""
    lines = [[one_line(cell) for cell in line] for line in (columns, *rows)]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines)]
    return "".join(
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths)).rstrip() + "\n"
        for line in lines
    )
