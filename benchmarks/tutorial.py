"""Make docs/tutorial.ipynb and the pictures of docs/tutorial.md from the page's own Python blocks.

python benchmarks/tutorial.py
"""

import json
import os
import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"


def notebook(page: str) -> dict[str, Any]:
    """The page as a notebook: text and code in turn, without outputs."""
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(re.split(r"```python\n(.*?)```", page, flags=re.DOTALL)):
        text = part.strip("\n")
        text = re.sub(r"The\nsame page is a \[notebook\]\(tutorial.ipynb\)\. ", "", text)
        if not text:
            continue
        kind = "code" if number % 2 else "markdown"
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}}
        cell["source"] = text.splitlines(keepends=True)
        cells.append({**cell, "execution_count": None, "outputs": []} if kind == "code" else cell)
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def code_of(page: str) -> str:
    """All Python blocks of a page."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))


def main() -> None:
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    (DOCS / "tutorial.ipynb").write_text(json.dumps(notebook(page), indent=1) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("page.py").write_text(code_of(page), encoding="utf-8")
        runpy.run_path("page.py")
        for picture in Path(folder).glob("*.svg"):
            text = re.sub(r"<metadata>.*?</metadata>\s*", "", picture.read_text(encoding="utf-8"), flags=re.DOTALL)
            (DOCS / "images" / f"tutorial-{picture.name}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
