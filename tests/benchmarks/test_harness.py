"""Timing in turns, on a clock that the test moves."""

from __future__ import annotations

import pytest

from contextlm.benchmarks import harness
from contextlm.benchmarks.harness import Target, Timing, interleaved


class Clock:
    """Each piece of work takes the seconds that its list says."""

    def __init__(self, **seconds: list[float]):
        self.now = 0.0
        self.seconds = seconds
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def work(self, name: str):
        def run() -> None:
            self.calls.append(name)
            self.now += self.seconds[name].pop(0)

        return run


def test_cases_take_turns_and_the_warm_up_does_not_count(monkeypatch):
    clock = Clock(a=[99, 1, 5, 3], b=[77, 2, 2, 8])
    monkeypatch.setattr(harness, "time", clock)
    times = interleaved({name: clock.work(name) for name in "ab"}, 3)
    assert clock.calls == list("abababab")
    assert times["a"] == Timing(median=3, low=1, high=5)
    assert times["b"] == Timing(median=2, low=2, high=8)
    assert times["b"].milliseconds() == {"median ms": 2000, "least ms": 2000, "most ms": 8000}


@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [
        (Target(2.0), 2.0, True),
        (Target(2.0), 1.99, False),
        (Target(1.1, at_least=False), 1.1, True),
        (Target(1.1, at_least=False), 1.2, False),
    ],
)
def test_a_target_knows_its_side(target, ratio, met):
    assert target.met(ratio) is met
    assert target.text() in (">= 2", "<= 1.1")
