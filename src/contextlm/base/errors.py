"""The errors that a user can mend, and the wording they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from contextlm.base.visible import shown


class ContextLMError(Exception):
    """Base of contextlm's own errors. The message is one line that names the culprit."""


class InputError(ContextLMError):
    """Bad input or usage: a file, key, option or value that the user can correct (exit code 2)."""


class RunError(ContextLMError):
    """A fault while running: no network, a loss that is not finite, a full disk (exit code 1)."""


class NotFiniteError(RunError):
    """A loss or a weight became NaN or infinite: the same again would end the same way."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of an accelerator.

    torch's own class is known by name, so that torch need not be imported. Its CPU allocator and
    some libraries of CUDA raise a plain `RuntimeError`.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not among `known`, with the nearest one suggested.

    Args:
        kind: what the name stands for, e.g. ``"recipe"``.
        name: what was given.
        known: the names that exist, in the order in which to list them.
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return InputError(f"unknown {kind} {shown(str(name))} ({hint})")
