"""What all questions share: timing side by side, ratios with their targets, the outcome."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """How a question is asked.

    Attributes:
        repeats: timed rounds; None: the question's own number.
        smoke: tiny sizes, to see that everything runs; the figures mean nothing.
    """

    repeats: int | None = None
    smoke: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds of one case over all rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Target:
    """What a ratio should be: at least or at most a number."""

    bound: float
    at_least: bool = True

    def met(self, ratio: float) -> bool:
        """Whether the ratio is on the right side."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def text(self) -> str:
        """For the table."""
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Curve:
    """One line of a plot: seconds a token and bytes of cache at each number of tokens."""

    label: str
    tokens: list[int]
    seconds: list[float]
    cache_bytes: list[int]


@dataclass
class Outcome:
    """The answer to a question.

    Attributes:
        rows: of the table, all with the same keys; figures under keys that name their unit.
        ratios: by name.
        targets: of those ratios that have one.
        settings: sizes and choices that the figures depend on.
        curves: for a plot over lengths; empty where the question has none.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)

    def compare(self, name: str, ratio: float, target: Target | None = None) -> None:
        """Add one ratio."""
        self.ratios[name] = ratio
        if target is not None:
            self.targets[name] = target


def interleaved(
    cases: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 1
) -> dict[str, Timing]:
    """Time several cases in turns, so that what the machine does meanwhile hits all alike.

    Args:
        cases: by name; each call is one measurement.
        rounds: timed calls of each.
        warm_up: calls of each beforehand, not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warm_up + rounds):
        for name, case in cases.items():
            elapsed = _seconds(case)
            if number >= warm_up:
                seconds[name].append(elapsed)
    return {name: timing(values) for name, values in seconds.items()}


def timing(seconds: list[float]) -> Timing:
    """Median, least and most of several measurements."""
    return Timing(median(seconds), min(seconds), max(seconds))


def _seconds(case: Callable[[], object]) -> float:
    gc.collect()
    _synchronize()
    started = time.perf_counter()
    case()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    """Wait for an accelerator, which otherwise only queues its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(timing: Timing) -> dict[str, float]:
    """Columns of a table."""
    return {
        "median ms": 1e3 * timing.median,
        "least ms": 1e3 * timing.low,
        "most ms": 1e3 * timing.high,
    }
