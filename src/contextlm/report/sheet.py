"""A table as texts in columns, each column marked as measured or reported, and its Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from contextlm.base.visible import visible

Kind = Literal["text", "measured", "reported"]


@dataclass(frozen=True)
class Column:
    """A heading, and where the figures below it come from."""

    label: str
    kind: Kind = "measured"

    @property
    def heading(self) -> str:
        """The label with its origin, for renderers that have no styles."""
        return self.label if self.kind == "text" else f"{self.label} ({self.kind})"


CONTENDER = Column("contender", "text")


@dataclass(frozen=True)
class Table:
    """A caption, columns, and rows of one text per column. The first column names the row."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def make_table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    """A `Table` from any sequences."""
    return Table(caption, tuple(columns), tuple(tuple(row) for row in rows))


def markdown_table(table: Table) -> str:
    """A table as GitHub Markdown; headings say which figures are measured and which reported."""
    header = [escape_markdown(column.heading) for column in table.columns]
    rule = [":---" if i == 0 or c.kind == "text" else "---:" for i, c in enumerate(table.columns)]
    body = [[escape_markdown(cell) for cell in row] for row in table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *body])


def escape_markdown(text: object) -> str:
    """Text that GitHub Markdown shows as it is, on one line, in a table too."""
    flat = visible(" ".join(str(text).split()))
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    flat = re.sub(r"([\\`*|\[\]~$])", r"\\\1", flat)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", flat)  # inside a word it means nothing
