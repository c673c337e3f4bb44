"""The prompt of `contextlm generate`, read block by block, however long it is."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

from contextlm.base.errors import InputError
from contextlm.base.visible import shown

_BLOCK = 2**15  # bytes


def read_prompt(prompt: str | None, file: str | None) -> Iterable[str]:
    """The prompt in blocks of text, from where the command line says: the argument, a file, stdin.

    One line break at the end of a file or of stdin is left off. The first block is read at once,
    the others as they are asked for, and none is kept.

    Raises:
        InputError: it is given twice or not at all, or cannot be read as UTF-8; the latter also
            while the blocks are read.
    """
    if prompt is not None and file is not None:
        raise InputError("give either PROMPT or --prompt-file, not both")
    if prompt is not None:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError("PROMPT is not UTF-8")
        return [prompt]
    from_stdin = file in (None, "-")
    if from_stdin and (sys.stdin is None or (file is None and sys.stdin.isatty())):
        raise InputError("no prompt: give PROMPT, --prompt-file, or text on stdin")
    blocks = _without_last_break(_decoded(None if from_stdin else str(file)))
    return chain([next(blocks)], blocks)


def _decoded(file: str | None) -> Iterator[str]:
    """Text of a file, or of stdin."""
    name = "stdin" if file is None else file
    try:
        with nullcontext(sys.stdin.buffer) if file is None else Path(file).open("rb") as stream:
            yield from codecs.iterdecode(iter(lambda: stream.read(_BLOCK), b""), "utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"the prompt in {name} is not UTF-8") from None
    except OSError as error:
        raise InputError(f"--prompt-file {shown(name)}: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise InputError(f"--prompt-file {shown(name)}: no file can be named so") from None


def _without_last_break(blocks: Iterable[str]) -> Iterator[str]:
    """The same text without a line break at its end; at least one block, which may be empty.

    A block is handed on when the next one, or the end, has been seen.
    """
    held = ""
    for block in blocks:
        held, ready = held[-2:] + block, held[:-2]
        if ready:
            yield ready
    yield held.removesuffix("\n").removesuffix("\r")
