"""What the plots share: sizes, colours, markers, axes of perplexities and bytes, label places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from contextlm.report import numbers

WIDTH = 5.8  # inches; with large type, so that it can be read at 400 pixels
DPI = 160
FONT = 10.5
LABEL = 10.0
WIDE_RANGE = 4.0  # an axis is logarithmic when its largest value exceeds this times its smallest

# Told apart with any colour vision, and dark enough on white (after Okabe and Ito).
_COLOURS = "#222222", "#0072B2", "#D55E00", "#009E73", "#B8568F", "#B57A00", "#3E9BD0", "#7A6C00"
_MARKERS = "o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">"


@dataclass(frozen=True)
class Style:
    """How one contender is drawn, in both plots."""

    colour: str
    marker: str


def new_figure(height: float) -> Figure:
    """An empty white figure, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def styles(number: int) -> list[Style]:
    """One style per contender; colours and markers repeat out of step."""
    return [Style(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i in range(number)]


def perplexity_axis(axes: Axes, values: Sequence[float]) -> None:
    """Log scale where the range is wide; in both cases a few plain, unrepeated tick labels."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    if known and max(known) > WIDE_RANGE * min(known):
        axes.set_yscale("log")
        low, high = min(known), max(known)
        low, high = low / 1.15, high * 1.15
        axes.set_ylim(low, high)
        leading = (1, 2, 5) if high < 1000 * low else (1,)
        nice = (digit * 10.0**power for power in range(12) for digit in leading)
        axes.yaxis.set_major_locator(FixedLocator([tick for tick in nice if low <= tick <= high]))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def byte_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """Log scale with at most six ticks at powers of two, in KB or MB."""
    low, high = min(sizes) / 1.6, max(sizes) * 1.6
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first) / 5))
    ticks = [2.0**power for power in range(first, last + 1, step)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(size: float) -> str:
    return numbers.human_bytes(size).replace(".0 ", " ")


def spread(wanted: Sequence[float], gap: Sequence[float]) -> list[float]:
    """Positions in 0..1 as near the wanted ones as can be, in the same order, without overlap.

    Args:
        wanted: where each label would like to have its middle.
        gap: the height of each label; together at most 1, or the first ones overlap the bottom.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Measured from where a label would stand if all were stacked from 0 up, positions need only
    # not decrease; labels that would are pooled at their mean (isotonic regression).
    stacked: list[float] = []
    for number, i in enumerate(order):
        below = sum(gap[j] for j in order[:number])
        stacked.append(below + gap[i] / 2)
    pools: list[list[float]] = []
    for i, base in zip(order, stacked, strict=True):
        pools.append([wanted[i] - base])
        while len(pools) > 1 and fmean(pools[-2]) >= fmean(pools[-1]):
            upper = pools.pop()
            pools[-1] += upper
    room = 1 - sum(gap)
    shifts = [min(max(fmean(pool), 0.0), room) for pool in pools for _ in pool]
    placed = [0.0] * len(wanted)
    for i, base, shift in zip(order, stacked, shifts, strict=True):
        placed[i] = base + shift
    return placed
