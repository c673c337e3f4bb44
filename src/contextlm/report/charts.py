"""The charts of a report, in Vega-Lite through Altair: one description for paper and page.

A chart is described without colours and fonts; those are a theme, `LIGHT` for the files (made by
vl-convert, without a browser), `LIGHT` or `DARK` on the page. Contenders are numbered by their
quality and keep that number in all charts of a list; the first eight have a colour each, the others
are grey. What is not finite is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from contextlm.base.files import atomic_open
from contextlm.base.visible import visible
from contextlm.report import numbers
from contextlm.report.contenders import (
    CACHE,
    PPL_AT,
    Contender,
    comparable_groups,
    ranked,
    same_data_groups,
    scored_lengths,
)
from contextlm.report.frame import DIVERGED_LOSS
from contextlm.report.language import ENGLISH, say, speaking, spoken, translations
from contextlm.report.statistics import Stat
from contextlm.report.tables import level_name, setting_of, versus_text

FORMATS = ("png", "svg", "pdf")
WIDTH, HEIGHT = 440, 300  # of the plot itself
WIDE_RANGE = 4.0  # an axis is logarithmic when its largest value exceeds this times its smallest
MOST_POINTS = 120  # of a training curve: each is the mean of its stretch

# Told apart with any colour vision (after Tol's bright scheme), on white and on black.
_COLOURS = "#4477AA", "#EE6677", "#228833", "#AA4488", "#B8860B", "#33A6CC", "#DD8833", "#7766BB"
_GREY = "#9aa1a9"
_BYTES = (
    "datum.value < 1024 ? datum.value + ' B' : datum.value < 1048576 ? datum.value / 1024 + ' KB'"
    " : datum.value < 1073741824 ? datum.value / 1048576 + ' MB'"
    " : datum.value / 1073741824 + ' GB'"
)
_TOKENS = "format(datum.value, '.3~s')"


def _theme(back: str, text: str, soft: str, grid: str) -> dict[str, Any]:
    return {
        "font": "Helvetica, Arial, Liberation Sans, Noto Sans CJK JP, Hiragino Sans, sans-serif",
        # A reader without these fonts sees wider letters.
        "padding": {"left": 5, "top": 5, "right": 35, "bottom": 5},
        "background": back,
        "view": {"stroke": None},
        "axis": {
            "labelColor": text,
            "titleColor": text,
            "titleFontWeight": "normal",
            "titleFontSize": 12,
            "labelFontSize": 11,
            "gridColor": grid,
            "domainColor": soft,
            "tickColor": soft,
            "labelSeparation": 8,
        },
        "legend": {
            "labelColor": text,
            "title": None,
            "labelFontSize": 11,
            "labelLimit": 190,
            "symbolLimit": 0,
            "symbolOpacity": 1,
        },
        "range": {"category": [*_COLOURS, *[_GREY] * 500]},
    }


LIGHT = _theme("white", "#1c1e21", "#8a9097", "#e4e7ea")
DARK = _theme("transparent", "#e6e8eb", "#7d858e", "#333a42")


Drawn = tuple[str, alt.LayerChart] | None  # with its caption


@dataclass(frozen=True)
class Figure:
    """A chart in Vega-Lite without a theme, the name of its files, and how to read it."""

    name: str
    caption: str
    chart: dict[str, Any]

    @cached_property
    def svg(self) -> str:
        """The chart as SVG, in the light theme."""
        return str(vl_convert.vegalite_to_svg(self.chart, config=LIGHT))

    def save(self, folder: Path) -> None:
        """Write it as ``NAME.png``, ``NAME.svg`` and ``NAME.pdf``."""
        made = {
            "png": vl_convert.vegalite_to_png(self.chart, scale=2, config=LIGHT),
            "svg": self.svg.encode(),
            "pdf": vl_convert.vegalite_to_pdf(self.chart, config=LIGHT),
        }
        for suffix, content in made.items():
            with atomic_open(folder / f"{self.name}.{suffix}", "wb") as stream:
                stream.write(content)


def figure(name: str, drawn: Drawn, where: str = "") -> list[Figure]:
    """A chart under a name, its caption after `where` it was measured; none of None."""
    if drawn is None:
        return []
    caption, chart = drawn
    described = chart.to_dict(validate=False)
    described.pop("config", None)
    return [Figure(name, where + caption, described)]


def figures(rows: Sequence[Contender]) -> list[Figure]:
    """Every chart that the rows have something for, in English where no font has the glyphs."""
    lists, families = comparable_groups(rows), same_data_groups(rows)
    kinds = [
        ("frontier", lists, frontier),
        ("frontier-long", lists, longer_frontier),
        ("retrieval", lists, retrieval),
        ("budgets", families, budgets),
        ("curves", families, curves),
        ("positions", lists, positions),
    ]
    found = []
    with speaking(spoken() if has_glyphs(spoken()) else ENGLISH):
        for name, groups, draw in kinds:
            for number, group in enumerate(groups, start=1):
                where = f"{setting_of(group)}: " if len(groups) > 1 else ""
                own = name if number == 1 else f"{name}-{number}"
                found += figure(own, draw(group), where)
    return found


@cache
def has_glyphs(language: str) -> bool:
    """Whether a font of this machine has the language's glyphs: without one, all look alike."""
    foreign = {c for text in translations(language).values() for c in text if c >= "\u4e00"}
    glyphs = sorted(foreign)[:3]
    pictures = {
        vl_convert.svg_to_png(
            '<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24">'
            f'<text y="20" font-size="20" font-family="{LIGHT["font"]}">{glyph}</text></svg>'
        )
        for glyph in glyphs
    }
    return len(pictures) == len(glyphs)


# --- perplexity, or right answers, against cache ---------------------------------------------


def frontier(group: Sequence[Contender]) -> Drawn:
    """Quality against logical cache bytes, both at the length of the windows, and the frontier."""
    measure = "accuracy" if group[0].task else "validation_ppl"
    return _frontier(group, group[0].value("sequence_length"), measure)


def longer_frontier(group: Sequence[Contender]) -> Drawn:
    """The same at the greatest length at which all were scored beyond their windows."""
    lengths = scored_lengths(group)
    return _frontier(group, lengths[-1], f"{PPL_AT}{lengths[-1]}") if lengths else None


def _frontier(group: Sequence[Contender], length: int, measure: str) -> Drawn:
    answers, size = measure == "accuracy", f"{CACHE}{length}"
    points = points_of(
        {
            **point(row, label, row.stat(measure), 100 if answers else 1),
            "x": max(row.value(size), 1),  # nothing kept is drawn as one byte
            "number": label.partition(" ")[0],
            "cache": numbers.human_bytes(row.value(size)),
        }
        for row, label in _labels(group).items()
        if not row.diverged and row.value(size) is not None
    )
    if points.empty:
        return None
    left, right = points.x.min() / 1.6, points.x.max() * 1.6
    tokens = numbers.count(length)
    x = alt.X("x:Q").title(say("cache of one sequence at {tokens} tokens", tokens=tokens))
    x = x.scale(type="log", base=2, domain=[left, right], nice=False)
    x = x.axis(values=_powers_of_two(left, right), labelExpr=_BYTES)
    y = _shares() if answers else _perplexity(points, say("validation perplexity"))
    best = pareto(points.assign(cost=-points.y if answers else points.y))[["x", "y"]]
    step = alt.Chart(_values(pd.concat([best, best.tail(1).assign(x=right)])))
    step = step.mark_line(interpolate="step-after", strokeWidth=2, color=_GREY).encode(x, y)
    label = alt.Chart(_values(points[::-1])).mark_text(
        fontSize=10, fontWeight="bold", color="white"
    )
    chart = _layered(
        [
            step,
            *_marks(points, x, y, size=230),
            label.encode(x, y, text="number:N", tooltip=_tips(points)),
        ],
        len(points),
    )
    said = (
        say("Right answers against cache at {tokens} tokens.", tokens=tokens)
        if answers
        else say("Perplexity and cache, both at {tokens} tokens.", tokens=tokens)
    )
    more = say("No contender beats one on the line in both. Bars: 95% interval of the mean.")
    return f"{said} {more}", chart


def pareto(points: pd.DataFrame) -> pd.DataFrame:
    """The points that no other beats, by rising `x`; less is better in `x` and in `cost`."""
    ordered = points.sort_values(["x", "cost"]).drop_duplicates("x")
    return ordered[ordered.cost < ordered.cost.cummin().shift(fill_value=math.inf)]


# --- lines: by tokens, by position, by difficulty, by a grid's values ------------------------


def budgets(group: Sequence[Contender]) -> Drawn:
    """Perplexity against training tokens, a line a contender; None with a single budget."""
    if len({row.budget for row in group}) < 2:
        return None
    named = [replace(row, name=row.value("contender")) for row in group]
    latest = {row.name: row for row in sorted(named, key=lambda row: row.budget)}
    labels = {row.name: label for row, label in _labels([*latest.values()]).items()}
    points = points_of(
        {**point(row, labels[row.name], row.stat("validation_ppl")), "x": row.budget}
        for row in named
        if not row.diverged
    )
    return budget_chart(points)


def budget_chart(points: pd.DataFrame) -> Drawn:
    """The same from points with `label`, `x` in training tokens, `y`, `low` and `high`."""
    x = alt.X("x:Q").title(say("training tokens")).scale(type="log", nice=False, padding=20)
    x = x.axis(values=sorted(set(points.x)), labelExpr=_TOKENS)
    said = say("Perplexity against training tokens. Bars: 95% interval of the mean.")
    return _line_chart(points, x, _perplexity(points, say("validation perplexity")), said)


def retrieval(group: Sequence[Contender]) -> Drawn:
    """Right answers by difficulty; None without a synthetic task."""
    levels = list(dict.fromkeys(level for row in group for level in row.levels))
    points = points_of(
        {
            **point(row, label, row.stat(level), 100),
            "x": level_name(level),
        }
        for row, label in _labels(group).items()
        for level in row.levels
        if not row.diverged
    )
    names = [level_name(level) for level in levels]
    x = alt.X("x:O").title(None).sort(names).axis(labelAngle=0)
    return _line_chart(points, x, _shares(), say("Right answers by difficulty."))


def positions(group: Sequence[Contender]) -> Drawn:
    """Perplexity by position in long texts; None where nothing was scored beyond the windows."""
    points = points_of(
        {**point(row, label, found), "x": last}
        for row, label in _labels(group).items()
        for last, found in row.positions().items()
    )
    x = alt.X("x:Q").title(say("tokens read so far")).scale(nice=False, zero=True)
    x = x.axis(labelExpr=_TOKENS)
    said = say(
        "Perplexity by position in long texts; training windows had {tokens} tokens.",
        tokens=numbers.count(group[0].value("sequence_length")),
    )
    return _line_chart(points, x, _perplexity(points, say("perplexity")), said)


def grid_chart(points: pd.DataFrame, key: str, marks: Sequence[str]) -> Drawn:
    """Perplexity against a key's values, from points with `label`, `x`, `y`, `low` and `high`."""
    x = alt.X("x:O").title(visible(key)).sort(list(marks)).axis(labelAngle=0)
    said = say("Perplexity of each setting. Bars: 95% interval of the mean.")
    return _line_chart(points, x, _perplexity(points, say("validation perplexity")), said)


def course(points: pd.DataFrame, *, shapes: bool) -> Drawn:
    """Perplexity by epoch, from points with `label`, `x` and `y`; `shapes`: over its lowest."""
    x = alt.X("x:Q").title(say("epoch")).axis(tickMinStep=1, format="d").scale(nice=False)
    points = points.assign(low=math.nan, high=math.nan, baseline=False)
    if shapes:
        y = alt.Y("y:Q").title(say("validation perplexity over its lowest")).scale(zero=False)
        return _line_chart(points, x, y, say("Perplexity by epoch, as a multiple of its lowest."))
    y = _perplexity(points, say("validation perplexity"))
    return _line_chart(points, x, y, say("Perplexity by epoch."))


def curves(group: Sequence[Contender]) -> Drawn:
    """Loss over the tokens trained on, of validation and, running, of training.

    With several seeds lines are means, as far as all seeds went, and a band spans the seeds.
    """
    lines = [(row, label, *_curves(row)) for row, label in _labels(group).items()]
    train = pd.concat([_curve(row, label, losses) for row, label, losses, _ in lines])
    validation = pd.concat([_curve(row, label, losses) for row, label, _, losses in lines])
    if validation.empty:
        return None
    x = (
        alt.X("x:Q")
        .title(say("training tokens"))
        .scale(zero=True, nice=False)
        .axis(labelExpr=_TOKENS)
    )
    y = alt.Y("y:Q").title(say("loss, nats a token")).scale(zero=False)
    colour = _colour(validation)
    thin = alt.Chart(_values(train)).mark_line(strokeWidth=0.8, opacity=0.6)
    spread = validation[validation.low < validation.high]
    band = alt.Chart(_values(spread)).mark_area(opacity=0.15)
    layers = [] if train.empty else [thin.encode(x, y, color=colour)]
    layers += [] if spread.empty else [band.encode(x, _low(y), y2="high:Q", color=colour)]
    points = validation.assign(low=math.nan, high=math.nan)
    chart = _layered([*layers, *_marks(points, x, y, line=True)], len(lines))
    return say("Loss: with points of validation, without of training (running)."), chart


def live_chart(steps: pd.DataFrame) -> Drawn:
    """Loss by step of each job that has begun, from `label`, `x` and `y`; the latest is last."""
    if steps.empty:
        return None
    lines = []
    for label, own in steps.groupby("label", sort=False):
        stretch = np.arange(len(own)) // (-(-len(own) // MOST_POINTS))
        lines.append(own[["x", "y"]].groupby(stretch).mean().assign(label=visible(str(label))))
    points = pd.concat(lines[::-1]).assign(baseline=False)
    x, y = alt.X("x:Q").title(say("step")), alt.Y("y:Q").title(say("loss, nats a token"))
    line = alt.Chart(_values(points)).mark_line(strokeWidth=1.5)
    line = line.encode(x, y.scale(zero=False), color=_colour(points))
    return say("Training loss by step."), _layered([line], len(lines))


def _curves(row: Contender) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The losses of training and of validation: a column a seed, a row a number of tokens."""
    epochs, steps = _with_tokens(row, row.epochs()), _with_tokens(row, row.steps())
    validation = _losses(epochs, "validation_loss")
    return (_losses(epochs, "train_loss") if steps.empty else _losses(steps, "loss")), validation


def _with_tokens(row: Contender, lines: pd.DataFrame) -> pd.DataFrame:
    """The lines of a history with the tokens trained on; older ones only count steps and epochs."""
    if lines.empty or lines.tokens.notna().all():
        return lines
    epoch_tokens = row.value("train_windows") * row.value("sequence_length")
    if "step" not in lines:
        return lines.assign(tokens=lines.epoch * epoch_tokens)
    # Steps may be written down every so often: the last one of the first epoch tells its length.
    epoch_steps = lines.step[lines.epoch == lines.epoch.min()].max()
    return lines.assign(tokens=lines.step / epoch_steps * epoch_tokens)


def _losses(lines: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column a seed, a row for each number of tokens that all seeds reached undiverged."""
    lines = lines.assign(tokens=lines.tokens.astype(float), loss=lines[column].astype(float))
    lines = lines.drop_duplicates(["tokens", "seed"], keep="last")
    losses = lines.pivot(index="tokens", columns="seed", values="loss")
    return losses[losses < DIVERGED_LOSS].dropna()


def _curve(row: Contender, label: str, losses: pd.DataFrame) -> pd.DataFrame:
    """The mean over the seeds and their range, at no more than `MOST_POINTS` places."""
    found = pd.DataFrame(
        {"x": losses.index, "y": losses.mean(axis=1), "low": losses.min(axis=1)}
    ).assign(high=losses.max(axis=1))
    stretch = -(-len(found) // MOST_POINTS) or 1
    found = found.groupby(np.arange(len(found)) // stretch).mean()
    shown = [numbers.decimal(loss, 4) for loss in found.y]
    return found.assign(label=label, shown=shown, baseline=bool(row.value("baseline")))


# --- what charts are made of -----------------------------------------------------------------


def _labels(group: Sequence[Contender]) -> dict[Contender, str]:
    """Each contender's number and short name, the best first."""
    return {row: f"{number} {short(row.shown_name)}" for number, row in enumerate(ranked(group), 1)}


def short(name: str) -> str:
    """A name for a legend, without its middle where it is long."""
    return visible(name if len(name) <= 30 else f"{name[:17]}…{name[-12:]}")


def point(row: Contender, label: str, found: Stat | None, times: float = 1) -> dict[str, Any]:
    """Where a mean stands, with its interval, and what hovering tells."""
    if found is None or not math.isfinite(found.mean):
        return {"label": label, "baseline": False, "y": math.nan}
    low, high = found.interval or (math.nan, math.nan)
    shown = numbers.with_deviation(found, numbers.percent if times == 100 else numbers.perplexity)
    place = {"y": times * found.mean, "low": times * low, "high": times * high}
    told = {"shown": shown, "versus": versus_text(row), "baseline": bool(row.value("baseline"))}
    return {"label": label, **told, **place}


def points_of(found: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The rows that have a value: `label`, `x`, `y`, `low`, `high` and what hovering tells."""
    columns = ["label", "x", "y", "low", "high", "shown", "baseline"]
    points = pd.DataFrame(list(found))
    return points[points.y.notna()] if len(points) else pd.DataFrame(columns=columns)


def _values(points: pd.DataFrame) -> dict[str, Any]:
    records = points.to_dict("records")
    return {"values": [{k: v for k, v in one.items() if v == v} for one in records]}  # no NaN


def _line_chart(points: pd.DataFrame, x: alt.X, y: alt.Y, caption: str) -> Drawn:
    if points.empty:
        return None
    return caption, _layered(_marks(points, x, y, line=True), points.label.nunique())


def _marks(
    points: pd.DataFrame,
    x: alt.X,
    y: alt.Y,
    *,
    size: int = 45,
    line: bool = False,
) -> list[alt.Chart]:
    """A point for each row, its interval where it has one, and a line a label if wanted.

    A click in the legend leaves one label in colour.
    """
    colour = _colour(points)
    points = points[::-1]  # so that the best are drawn last, over all others
    pick = alt.selection_point(name="pick", fields=["label"], bind="legend")
    picked = alt.condition(pick, alt.value(1), alt.value(0.12))
    base = alt.Chart(_values(points)).encode(x, y, color=colour, opacity=picked)
    known = points[points.low.notna()]
    spread = alt.Chart(_values(known)).mark_rule(strokeWidth=1.5)
    bars = spread.encode(x, _low(y), y2="high:Q", color=colour, opacity=picked)
    marks = [] if known.empty else [bars]
    if line:
        marks.append(base.mark_line(strokeWidth=1.8))
    shape = alt.Shape("baseline:N").scale(domain=[False, True], range=["circle", "square"])
    dots = base.mark_point(size=size, filled=True).encode(
        tooltip=_tips(points), shape=shape.legend(None)
    )
    return [*marks, dots.add_params(pick)]


def _tips(points: pd.DataFrame) -> list[alt.Tooltip]:
    """What hovering tells, as far as the points have it."""
    told = {"label": say("contender"), "shown": say("value"), "cache": say("cache")}
    told |= {"versus": say("vs baseline")}
    return [alt.Tooltip(f"{name}:N").title(told[name]) for name in told if name in points]


def _colour(points: pd.DataFrame) -> alt.Color:
    """A colour a label, in their order; baselines always have one of their own."""
    labels = list(points.label.drop_duplicates())
    own = set(points.label[points.baseline])
    others = [label for label in labels if label not in own]
    first = others[: max(0, len(_COLOURS) - len(own))]
    domain = list(dict.fromkeys([*(one for one in labels if one in {*first, *own}), *labels]))
    return alt.Color("label:N").scale(domain=domain).legend(values=labels)


def _low(y: alt.Y) -> alt.Y:
    """The same axis for the lower ends of intervals."""
    low = y.copy()
    low.shorthand = "low:Q"
    return low


def _layered(layers: Sequence[alt.Chart], labels: int) -> alt.LayerChart:
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=max(HEIGHT, 16 * labels))


def _shares() -> alt.Y:
    return alt.Y("y:Q").title(say("right answers, %")).scale(domain=[0, 100])


def _perplexity(points: pd.DataFrame, title: str) -> alt.Y:
    """A log scale where the range is wide; in both cases a few plain tick labels."""
    y = alt.Y("y:Q").title(title)
    if points.empty or points.y.max() <= WIDE_RANGE * points.y.min():
        return y.scale(zero=False)
    low, high = points.y.min(), points.y.max()
    few = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    steps = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if high < 12 * low else few
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    values = [value for value in every if low / 2 <= value <= 2 * high]
    return y.scale(type="log", nice=False).axis(values=values, format=",~r")


def _powers_of_two(low: float, high: float, most: int = 6) -> list[int]:
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    return [2**power for power in powers[:: -(-len(powers) // most) or 1] if power >= 0]
