import csv
import io
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikedistill.deliver.forms import FORMS, check_table, write_table
from spikedistill.deliver.latex import escaped, latex
from spikedistill.deliver.tables import Table, blocks, markdown, text_table
from spikedistill.errors import RunError
from spikedistill.files import csv_text

CELLS = st.text(st.sampled_from("ab1 .±-%_|\\*<>&#$~^{}[]`'\"é\n\t"), max_size=8)
HOSTILE = st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=1, max_size=4)
COLUMNS = ["run", "accuracy (%)", "p"]
TABLE = Table(COLUMNS, [["a|b_1", "91.60 ± 0.10", "< 0.001"], ["[c]", "-0.5", ""]], "100 % of it.", ["Said & done."])


def one_line(text):
    return " ".join(text.split())


def read_markdown(text):
    """The cells of a table in GitHub's Markdown: bars that have no backslash part them, backslashes are taken off."""
    rows = [_cells(line) for line in text.splitlines()]
    return [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in row[1:-1]] for row in rows]


def _cells(line):
    cells, signs = [""], iter(line)
    for sign in signs:
        if sign == "\\":
            cells[-1] += sign + next(signs)
        elif sign == "|":
            cells.append("")
        else:
            cells[-1] += sign
    return cells


SPELLED = {"textbackslash{}": "\\", "textasciitilde{}": "~", "textasciicircum{}": "^"}


def read_latex(text):
    """What TeX prints of text: an independent reader of the little that tables use; braces must balance."""
    told, depth, place = "", 0, 0
    text = text.replace("$\\pm$", "±")
    text = re.sub(r"(?<!\\)\$([<>|])\$", r"\1", text)
    while place < len(text):
        sign = text[place]
        if sign == "\\":
            word = next((word for word in SPELLED if text.startswith(word, place + 1)), None)
            told += SPELLED[word] if word else text[place + 1]
            assert word or text[place + 1] in "{}$&#_%", text
            place += len(word) if word else 1
        elif sign in "{}":
            depth += 1 if sign == "{" else -1
            assert depth >= 0, text
        else:
            assert sign not in "&#_%~^$", text
            told += sign
        place += 1
    assert depth == 0, text
    return told


class TestMarkdown:
    def test_has_a_line_a_row_below_two_of_the_head(self):
        assert markdown(["a", "b"], [["1", ""], ["2", "x"]]) == "| a | b |\n| --- | --- |\n| 1 |  |\n| 2 | x |\n"

    @given(HOSTILE)
    def test_gives_back_every_cell_whatever_it_holds(self, rows):
        head, line, *body = read_markdown(markdown(COLUMNS, rows))
        assert (head, line) == (COLUMNS, ["---"] * 3)
        assert body == [[one_line(cell) for cell in row] for row in rows]

    def test_sets_the_best_in_bold(self):
        assert markdown(["a"], [["1"], ["2"]], bold={(1, 0)}).splitlines()[2:] == ["| 1 |", "| **2** |"]


class TestLatex:
    @given(st.text(st.characters(max_codepoint=126, min_codepoint=32) | st.sampled_from("±éÜß"), max_size=20))
    def test_text_is_printed_as_it_is(self, text):
        assert read_latex(escaped(text)) == one_line(text)
        assert "--" not in escaped(text) and "--" not in escaped("a" + "-" * len(text))  # joined to a longer dash

    @given(HOSTILE)
    def test_has_as_many_cells_in_each_line_as_columns_and_balances(self, rows):
        told = latex(Table(COLUMNS, rows))
        begin, *lines = told[told.index("\\begin{tabular}") :].splitlines()
        assert re.fullmatch(r"\\begin\{tabular\}\{[lr]{3}\}", begin)
        assert [line for line in lines if "&" not in line] == [
            *("\\toprule", "\\midrule", "\\bottomrule"),
            *("\\end{tabular}}", "\\end{table}"),
        ]
        body = [line for line in lines if re.search(r"(?<!\\)&", line)]
        assert len(body) == 1 + len(rows)
        assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {2}
        assert all(line.endswith(" \\\\") and line[:1] not in "[*" for line in body)
        assert all(line.replace("\\$", "").count("$") % 2 == 0 for line in body)
        bare = re.sub(r"\\[{}]", "", told)
        assert bare.count("{") == bare.count("}")

    def test_sets_numbers_as_mathematics_and_the_best_in_bold(self):
        cells = ["+0.50 ± 0.10", "-3", "< 0.001", "1e-05", "resnet-18", "3 of 3", ""]
        plainly, boldly = (
            latex(Table(list("abcdefg"), [cells], bold=frozenset((0, j) for j in bold))).splitlines()[-4]
            for bold in ([], range(7))
        )
        assert plainly == r"$+0.50 \pm 0.10$ & $-3$ & $< 0.001$ & $1e-05$ & resnet-18 & 3 of 3 &  \\"
        assert boldly.startswith(r"$\mathbf{+0.50 \pm 0.10}$ & $\mathbf{-3}$ & ")
        assert boldly.endswith(r" & \textbf{resnet-18} & \textbf{3 of 3} &  \\")

    def test_numbers_stand_right_and_heads_are_broken(self):
        told = latex(Table(["run", "accuracy (%)", "empty"], [["a", "1.0", ""], ["b", "2.0", ""]]))
        assert r"\begin{tabular}{lrl}" in told and r"run & \shortstack[r]{accuracy \\ (\%)} & empty \\" in told

    def test_columns_that_a_line_does_not_hold_go_below_with_the_first(self):
        columns = [f"column {number}" for number in range(12)]
        told = latex(Table(columns, [[f"{number}" * 9 for number in range(12)]]))
        heads = [re.findall(r"column (\d+)", line) for line in told.splitlines() if line.startswith("column")]
        assert [len(places) for places in heads] == [7, 6] and heads[1][0] == "0"
        assert [*heads[0], *heads[1][1:]] == [str(number) for number in range(12)]
        assert told.count(r"\begin{tabular}") == told.count(r"\end{tabular}") == told.count(r"\toprule") == 2

    def test_letters_that_pdflatex_does_not_know_are_numbers(self):
        assert escaped("é中\x1b") == "é{[}U+4E2D{]}{[}U+001B{]}"

    def test_says_what_it_needs_and_has_caption_and_notes(self):
        told = latex(TABLE)
        assert told.startswith("% needs \\usepackage{booktabs,graphicx}\n")
        assert r"\caption{100 \% of it. Said \& done.}" in told
        assert "caption" not in latex(Table(COLUMNS, TABLE.rows))


class TestPlainText:
    @given(HOSTILE)
    def test_has_a_line_a_row_and_every_cell_below_its_head(self, rows):
        told = text_table(COLUMNS, rows)
        head, *body = told.removesuffix("\n").split("\n")
        places = [head.index(column) for column in COLUMNS]
        assert len(body) == len(rows)
        for line, row in zip(body, rows):
            assert [line[a:b].strip() for a, b in zip(places, [*places[1:], None])] == [one_line(c) for c in row]

    def test_counts_wide_letters_as_two(self):
        assert text_table(["a", "b"], [["中", "x"], ["cc", "y"]]).splitlines() == ["a   b", "中  x", "cc  y"]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 100))
def test_blocks_hold_every_column_once_the_first_in_each_and_fit_where_they_can(widths, room):
    found = blocks(widths, room)
    assert [place for block in found for place in block[1:]] == list(range(1, len(widths)))
    assert all(block[0] == 0 for block in found)
    for block in found:
        assert sum(widths[place] + 2 for place in block) - 2 <= room or len(block) <= 2
    for block, following in itertools.pairwise(found):
        assert sum(widths[place] + 2 for place in (*block, following[1])) - 2 > room


@given(HOSTILE)
def test_csv_gives_back_every_cell(rows):
    told = csv_text(COLUMNS, rows)
    assert list(csv.reader(io.StringIO(told, newline=""))) == [COLUMNS, *rows]


class TestFiles:
    @pytest.mark.parametrize("kind", FORMS)
    def test_replace_their_like_and_nothing_else(self, tmp_path, kind):
        file = tmp_path / "folder" / "table"
        write_table(file, kind, Table(COLUMNS, [["old", "", ""]]))
        check_table(file, kind, COLUMNS[0])
        write_table(file, kind, TABLE)
        assert file.read_text() == FORMS[kind](TABLE) and "91.60" in file.read_text()
        file.write_text("my notes\n")
        for refused in (lambda: check_table(file, kind, COLUMNS[0]), lambda: write_table(file, kind, TABLE)):
            with pytest.raises(RunError, match="was not written by this command"):
                refused()
        assert file.read_text() == "my notes\n"

    def test_of_markdown_hold_caption_and_notes(self):
        said = FORMS["markdown"](TABLE)
        assert said.endswith("|\n\n100 % of it.\n\n- Said & done.\n")
