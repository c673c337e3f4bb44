"""A report's summary inside a document of the user's, between two marks.

A document holds ``<!-- results:begin -->`` and ``<!-- results:end -->``, or, where it has several
blocks, ``<!-- results:begin NAME -->`` and ``<!-- results:end NAME -->``. Only what stands between
them is replaced, so the figures in a document are never typed by hand.
"""

from __future__ import annotations

from pathlib import Path

from contextlm.base.errors import InputError
from contextlm.base.files import atomic_open


def embed(document: Path, block: str | None, text: str) -> None:
    """Replace one block of a document by `text`; the rest stays as it is, to the byte.

    Raises:
        InputError: as `embedded`.
    """
    content = embedded(document, block, text)
    with atomic_open(document, "wb") as stream:
        stream.write(content)


def embedded(document: Path, block: str | None, text: str) -> bytes:
    """What `embed` would write: the document with its line ends, one block of it replaced.

    Args:
        document: a UTF-8 text file.
        block: name of the block, or None for the block without a name.
        text: what to put between the marks.

    Raises:
        InputError: the document cannot be read, or does not hold the two marks exactly once.
    """
    name = f" {block}" if block else ""
    begin, end = f"<!-- results:begin{name} -->", f"<!-- results:end{name} -->"
    try:
        content = document.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{document}: cannot be read: {error.strerror}") from None
    except ValueError:  # also a name that no file can have
        raise InputError(f"{document}: not UTF-8 text") from None
    if content.count(begin) != 1 or content.count(end) != 1:
        raise InputError(f"{document}: expected the marks {begin} and {end} once each")
    before, _, rest = content.partition(begin)
    if end not in rest:
        raise InputError(f"{document}: {end} stands before {begin}")
    after = rest.partition(end)[2]
    lines = "\r\n" if "\r\n" in content else "\n"
    block_text = lines.join(["", *text.strip().split("\n"), ""])
    return f"{before}{begin}{block_text}{end}{after}".encode()
