"""The live line beside streamed text, as a terminal would show both."""

from __future__ import annotations

import io
import os
import re
from typing import Any

import pytest

from contextlm.base import live_line
from contextlm.base.live_line import LiveLine

COLUMNS, ROWS = 20, 6


class Screen(io.StringIO):
    """As much of a VT100 as is needed to see where text ends up; both streams write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = [""] * ROWS
        self.gone: list[str] = []  # rows that have scrolled away
        self.row = self.column = 0
        self.bottom = ROWS - 1
        self.saved = (0, 0)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\x1b[78]|.", text, re.DOTALL):
            self._take(token)
        return len(text)

    def _take(self, token: str) -> None:
        if token == "\n":
            self.column = 0  # the terminal driver adds the carriage return
            self._down()
        elif token == "\r":
            self.column = 0
        elif token == "\x1b7":
            self.saved = (self.row, self.column)
        elif token == "\x1b8":
            self.row, self.column = self.saved
        elif token.startswith("\x1b["):
            self._control(token[-1], [int(n) for n in token[2:-1].split(";") if n])
        else:
            if self.column == COLUMNS:
                self.column = 0
                self._down()
            self.rows[self.row] = self.rows[self.row].ljust(self.column)
            before, after = (
                self.rows[self.row][: self.column],
                self.rows[self.row][self.column + 1 :],
            )
            self.rows[self.row] = before + token + after
            self.column += 1

    def _control(self, letter: str, numbers: list[int]) -> None:
        if letter == "r":
            self.bottom = (numbers[1] if numbers else ROWS) - 1
            self.row = self.column = 0
        elif letter == "H":
            self.row, self.column = numbers[0] - 1, numbers[1] - 1
        elif letter == "A":
            self.row = max(0, self.row - 1)
        elif letter == "K":
            assert numbers == [2]
            self.rows[self.row] = ""
        else:
            raise AssertionError(letter)

    def _down(self) -> None:
        if self.row == self.bottom:
            self.gone.append(self.rows.pop(0))
            self.rows.insert(self.bottom, "")
        else:
            self.row = min(self.row + 1, ROWS - 1)

    def text(self) -> str:
        return "\n".join(row.rstrip() for row in [*self.gone, *self.rows]).rstrip("\n")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live_line, "_EVERY", 0.0)
    monkeypatch.setattr(live_line, "_size", lambda file: (COLUMNS, ROWS))
    return Screen()


TEXT = "A text, much longer than a row.\n\nAnd one of exactly20and then more\n" * 3 + "the end"


@pytest.mark.parametrize("above", [0, 2, ROWS - 1, 3 * ROWS])
@pytest.mark.parametrize("piece", [1, 3, 20, 50])
def test_the_text_stands_as_it_would_without_the_line(
    screen: Screen, above: int, piece: int
) -> None:
    plain = Screen()
    for out in (screen, plain):
        out.write("earlier\n" * above)
    plain.write(TEXT + "\n")
    lines: list[str] = []
    with LiveLine(screen) as live:
        live.show(lambda: "reading the prompt, in words too long for a row")
        assert screen.rows[screen.row] == "reading the prompt, "[: COLUMNS - 1]
        live.text_follows(screen)
        for at in range(0, len(TEXT), piece):
            screen.write(TEXT[at : at + piece])
            live.show(lambda at=at: f"{at} tokens")
            lines.append(screen.rows[-1])
            assert lines[-1] == f"{at} tokens"
        screen.write("\n")
    assert "tokens" not in screen.text()
    assert screen.text() == plain.text()
    assert screen.bottom == ROWS - 1, "the terminal scrolls all of its rows again"


def interrupted(screen: Screen, text: str) -> None:
    with LiveLine(screen) as live:
        live.show(lambda: "reading")
        if text:
            live.text_follows(screen)
            screen.write(text)
            live.show(lambda: "tokens")
        raise KeyboardInterrupt


@pytest.mark.parametrize("text", ["", "some text"])
def test_the_line_goes_with_an_error(screen: Screen, text: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(screen, text)
    assert screen.text() == text
    assert screen.bottom == ROWS - 1


def test_text_that_goes_elsewhere_leaves_an_ordinary_line(screen: Screen) -> None:
    text = io.StringIO()
    with LiveLine(screen) as live:
        live.text_follows(text)
        for tokens in range(3):
            text.write("word ")
            live.show(lambda tokens=tokens: f"{tokens} tokens")
        assert screen.text() == "2 tokens"
    assert screen.text() == ""


def test_no_terminal_no_line(monkeypatch: pytest.MonkeyPatch, screen: Screen) -> None:
    def never() -> Any:
        raise AssertionError("not asked for")

    log = io.StringIO()
    for file in (log, None):
        with LiveLine(file) as live:
            live.show(never)
            live.text_follows(screen)
            live.show(never)
    monkeypatch.setenv("TERM", "dumb")
    with LiveLine(screen) as live:
        live.show(never)
    assert log.getvalue() == screen.text() == ""


def test_it_is_not_drawn_at_every_token(monkeypatch: pytest.MonkeyPatch, screen: Screen) -> None:
    monkeypatch.setattr(live_line, "_EVERY", 3600.0)
    shown: list[int] = []
    with LiveLine(screen) as live:
        for tokens in range(5):
            live.show(lambda tokens=tokens: str(shown.append(tokens)))
    assert shown == [0]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_the_size_is_the_terminals() -> None:
    import fcntl
    import struct
    import termios

    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 7, 33, 0, 0))
    with os.fdopen(follower, "w") as terminal, os.fdopen(leader, "rb"):
        assert live_line._size(terminal) == (33, 7)
        assert live_line._size(io.StringIO()) == (80, 24)
