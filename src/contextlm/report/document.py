"""The source document's own figures beside the measured ones.

A recipe's ``reported`` maps names to numbers. Known names are `val_ppl`, `val_loss`, `train_ppl`
(running), `train_ppl_best_weights`,
`bits_per_byte`, `accuracy`, `best_epoch`, `epochs`, `parameters`, `parameters_trainable`,
`seconds_per_epoch`, `phase1_iterations`, `phase1_converged`, `phase1_seconds`,
`effective_rank_train`, `effective_rank_val`, `cache_kb_at_N` (`mb`, `bytes`), `train_val_gap`,
`store_mb`, `store_train_contexts_mb`, `store_train_embeddings_mb`, `store_val_contexts_mb`,
`store_val_embeddings_mb`, and `host_gb_STAGE` and `accelerator_gb_STAGE` with the stages `data`,
`model`, `phase1` and `phase2`; `validation_` may stand for `val_`. Accuracy, convergence and rank
(as part of the width) are shares up to 1, and percentages above; 1 KB = 1024 bytes. Any other name
is shown as it stands, with nothing measured beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from contextlm.report import numbers
from contextlm.report.numbers import Stat, percent_change
from contextlm.report.resources import (
    AFTER_PHASE_1,
    DATA_LOADED,
    MODEL_INITIALISED,
    PHASE_2_PREPARED,
    StoreSummary,
)
from contextlm.report.summary import SummaryRow


@dataclass(frozen=True)
class DocumentFigure:
    """One figure of one contender. Texts are ready to print; changes are percent of the reference.

    `measured` is None where this run has no such figure; a change is None where a percentage makes
    no sense or the reference lacks the figure.
    """

    name: str
    key: str
    label: str
    reported: str
    measured: str | None
    reported_change: float | None
    measured_change: float | None


Measure = Callable[[SummaryRow], Stat | None]


@dataclass(frozen=True)
class _Kind:
    label: str
    measure: Measure
    show: Callable[[float], str]
    unit: str = ""
    share: bool = False
    relative: bool = False
    remark: Callable[[SummaryRow], str] = lambda row: ""  # beside the measured figure

    def reported(self, value: float) -> str:
        """The document's figure, in its own digits."""
        if self.share:
            return numbers.plain(100 * value if value <= 1 else value) + " %"
        return numbers.plain(value) + self.unit


def loss(value: float) -> str:
    """Nats, four decimals."""
    return numbers.decimal(value, 4)


def ratio(value: float) -> str:
    """A ratio of perplexities, two decimals."""
    return numbers.decimal(value, 2)


def epoch(value: float) -> str:
    """An epoch or iteration: whole where it is whole."""
    return numbers.decimal(value, 0 if value == int(value) else 1)


def windows_of_train_ppl(row: SummaryRow) -> tuple[int, int] | None:
    """On how many train windows the best weights were scored, and of how many; None if on all."""
    windows, total = row.outcomes[0].result.train_ppl_windows, row.corpus.train_windows
    return None if windows is None or windows >= total else (windows, total)


def _part_of_windows(row: SummaryRow) -> str:
    part = windows_of_train_ppl(row)
    return f" (first {numbers.count(part[0])} of {numbers.count(part[1])} windows)" if part else ""


def validation_rank_label(stored: bool) -> str:
    """What the validation rank is measured on: a store's contexts are one stream, never reset."""
    return f"effective rank, validation {'stream' if stored else 'windows'}"


def _exactly(value: float) -> Stat:
    return Stat(mean=value, sd=None, seeds=1)


def _rank(validation: bool) -> Measure:
    def measure(row: SummaryRow) -> Stat | None:
        if row.phase1 is None:
            return None
        rank = row.phase1.rank_validation if validation else row.phase1.rank_train
        width = row.phase1.context_dim
        return Stat(rank.mean / width, None if rank.sd is None else rank.sd / width, rank.seeds)

    return measure


def _iterations(row: SummaryRow) -> Stat | None:
    return row.phase1.iterations if row.phase1 else None


def _converged(row: SummaryRow) -> Stat | None:
    return row.phase1.converged if row.phase1 else None


_STAGES = {
    "data": DATA_LOADED,
    "model": MODEL_INITIALISED,
    "phase1": AFTER_PHASE_1,
    "phase2": PHASE_2_PREPARED,
}
_UNITS = {"bytes": 1, "kb": 1024, "mb": 1024**2, "gb": 1024**3}


def _store(label: str, size: Callable[[StoreSummary], int]) -> _Kind:
    def measure(row: SummaryRow) -> Stat | None:
        return _exactly(size(row.store) / _UNITS["mb"]) if row.store else None

    return _Kind(label, measure, _megabytes, " MB", relative=True)


def _megabytes(value: float) -> str:
    return f"{numbers.decimal(value, 1)} MB"


def _memory(stage: str, accelerator: bool) -> _Kind:
    def measure(row: SummaryRow) -> Stat | None:
        found = row.stage(stage)
        if found is None:
            return None
        size = found.accelerator_bytes if accelerator else found.host_bytes
        return None if size is None else _exactly(size / _UNITS["gb"])

    place = "accelerator" if accelerator else "host"
    return _Kind(f"{place} memory, {stage}", measure, numbers.gigabytes, " GB")


_TRAIN_RANK = _Kind("effective rank, training stream", _rank(False), numbers.percent, share=True)
_KINDS = {
    "val_ppl": _Kind("validation PPL", lambda r: r.ppl, numbers.perplexity, relative=True),
    "val_loss": _Kind("validation loss", lambda r: r.loss, loss, relative=True),
    "train_ppl": _Kind(
        "train PPL, running", lambda r: r.train_ppl_running, numbers.perplexity, relative=True
    ),
    "train_ppl_best_weights": _Kind(
        "train PPL, best weights",
        lambda r: r.train_ppl,
        numbers.perplexity,
        relative=True,
        remark=_part_of_windows,
    ),
    "bits_per_byte": _Kind("bits per byte", lambda r: r.bits_per_byte, loss, relative=True),
    "accuracy": _Kind("accuracy", lambda r: r.accuracy, numbers.percent, share=True),
    "best_epoch": _Kind("best epoch", lambda r: r.best_epoch, epoch),
    "epochs": _Kind("epochs run", lambda r: r.epochs, epoch),
    "parameters": _Kind(
        "parameters", lambda r: _exactly(r.parameters_total), numbers.count, relative=True
    ),
    "parameters_trainable": _Kind(
        "parameters trained in phase 2",
        lambda r: _exactly(r.parameters_trainable),
        numbers.count,
        relative=True,
    ),
    "seconds_per_epoch": _Kind(
        "seconds an epoch", lambda r: r.seconds_per_epoch, numbers.seconds, " s", relative=True
    ),
    "phase1_iterations": _Kind("phase-1 iterations", _iterations, epoch),
    "phase1_converged": _Kind("phase-1 convergence", _converged, numbers.percent, share=True),
    "phase1_seconds": _Kind("phase-1 seconds", lambda r: r.phase1_seconds, numbers.seconds, " s"),
    "effective_rank_train": _TRAIN_RANK,
    "train_val_gap": _Kind(
        "gap, validation / running train PPL", lambda r: r.train_validation_gap, ratio
    ),
    # The documents store an embedding for every position, too; here it is looked up by token.
    "store_mb": _store("stored contexts and embeddings, both splits", lambda s: s.total_bytes),
    "store_train_contexts_mb": _store("stored contexts, training text", lambda s: s.train_bytes),
    "store_train_embeddings_mb": _store(
        "stored embeddings, training text (here looked up by token)", lambda s: 0
    ),
    "store_val_contexts_mb": _store(
        "stored contexts, validation text", lambda s: s.validation_bytes
    ),
    "store_val_embeddings_mb": _store(
        "stored embeddings, validation text (here looked up by token)", lambda s: 0
    ),
    **{
        f"{place}_gb_{key}": _memory(stage, accelerator=place == "accelerator")
        for place in ("host", "accelerator")
        for key, stage in _STAGES.items()
    },
}
_ALIASES = {
    "parameters_total": "parameters",
    "iterations": "phase1_iterations",
    "converged": "phase1_converged",
    "effective_rank": "effective_rank_train",
}
_CACHE = re.compile(r"cache_(bytes|kb|mb)_at_(\d+)")


def document_figures(rows: Sequence[SummaryRow]) -> list[DocumentFigure]:
    """Every reported figure of every contender, in the recipe's order."""
    return [
        _figure(row, _reference(row, rows), key, value)
        for row in rows
        for key, value in row.reported.items()
    ]


def reported_value(row: SummaryRow, key: str) -> float | None:
    """The document's figure for a contender, whichever of its names the recipe uses."""
    return next((v for name, v in row.reported.items() if _canonical(name) == key), None)


def reported_change(row: SummaryRow, rows: Sequence[SummaryRow], key: str) -> float | None:
    """The document's own difference of a contender from its reference, in percent."""
    value, other = reported_value(row, key), _reference(row, rows)
    base = reported_value(other, key) if other else None
    return None if value is None or base is None else percent_change(value, base)


def _reference(row: SummaryRow, rows: Sequence[SummaryRow]) -> SummaryRow | None:
    return next((other for other in rows if other.name == row.comparison.reference), None)


def _canonical(key: str) -> str:
    key = key.replace("validation", "val")
    return _ALIASES.get(key, key)


def _kind(key: str, row: SummaryRow) -> _Kind | None:
    """What is known of a figure; None for a name that is not."""
    if key == "effective_rank_val":
        label = validation_rank_label(stored=row.store is not None)
        return _Kind(label, _rank(True), numbers.percent, share=True)
    cache = _CACHE.fullmatch(key)
    if cache is None:
        return _KINDS.get(key)
    unit, tokens = cache[1], int(cache[2])
    name = "bytes" if unit == "bytes" else unit.upper()

    def measure(row: SummaryRow) -> Stat | None:
        found = row.cache_at(tokens)
        return _exactly(found.logical / _UNITS[unit]) if found else None

    def show(value: float) -> str:
        return f"{numbers.decimal(value, 0 if unit == 'bytes' else 1)} {name}"

    label = f"cache at {numbers.count(tokens)} tokens"
    return _Kind(label, measure, show, f" {name}", relative=True)


def _figure(
    row: SummaryRow, reference: SummaryRow | None, key: str, value: float
) -> DocumentFigure:
    kind = _kind(_canonical(key), row)
    if kind is None:
        label = key.replace("_", " ")
        return DocumentFigure(row.name, key, label, numbers.plain(value), None, None, None)
    measured = kind.measure(row)
    base = kind.measure(reference) if reference and kind.relative else None
    return DocumentFigure(
        name=row.name,
        key=key,
        label=kind.label,
        reported=kind.reported(value),
        measured=(
            numbers.with_deviation(measured, kind.show) + kind.remark(row) if measured else None
        ),
        reported_change=(
            reported_change(row, [row, reference], _canonical(key))
            if reference and kind.relative
            else None
        ),
        measured_change=percent_change(measured.mean, base.mean) if measured and base else None,
    )
