"""One process at a time: a lock on a file that ends with its process, however that ends.

A leaf module: every room may import it, it imports no room.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from contextlm.base.errors import InputError

# What a file system says that knows no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


@contextmanager
def locked(file: Path, what: str) -> Iterator[bool]:
    """Hold the lock of `file` for the time of the block.

    The operating system gives the lock back when the process ends, a killed one too. Windows has no
    such locks, and some network file systems have none: there nothing keeps a second process out.

    Args:
        file: made if needed, in a folder that exists; it holds the number of the process that holds
            the lock.
        what: is locked, for the message.

    Yields:
        Whether there is a lock.

    Raises:
        InputError: another process holds it; the message names that process.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        held = _take(descriptor)
        if held is False:
            raise InputError(f"{what}: {_holder(descriptor)} is at work on it")
        if held:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield held is True
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool | None:
    """Whether the lock is now ours; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _holder(descriptor: int) -> str:
    with suppress(OSError, ValueError):
        return f"process {int(os.read(descriptor, 20))}"
    return "another process"
