"""The table of a corpus of tasks: how often each contender gives the right answer, by level."""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report import numbers
from contextlm.report.numbers import Stat, with_deviation
from contextlm.report.resources import in_order
from contextlm.report.sheet import CONTENDER, Column, Table, make_table
from contextlm.report.summary import SummaryRow


def retrieval_table(rows: Sequence[SummaryRow]) -> Table | None:
    """Accuracy on the answers at each level and in all; None if no contender was asked."""
    asked = [row for row in rows if asked_questions(row)]
    if not asked:
        return None
    levels = in_order([level for row in asked for level in _by_level(row)])
    lines = []
    for row in asked:
        found = _by_level(row)
        line = [with_deviation(found.get(level), numbers.percent) for level in levels]
        lines.append([row.shown_name, *line, with_deviation(row.accuracy, numbers.percent)])
    columns = [CONTENDER, *map(Column, levels), Column("all answers")]
    return make_table("Right answers", columns, lines)


def asked_questions(row: SummaryRow) -> bool:
    """Whether the row's corpus is one of tasks, where accuracy is the figure that counts."""
    return any(outcome.result.retrieval for outcome in row.outcomes)


def _by_level(row: SummaryRow) -> dict[str, Stat]:
    found: dict[str, list[float]] = {}
    for outcome in row.outcomes:
        for entry in outcome.result.retrieval:
            found.setdefault(entry.level, []).append(entry.accuracy)
    return {level: Stat.of(values) for level, values in found.items()}
