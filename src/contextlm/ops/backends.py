"""Which implementation of an op runs: chosen by the call, by the program around it, or by the user.

An op with several backends takes ``backend="auto"`` or a name. Where a model calls the op,
`use_backend` around the model chooses; a user chooses with the environment variable
``CONTEXTLM_BACKEND``, which holds a name for all ops or a list such as
``context_scan=eager,linear_scan=numba``. The nearest choice counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

VARIABLE = "CONTEXTLM_BACKEND"
AUTO = "auto"

_used: ContextVar[dict[str, str] | None] = ContextVar("contextlm_backends", default=None)


@contextmanager
def use_backend(op: str, name: str) -> Iterator[None]:
    """Let `op` run on the backend `name` wherever a call leaves the choice open.

    Args:
        op: e.g. ``context_scan``.
        name: one of its backends, or ``auto``; an unknown one is refused by the op.
    """
    token = _used.set({**(_used.get() or {}), op: name})
    try:
        yield
    finally:
        _used.reset(token)


def requested_backend(op: str, given: str, known: Sequence[str]) -> str:
    """The backend that was asked for, or ``auto``.

    Args:
        op: its name.
        given: what the call says.
        known: its backends.

    Raises:
        ValueError: none of them has that name.
    """
    name = given
    if name == AUTO:
        name = (_used.get() or {}).get(op) or _from_environment(op)
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
