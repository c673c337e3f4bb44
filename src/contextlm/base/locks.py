"""One process at a time: a lock on a file that ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from contextlm.base.errors import InputError
from contextlm.base.files import disk_faults_named

# From file systems that know none.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold the lock of `file` for the time of the block.

    Where the file system has no locks, nothing keeps a second process out. Nor on Windows, which
    renames no folder with an open file in it: a run's folder is named while its lock is held.

    Args:
        file: made if needed, in a folder that exists; it holds the number of the lock's process.
        what: opens the message.

    Raises:
        InputError: another process holds the lock; the message gives its number where it is known.
    """
    if os.name == "nt":
        yield
        return
    lock = FileLock(file, timeout=0, fallback_to_soft=False)  # a soft one outlives its process
    try:
        lock.acquire()
        with disk_faults_named(file):
            file.write_text(f"{os.getpid()}\n")
    except Timeout:
        raise InputError(f"{what}: {_holder(file)} is at work on it") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def _holder(file: Path) -> str:
    with suppress(OSError, ValueError):
        return f"process {int(file.read_text()[:20])}"
    return "another process"
