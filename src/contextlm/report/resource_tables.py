"""The tables of what stands beside a model: its context stores, and the memory of each stage."""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report import numbers
from contextlm.report.numbers import ABSENT, with_deviation
from contextlm.report.resources import in_order
from contextlm.report.sheet import CONTENDER, Column, Table, make_table
from contextlm.report.summary import SummaryRow


def store_table(rows: Sequence[SummaryRow]) -> Table | None:
    """What the context stores hold and how they were filled; None if no contender reads one."""
    columns = ["size, training text", "size, validation text", "size, both"]
    columns += ["drift, training text", "drift, validation text", "seconds to fill"]
    lines = [
        [
            row.shown_name,
            store.fill,
            store.dtype,
            numbers.human_bytes(store.train_bytes),
            numbers.human_bytes(store.validation_bytes),
            numbers.human_bytes(store.total_bytes),
            with_deviation(store.drift_train, numbers.significant),
            with_deviation(store.drift_validation, numbers.significant),
            with_deviation(store.seconds, numbers.seconds),
        ]
        for row in rows
        if (store := row.store) is not None
    ]
    if not lines:
        return None
    texts = [CONTENDER, Column("fill", "text"), Column("dtype", "text")]
    return make_table("Context stores", [*texts, *map(Column, columns)], lines)


def stage_table(rows: Sequence[SummaryRow]) -> Table | None:
    """Memory in use at the end of each stage, a column for each contender's host and accelerator.

    None if no contender has such figures.
    """
    measured = [row for row in rows if row.stages]
    if not measured:
        return None
    columns = [Column("stage", "text")]
    for row in measured:
        columns += [Column(f"{row.name}, host"), Column(f"{row.name}, accelerator")]
    lines = []
    for name in in_order([stage.stage for row in measured for stage in row.stages]):
        line = [name]
        for row in measured:
            stage = row.stage(name)
            line += [
                _gigabytes(stage.host_bytes if stage else None),
                _gigabytes(stage.accelerator_bytes if stage else None),
            ]
        lines.append(line)
    return make_table("Memory in use at the end of each stage", columns, lines)


def _gigabytes(size: float | None) -> str:
    return ABSENT if size is None else numbers.gigabytes(size / 1024**3)
