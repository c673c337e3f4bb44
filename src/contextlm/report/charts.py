"""The two charts of a report: learning curves, and perplexity against cache.

Matplotlib's object-oriented interface only, so that nothing is shared with a user's own plots. No
figure that a result may hold keeps a chart from being drawn: what is not finite is left out.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from contextlm.base.visible import visible
from contextlm.report import numbers
from contextlm.report.contenders import CACHE, Contender, cache_length, comparable_groups
from contextlm.report.tables import ppl_text, setting_of

WIDTH = 5.8  # inches; with large type, so that it can be read at 400 pixels
DPI = 160
FONT = 10.5
WIDE_RANGE = 4.0  # an axis is logarithmic when its largest value exceeds this times its smallest
LARGEST = 1e90  # of what is drawn: above the cap of a perplexity, exp(200)
_DASHED = (0, (4, 2))
_GREY = "#666666"

# Told apart with any colour vision, and dark enough on white (after Okabe and Ito).
_COLOURS = "#222222", "#0072B2", "#D55E00", "#009E73", "#B8568F", "#B57A00", "#3E9BD0", "#7A6C00"
_MARKERS = "o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">"


@dataclass(frozen=True)
class Style:
    """How one contender is drawn, in every chart."""

    colour: str
    marker: str


def styles(number: int) -> list[Style]:
    """One style per contender; colours and markers repeat out of step."""
    return [Style(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i in range(number)]


def new_figure(height: float) -> Figure:
    """An empty white figure, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def drawable(values: Any) -> np.ndarray:
    """Which of some values can be drawn on any axis here."""
    known = np.asarray(values, dtype=float)
    return np.isfinite(known) & (known < LARGEST) & (known > -LARGEST)


# --- learning curves -------------------------------------------------------------------------


def curves_figure(rows: Sequence[Contender]) -> Figure:
    """Loss and perplexity over the tokens trained on: validation solid, running train dashed.

    With several seeds, lines are means as far as all seeds went, and thin lines the validation of
    each seed; stars stand at the best epochs. The train line is drawn by step where a run wrote its
    steps down.
    """
    looks = styles(len(rows))
    columns = 2 if all(len(row.name) <= 28 for row in rows) else 1
    figure = new_figure(6.2 + 0.24 * math.ceil((len(rows) + 3) / columns))
    figure.set_layout_engine("constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    drawn: list[float] = []
    for row, style in zip(rows, looks, strict=True):
        curves = _curves(row)
        best = row.seeds.set_index("seed").best_epoch
        for axes, measure in ((top, "loss"), (bottom, "ppl")):
            values = _draw_curves(axes, curves, style, measure, best)
            drawn += values if measure == "ppl" else []
    for axes, label in ((top, "loss (nats a token)"), (bottom, "perplexity")):
        axes.set_ylabel(label)
        axes.grid(color="#dddddd", linewidth=0.6)
    bottom.set_xlabel("training tokens")
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=1))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
    bottom.set_xlim(left=0)
    perplexity_axis(bottom, drawn)
    entries = [
        legend_entry(_short(row.name), style) for row, style in zip(rows, looks, strict=True)
    ]
    add_legend(figure, [*entries, *_kinds()], columns)
    return figure


def _curves(row: Contender) -> dict[str, pd.DataFrame]:
    """Epochs and steps of every seed, with `tokens` trained on so far, losses and perplexities."""
    windows, length = row.value("train_windows") or 1, row.value("sequence_length") or 1
    epochs, steps = row.epochs(), row.steps()
    epochs = epochs.assign(tokens=epochs.epoch.astype(float) * windows * length)
    # Steps may be written down every so often: the last one of the first epoch tells its length.
    first = steps[steps.epoch == steps.epoch.min()]
    in_an_epoch = first.step.max() if len(epochs) or len(steps) else 1
    losses = steps.loss.astype(float)
    steps = steps.assign(
        tokens=steps.step.astype(float) / in_an_epoch * windows * length,
        train_loss=losses,
        train_ppl=np.exp(np.minimum(losses, 200.0)),
    )
    return {"validation": epochs, "train": steps if len(steps) else epochs}


def _draw_curves(
    axes: Axes, curves: dict[str, pd.DataFrame], style: Style, measure: str, best: pd.Series[int]
) -> list[float]:
    """What was drawn."""
    drawn: list[float] = []
    for kind, dashes in (("train", _DASHED), ("validation", "solid")):
        lines, column = curves[kind], f"{kind}_{measure}"
        known = lines[drawable(lines[column])]
        by_step = "step" in lines
        seeds = known.seed.nunique()
        if kind == "validation" and seeds > 1:  # the train lines of each seed would hide the rest
            for _, line in known.groupby("seed"):
                axes.plot(line.tokens, line[column], linewidth=0.7, alpha=0.6, color=style.colour)
        means = known.groupby("tokens")[column].agg(["mean", "count"])
        shared = means[means["count"] == seeds]["mean"]
        axes.plot(
            shared.index,
            shared.to_numpy(),
            color=style.colour,
            linestyle="solid" if by_step else dashes,
            linewidth=0.8 if by_step else 1.8,
            alpha=0.5 if by_step else 1.0,
            marker=None if by_step else style.marker,  # a single epoch has no line
            markersize=4,
            markerfacecolor="white" if kind == "train" else style.colour,
        )
        drawn += shared.tolist()
        if kind == "validation":
            drawn += known[column].tolist()
            stars = known[known.epoch == known.seed.map(best)]
            for place, value in zip(stars.tokens, stars[column], strict=True):
                axes.plot(place, value, marker="*", markersize=13, color=style.colour, mec="white")
    return drawn


def _kinds() -> list[Line2D]:
    return [
        Line2D([], [], color=_GREY, label="validation"),
        Line2D([], [], color=_GREY, linestyle=_DASHED, label="train, running"),
        Line2D(
            [], [], color=_GREY, linestyle="none", marker="*", markersize=11, label="best epoch"
        ),
    ]


def add_legend(figure: Figure | SubFigure, entries: Sequence[Line2D], columns: int = 1) -> None:
    """A legend below everything else."""
    legend = figure.legend(
        handles=list(entries), loc="outside lower center", ncols=columns, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a name begins no formula


def legend_entry(label: str, style: Style) -> Line2D:
    """A line and marker for a legend; a leading underscore would hide it."""
    text = visible(label).lstrip("_")
    return Line2D([], [], color=style.colour, marker=style.marker, label=text)


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:39]}…"


def _tokens(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# --- perplexity against cache ----------------------------------------------------------------


def frontier_figure(rows: Sequence[Contender]) -> Figure:
    """Validation perplexity against logical cache bytes, and the frontier at one length.

    Large markers stand at `cache_length`, small ones at the other measured lengths; a step line
    joins the contenders that no other beats in both. Those that may not be ranked together get a
    panel each.
    """
    groups = comparable_groups(rows)
    figure = new_figure(0.6 + sum(3.4 + 0.24 * len(group) for group in groups))
    figure.set_layout_engine("constrained")
    heights = [3.4 + 0.24 * len(group) for group in groups]
    looks = {row.name: style for row, style in zip(rows, styles(len(rows)), strict=True)}
    panels = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, group in zip(panels, groups, strict=True):
        axes = panel.subplots()
        _draw_frontier(axes, group, looks)
        title = setting_of(group) if len(groups) > 1 else ""
        text = textwrap.fill(textwrap.shorten(visible(title), 150, placeholder=" …"), 75)
        axes.set_title(text, fontsize=FONT - 2, loc="left", pad=20, parse_math=False)
        axes.set_xlabel("cache of one sequence, logical bytes (log scale)")
        length = cache_length(group)
        add_legend(panel, [_entry(row, looks[row.name], length) for row in group])
    return figure


def perplexity_axis(axes: Axes, values: Sequence[float]) -> None:
    """Log scale where the range is wide; in both cases a few plain, unrepeated tick labels."""
    known = np.array([value for value in values if 0 < value < LARGEST])
    if known.size and known.max() > WIDE_RANGE * known.min():
        low, high = known.min() / 1.15, known.max() * 1.15
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        decades = math.log10(high / low)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        leading = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
        nice = [d * 10.0**p for p in powers[:: max(1, round(decades / 8))] for d in leading]
        axes.yaxis.set_major_locator(FixedLocator([tick for tick in nice if low <= tick <= high]))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _byte_axis(axes: Axes, sizes: Sequence[float]) -> None:
    """Log scale with at most six ticks at powers of two, in KB or MB."""
    low, high = min(sizes) / 1.6, max(sizes) * 1.6
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first) / 5))
    axes.xaxis.set_major_locator(FixedLocator([2.0**p for p in range(first, last + 1, step)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: numbers.human_bytes(value).replace(".0 ", " "))
    )


def _draw_frontier(axes: Axes, group: Sequence[Contender], looks: dict[str, Style]) -> None:
    window = numbers.count(group[0].value("sequence_length"))
    axes.set_ylabel(f"validation perplexity\non windows of {window} tokens")
    axes.grid(color="#dddddd", linewidth=0.6)
    length = cache_length(group)
    shown = [row for row in group if row.cache_lengths and _level(row) is not None]
    if length is None or not shown:
        text = "no cache was measured" if length is None else "nothing finite to draw"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center")
        return
    _byte_axis(axes, [size for row in shown for size in _sizes(row).values()])
    levels = [found for row in shown if (found := _level(row)) is not None]
    _set_y_range(axes, [mean + side * sd for mean, sd in levels for side in (-1, 1)])
    for row in shown:
        _draw_contender(axes, row, looks[row.name], length)
    _draw_step(axes, shown, length)


def _level(row: Contender) -> tuple[float, float] | None:
    """Mean perplexity and deviation; None where a seed diverged."""
    found = None if row.diverged else row.stat("validation_ppl")
    if found is None or not drawable(found.mean) or found.mean <= 0:
        return None
    return found.mean, min(found.sd or 0.0, LARGEST)


def _sizes(row: Contender) -> dict[int, float]:
    """Tokens to logical bytes; a cache of nothing is drawn as one byte."""
    return {n: max(float(row.seeds[f"{CACHE}{n}"].max()), 1.0) for n in row.cache_lengths}


def _set_y_range(axes: Axes, values: Sequence[float]) -> None:
    perplexity_axis(axes, values)
    if axes.get_yscale() == "linear":
        low, high = min(values), max(values)
        margin = 0.12 * (high - low) or 0.05 * high
        axes.set_ylim(low - margin, high + margin)


def _draw_contender(axes: Axes, row: Contender, style: Style, length: int) -> None:
    mean, sd = _level(row) or (math.nan, 0.0)
    sizes = _sizes(row)
    look: dict[str, Any] = {"color": style.colour, "marker": style.marker}
    axes.plot(list(sizes.values()), [mean] * len(sizes), lw=0.9, alpha=0.6, markersize=4, **look)
    if length in sizes:
        if sd:
            axes.errorbar(sizes[length], mean, yerr=sd, color=style.colour, capsize=4, zorder=4)
        axes.plot(sizes[length], mean, markersize=11, mec="white", mew=1.0, zorder=5, **look)


def pareto(points: pd.DataFrame) -> pd.DataFrame:
    """The points that no other beats, by rising `size`; less is better in `size` and in `ppl`."""
    ordered = points.sort_values(["size", "ppl"]).drop_duplicates("size")
    return ordered[ordered.ppl < ordered.ppl.cummin().shift(fill_value=math.inf)]


def _draw_step(axes: Axes, shown: Sequence[Contender], length: int) -> None:
    points = [
        (sizes[length], level[0])
        for row in shown
        if length in (sizes := _sizes(row)) and (level := _level(row)) is not None
    ]
    best = pareto(pd.DataFrame(points, columns=["size", "ppl"]))
    if best.empty:
        return
    x = [best["size"].iloc[0], *best["size"], axes.get_xlim()[1]]
    y = [axes.get_ylim()[1], *best.ppl, best.ppl.iloc[-1]]
    axes.plot(x, y, drawstyle="steps-post", color="#888888", linewidth=2.2, alpha=0.45, zorder=1)
    spread = any((level := _level(row)) is not None and level[1] > 0 for row in shown)
    bars = "; bars: ± 1 sd over seeds" if spread else ""
    axes.annotate(
        f"large markers: {numbers.count(length)} tokens; step line: frontier{bars}",
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=FONT - 2,
        color="#444444",
    )


def _entry(row: Contender, style: Style, length: int | None) -> Line2D:
    size = _sizes(row).get(length or 0)
    told = ppl_text(row) if size is None else f"{ppl_text(row)}, {numbers.human_bytes(size)}"
    return legend_entry(f"{_short(row.name)}: {told}", style)
