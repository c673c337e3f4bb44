"""Compiling a loop with Numba, the same way for every op; importing this file needs Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

Function = Callable[..., Any]


def compiled(*flags: str, inlined: bool = False) -> Callable[[Function], Function]:
    """Decorator: compile at the first call, and keep the code on disk if a folder is writable.

    Args:
        *flags: what floating-point arithmetic may do, in LLVM's names. "reassoc" lets sums be
            vectorised; "fast" would also hide a NaN.
        inlined: for a function that another compiled one calls. Without it a process that compiles
            runs the callee's own code, one that loads from disk the copy within the caller's, and
            the two were optimised apart: sums differ in their last bits.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(flags)}
    options["forceinline"] = inlined

    def compile_function(function: Function) -> Function:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to keep it in can be written
            return njit(**options)(function)

    return compile_function
