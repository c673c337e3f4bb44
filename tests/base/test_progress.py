"""Progress: plain lines in a log file, bars on a terminal, nothing when silent."""

from __future__ import annotations

import io
import os

import pytest

from contextlm.base.progress import Progress, RichProgress, SilentProgress


class Terminal(io.StringIO):
    """Text that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def work(progress: Progress) -> None:
    progress.update("preparing [corpus]")
    progress.stage("base, seed 0")
    with progress.bar(3, "epoch 1") as outer:
        progress.update("step")
        with progress.bar(2, "validation") as inner:
            inner.advance(2)
        outer.advance()
        progress.line("epoch 1  loss [1.5]  *")
        outer.advance(2)
    progress.line("done")


def test_a_log_file_gets_whole_lines_only() -> None:
    log = io.StringIO()
    with RichProgress(log) as progress:
        work(progress)
    assert log.getvalue() == "\nbase, seed 0\nepoch 1  loss [1.5]  *\ndone\n"


def test_a_terminal_gets_lines_and_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    screen = Terminal()
    with RichProgress(screen) as progress:
        work(progress)
        work(progress)
    shown = screen.getvalue()
    for text in (
        "preparing [corpus]",
        "base, seed 0",
        "epoch 1  loss [1.5]  *",
        "validation",
        "done",
    ):
        assert text in shown
    # The cursor is hidden and shown again equally often.
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0


def interrupted(progress: RichProgress, *, during_a_bar: bool) -> None:
    with progress:
        progress.update("waiting")
        if during_a_bar:
            with progress.bar(3, "epoch 1"):
                raise KeyboardInterrupt
        raise KeyboardInterrupt


@pytest.mark.parametrize("during_a_bar", [True, False])
def test_an_error_gives_the_terminal_back(
    monkeypatch: pytest.MonkeyPatch, during_a_bar: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    with pytest.raises(KeyboardInterrupt):
        interrupted(RichProgress(screen), during_a_bar=during_a_bar)
    shown = screen.getvalue()
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0


def test_work_goes_on_when_the_reader_has_left() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as log, RichProgress(log) as progress:
        work(progress)
        work(progress)


def test_silence(capfd: pytest.CaptureFixture[str]) -> None:
    work(SilentProgress())
    assert capfd.readouterr() == ("", "")
