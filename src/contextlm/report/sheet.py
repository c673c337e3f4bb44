"""Columns declared once, and tables made of them, as Markdown and LaTeX.

A table knows nothing of its form; the page and the command line render the same one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from contextlm.base.visible import visible
from contextlm.report.language import say
from contextlm.report.numbers import ABSENT

Kind = Literal["text", "measured", "reported"]
T = TypeVar("T")

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    ABSENT: "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Column(Generic[T]):
    """A heading, with its unit; how to print an item's cell; and where the figures come from."""

    heading: str
    cell: Callable[[T], str]
    kind: Kind = "measured"


@dataclass(frozen=True)
class Table:
    """A caption, headings with their kinds, and rows of one text a column; the first names the row.

    Headings say ``(measured)`` only where the table also has ``(reported)`` figures.
    """

    caption: str
    headings: tuple[str, ...]
    kinds: tuple[Kind, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def make_table(
    caption: str, columns: Sequence[Column[T]], items: Iterable[T], note: str = ""
) -> Table:
    """A row for each item, without rows that hold only a name, and without empty columns."""
    rows = [[column.cell(item) for column in columns] for item in items]
    rows = [row for row in rows if any(cell != ABSENT for cell in row[1:])]
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] != ABSENT for row in rows)]
    kinds = tuple(columns[i].kind for i in kept)
    headings = tuple(
        f"{say(columns[i].heading)} ({say(columns[i].kind)})"
        if "reported" in kinds and columns[i].kind != "text"
        else say(columns[i].heading)
        for i in kept
    )
    texts = tuple(tuple(row[i] for i in kept) for row in rows)
    return Table(say(caption), headings, kinds, texts, note)


def markdown_table(table: Table) -> str:
    """A table as GitHub Markdown."""
    rule = [":---" if i == 0 or k == "text" else "---:" for i, k in enumerate(table.kinds)]
    lines = [table.headings, *table.rows]
    header, *body = [[escape_markdown(cell) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *body])


def latex_table(table: Table) -> str:
    """A table as a LaTeX float; its document needs the package booktabs."""
    places = "".join("l" if i == 0 or k == "text" else "r" for i, k in enumerate(table.kinds))
    header, *body = [
        " & ".join(map(escape_latex, line)) + r" \\" for line in [table.headings, *table.rows]
    ]
    caption = escape_latex(" ".join(filter(None, [f"{table.caption}.", table.note])))
    lines = [
        r"\begin{table}",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{{places}}}",
        *(r"\toprule", header, r"\midrule", *body, r"\bottomrule"),
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape_markdown(text: object) -> str:
    """Text that GitHub Markdown shows as it is, on one line, in a table too."""
    flat = visible(" ".join(str(text).split()))
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    flat = re.sub(r"([\\`*|\[\]~$])", r"\\\1", flat)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", flat)  # inside a word it means nothing


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(character, character) for character in visible(text))
