"""A line on the terminal that says how work is going, below the text that is written meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import TextIO

from rich.cells import chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from contextlm.base.visible import visible

_EVERY = 0.1  # seconds between two looks at how work is going


class LiveLine(AbstractContextManager["LiveLine"]):
    """Shows no line unless `status` is a terminal; leaving its `with` block takes the line away.

    Args:
        status: where the line goes, such as stderr.
        text: what `write` writes to, such as stdout; None: nowhere. Where both are terminals they
            are taken for the same one, and the line stands below the text.
    """

    def __init__(self, status: TextIO, text: TextIO | None) -> None:
        self._text = text
        self._live: Live | None = None
        self._unfinished: str | None = None  # row of the text, where the line stands below it
        self._said = ""
        self._next = 0.0
        if status.isatty():
            if text is not None and text.isatty():
                status, self._unfinished = text, ""
            console = Console(file=status, force_terminal=True, highlight=False)
            if not console.is_dumb_terminal:
                self._live = Live(
                    console=console,
                    auto_refresh=False,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self._live.start()

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError, ValueError):  # nobody may be left to read it
            if self._live is not None:
                self._live.stop()
            if self._live is not None and self._text is not None and self._unfinished:
                self._text.write(self._unfinished)
                self._text.flush()

    def show(self, words: Callable[[], str]) -> None:
        """Show what `words` says now, at most ten times a second."""
        now = time.monotonic()
        if self._live is not None and now >= self._next:
            self._next = now + _EVERY
            self._said = words()
            self._draw()

    def write(self, piece: str) -> None:
        """Write some more text; a terminal gets nothing that it would obey."""
        if self._text is None:
            return
        if self._text.isatty():
            piece = visible(piece)
        if self._live is None or self._unfinished is None:
            self._text.write(piece)
            self._text.flush()
            return
        *rows, last = (self._unfinished + piece).expandtabs().split("\n")
        *full, self._unfinished = chop_cells(last, self._live.console.width) or [""]
        for row in [*rows, *full]:
            self._live.console.print(Text(row), soft_wrap=True)
        self._draw()

    def _draw(self) -> None:
        assert self._live is not None
        shown = [Text(row, no_wrap=True) for row in (self._unfinished, self._said) if row]
        self._live.update(Group(*shown), refresh=True)
