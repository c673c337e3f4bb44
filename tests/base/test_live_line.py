"""The live line beside streamed text, as a terminal would show both."""

from __future__ import annotations

import io
import re
from typing import NoReturn

import pytest

from contextlm.base import live_line
from contextlm.base.live_line import LiveLine

COLUMNS = 20


class Screen(io.StringIO):
    """As much of a VT100 without a bottom as is needed to see where text ends up."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.row, self.column = [""], 0, 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|.", text, re.DOTALL):
            if token == "\r":
                self.column = 0
            elif token == "\x1b[2K":
                self.rows[self.row] = ""
            elif token == "\x1b[1A":
                self.row = max(0, self.row - 1)
            elif token in ("\x1b[?25l", "\x1b[?25h"):
                continue
            elif token == "\n" or self.column == COLUMNS:
                self.row, self.column = self.row + 1, 0
                self.rows += [""] * (self.row + 1 - len(self.rows))
            assert not token.startswith("\x1b") or token[2:] in ("2K", "1A")
            if token.isprintable():
                row = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = row[: self.column] + token + row[self.column + 1 :]
                self.column += 1
        return len(text)

    def shown(self) -> list[str]:
        rows = [row.rstrip() for row in self.rows]
        return rows[: max([0, *(number + 1 for number, row in enumerate(rows) if row)])]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setattr(live_line, "_EVERY", 0.0)
    return Screen()


TEXT = "A text, much longer than a row.\n\nAnd one of exactly20and then more\n" * 3 + "the end"


@pytest.mark.parametrize("piece", [1, 20])
def test_the_line_stands_below_the_text_and_leaves_no_trace(screen: Screen, piece: int) -> None:
    plain = Screen()
    plain.write("earlier\n" + TEXT + "\n")
    screen.write("earlier\n")
    with LiveLine(screen, screen) as live:
        live.show(lambda: "reading")
        assert screen.shown() == ["earlier", "reading"]
        for at in range(0, len(TEXT), piece):
            live.write(TEXT[at : at + piece])
            live.show(lambda at=at: f"{at} tokens")
            assert screen.shown()[-1] == f"{at} tokens"
    screen.write("\n")
    assert screen.shown() == plain.shown()


def interrupted(screen: Screen, text: str) -> NoReturn:
    with LiveLine(screen, screen) as live:
        live.show(lambda: "reading")
        live.write(text)
        raise KeyboardInterrupt


@pytest.mark.parametrize("text", ["", "some text"])
def test_the_line_goes_with_an_error_and_the_text_stays(screen: Screen, text: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(screen, text)
    assert screen.shown() == ([text] if text else [])


def test_text_that_goes_elsewhere_is_left_as_it_is(screen: Screen) -> None:
    text = io.StringIO()
    with LiveLine(screen, text) as live:
        for tokens in range(3):
            live.write("word\x1b[31m ")
            live.show(lambda tokens=tokens: f"{tokens} tokens")
        assert screen.shown() == ["2 tokens"]
    assert screen.shown() == []
    assert text.getvalue() == "word\x1b[31m " * 3


def test_no_terminal_no_line(monkeypatch: pytest.MonkeyPatch, screen: Screen) -> None:
    def never() -> NoReturn:
        raise AssertionError("not asked for")

    log = io.StringIO()
    with LiveLine(log, screen) as live:
        live.show(never)
        live.write("a\x1b[2J")  # a terminal must not obey it
    monkeypatch.setenv("TERM", "dumb")
    with LiveLine(screen, None) as live:
        live.show(never)
        live.write("nowhere")
    assert screen.shown() == ["a\\x1b[2J"]
    assert log.getvalue() == ""
