"""Looking at paths that a user typed, whatever they hold: too long, with a NUL, without a home.

A leaf module: every room may import it, it imports nothing of ours but the errors.
"""

from __future__ import annotations

from pathlib import Path

from contextlm.base.errors import InputError


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file; a path that cannot even be looked at is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, not permitted, a NUL
        return False


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; a path that cannot even be looked at is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def with_home(text: str, where: str) -> Path:
    """`text` as a path, a leading ``~`` or ``~name`` replaced by that user's home.

    Raises:
        InputError: there is no such user, or no home; `where` opens the message.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{where}: no home folder is known for {text.split('/')[0]!r}") from None
