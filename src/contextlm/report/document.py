"""The source document's own figures beside the measured ones.

A recipe's ``reported`` maps names to numbers. Names known here have a measured figure beside them;
any other is shown as it stands. ``validation_`` may stand for ``val_``. Accuracy, convergence and
rank (as part of the width) are shares up to 1, and percentages above; sizes are in the unit that
their name holds (``kb``, ``mb``, ``gb``), of 1024.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from contextlm.report import numbers
from contextlm.report.contenders import CACHE, REPORTED, Contender
from contextlm.report.language import say
from contextlm.report.numbers import ABSENT, signed_percent, with_deviation
from contextlm.report.sheet import Column, Table, make_table
from contextlm.report.statistics import stat
from contextlm.report.tables import Show, four, whole


class Figure(NamedTuple):
    """What a figure is called, the column of the seed frame beside it, and how it is printed.

    `relative` says that a percentage of the baseline's makes sense.
    """

    label: str
    column: str
    show: Show
    relative: bool = True


_STAGES = {
    "data": "data_loaded",
    "model": "model_initialised",
    "phase1": "after_phase_1",
    "phase2": "phase_2_prepared",
}
FIGURES = {
    "val_ppl": Figure("validation PPL", "validation_ppl", numbers.perplexity),
    "val_loss": Figure("validation loss", "validation_loss", four),
    "train_ppl": Figure("train PPL, running", "train_ppl_running", numbers.perplexity),
    "train_ppl_best_weights": Figure("train PPL, best weights", "train_ppl", numbers.perplexity),
    "bits_per_byte": Figure("bits per byte", "bits_per_byte", four),
    "accuracy": Figure("accuracy", "accuracy", numbers.percent, False),
    "best_epoch": Figure("best epoch", "best_epoch", whole, False),
    "epochs": Figure("epochs run", "epochs", whole, False),
    "parameters": Figure("parameters", "parameters", numbers.count),
    "trainable": Figure("parameters trained in phase 2", "trainable", numbers.count),
    "seconds_per_epoch": Figure("seconds an epoch", "seconds_per_epoch", numbers.seconds),
    "phase1_iterations": Figure("phase-1 iterations", "phase1_iterations", whole, False),
    "phase1_converged": Figure("phase-1 convergence", "phase1_converged", numbers.percent, False),
    "phase1_seconds": Figure("phase-1 seconds", "phase1_seconds", numbers.seconds, False),
    "effective_rank_train": Figure(
        "effective rank, training stream", "rank_share_train", numbers.percent, False
    ),
    "effective_rank_val": Figure(
        "effective rank, validation", "rank_share_validation", numbers.percent, False
    ),
    "train_val_gap": Figure(
        "validation / running train PPL", "train_val_gap", lambda v: numbers.decimal(v, 2), False
    ),
    # The documents store an embedding for every position, too; here it is looked up by token.
    "store_mb": Figure("stored contexts and embeddings", "store_bytes", numbers.human_bytes),
    "store_train_contexts_mb": Figure(
        "stored contexts, training text", "store_train_bytes", numbers.human_bytes
    ),
    "store_val_contexts_mb": Figure(
        "stored contexts, validation text", "store_validation_bytes", numbers.human_bytes
    ),
    **{
        f"{place}_gb_{key}": Figure(
            f"{place} memory, {stage.replace('_', ' ')}",
            f"{place}_bytes_{stage}",
            numbers.human_bytes,
        )
        for place in ("host", "accelerator")
        for key, stage in _STAGES.items()
    },
}


class _Line(NamedTuple):
    row: Contender
    key: str
    value: float
    figure: Figure


def document_table(rows: Sequence[Contender]) -> Table | None:
    """Each figure of the source document beside the one measured here; None if it has none."""
    lines = [
        _Line(row, key, float(row.value(REPORTED + key)), _figure(key))
        for row in rows
        for key in row.reported
    ]
    columns: list[Column[_Line]] = [
        Column("contender", lambda line: line.row.name, "text"),
        Column("figure", lambda line: say(line.figure.label), "text"),
        Column("document", _reported, "reported"),
        Column(
            "this run",
            lambda line: with_deviation(line.row.stat(line.figure.column), line.figure.show),
        ),
        Column(
            "document vs its baseline",
            lambda line: _change(line, line.row.reported_change(line.key)),
            "reported",
        ),
        Column(
            "this run vs its baseline",
            lambda line: _change(line, line.row.change(line.figure.column)),
        ),
    ]
    table = make_table("The document's figures and this run's", columns, lines)
    return table if table.rows else None


def epoch_tables(rows: Sequence[Contender]) -> list[Table]:
    """A table for each contender whose perplexities the document gives epoch by epoch.

    Measured figures are means over the seeds, as far as all of them went.
    """
    return [
        _epoch_table(row, reported)
        for row in rows
        if any(map(any, (reported := row.outcomes[0].result.reported_epochs).values()))
    ]


def _epoch_table(row: Contender, reported: dict[str, list[float | None]]) -> Table:
    of_epoch = {
        int(str(epoch)): lines
        for epoch, lines in row.epochs().groupby("epoch")
        if len(lines) == len(row.seeds)
    }

    def given(key: str) -> Callable[[int], str]:
        values = dict(enumerate(reported.get(key, []), 1))
        return lambda e: ABSENT if (value := values.get(e)) is None else numbers.plain(value)

    def found(column: str) -> Callable[[int], str]:
        return lambda e: with_deviation(stat(of_epoch[e][column]) if e in of_epoch else None)

    columns: list[Column[int]] = [
        Column("epoch", str, "text"),
        Column("train PPL", given("train_ppl"), "reported"),
        Column("validation PPL", given("val_ppl"), "reported"),
        Column("train PPL, running", found("train_ppl")),
        Column("validation PPL", found("validation_ppl")),
    ]
    last = max([*of_epoch, *map(len, reported.values())])
    caption = say("Epoch by epoch, document and this run: {name}", name=row.name)
    return make_table(caption, columns, range(1, last + 1))


def _figure(key: str) -> Figure:
    """A key that is not known has no column, and so nothing beside it."""
    if cache := re.fullmatch(r"cache_(?:bytes|kb|mb)_at_(\d+)", key):
        label = say("cache at {tokens} tokens", tokens=numbers.count(int(cache[1])))
        return Figure(label, f"{CACHE}{cache[1]}", numbers.human_bytes)
    return FIGURES.get(key, Figure(key.replace("_", " "), "", numbers.plain, False))


def _reported(line: _Line) -> str:
    """The document's own number, to its last digit unless it is a size."""
    show, value = line.figure.show, line.value
    if show is numbers.percent:
        return numbers.plain(100 * value if value <= 1 else value) + "%"
    if show is numbers.human_bytes:
        unit = re.search(r"_(kb|mb|gb)(_|$)", line.key)
        return numbers.human_bytes(value * (1024 ** (1 + "kmg".index(unit[1][0])) if unit else 1))
    return numbers.plain(value) + (" s" if show is numbers.seconds else "")


def _change(line: _Line, percent: float | None) -> str:
    return signed_percent(percent) if line.figure.relative else ABSENT
