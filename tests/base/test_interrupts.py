"""Told to stop: at once, or at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from contextlm.base.interrupts import Terminated, deferred, termination_raises

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent with os.kill")


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


WARNINGS = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1] if os.name != "nt" else []


@pytest.fixture(autouse=True)
def warnings_end_the_process() -> Iterator[None]:
    """As a terminal's shell starts it; nohup has SIGHUP ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in WARNINGS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", WARNINGS)
def test_a_signal_raises_within_the_block_and_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Terminated) as caught, termination_raises():
        send(number)
    assert caught.value.number == number
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, *WARNINGS])
def test_the_first_signal_waits_for_a_good_moment(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt) as caught, deferred() as asked:  # noqa: PT012
        assert not asked
        send(number)
        reached.append(bool(asked))
        asked.raise_now()
        reached.append("not this")
    assert reached == [True]
    assert caught.type is (KeyboardInterrupt if number == signal.SIGINT else Terminated)


@pytest.mark.usefixtures("interruptible")
def test_the_second_signal_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), deferred():  # noqa: PT012
        send(signal.SIGINT)
        send(signal.SIGINT)
        raise AssertionError("not reached")


def test_at_the_end_of_the_block_it_is_raised_at_the_latest() -> None:
    with pytest.raises(Terminated), deferred():
        send(signal.SIGTERM)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred() as asked:
            send(signal.SIGINT)
            assert not asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing() -> None:
    seen: list[Any] = []

    def work() -> None:
        with deferred() as asked, termination_raises():
            seen.append(bool(asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
