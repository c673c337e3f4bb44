"""The source document's own figures beside the measured ones.

A recipe's ``reported`` maps names to numbers. Names known here have a measured figure beside them;
any other is shown as it stands. ``validation_`` may stand for ``val_``. Accuracy, convergence and
rank (as part of the width) are shares up to 1, and percentages above; 1 KB = 1024 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from contextlm.report import numbers
from contextlm.report.contenders import CACHE, REPORTED, Contender
from contextlm.report.numbers import ABSENT, signed_percent, with_deviation
from contextlm.report.sheet import Column, Table, make_table
from contextlm.report.statistics import Stat
from contextlm.report.tables import Show, four, whole

_UNITS = {"bytes": 1, "kb": 1024, "mb": 1024**2, "gb": 1024**3}


@dataclass(frozen=True)
class Figure:
    """What a document's figure is called and which column of the seed frame stands beside it.

    `unit` divides bytes (``mb``), `suffix` is printed after the document's number. `relative` says
    that a percentage of the baseline's makes sense, `share` that it is a part of 1.
    """

    label: str
    column: str
    show: Show
    relative: bool = True
    share: bool = False
    suffix: str = ""
    unit: str = "bytes"


def _sized(label: str, column: str, unit: str) -> Figure:
    suffix = f" {unit if unit == 'bytes' else unit.upper()}"
    places = {"bytes": 0, "gb": 2}.get(unit, 1)
    return Figure(
        label, column, lambda v: numbers.decimal(v, places) + suffix, suffix=suffix, unit=unit
    )


def _share(label: str, column: str) -> Figure:
    return Figure(label, column, numbers.percent, relative=False, share=True)


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
    "accuracy": _share("accuracy", "accuracy"),
    "best_epoch": Figure("best epoch", "best_epoch", whole, relative=False),
    "epochs": Figure("epochs run", "epochs", whole, relative=False),
    "parameters": Figure("parameters", "parameters", numbers.count),
    "trainable": Figure("parameters trained in phase 2", "trainable", numbers.count),
    "seconds_per_epoch": Figure(
        "seconds an epoch", "seconds_per_epoch", numbers.seconds, suffix=" s"
    ),
    "phase1_iterations": Figure("phase-1 iterations", "phase1_iterations", whole, relative=False),
    "phase1_converged": _share("phase-1 convergence", "phase1_converged"),
    "phase1_seconds": Figure(
        "phase-1 seconds", "phase1_seconds", numbers.seconds, relative=False, suffix=" s"
    ),
    "effective_rank_train": _share("effective rank, training stream", "rank_share_train"),
    "effective_rank_val": _share("effective rank, validation", "rank_share_validation"),
    "train_val_gap": Figure(
        "validation / running train PPL",
        "train_val_gap",
        lambda value: numbers.decimal(value, 2),
        relative=False,
    ),
    "store_mb": _sized("stored contexts and embeddings, both splits", "store_bytes", "mb"),
    "store_train_contexts_mb": _sized("stored contexts, training text", "store_train_bytes", "mb"),
    "store_val_contexts_mb": _sized(
        "stored contexts, validation text", "store_validation_bytes", "mb"
    ),
    # The documents store an embedding for every position, too; here it is looked up by token.
    **{
        f"store_{split}_embeddings_mb": _sized(
            f"stored embeddings, {text} text (here looked up by token)",
            "store_embedding_bytes",
            "mb",
        )
        for split, text in (("train", "training"), ("val", "validation"))
    },
    **{
        f"{place}_gb_{key}": _sized(
            f"{place} memory, {stage.replace('_', ' ')}", f"{place}_bytes_{stage}", "gb"
        )
        for place in ("host", "accelerator")
        for key, stage in _STAGES.items()
    },
}
_CACHE_AT = re.compile(r"cache_(bytes|kb|mb)_at_(\d+)")
_Line = tuple[Contender, str, float]


def document_table(rows: Sequence[Contender]) -> Table | None:
    """Each figure of the source document beside the one measured here; None if it has none."""
    lines: list[_Line] = [
        (row, str(column).removeprefix(REPORTED), float(value))
        for row in rows
        for column in row.seeds
        if str(column).startswith(REPORTED) and (value := row.value(str(column))) is not None
    ]
    if not lines:
        return None
    columns: list[Column[_Line]] = [
        Column("contender", lambda line: line[0].name, "text"),
        Column("figure", lambda line: _label(line[1]), "text"),
        Column("document", lambda line: _reported(line[1], line[2]), "reported"),
        Column("this run", _measured),
        Column("document vs its baseline", _reported_change, "reported"),
        Column("this run vs its baseline", _measured_change),
    ]
    return make_table("The document's figures and this run's", columns, lines)


def _figure(key: str) -> Figure | None:
    cache = _CACHE_AT.fullmatch(key)
    if cache is None:
        return FIGURES.get(key)
    label = f"cache at {numbers.count(int(cache[2]))} tokens"
    return _sized(label, f"{CACHE}{cache[2]}", cache[1])


def _label(key: str) -> str:
    figure = _figure(key)
    return figure.label if figure else key.replace("_", " ")


def _reported(key: str, value: float) -> str:
    figure = _figure(key)
    if figure is None:
        return numbers.plain(value)
    if figure.share:
        return numbers.plain(100 * value if value <= 1 else value) + "%"
    return numbers.plain(value) + figure.suffix


def _measured(line: _Line) -> str:
    figure = _figure(line[1])
    found = line[0].stat(figure.column) if figure else None
    if figure is None or found is None:
        return ABSENT
    size = _UNITS[figure.unit]
    scaled = Stat(found.mean / size, None if not found.sd else found.sd / size, found.seeds)
    return with_deviation(scaled, figure.show)


def _relative(line: _Line, change: Callable[[Figure], float | None]) -> str:
    figure = _figure(line[1])
    return signed_percent(change(figure)) if figure and figure.relative else ABSENT


def _reported_change(line: _Line) -> str:
    return _relative(line, lambda figure: line[0].reported_change(line[1]))


def _measured_change(line: _Line) -> str:
    return _relative(line, lambda figure: line[0].change(figure.column))
