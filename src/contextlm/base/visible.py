"""Text from elsewhere made fit to be shown: nothing in it steers a terminal or reorders a line."""

from __future__ import annotations

import unicodedata

# Control, format and separator characters, and halves of surrogate pairs.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Line feed and tab; the two joiners, without which some scripts and emoji fall apart.
_HARMLESS = set("\n\t\u200c\u200d")
_LONGEST = 120  # characters of a value inside a message


def visible(text: str) -> str:
    """`text` with every character that cannot be seen written as an escape, such as ``\\x1b``.

    Line feeds and tabs stay. The rest would colour or overwrite a terminal's lines (control
    characters), show text in another order than it is read (bidirectional overrides), or could not
    be written as UTF-8 at all (lone surrogates, as in file names that are not UTF-8).
    """
    if text.isprintable():
        return text
    return "".join(_escaped(c) if _is_hidden(c) else c for c in text)


def shown(value: object, longest: int = _LONGEST) -> str:
    """`repr` of a value for a message, its middle left out where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out whole numbers of thousands of digits
        return "a number of thousands of digits"
    return shortened(text, longest)


def shortened(text: str, longest: int) -> str:
    """`text`, of which at most `longest` characters at the two ends are kept."""
    if len(text) <= longest:
        return text
    tail = longest // 4
    return f"{text[: longest - tail - 5]} ... {text[len(text) - tail :]}"


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in _HARMLESS


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
