"""Tables in LaTeX, with all special characters escaped."""

import re
import textwrap
from collections.abc import Sequence

from spikedistill.deliver.tables import NARROW, Table, blocks, head_width, one_line

NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?( ± \d+(\.\d+)?)?|< \d+(\.\d+)?")
"""A cell that LaTeX sets in math mode, for a proper minus sign: ``+0.42 ± 0.10``, ``< 0.001``."""
LINE = 82
"""Letters of footnotesize that fit into a line of the class article."""
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
TEX |= {sign: f"\\{sign}" for sign in "{}$&#_%"} | {sign: f"${sign}$" for sign in "<>|"}
TEX |= {sign: f"{{{sign}}}" for sign in "[]*"}
"""Characters with a meaning in LaTeX; brackets and stars have one after the end of a row."""


def latex(table: Table) -> str:
    r"""A table in LaTeX, for a document with the packages booktabs and graphicx.

    Columns that do not fit into a line of the class article go into further tabulars below, each with the first.

    >>> print(latex(Table(["run", "p"], [["a_1", "< 0.001"]])).splitlines()[7])
    a\_1 & $< 0.001$ \\
    """
    caption = " ".join([table.caption, *table.notes]).strip()
    cells = list(zip(*table.rows)) or [()] * len(table.columns)
    parts = blocks([head_width(head, column) for head, column in zip(table.columns, cells)], LINE)
    head = ["% needs \\usepackage{booktabs,graphicx}", r"\begin{table}", r"\centering\footnotesize\tabcolsep=4pt"]
    head += [f"\\caption{{{escaped(caption)}}}", r"\smallskip"] if caption else []
    return "\n".join([*head, "\n\n\\medskip\n".join(_tabular(table, part) for part in parts), r"\end{table}", ""])


def _tabular(table: Table, places: Sequence[int]) -> str:
    """A tabular of these columns, scaled down if it is wider than a line."""
    cells = [[row[place] for row in table.rows] for place in places]
    rights = [all(NUMBER.fullmatch(cell) for cell in column if cell) and any(column) for column in cells]
    heads = [_head(table.columns[place], "lr"[right]) for place, right in zip(places, rights)]
    rows = [[_cell(row[place], (i, place) in table.bold) for place in places] for i, row in enumerate(table.rows)]
    body = [" & ".join(line) + r" \\" for line in (heads, *rows)]
    begin = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{\begin{tabular}{"
    begin += "".join("lr"[right] for right in rights) + "}"
    return "\n".join([begin, r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}}"])


def _head(text: str, side: str) -> str:
    lines = [escaped(line) for line in textwrap.wrap(text, NARROW, break_long_words=False, break_on_hyphens=False)]
    stacked = r" \\ ".join(lines)
    return f"\\shortstack[{side}]{{{stacked}}}" if len(lines) > 1 else stacked


def _cell(text: str, bold: bool) -> str:
    if NUMBER.fullmatch(text):
        number = text.replace("±", r"\pm")
        return f"$\\mathbf{{{number}}}$" if bold else f"${number}$"
    return f"\\textbf{{{escaped(text)}}}" if bold and text else escaped(text)


def escaped(text: str) -> str:
    r"""Text escaped for LaTeX. A letter that pdfLaTeX cannot print becomes its code.

    >>> print(escaped("50 % of a_b -> c"))
    50 \% of a\_b -$>$ c
    """
    told = "".join(TEX.get(sign) or _letter(sign) for sign in one_line(text))
    return told.replace("--", "-{}-").replace("--", "-{}-")  # else LaTeX joins them to a longer dash


def _letter(sign: str) -> str:
    """A letter that pdfLaTeX prints without further packages (ASCII, accented Latin-1), else its code."""
    accented = "\u00c0" <= sign <= "\u00ff" and sign not in "\u00d7\u00f7\u00d0\u00f0\u00de\u00fe"
    return sign if " " <= sign <= "~" or accented else f"{{[}}U+{ord(sign):04X}{{]}}"
