"""Writing files so that each appears whole or not at all, and guessing what a wrong name meant.

A leaf module: every room may import it, it imports nothing of ours.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; rename it to `path` only if the block succeeds.

    The data is flushed to the disk before the rename, so after a crash `path` holds either the old
    content or the new one, never a part. Parent folders are made as needed.

    Args:
        path: the file to create or replace.
        mode: ``"w"`` for UTF-8 text, ``"wb"`` for bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    encoding = None if "b" in mode else "utf-8"
    try:
        with os.fdopen(descriptor, mode, encoding=encoding) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's file is private to its owner
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, whole or not at all."""
    with atomic_open(path) as stream:
        stream.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def nearest_file(path: Path, suffixes: Container[str]) -> str:
    """A hint at the file beside `path` whose name is nearest, or nothing.

    Args:
        path: that does not exist.
        suffixes: of the files to choose among.
    """
    names: list[str] = []
    with suppress(OSError):
        names = [file.name for file in path.parent.iterdir() if file.suffix in suffixes]
    near = difflib.get_close_matches(path.name, sorted(names), n=1)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""
