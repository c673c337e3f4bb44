"""The two charts of a report: learning curves, and perplexity against cache.

Matplotlib's object-oriented interface only, so that nothing is shared with a user's own plots. What
is not finite is left out.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator

from contextlm.base.visible import visible
from contextlm.report import numbers
from contextlm.report.contenders import CACHE, Contender, cache_length, comparable_groups
from contextlm.report.frame import DIVERGED_LOSS
from contextlm.report.tables import ppl_text, setting_of

WIDTH = 5.8  # inches; with large type, so that it can be read at 400 pixels
WIDE_RANGE = 4.0  # an axis is logarithmic when its largest value exceeds this times its smallest

# Told apart with any colour vision, and dark enough on white (after Okabe and Ito).
_COLOURS = "#222222", "#0072B2", "#D55E00", "#009E73", "#B8568F", "#B57A00", "#3E9BD0", "#7A6C00"
_MARKERS = "o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">"

styled = mpl.rc_context(
    {
        "figure.constrained_layout.use": True,
        "figure.dpi": 160,
        "figure.facecolor": "white",
        "axes.grid": True,
        "axes.titlelocation": "left",
        "axes.titlesize": "small",
        "grid.color": "#dddddd",
        "legend.fontsize": "small",
        "legend.frameon": False,
        "text.parse_math": False,  # a dollar sign in a name begins no formula
    }
)


@dataclass(frozen=True)
class Style:
    """How one contender is drawn, in every chart."""

    colour: str
    marker: str


def styles(number: int) -> list[Style]:
    """One style per contender; colours and markers repeat out of step."""
    return [Style(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i in range(number)]


@styled
def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def new_figure(height: float, entries: int) -> Figure:
    """An empty figure with `height` inches for its axes, and room for a legend below them."""
    return Figure(figsize=(WIDTH, height + 0.2 * entries))


def add_legend(figure: Figure | SubFigure) -> None:
    """A legend of everything that has a label, below the axes."""
    figure.legend(loc="outside lower center", markerscale=0.7)


def short(name: str) -> str:
    """A name for a legend."""
    return visible(name if len(name) <= 40 else f"{name[:39]}…")


# --- learning curves -------------------------------------------------------------------------


@styled
def curves_figure(rows: Sequence[Contender]) -> Figure:
    """Loss over the tokens trained on, of validation and, running, of training.

    With several seeds, lines are means as far as all seeds went, and a band spans the seeds.
    """
    figure = new_figure(3.6, len(rows))
    axes = figure.subplots()
    for row, style in zip(rows, styles(len(rows)), strict=True):
        _draw_curves(axes, row, style)
    axes.set(xlabel="training tokens", ylabel="loss (nats a token)")
    axes.set_title("with markers: validation; without: training, running")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    add_legend(figure)
    return figure


def _draw_curves(axes: Axes, row: Contender, style: Style) -> None:
    epoch_tokens = row.value("train_windows") * row.value("sequence_length")
    epochs, steps = row.epochs(), row.steps()
    # Steps may be written down every so often: the last one of the first epoch tells its length.
    epoch_steps = steps.step[steps.epoch == steps.epoch.min()].max()
    validation = _losses(epochs, "validation_loss", epochs.epoch * epoch_tokens)
    if steps.empty:
        train = _losses(epochs, "train_loss", epochs.epoch * epoch_tokens)
    else:
        train = _losses(steps, "loss", steps.step / epoch_steps * epoch_tokens)
    colour = style.colour
    axes.plot(train.mean(axis=1), color=colour, lw=0.9, alpha=0.7, ls="--" if steps.empty else "-")
    low, high = validation.min(axis=1), validation.max(axis=1)
    axes.fill_between(validation.index, low, high, color=colour, alpha=0.15, linewidth=0)
    label, marker = short(row.name), style.marker
    axes.plot(validation.mean(axis=1), color=colour, marker=marker, ms=4, lw=1.8, label=label)


def _losses(lines: pd.DataFrame, column: str, tokens: pd.Series[float]) -> pd.DataFrame:
    """A column a seed, a row for each number of tokens that all seeds reached undiverged."""
    lines = lines.assign(tokens=tokens.astype(float), loss=lines[column].astype(float))
    lines = lines.drop_duplicates(["tokens", "seed"], keep="last")
    losses = lines.pivot(index="tokens", columns="seed", values="loss")
    return losses[losses < DIVERGED_LOSS].dropna()


# --- perplexity against cache ----------------------------------------------------------------


@styled
def frontier_figure(rows: Sequence[Contender]) -> Figure:
    """Validation perplexity against logical cache bytes, and the frontier at one length.

    Large markers stand at `cache_length`, small ones at the other measured lengths; a step line
    joins the contenders that no other beats in both. Those that may not be ranked together get a
    panel each.
    """
    groups = comparable_groups(rows)
    looks = dict(zip([row.name for row in rows], styles(len(rows)), strict=True))
    figure = new_figure(3.6 * len(groups), len(rows))
    heights = [3.6 + 0.2 * len(group) for group in groups]
    panels = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, group in zip(panels, groups, strict=True):
        axes = panel.subplots()
        _draw_frontier(axes, group, looks)
        length = cache_length(group)
        title = [setting_of(group)] if len(groups) > 1 else []
        if length is not None:
            title.append(
                f"large markers: {numbers.count(length)} tokens; bars: ± 1 sd; step line: frontier"
            )
        axes.set_title("\n".join(textwrap.fill(visible(line), 75) for line in title))
        add_legend(panel)
    return figure


def _draw_frontier(axes: Axes, group: Sequence[Contender], looks: dict[str, Style]) -> None:
    window, length = group[0].value("sequence_length"), cache_length(group)
    axes.set_xlabel("cache of one sequence, logical bytes")
    axes.set_ylabel(f"validation perplexity\non windows of {numbers.count(window)} tokens")
    points = _points(group)
    for row in group:
        mine = points[points.name == row.name]
        at = mine[mine.tokens == length]
        colour, marker = looks[row.name].colour, looks[row.name].marker
        axes.plot(mine["size"], mine.ppl, color=colour, marker=marker, ms=4, lw=0.9, alpha=0.6)
        label = f"{short(row.name)}: {ppl_text(row)}"
        axes.errorbar(
            at["size"],
            at.ppl,
            at.sd,
            color=colour,
            marker=marker,
            ms=10,
            mec="white",
            ls="",
            label=label,
        )
    if points.empty:
        axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center")
        return
    axes.set_xscale("log", base=2)
    axes.set_xlim(points["size"].min() / 1.6, points["size"].max() * 1.6)
    axes.xaxis.set_major_locator(LogLocator(2, numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: numbers.human_bytes(size)))
    perplexity_axis(axes, points.ppl)
    best = pareto(points[points.tokens == length])
    x = [*best["size"].iloc[:1], *best["size"], axes.get_xlim()[1]]
    y = [axes.get_ylim()[1], *best.ppl, *best.ppl.iloc[-1:]]
    axes.autoscale(enable=False)
    if len(best):
        axes.plot(x, y, drawstyle="steps-post", color="#888888", lw=2.2, alpha=0.45, zorder=1)


def _points(group: Sequence[Contender]) -> pd.DataFrame:
    """A row for each measured length of each contender that did not diverge.

    A cache of nothing is drawn as one byte.
    """
    return pd.DataFrame(
        [
            (row.name, tokens, max(row.value(f"{CACHE}{tokens}"), 1), ppl.mean, ppl.sd or math.nan)
            for row in group
            if not row.diverged
            if (ppl := row.stat("validation_ppl")) is not None and np.isfinite(ppl.mean)
            for tokens in row.cache_lengths
        ],
        columns=["name", "tokens", "size", "ppl", "sd"],
    )


def pareto(points: pd.DataFrame) -> pd.DataFrame:
    """The points that no other beats, by rising `size`; less is better in `size` and in `ppl`."""
    ordered = points.sort_values(["size", "ppl"]).drop_duplicates("size")
    return ordered[ordered.ppl < ordered.ppl.cummin().shift(fill_value=math.inf)]


def perplexity_axis(axes: Axes, values: pd.Series[float]) -> None:
    """Log scale where the range is wide; in both cases a few plain tick labels."""
    axes.margins(y=0.12)
    spread = values.max() / values.min()
    if spread > WIDE_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 1000 else (1,)))
        axes.yaxis.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
