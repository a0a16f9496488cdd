"""Tables on a terminal, in a pipe, and in files that a command was asked for."""

import csv
import io
import itertools
import re
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spikedistill.cli.show import check_files, output, show, show_table
from spikedistill.deliver.forms import FORMS
from spikedistill.deliver.tables import Table, text_table
from spikedistill.errors import ConfigError, RunError

COLUMNS = ["run", "accuracy (%)", "difference (points)", "network", "empty", "t=1 (%)", "t=2 (%)"]
ROWS = [
    ["direct-t4", "71.85 ± 1.53", "baseline", "examples/resnet20_cifar.py:resnet20", "", "37.41", "59.72"],
    ["kdsnn-response-t4", "74.81 ± 1.63", "+2.96 ± 0.42", "resnet18", "", "48.06", "64.35"],
]
TABLE = Table(COLUMNS, ROWS, "Percent.", ["It is said of " + "each row " * 20 + "in one line."])


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard output a terminal of so many columns, without colours; what was printed, line by line."""

    def of(width, printed, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", _Terminal())
            for name, value in (("COLUMNS", width), ("LINES", 40), ("TERM", "xterm"), ("NO_COLOR", 1)):
                patch.setenv(name, str(value))
            printed(*arguments)
            return re.sub(r"\x1b\[[\d;]*m", "", sys.stdout.getvalue()).splitlines()

    return of


class _Terminal(io.StringIO):
    def isatty(self):
        return True


class TestPipe:
    def test_hears_a_line_a_row_however_long_and_no_colours(self, capsys, monkeypatch):
        for name, value in (("COLUMNS", "40"), ("FORCE_COLOR", "1")):
            monkeypatch.setenv(name, value)
        show_table(TABLE)
        told = capsys.readouterr().out
        assert told == text_table(COLUMNS, ROWS) + TABLE.notes[0] + "\n"

    def test_keeps_columns_without_values(self, capsys):
        show(COLUMNS, ROWS)
        assert "  empty  " in capsys.readouterr().out


class TestTerminal:
    @pytest.mark.parametrize("width", [40, 60, 80, 120, 160])
    def test_shows_every_word_within_its_width(self, terminal, width):
        told = terminal(width, show_table, TABLE)
        assert max(map(len, told)) <= width and "…" not in "".join(told)
        if width >= 80:  # below, cells are folded
            assert set(itertools.chain(*(cell.split() for row in ROWS for cell in row))) <= set(" ".join(told).split())
            assert all(any(line.startswith(row[0]) for line in told) for row in ROWS)

    def test_of_enough_columns_shows_one_table(self, terminal):
        head, more, *body = terminal(160, show, COLUMNS, ROWS)
        assert re.split(" {2,}", head) == ["run", "accuracy (%)", "difference", "network", "t=1 (%)", "t=2 (%)"]
        assert more.split() == ["(points)"] and [line.split()[0] for line in body] == [row[0] for row in ROWS]
        assert body[0].index("59.72") == head.index("t=2")

    def test_of_few_columns_shows_further_tables_each_with_the_first_column(self, terminal):
        told = terminal(80, show, COLUMNS, ROWS)
        assert [line.split()[0] for line in told if line and line.strip()[0] not in "("] == [
            *("run", "direct-t4", "kdsnn-response-t4"),
            *("run", "direct-t4", "kdsnn-response-t4"),
        ]
        assert told.count("") == 1

    def test_folds_a_cell_that_is_wider_than_all(self, terminal):
        told = terminal(30, show, ["a", "b"], [["n" * 40, "m" * 70]])
        assert max(map(len, told)) <= 30
        assert "".join(told).count("n") == 40 and "".join(told).count("m") == 70

    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(st.lists(st.text("abc", max_size=30), min_size=4, max_size=4), min_size=1, max_size=3),
        st.integers(20, 100),
    )
    def test_loses_no_letter(self, terminal, rows, width):
        columns = ["1", "2", "3", "4"]
        told = terminal(width, show, columns, rows)
        assert max(map(len, told)) <= width
        shown = "".join(told)
        blocks = sum("1" in line for line in told)
        for letter in "abc":
            first = sum(row[0].count(letter) for row in rows)
            others = sum(cell.count(letter) for row in rows for cell in row[1:])
            assert shown.count(letter) == blocks * first + others

    def test_leaves_out_what_has_no_value_and_shows_a_table_without_rows(self, terminal):
        assert not any("empty" in line for line in terminal(160, show, COLUMNS, ROWS))
        assert terminal(80, show, ["run", "p"], []) == ["run"]


class TestFiles:
    def test_are_written_beside_what_is_printed(self, tmp_path, capsys):
        files = {kind: tmp_path / kind for kind in FORMS}
        output(TABLE, files, Table(["run", "seed"], [["a", "1"]]))
        caught = capsys.readouterr()
        assert caught.out.startswith("run ") and caught.err.count("wrote") == 3
        assert (tmp_path / "csv").read_text() == "run,seed\na,1\n"
        assert (tmp_path / "latex").read_text() == FORMS["latex"](TABLE)
        assert (tmp_path / "markdown").read_text() == FORMS["markdown"](TABLE)

    @pytest.mark.parametrize("kind", FORMS)
    def test_of_a_dash_are_standard_output_in_place_of_the_table(self, kind, capsys):
        output(TABLE, {kind: Path("-")})
        assert capsys.readouterr().out == FORMS[kind](TABLE)

    def test_that_are_another_s_or_one_for_two_are_refused(self, tmp_path):
        (tmp_path / "notes").write_text("mine")
        for kind in FORMS:
            with pytest.raises(RunError, match="notes' exists"):
                check_files({kind: tmp_path / "notes"}, "run")
        for one in (Path("-"), tmp_path / "new"):
            with pytest.raises(ConfigError, match="Two formats of the table go to the same file"):
                check_files({"csv": one, "markdown": None, "latex": one}, "run")


class TestCompare:
    EXAMPLE = Path(__file__).parents[1] / "examples" / "resnet20_t4"

    def test_writes_every_form(self, call, tmp_path, capsys):
        files = [f"--{kind}={tmp_path / kind}" for kind in FORMS]
        assert call("compare", self.EXAMPLE, *files) == 0
        shown = capsys.readouterr().out
        (line,) = csv.DictReader((tmp_path / "csv").read_text().splitlines())
        assert (line["run"], line["test_accuracy"], line["accuracy_t2"]) == ("resnet20_t4", "89.92", "74.71")
        assert "| resnet20_t4 | 89.92 | kdsnn |" in (tmp_path / "markdown").read_text()
        assert r"resnet20\_t4 & $89.92$ & kdsnn &" in (tmp_path / "latex").read_text()
        assert call("compare", self.EXAMPLE, *files) == 0
        assert capsys.readouterr().out == shown

    def test_prints_a_form_alone_where_it_goes_to_standard_output(self, call, capsys):
        assert call("compare", self.EXAMPLE, "--csv", "-") == 0
        (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
        assert line["run"] == "resnet20_t4"

    def test_refuses_a_file_before_it_reads_runs(self, call, tmp_path, capsys):
        (tmp_path / "notes").write_text("mine")
        assert call("compare", "nowhere", "--latex", tmp_path / "notes") == 2
        assert "notes' exists" in capsys.readouterr().err

    def test_refuses_a_baseline_that_is_not_there(self, call, capsys):
        assert call("compare", self.EXAMPLE, "--baseline", "direct") == 2
        assert "no row to compare with 'direct'" in capsys.readouterr().err
