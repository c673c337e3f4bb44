"""The two plots of a report: learning curves, and perplexity against cache.

Matplotlib's object-oriented interface only, so that nothing is shared with a user's own plots.
Sizes, colours and axes are in `report.axes`.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from contextlm.base.visible import visible
from contextlm.report import numbers
from contextlm.report.axes import (
    FONT,
    LABEL,
    Style,
    byte_axis,
    new_figure,
    perplexity_axis,
    spread,
    styles,
)
from contextlm.report.frontier import comparable_groups, headline_length, pareto
from contextlm.report.summary import SummaryRow
from contextlm.results.result import Outcome, PhaseTwoRow


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def curves_figure(rows: Sequence[SummaryRow]) -> Figure:
    """Loss and perplexity by epoch: validation solid, running train dashed, best epoch starred.

    With several seeds, thick lines are means, as far as all seeds went, and thin ones
    the validation of each seed.
    """
    columns = 2 if all(len(row.name) <= 28 for row in rows) else 1
    legend_lines = math.ceil((len(rows) + 3) / columns)
    figure = new_figure(6.2 + 0.24 * legend_lines)
    figure.set_layout_engine("constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    looks = styles(len(rows))
    for axes, measure in ((top, "loss"), (bottom, "ppl")):
        for row, style in zip(rows, looks, strict=True):
            _draw_curves(axes, row, style, measure)
        axes.grid(color="#dddddd", linewidth=0.6)
    top.set_ylabel("loss (nats per token)")
    bottom.set_ylabel("perplexity")
    bottom.set_xlabel("epoch")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    longest = max((row.epochs.mean for row in rows), default=1)
    if longest <= 1:
        bottom.set_xlim(0.5, 1.5)
    names = "train_ppl", "validation_ppl"
    series = [_series(o, name) for row in rows for o in row.outcomes for name in names]
    perplexity_axis(bottom, [value for values in series for value in values.values()])
    entries = _legend(rows, looks)
    legend = figure.legend(
        handles=entries, loc="outside lower center", ncols=columns, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a name begins no formula
    return figure


def frontier_figure(rows: Sequence[SummaryRow]) -> Figure:
    """Validation perplexity against logical cache bytes, and the frontier at one length.

    Large markers stand at `headline_length`, small ones at the other measured lengths; a step
    line joins the contenders that no other beats in both. Contenders whose perplexities cannot be
    compared (other data, other target) get a panel each.
    """
    groups = comparable_groups(rows) or [[]]
    heights = [max(3.6, 0.46 * len(group) + 0.9) for group in groups]
    figure = new_figure(sum(heights) + 0.5)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    total = sum(heights) + 0.5
    # The labels start at 1.075 axes widths and end just inside the figure.
    left = 0.18
    right = min(left + (0.985 - left - _label_width(figure, groups)) / 1.075, 0.72)
    figure.subplots_adjust(
        left=left, right=right, top=1 - 0.55 / total, bottom=0.6 / total, hspace=0.36
    )
    looks = dict(zip((row.name for row in rows), styles(len(rows)), strict=True))
    for axes, group in zip(panels, groups, strict=True):
        _draw_frontier(axes, group, looks)
        if len(groups) > 1 and group:
            data, ahead = group[0].corpus, group[0].target_offset
            suffix = "" if ahead == 1 else f", {ahead} tokens ahead"
            title = textwrap.shorten(visible(f"{data.name}{suffix}"), 60, placeholder=" …")
            axes.set_title(title, fontsize=FONT, loc="left", pad=20, parse_math=False)
    panels[-1].set_xlabel("cache of one sequence, logical bytes (log scale)")
    return figure


def _draw_curves(axes: Axes, row: SummaryRow, style: Style, measure: str) -> None:
    for kind, dashes in (("train", (0, (4, 2))), ("validation", "solid")):
        lines = [_series(outcome, f"{kind}_{measure}") for outcome in row.outcomes]
        lines = [line for line in lines if line]
        look: dict[str, Any] = {"color": style.colour, "linestyle": dashes, "marker": style.marker}
        look["markerfacecolor"] = "white" if kind == "train" else style.colour
        if len(lines) > 1:
            if kind == "validation":  # the train lines of each seed would hide the rest
                for line in lines:
                    axes.plot(
                        list(line),
                        list(line.values()),
                        linewidth=0.7,
                        alpha=0.6,
                        color=style.colour,
                    )
            shared = [epoch for epoch in lines[0] if all(epoch in line for line in lines)]
            mean = {epoch: sum(line[epoch] for line in lines) / len(lines) for epoch in shared}
        else:
            mean = lines[0] if lines else {}
        # A marker as well: a single epoch has no line.
        axes.plot(list(mean), list(mean.values()), linewidth=1.8, markersize=4, **look)
    for outcome in row.outcomes:
        values = _series(outcome, f"validation_{measure}")
        best = outcome.result.best_epoch
        if best in values:
            axes.plot(
                best, values[best], marker="*", markersize=13, color=style.colour, mec="white"
            )


def _series(outcome: Outcome, name: str) -> dict[int, float]:
    """Epoch to value, finite values only."""
    lines = [line for line in outcome.history if isinstance(line, PhaseTwoRow)]
    values = {line.epoch: float(getattr(line, name)) for line in lines}
    return {epoch: value for epoch, value in values.items() if math.isfinite(value)}


def _legend(rows: Sequence[SummaryRow], looks: Sequence[Style]) -> list[Line2D]:
    handles = [
        # A leading underscore would hide the entry.
        Line2D(
            [],
            [],
            color=style.colour,
            marker=style.marker,
            label=_shorten(visible(row.name)).lstrip("_"),
        )
        for row, style in zip(rows, looks, strict=True)
    ]
    grey = "#666666"
    return [
        *handles,
        Line2D([], [], color=grey, label="validation"),
        Line2D([], [], color=grey, linestyle=(0, (4, 2)), label="train, running"),
        Line2D([], [], color=grey, linestyle="none", marker="*", markersize=11, label="best epoch"),
    ]


def _shorten(name: str, width: int = 40) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _draw_frontier(axes: Axes, group: Sequence[SummaryRow], looks: dict[str, Style]) -> None:
    windows = {row.corpus.sequence_length for row in group}
    on = "".join(f"\non windows of {numbers.count(length)} tokens" for length in windows)
    axes.set_ylabel(f"validation perplexity{on}")
    axes.grid(color="#dddddd", linewidth=0.6)
    length = headline_length(group)
    sizes = [max(cache.logical, 1) for row in group for cache in row.cache]
    if length is None or not sizes:
        axes.text(0.5, 0.5, "no cache was measured", transform=axes.transAxes, ha="center")
        return
    byte_axis(axes, sizes)
    finite = [row.ppl for row in group if math.isfinite(row.ppl.mean)]
    _set_y_range(axes, [ppl.mean + side * (ppl.sd or 0.0) for ppl in finite for side in (-1, 1)])
    for row in group:
        _draw_contender(axes, row, looks[row.name], length)
    _draw_step(axes, group, length)
    _draw_labels(axes, group, looks, length)


def _set_y_range(axes: Axes, values: Sequence[float]) -> None:
    perplexity_axis(axes, values)
    if axes.get_yscale() == "linear" and values:
        low, high = min(values), max(values)
        margin = 0.12 * (high - low) or 0.05 * high
        axes.set_ylim(low - margin, high + margin)


def _draw_contender(axes: Axes, row: SummaryRow, style: Style, length: int) -> None:
    sizes = [max(cache.logical, 1) for cache in row.cache]
    level = row.ppl.mean
    if not sizes or not math.isfinite(level):
        return
    look: dict[str, Any] = {"color": style.colour, "marker": style.marker}
    axes.plot(sizes, [level] * len(sizes), linewidth=0.9, alpha=0.6, markersize=4, **look)
    main = row.cache_at(length)
    if main is not None:
        place = max(main.logical, 1)
        if row.ppl.sd:
            axes.errorbar(place, level, yerr=row.ppl.sd, color=style.colour, capsize=4, zorder=4)
        axes.plot(place, level, markersize=11, mec="white", mew=1.0, zorder=5, **look)


def _draw_step(axes: Axes, group: Sequence[SummaryRow], length: int) -> None:
    points = [
        (float(max(cache.logical, 1)), row.ppl.mean)
        for row in group
        if (cache := row.cache_at(length)) and math.isfinite(row.ppl.mean)
    ]
    best = [points[i] for i in pareto(points)]
    if not best:
        return
    top, right = axes.get_ylim()[1], axes.get_xlim()[1]
    x = [best[0][0], *(point[0] for point in best), right]
    y = [top, *(point[1] for point in best), best[-1][1]]
    axes.plot(x, y, drawstyle="steps-post", color="#888888", linewidth=2.2, alpha=0.45, zorder=1)
    bars = "; bars: ± 1 sd over seeds" if any(row.ppl.sd for row in group) else ""
    caption = f"large markers: {numbers.count(length)} tokens; step line: frontier{bars}"
    axes.annotate(
        caption,
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=FONT - 2,
        color="#444444",
    )


def _draw_labels(
    axes: Axes, group: Sequence[SummaryRow], looks: dict[str, Style], length: int
) -> None:
    """Each contender's name and figures in the right margin, spread so that none overlap."""
    shown = [row for row in group if row.cache and math.isfinite(row.ppl.mean)]
    texts = [_label(row, length) for row in shown]
    height = axes.get_window_extent().height
    line = LABEL * 1.25 * axes.figure.dpi / 72 / height
    gaps = [line * (text.count("\n") + 1) + 0.35 * line for text in texts]
    right = axes.get_xlim()[1]
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((1, row.ppl.mean))[1]) for row in shown]
    for row, text, place in zip(shown, texts, spread(wanted, gaps), strict=True):
        colour = looks[row.name].colour
        end = max(max(cache.logical, 1) for cache in row.cache)
        axes.plot([end, right], [row.ppl.mean] * 2, ":", color=colour, linewidth=0.9, alpha=0.6)
        level = float(to_axes.transform((1, row.ppl.mean))[1])
        axes.plot(
            [1, 1.06],
            [level, place],
            transform=axes.transAxes,
            clip_on=False,
            color=colour,
            linewidth=0.9,
        )
        axes.text(
            1.075,
            place,
            text,
            transform=axes.transAxes,
            va="center",
            fontsize=LABEL,
            color=colour,
            linespacing=1.15,
            parse_math=False,
        )


def _label_width(figure: Figure, groups: Sequence[Sequence[SummaryRow]]) -> float:
    """The widest label, as a share of the figure's width."""
    widest = 0.0
    for group in groups:
        length = headline_length(group)
        for row in group:
            if length is not None and row.cache:
                text = figure.text(0, 0, _label(row, length), fontsize=LABEL, parse_math=False)
                widest = max(widest, text.get_window_extent().width)
                text.remove()
    return widest / figure.bbox.width


def _label(row: SummaryRow, length: int) -> str:
    lines = textwrap.wrap(visible(row.name), 20, break_on_hyphens=True)
    if len(lines) > 2:
        lines = [lines[0], f"{lines[1][:19]}…"]
    cache = row.cache_at(length)
    longest = max(cache.tokens for cache in row.cache)
    size = numbers.human_bytes(cache.logical) if cache else f"≤ {numbers.count(longest)} tokens"
    return "\n".join([*lines, f"{numbers.perplexity(row.ppl.mean)}, {size}"])
