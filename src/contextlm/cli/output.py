"""Printing results: one JSON object for programs, tables for people."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextlm.base.errors import InputError
from contextlm.base.plain import plain
from contextlm.base.visible import json_visible, shown, visible

if TYPE_CHECKING:
    from contextlm.results.result import Run

# What the report of a run consists of.
REPORT_FILES = ("report.md", "report.html", "curves.png", "frontier.png")

_WIDE = 240  # columns of a table that goes into a file or a pipe


def print_json(value: Any) -> None:
    """Print one JSON object on one line, valid for every reader (no NaN), in any encoding."""
    text = json_visible(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(plain(value), allow_nan=False)
    print(text)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", text: int = 1
) -> None:
    """Print a table to stdout.

    Where it is too wide, headings and text are broken at spaces and hyphens, figures never.

    Args:
        columns: the headings.
        rows: one text for each column.
        caption: a line above the table.
        text: so many columns at the left hold text; those after them hold figures, set right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    seen = [[visible(cell) for cell in line] for line in (columns, *rows)]
    columns, *rows = _fitted(seen, text, _room())
    console = Console(width=_room())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    if caption:
        table.title = Text(visible(caption), style="bold")
    for number, heading in enumerate(columns):
        left = number < text
        table.add_column(
            Text(heading), justify="left" if left else "right", overflow="fold", vertical="top"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def print_comparison(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = ""
) -> None:
    """Print a table of contenders, turned on its side where the terminal is too narrow for it.

    If even that is too wide, the contenders are shown a few at a time.
    """
    lines: list[Sequence[str]] = [columns, *rows]
    fits = _table_width(_least_widths(lines, 1)) <= _room()
    if fits and not _width(_turned(lines)) < _width(lines) > _room():
        print_table(columns, rows, caption=caption)
        return
    group: list[Sequence[str]] = []
    for row in rows:
        if group and _table_width(_least_widths(_turned([columns, *group, row]), 1)) > _room():
            _print_turned(columns, group, caption)
            group = []
        group.append(row)
    _print_turned(columns, group, caption)


def print_facts(facts: Mapping[str, Any], *, caption: str) -> None:
    """Print names and values, one pair a line."""
    rows = [(name, _shown(value)) for name, value in facts.items()]
    print_table(["", "value"], rows, caption=caption, text=2)


def print_runs(runs: Sequence[Run], paths: Mapping[str, Path]) -> None:
    """Print the answer and the comparison of some runs, and where their report is."""
    from contextlm.report.contenders import contenders
    from contextlm.report.notes import answers
    from contextlm.report.tables import main_tables

    rows = contenders(runs)
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


def runs_json(runs: Sequence[Run], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The same as one object, with the result of every seed beside the rows of their means."""
    from contextlm.report.contenders import contenders, row_facts

    return {
        "runs": [run.folder for run in runs],
        "report": dict(paths),
        "rows": [row_facts(row) for row in contenders(runs)],
        "results": [o.result.model_dump() for run in runs for o in run.outcomes],
    }


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 1:
        return "< 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def writable_folder(text: str, option: str) -> Path:
    """The folder that an option names, which need not exist yet.

    Raises:
        InputError: it has no name, or nothing could be written there.
    """
    if not text.strip():
        raise InputError(f"{option} {shown(text)}: expected the name of a folder")
    from contextlm.base.files import why_not_writable

    problem = why_not_writable(Path(text))
    if problem is not None:
        raise InputError(f"{option} {problem}")
    return Path(text)


def scientific(value: float) -> str:
    """A large count, such as floating-point operations, with two figures."""
    return f"{value:.1e}".replace("e+", "e")


def _room() -> int:
    """Columns of the terminal, or of a table that goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDE


def _turned(lines: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    return [list(column) for column in zip(*lines, strict=True)]


def _print_turned(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    headings, *lines = _turned([columns, *rows])
    print_table(headings, lines, caption=caption)


def _table_width(widths: Sequence[int]) -> int:
    return sum(width + 3 for width in widths)


def _width(lines: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that a table takes when no cell is broken."""
    return _table_width([max(map(len, column)) for column in _turned(lines)])


def _broken(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False) or [""]


def _least_widths(lines: Sequence[Sequence[str]], text: int) -> list[int]:
    """The narrowest that each column can be with headings and `text` columns broken."""
    least = []
    for number, (heading, *cells) in enumerate(_turned(lines)):
        pieces = _broken(heading, 1)
        pieces += [p for c in cells for p in (_broken(c, 1) if number < text else [c])]
        least.append(max(map(len, pieces)))
    return least


def _fitted(lines: Sequence[Sequence[str]], text: int, room: int) -> Sequence[Sequence[str]]:
    """`lines` with cells broken so that the table fits `room`; as they are if it cannot."""
    widths = [max(map(len, column)) for column in _turned(lines)]
    least = _least_widths(lines, text)
    if _table_width(widths) <= room or _table_width(least) > room:
        return lines
    while _table_width(widths) > room:
        loose = [number for number, width in enumerate(widths) if width > least[number]]
        widths[max(loose, key=lambda number: widths[number])] -= 1
    return [
        [
            "\n".join(_broken(cell, widths[number])) if row == 0 or number < text else cell
            for number, cell in enumerate(line)
        ]
        for row, line in enumerate(lines)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)
