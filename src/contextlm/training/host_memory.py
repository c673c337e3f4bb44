"""Keeping large blocks of host memory between training steps.

The logits of one step can take gigabytes. glibc asks the system for a block of that size at every
step and gives it back, and the system clears each of its pages anew: up to half of a step's time
(docs/log.md has the figures).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Names and defaults of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 * 2**20}
_DEFAULTS = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 * 2**10, _TOP_PAD: 128 * 2**10}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep what is freed inside the `with` block, and give it back at its end.

    Elsewhere than on glibc (macOS, Windows, musl) nothing changes.
    """
    library: Any = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(library, "gnu_get_libc_version"):
        yield
        return
    _tell(library, _KEEP)
    try:
        yield
    finally:
        _tell(library, _DEFAULTS)
        library.malloc_trim(0)


def _tell(library: Any, values: dict[int, int]) -> None:
    for name, value in values.items():
        library.mallopt(name, value)
