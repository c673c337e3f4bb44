"""A grid of settings: one table, one file for programs, one chart of perplexity against a key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contextlm.base.files import atomic_open, write_json, write_text
from contextlm.base.visible import visible
from contextlm.report import charts, numbers
from contextlm.report.contenders import Contender, contenders, row_facts
from contextlm.report.numbers import with_deviation
from contextlm.report.sheet import Column, Table, escape_markdown, make_table, markdown_table
from contextlm.report.statistics import corrected
from contextlm.report.tables import (
    CONTENDER,
    difference_text,
    interval_text,
    mean,
    ppl_text,
    shared,
    tests_note,
    verdict_text,
    whole,
)
from contextlm.results.result import Run


@dataclass(frozen=True)
class GridPoint:
    """A setting's values by key, and its run as far as it has finished."""

    values: dict[str, Any]
    run: Run


_Line = tuple[GridPoint, Contender]
_FIGURES: list[Column[Contender]] = [
    CONTENDER,
    Column("validation PPL", ppl_text),
    Column("PPL vs baseline", difference_text),
    Column("95% interval", interval_text),
    Column("verdict", verdict_text, "text"),
    mean("accuracy", "accuracy", numbers.percent),
    mean("best epoch", "best_epoch", whole),
    shared("parameters", "parameters", numbers.count),
    Column("seeds", lambda row: str(len(row.seeds)), "text"),
]


def write_grid(points: Sequence[GridPoint], folder: Path) -> dict[str, Path]:
    """Write ``grid.md``, ``grid.json`` and ``grid.png`` into `folder`; the paths by file name.

    A contender is compared with the baseline of its own setting; Holm's correction is over the
    whole grid. Settings without a finished contender are left out.
    """
    lines = grid_lines(points)
    table, best = grid_table(lines), best_sentences(lines)
    parts = [markdown_table(table), table.note, "\n".join(f"- {escape_markdown(b)}" for b in best)]
    paths = {name: folder / name for name in ("grid.md", "grid.json", "grid.png")}
    write_text(paths["grid.md"], "\n\n".join(part.rstrip() for part in parts if part) + "\n")
    write_json(paths["grid.json"], {"rows": grid_facts(lines), "best": best})
    with atomic_open(paths["grid.png"], "wb") as stream:
        stream.write(charts.png(grid_figure(lines)))
    return paths


def grid_lines(points: Sequence[GridPoint]) -> list[_Line]:
    """Each setting with each of its contenders."""
    found = [
        (point, row) for point in points if point.run.outcomes for row in contenders([point.run])
    ]
    told = iter(corrected([row.difference for _, row in found if row.difference is not None]))
    return [
        (point, row if row.difference is None else replace(row, difference=next(told)))
        for point, row in found
    ]


def grid_table(lines: Sequence[_Line]) -> Table:
    """The grid's keys, then the figures."""
    keys: list[Column[_Line]] = [
        Column(key, _cell_of(key), "text") for key in (lines[0][0].values if lines else ())
    ]
    figures: list[Column[_Line]] = [
        Column(column.heading, _on_row(column), column.kind) for column in _FIGURES
    ]
    return make_table("Grid", [*keys, *figures], lines, tests_note([row for _, row in lines]))


def grid_facts(lines: Sequence[_Line]) -> list[dict[str, Any]]:
    """The same for programs, in JSON's own types; what is not finite is null."""
    return [
        {"setting": point.values, "run": str(point.run.folder), **_json(row_facts(row))}
        for point, row in lines
    ]


def best_sentences(lines: Sequence[_Line]) -> list[str]:
    """For each contender the setting with the lowest mean perplexity."""
    best: dict[str, tuple[float, _Line]] = {}
    for point, row in lines:
        found = row.stat("validation_loss")
        if found is None or row.diverged:
            continue
        if row.name not in best or found.mean < best[row.name][0]:
            best[row.name] = (found.mean, (point, row))
    return [
        f"{name} is lowest with {_named(point.values)}: "
        f"{with_deviation(row.stat('validation_ppl'))} ({numbers.seeds_text(len(row.seeds))})"
        for name, (_, (point, row)) in best.items()
    ]


def grid_figure(lines: Sequence[_Line]) -> charts.Figure:
    """Validation perplexity against the first key, a line a contender (and values of other keys).

    Bars are one standard deviation over the seeds. Contenders that diverged have no point there.
    """
    key = next(iter(lines[0][0].values)) if lines else ""
    marks = list(dict.fromkeys(_shown(point.values[key]) for point, _ in lines))
    numeric = all(_is_number(point.values[key]) for point, _ in lines)
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for point, row in lines:
        others = {name: value for name, value in point.values.items() if name != key}
        name = ", ".join([row.name, *(f"{k} {_shown(v)}" for k, v in others.items())])
        place = float(point.values[key]) if numeric else marks.index(_shown(point.values[key]))
        found = None if row.diverged else row.stat("validation_ppl")
        points = curves.setdefault(name, [])
        if found is not None and charts.drawable(found.mean):
            points.append((place, found.mean, found.sd or 0.0))
    figure = charts.new_figure(4.2 + 0.24 * len(curves))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    looks = charts.styles(len(curves))
    for points, style in zip(curves.values(), looks, strict=True):
        for one in sorted(points):
            axes.errorbar(*one[:2], yerr=one[2], color=style.colour, capsize=4)
        x, y = [p[0] for p in sorted(points)], [p[1] for p in sorted(points)]
        axes.plot(x, y, color=style.colour, marker=style.marker, linewidth=1.8)
    places = sorted({place for points in curves.values() for place, _, _ in points})
    if numeric and places and places[0] > 0 and places[-1] > charts.WIDE_RANGE * places[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    if places and (not numeric or len(places) <= 8):
        axes.set_xticks(places, [f"{p:g}" if numeric else visible(marks[int(p)]) for p in places])
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
    charts.perplexity_axis(axes, [mean for points in curves.values() for _, mean, _ in points])
    axes.set_xlabel(visible(key), parse_math=False)
    axes.set_ylabel("validation perplexity")
    axes.grid(color="#dddddd", linewidth=0.6)
    charts.add_legend(figure, [charts.legend_entry(*p) for p in zip(curves, looks, strict=True)])
    return figure


def _cell_of(key: str) -> Callable[[_Line], str]:
    return lambda line: _shown(line[0].values[key])


def _on_row(column: Column[Contender]) -> Callable[[_Line], str]:
    return lambda line: column.cell(line[1])


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    if hasattr(value, "__dataclass_fields__"):
        return _json(vars(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
