"""How results are printed on standard output, and written to files that were asked for."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from spikedistill.deliver.compare import compare
from spikedistill.deliver.forms import FORMS, TableFormat, check_table, write_table
from spikedistill.deliver.tables import GAP, Table, blocks, head_width, text_table
from spikedistill.errors import ConfigError

STDOUT = Path("-")
"""A file of this name is standard output."""
Files = Mapping[TableFormat, Path | None]
"""Where a table is written in which form; None where it was not asked for."""


def print_table(paths: Sequence[Path], baseline: str | None = None) -> None:
    """Finished runs side by side, those that differ in the seed alone in one row; see ``compare``."""
    show_table(compare(paths, baseline))


def check_files(files: Files, first: str) -> None:
    """Check where a table will be written, before it is made.

    Args:
        files: as asked for.
        first: the head of its first column, by which a CSV file is known again.

    Raises:
        RunError: if a file exists that no such table was written to.
        ConfigError: if two forms are to go to one file, or to standard output.
    """
    asked = [path for path in files.values() if path is not None]
    if len(set(asked)) < len(asked):
        raise ConfigError(
            f"Two formats of the table go to the same file ({', '.join(map(str, asked))}): name two files."
        )
    for kind, path in files.items():
        if path is not None and path != STDOUT:
            check_table(path, kind, first)


def output(table: Table, files: Files, long: Table | None = None) -> None:
    """Print a table, or in its place the form that goes to standard output, and write the files.

    Args:
        table: what is shown.
        files: as asked for.
        long: what CSV holds, where it is not the same: one value per line, with all digits.
    """
    if STDOUT not in files.values():
        show_table(table)
    for kind, path in files.items():
        made = long if kind == "csv" and long is not None else table
        if path == STDOUT:
            sys.stdout.write(FORMS[kind](made))
        elif path is not None:
            write_table(path, kind, made)
            print(f"wrote {path}", file=sys.stderr)


def show_table(table: Table) -> None:
    """A table, and below it what is to be said of it."""
    show(table.columns, table.rows)
    console = Console(highlight=False)
    for note in table.notes:
        console.print(note, markup=False, soft_wrap=not sys.stdout.isatty())


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: on a terminal within its width, in a pipe one line per row, however long; nothing is ever cut.

    On a terminal columns without any value are left out, heads are broken into lines, and columns that do not fit go
    into further tables below, each with the first column.
    """
    if not sys.stdout.isatty():
        sys.stdout.write(text_table(columns, rows))
        return
    console = Console(highlight=False)
    cells = [[row[place] for row in rows] for place in range(len(columns))]
    some = [place for place, column in enumerate(cells) if any(column) or not place]
    made = _fitted(
        [(head_width(columns[place], cells[place]), columns[place], cells[place]) for place in some], console
    )
    for number, block in enumerate(blocks([width for width, _, _ in made], console.width)):
        if number:
            console.print()
        _print_block(console, [made[place] for place in block])


Column = tuple[int, str, list[str]]
"""Its width, head and cells."""


def _fitted(columns: Sequence[Column], console: Console) -> list[Column]:
    """No column wider than the terminal has room for beside the first, which takes half of it at most."""
    widest = max(console.width // 2, 1)
    first = min(columns[0][0], widest)
    room = max(console.width - first - GAP, 1)
    return [(min(one[0], room if place else first), one[1], one[2]) for place, one in enumerate(columns)]


def _print_block(console: Console, block: Sequence[Column]) -> None:
    heads = [head for _, head, _ in block]
    for number, line in enumerate([heads, *zip(*(values for _, _, values in block))]):
        folded = [_folded(console, cell, width) for cell, (width, _, _) in zip(line, block)]
        for part in range(max(map(len, folded))):
            parts = [lines[part] if part < len(lines) else "" for lines in folded]
            shown = "  ".join(text + " " * (width - cell_len(text)) for text, (width, _, _) in zip(parts, block))
            console.print(Text(shown.rstrip(), style="" if number else "bold"), soft_wrap=True)


def _folded(console: Console, cell: str, width: int) -> list[str]:
    """A cell in lines of at most so many columns."""
    return [line.plain.rstrip() for line in Text(cell).wrap(console, width)] or [""]
