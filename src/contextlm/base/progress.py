"""How long work tells what it is doing: headings, finished lines, and bars on a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

import rich.progress as bars
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from contextlm.base.visible import visible


class Bar(Protocol):
    """One piece of work of known size, while it runs."""

    def advance(self, n: int = 1, text: str | None = None) -> None:
        """`n` more units are done; `text` takes the description's place."""


class Progress(Protocol):
    """Where work reports to. Lines stay; bars vanish when their work is done."""

    def stage(self, title: str) -> None:
        """A heading: which contender and seed is at work."""

    def line(self, text: str) -> None:
        """One finished line, e.g. ``epoch 3  train loss 5.1  validation loss 5.3  *``."""

    def update(self, text: str) -> None:
        """What is at work at this moment; gone with the next heading, line or bar."""

    def bar(self, total: int, description: str) -> AbstractContextManager[Bar]:
        """A bar of `total` units for the time of a `with` block."""


class _SilentBar:
    def advance(self, n: int = 1, text: str | None = None) -> None:
        pass


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Fall silent where the reader has left; rich's own answer is to end the process."""
        self.quiet = True
        # What is buffered would fail again when Python flushes the file at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class RichProgress(AbstractContextManager["RichProgress"]):
    """Headings and lines on `file` (stderr); on a terminal also remarks and nested bars.

    Leaving its `with` block gives the terminal back as it was.
    """

    def __init__(self, file: TextIO | None = None):
        self._console: Console = _Console(file=file, stderr=file is None, highlight=False)
        # A terminal has room for one live display: either a remark, or the bars of nested blocks.
        self._remark: Status | None = None
        self._bars: bars.Progress | None = None

    def __exit__(self, *exception: object) -> None:
        self._clear()
        if self._bars is not None:
            self._bars.stop()

    def stage(self, title: str) -> None:
        self._clear()
        self._console.print(f"\n{visible(title)}", style="bold", markup=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self._clear()
        self._console.print(visible(text), markup=False, soft_wrap=True)

    def update(self, text: str) -> None:
        self._clear()
        if self._console.is_terminal and self._bars is None:
            self._remark = self._console.status(escape(visible(text)))
            self._remark.start()

    @contextmanager
    def bar(self, total: int, description: str) -> Iterator[Bar]:
        if not self._console.is_terminal:
            yield _SilentBar()
            return
        self._clear()
        outermost = self._bars is None
        display = self._bars = self._bars or self._new_bars()
        task = display.add_task(visible(description), total=total)
        try:
            yield _RichBar(display, task)
        finally:
            display.remove_task(task)
            if outermost:
                display.stop()
                self._bars = None

    def _new_bars(self) -> bars.Progress:
        display = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=None),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )
        display.start()
        return display

    def _clear(self) -> None:
        if self._remark is not None:
            self._remark.stop()
            self._remark = None


class SilentProgress(RichProgress):
    """Shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(quiet=True, force_terminal=False)


class _RichBar:
    def __init__(self, display: bars.Progress, task: bars.TaskID):
        self._display = display
        self._task = task

    def advance(self, n: int = 1, text: str | None = None) -> None:
        described = None if text is None else visible(text)
        self._display.update(self._task, advance=n, description=described)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 1:
        return "< 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
