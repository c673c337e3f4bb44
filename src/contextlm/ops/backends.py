"""Which implementation of an op runs, and how loops are compiled.

An op with several backends takes ``backend="auto"`` or a name. What a call leaves open the
environment variable ``CONTEXTLM_BACKEND`` decides, which holds a name for all ops or a list such as
``context_scan=eager,linear_scan=numba``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

VARIABLE = "CONTEXTLM_BACKEND"
AUTO = "auto"


def requested_backend(op: str, given: str, known: Sequence[str]) -> str:
    """The backend among `known` that was asked for, or ``auto``; `given` is what the call says.

    Raises:
        ValueError: none of them has that name.
    """
    name = given if given != AUTO else _from_environment(op)
    if name != AUTO and name not in known:
        raise ValueError(f"unknown {op} backend {name!r} (known: {', '.join((AUTO, *known))})")
    return name


def is_installed(package: str) -> bool:
    """Whether an optional package can be imported; it is not imported for this."""
    return find_spec(package) is not None


def _from_environment(op: str) -> str:
    chosen = AUTO
    for part in os.environ.get(VARIABLE, "").split(","):
        name, equals, value = (text.strip() for text in part.partition("="))
        if not equals and name:
            chosen = name
        elif name == op and value:
            return value
    return chosen


def compiled(*flags: str, inlined: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compile with Numba at the first call, and keep the code on disk where possible.

    Args:
        *flags: what floating-point arithmetic may do, in LLVM's names. "reassoc" lets sums be
            vectorised; "fast" would also hide a NaN.
        inlined: for a function that another compiled one calls. Without it a process that compiles
            runs the callee's own code, one that loads from disk the copy within the caller's, and
            the two were optimised apart: sums differ in their last bits.

    Raises:
        ImportError: Numba is not installed.
    """
    from numba import njit

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(flags)}
    options["forceinline"] = inlined

    def compile_function(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to keep it in can be written
            return njit(**options)(function)

    return compile_function


def in_threads(work: Callable[[slice], object], rows: int) -> None:
    """Let as many threads as torch's operations have work on equal parts of so many rows.

    For compiled loops, which let other threads run.
    """
    import torch

    each = -(-rows // torch.get_num_threads())
    parts = [slice(start, start + each) for start in range(0, rows, each)] if rows else []
    if len(parts) == 1:
        work(parts[0])
    elif parts:
        list(_pool(len(parts)).map(work, parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "contextlm")
