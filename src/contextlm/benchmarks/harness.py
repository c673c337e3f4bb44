"""What all questions share: timing side by side, ratios with targets, the answer, its plot."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
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

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Of several measurements."""
        return cls(median(seconds), min(seconds), max(seconds))

    def milliseconds(self) -> dict[str, float]:
        """Columns of a table."""
        figures = {"median": self.median, "least": self.low, "most": self.high}
        return {f"{name} ms": 1e3 * seconds for name, seconds in figures.items()}


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
class Answer:
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

    Each case is called `warm_up` times without and `rounds` times with a clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warm_up + rounds):
        for name, case in cases.items():
            elapsed = _seconds(case)
            if number >= warm_up:
                seconds[name].append(elapsed)
    return {name: Timing.of(values) for name, values in seconds.items()}


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


def draw(question: str, answer: Answer, path: Path) -> None:
    """Write a PNG: latency and memory against length where there are curves, else the ratios."""
    import altair as alt

    title = f"contextlm bench {question}"
    if answer.curves:
        points = [
            {"model": curve.label, "tokens": tokens, "ms": 1e3 * seconds, "megabytes": size / 1e6}
            for curve in answer.curves
            for tokens, seconds, size in zip(
                curve.tokens, curve.seconds, curve.cache_bytes, strict=True
            )
        ]
        lines = alt.Chart({"values": points}).mark_line(point=True)
        x = alt.X("tokens:Q").scale(type="log").title("tokens before")
        names = alt.Color("model:N").title(None).legend(labelLimit=0, symbolLimit=0)
        y = (
            alt.Y(f"{field}:Q").scale(type="log").title(what)
            for field, what in (("ms", "ms a token"), ("megabytes", "cache, MB"))
        )
        chart: alt.HConcatChart | alt.LayerChart = alt.HConcatChart(
            hconcat=[lines.encode(x, one, color=names) for one in y]
        )
    else:
        ratios = [{"figure": name, "ratio": ratio} for name, ratio in answer.ratios.items()]
        y = alt.Y("figure:N").sort(None).title(None).axis(labelLimit=0)
        bars = alt.Chart({"values": ratios}).mark_bar().encode(alt.X("ratio:Q"), y)
        one = alt.Chart({"values": [{"ratio": 1}]}).mark_rule().encode(alt.X("ratio:Q"))
        chart = alt.LayerChart(layer=[bars, one])
    chart.properties(title=title).save(path, scale_factor=2)
