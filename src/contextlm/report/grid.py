"""A grid of settings: one table, one file for programs, one chart of perplexity against a key."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contextlm.base.files import plain, write_json, write_text
from contextlm.base.visible import visible
from contextlm.report import charts, numbers
from contextlm.report.contenders import Contender, comparable_groups, contenders, row_facts
from contextlm.report.sheet import Column, Table, escape_markdown, make_table, markdown_table
from contextlm.report.statistics import corrected
from contextlm.report.tables import (
    CONTENDER,
    difference_text,
    interval_text,
    mean,
    ppl_text,
    setting_of,
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
    """Write ``grid.md``, ``grid.json`` and the chart's files into `folder`; the paths by name.

    A contender is compared with the baseline of its own setting; Holm's correction is over the
    whole grid. Settings without a finished contender are left out.
    """
    lines = grid_lines(points)
    table, best = grid_table(lines), best_sentences(lines)
    parts = [markdown_table(table), table.note, "\n".join(f"- {escape_markdown(b)}" for b in best)]
    paths = {name: folder / name for name in ("grid.md", "grid.json")}
    write_text(paths["grid.md"], "\n\n".join(part.rstrip() for part in parts if part) + "\n")
    rows = [
        {"setting": point.values, "run": point.run.folder, **row_facts(row)} for point, row in lines
    ]
    write_json(paths["grid.json"], plain({"rows": rows, "best": best}))
    for figure in charts.figure("grid", grid_chart(lines)):
        figure.save(folder)
        paths |= {f"grid.{suffix}": folder / f"grid.{suffix}" for suffix in charts.FORMATS}
    return paths


def grid_lines(points: Sequence[GridPoint]) -> list[_Line]:
    """Each setting with each of its contenders."""
    found = [
        (point, row) for point in points if point.run.outcomes for row in contenders([point.run])
    ]
    told = corrected([row.difference for _, row in found])
    return [
        (point, replace(row, difference=one)) for (point, row), one in zip(found, told, strict=True)
    ]


def grid_table(lines: Sequence[_Line]) -> Table:
    """The grid's keys, then the figures."""
    keys = [_of_setting(key) for key in (lines[0][0].values if lines else ())]
    figures = [_of_row(column) for column in _FIGURES]
    return make_table("Grid", [*keys, *figures], lines, tests_note([row for _, row in lines]))


def best_sentences(lines: Sequence[_Line]) -> list[str]:
    """For each contender the setting with the lowest mean perplexity, of those alike in data.

    Settings with other data, windows or budgets are not ranked with each other.
    """
    groups = comparable_groups([row for _, row in lines])
    found = []
    for group in groups:
        best: dict[str, tuple[float, str]] = {}
        alike = [(point, row) for point, row in lines if row in group]
        for point, row in alike:
            loss = None if row.diverged else row.stat("validation_loss")
            if loss is not None and loss.mean < best.get(row.name, (math.inf, ""))[0]:
                setting = ", ".join(f"{key} {_shown(value)}" for key, value in point.values.items())
                told = f"{setting}: {ppl_text(row)} ({numbers.seeds_text(len(row.seeds))})"
                best[row.name] = loss.mean, told
        where = f"On {setting_of(group)}: " if len(groups) > 1 else ""
        if len({id(point) for point, _ in alike}) > 1 or len(groups) == 1:
            found += [f"{where}{name} is lowest with {told}" for name, (_, told) in best.items()]
    return found


def grid_chart(lines: Sequence[_Line]) -> charts.Drawn:
    """Validation perplexity against the first key, a line a contender (and values of other keys).

    Contenders that diverged have no point there.
    """
    key = next(iter(lines[0][0].values)) if lines else ""
    marks = list(dict.fromkeys(_shown(point.values[key]) for point, _ in lines))
    found = []
    for point, row in lines:
        others = {name: value for name, value in point.values.items() if name != key}
        values = (visible(f"{k} {_shown(v)}") for k, v in others.items())
        label = ", ".join([charts.short(row.shown_name), *values])
        if not row.diverged:
            place = charts.point(row, label, row.stat("validation_ppl"))
            found.append({**place, "x": _shown(point.values[key])})
    return charts.grid_chart(charts.points_of(found), key, marks)


def _of_setting(key: str) -> Column[_Line]:
    return Column(key, lambda line: _shown(line[0].values[key]), "text")


def _of_row(column: Column[Contender]) -> Column[_Line]:
    return Column(column.heading, lambda line: column.cell(line[1]), column.kind)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
