"""Being told to stop: Ctrl-C (SIGINT) and SIGTERM, at once or at the next good moment.

A leaf module: every room may import it, it imports no room. Signals reach the main thread only; in
other threads nothing here changes anything.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Handled like Ctrl-C: what cleans up after one does so after the other."""


@contextmanager
def termination_raises() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated` instead of ending the process on the spot."""
    with _handled({signal.SIGTERM: _raise}):
        yield


class Deferred:
    """Whether a signal to stop has come. `raise_now` raises what it stands for."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def __bool__(self) -> bool:
        return self._signal is not None

    def raise_now(self) -> None:
        """Raise `KeyboardInterrupt` or `Terminated` if a signal has come."""
        if self._signal is not None:
            number, self._signal = self._signal, None
            _raise(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self:  # twice: no more waiting
            _raise(number, frame)
        self._signal = number


@contextmanager
def deferred() -> Iterator[Deferred]:
    """Within the block the first signal to stop is only noted; a second one raises at once.

    The block asks the yielded object from time to time, and calls its `raise_now` at a good moment;
    at the latest that happens at the block's end.
    """
    asked = Deferred()
    with _handled({signal.SIGINT: asked._note, signal.SIGTERM: asked._note}):
        yield asked
    asked.raise_now()


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def _handled(handlers: dict[signal.Signals, _Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in handlers.items():
            # One that the process was told to ignore (a job in the background) stays ignored.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
