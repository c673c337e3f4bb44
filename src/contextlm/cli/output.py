"""Printing results: one JSON object for programs, tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from contextlm.base.errors import InputError
from contextlm.base.files import plain, why_not_writable
from contextlm.base.visible import shown, visible

if TYPE_CHECKING:
    from contextlm.results.result import Run

# What the report of a run consists of.
REPORT_FILES = ("report.md", "report.html", "figures")

_WIDE = 240  # columns of a table that goes into a file or a pipe


def print_json(value: Any) -> None:
    """Print one JSON object on one line: ASCII, for every encoding, and without NaN."""
    print(json.dumps(plain(value), allow_nan=False))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", text: int = 1
) -> None:
    """Print a table to stdout.

    Where it is too wide, headings and text are broken at spaces, figures never.

    Args:
        columns: the headings.
        rows: one text for each column.
        caption: a line above the table.
        text: so many columns at the left hold text; those after them hold figures, set right.
    """
    table, least = _table(columns, rows, caption, text)
    Console(width=max(_room(), least)).print(table)


def print_comparison(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = ""
) -> None:
    """Print a table of contenders, turned on its side where the terminal is too narrow for it.

    If even that is too wide, the contenders are shown a few at a time.
    """
    if _least_width(columns, rows) <= _room():
        print_table(columns, rows, caption=caption)
        return
    shown = list(rows)
    while shown:
        count = len(shown)
        while count > 1 and _least_width(*_turned(columns, shown[:count])) > _room():
            count -= 1
        print_table(*_turned(columns, shown[:count]), caption=caption)
        shown = shown[count:]


def print_facts(facts: Mapping[str, str], *, caption: str) -> None:
    """Print names and values, one pair a line."""
    print_table(["", "value"], list(facts.items()), caption=caption, text=2)


def print_runs(runs: Sequence[Run], paths: Mapping[str, Path], against: str | None = None) -> None:
    """Print the answer and the comparison of some runs, and where their report is."""
    from contextlm.report.contenders import contenders
    from contextlm.report.notes import answers
    from contextlm.report.tables import main_tables

    rows = contenders(runs, against)
    for sentence in answers(rows):
        print(visible(sentence))
    tables = main_tables(rows)
    for table in tables:
        caption = table.caption if len(tables) > 1 else ""
        print_comparison(table.headings, table.rows, caption=caption)
        if table.note:
            print(table.note)
    for kind, path in paths.items():
        print(f"{kind}: {visible(str(path))}")


def runs_json(
    runs: Sequence[Run], paths: Mapping[str, Path], against: str | None = None
) -> dict[str, Any]:
    """The same as one object, with the result of every seed beside the rows of their means."""
    from contextlm.report.contenders import contenders
    from contextlm.report.page import report_facts

    return {"report": dict(paths), **report_facts(runs, contenders(runs, against))}


def writable_folder(text: str, option: str) -> Path:
    """The folder that an option names, which need not exist yet.

    Raises:
        InputError: it has no name, or nothing could be written there.
    """
    if not text.strip():
        raise InputError(f"{option} {shown(text)}: expected the name of a folder")
    problem = why_not_writable(Path(text))
    if problem is not None:
        raise InputError(f"{option} {problem}")
    return Path(text)


def scientific(value: float) -> str:
    """A large count, such as floating-point operations, with two figures."""
    return f"{value:.1e}".replace("e+", "e")


def _room() -> int:
    """Columns of the terminal, or of a table that goes elsewhere."""
    return Console().width if sys.stdout.isatty() else _WIDE


def _turned(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    headings, *lines = zip(columns, *rows, strict=True)
    return headings, lines


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    return _table(columns, rows, "", 1)[1]


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, text: int
) -> tuple[Table, int]:
    """The table, and the narrowest that it can be with headings and text broken at spaces."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    if caption:
        table.title = Text(visible(caption), style="bold")
    for number, heading in enumerate(columns):
        table.add_column(
            Text(visible(heading)), justify="left" if number < text else "right", overflow="fold"
        )
        if number >= text:
            unbroken = [*heading.split(), *(row[number] for row in rows)]
            table.columns[number].min_width = max(cell_len(visible(piece)) for piece in unbroken)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    unlimited = Console(width=10**6)
    width = Measurement.get(unlimited, unlimited.options, table)
    if width.maximum > _room():  # text alone gives way beyond this
        for column in table.columns[text:]:
            column.width = column.min_width
    return table, width.minimum
