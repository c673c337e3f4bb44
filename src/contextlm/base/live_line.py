"""One line on the terminal that says how work is going, and never mixes with the text beside it.

While text is written to the same terminal, the line stands in the last row and the text scrolls
above it: the terminal is told to scroll all rows but the last (DECSTBM), so that the line is drawn
without a need to know where the text is. Before that, and where the text goes elsewhere, it is an
ordinary line that is drawn again from its beginning.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import TextIO

_EVERY = 0.1  # seconds between two drawings
_FEWEST_ROWS = 4
_SAVE, _RESTORE = "\x1b7", "\x1b8"  # the cursor's place
_ERASE = "\x1b[2K"


class LiveLine(AbstractContextManager["LiveLine"]):
    """Shows nothing unless `file` is a terminal; leaving its `with` block takes the line away.

    Args:
        file: where the line goes, such as stderr; None: nowhere.
    """

    def __init__(self, file: TextIO | None) -> None:
        self._file = file if file is not None and _is_terminal(file) else None
        self._size: tuple[int, int] | None = None  # columns and rows while the last row is ours
        self._drawn = False
        self._next = 0.0

    def __exit__(self, *exception: object) -> None:
        # Nobody may be left to read it.
        with suppress(OSError, ValueError):
            self._clear()
            if self._size is not None:
                _, rows = self._size
                self._put(f"{_SAVE}\x1b[r\x1b[{rows};1H{_ERASE}{_RESTORE}")
                self._size = None

    def show(self, words: Callable[[], str]) -> None:
        """Show what `words` says now, at most ten times a second."""
        now = time.monotonic()
        if self._file is None or now < self._next:
            return
        self._next = now + _EVERY
        columns, rows = _size(self._file)
        if self._size is not None and self._size != (columns, rows):
            self._take_last_row(columns, rows)
        # A full row would break.
        line = words()[: columns - 1]
        if self._size is None:
            self._put(f"\r{_ERASE}{line}")
            self._drawn = True
        else:
            self._put(f"{_SAVE}\x1b[{rows};1H{_ERASE}{line}{_RESTORE}")

    def text_follows(self, file: TextIO) -> None:
        """Make room: from now on text is written to `file`, beginning in the first column."""
        self._clear()
        if self._file is None or not _is_terminal(file):
            return
        columns, rows = _size(self._file)
        if rows < _FEWEST_ROWS:
            self._file = None
            return
        self._put("\n\x1b[A")  # where the cursor is in the last row, all moves up by one
        self._take_last_row(columns, rows)

    def _take_last_row(self, columns: int, rows: int) -> None:
        self._put(f"{_SAVE}\x1b[1;{rows - 1}r{_RESTORE}")
        self._size = (columns, rows)

    def _clear(self) -> None:
        if self._drawn:
            self._put(f"\r{_ERASE}")
            self._drawn = False

    def _put(self, sequence: str) -> None:
        assert self._file is not None
        self._file.write(sequence)
        self._file.flush()


def _is_terminal(file: TextIO) -> bool:
    return file.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def _size(file: TextIO) -> tuple[int, int]:
    """Columns and rows of the terminal."""
    try:
        columns, rows = os.get_terminal_size(file.fileno())
    except (OSError, ValueError):
        columns, rows = 0, 0
    return columns or 80, rows or 24
