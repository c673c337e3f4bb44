"""Whether a folder can be written to, asked before long work rather than after it."""

from __future__ import annotations

import tempfile
from pathlib import Path


def why_not_writable(folder: Path) -> str | None:
    """Why nothing could be written into `folder`, or None if it could.

    The folder need not exist: then the nearest one above it that does is asked. Asked by opening a
    nameless temporary file there, since permissions alone do not tell (``/proc``, root, read-only
    file systems).
    """
    place = folder.absolute()
    while True:
        try:
            place.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):
            place = place.parent
        except (OSError, ValueError) as error:  # a name too long, or a NUL in it
            return f"{folder}: {getattr(error, 'strerror', None) or error}"
    if not place.is_dir():
        return f"{place if place != folder.absolute() else folder}: not a folder"
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return f"{folder}: cannot be written to: {error.strerror or error}"
    return None
