"""Being told to stop by Ctrl-C (SIGINT), SIGTERM, SIGHUP or SIGUSR1: at once or a little later.

Schedulers warn a job by one of the last three before they kill it. Signals reach the main thread
only; in other threads nothing here changes anything.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]

# Windows has the first only.
_WARNINGS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]


class Terminated(KeyboardInterrupt):
    """SIGTERM, SIGHUP or SIGUSR1 arrived. Whatever cleans up after Ctrl-C does so after these.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def termination_raises() -> Iterator[None]:
    """Within the block signals raise `Terminated` instead of ending the process on the spot."""
    with _handled(dict.fromkeys(_WARNINGS, _raise)):
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
    with _handled(dict.fromkeys([signal.SIGINT, *_WARNINGS], asked._note)):
        yield asked
    asked.raise_now()


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


@contextmanager
def _handled(handlers: dict[signal.Signals, _Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in handlers.items():
            # One that the process was told to ignore (in the background, by nohup) stays ignored.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
