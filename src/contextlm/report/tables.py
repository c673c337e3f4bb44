"""The report's tables: pure functions from summary rows to texts in columns.

A `Table` knows nothing of Markdown, HTML or a terminal; each column says whether its figures were
measured here or reported by the source document. `markdown_table` renders one for GitHub; the page
renders them as HTML, and the command line may print `main_table` as it likes.
"""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report import numbers
from contextlm.report.document import (
    document_figures,
    epoch,
    loss,
    ratio,
    reported_change,
    reported_value,
    validation_rank_label,
)
from contextlm.report.frontier import headline_length
from contextlm.report.numbers import ABSENT, Stat, signed_percent, with_deviation
from contextlm.report.retrieval_table import asked_questions
from contextlm.report.sheet import CONTENDER, Column, Table, make_table, markdown_table
from contextlm.report.summary import (
    SummaryRow,
    summarise,
    summarise_runs,
)

__all__ = [
    "Column",
    "Stat",
    "SummaryRow",
    "Table",
    "cache_table",
    "document_table",
    "main_table",
    "markdown_table",
    "phase1_table",
    "quality_table",
    "speed_table",
    "summarise",
    "summarise_runs",
    "training_table",
]


def main_table(rows: Sequence[SummaryRow]) -> Table:
    """The comparison at a glance: perplexity, cache, speed, each against the baseline.

    A corpus of tasks has the share of right answers in front. The document's perplexity stands
    beside the measured one if any contender has one, and the number of seeds at the end if it is
    not the same for all.
    """
    length = headline_length(rows)
    documented = any(reported_value(row, "val_ppl") is not None for row in rows)
    columns = [CONTENDER, Column("validation PPL"), Column("PPL vs baseline")]
    retrieval = any(map(asked_questions, rows))
    if retrieval:
        columns.insert(1, Column("right answers"))
    if documented:
        columns += [
            Column("validation PPL", "reported"),
            Column("PPL vs baseline", "reported"),
        ]
    if length is not None:
        columns += [
            Column(f"cache at {numbers.count(length)} tokens"),
            Column("cache vs baseline"),
        ]
    columns += [
        Column("parameters"),
        Column("decode tokens/s"),
        Column("decode vs baseline"),
    ]
    uneven = len({len(row.seeds) for row in rows}) > 1
    if uneven:
        columns.append(Column("seeds", "text"))
    lines = []
    for row in rows:
        against = row.comparison
        line = [row.shown_name, with_deviation(row.ppl), signed_percent(against.ppl)]
        if retrieval:
            line.insert(1, with_deviation(row.accuracy, numbers.percent))
        if documented:
            value = reported_value(row, "val_ppl")
            line += [
                ABSENT if value is None else numbers.plain(value),
                signed_percent(reported_change(row, rows, "val_ppl")),
            ]
        if length is not None:
            cache = row.cache_at(length)
            line += [
                numbers.human_bytes(cache.logical) if cache else ABSENT,
                signed_percent(against.cache.get(length)),
            ]
        line += [
            numbers.count(row.parameters_total),
            with_deviation(row.decode_rate, numbers.rate),
            signed_percent(against.decode_rate),
        ]
        if uneven:
            line.append(numbers.seeds_text(len(row.seeds)))
        lines.append(line)
    return make_table("Measured comparison", columns, lines)


def document_table(rows: Sequence[SummaryRow]) -> Table | None:
    """Each figure of the source document beside the one measured here; None if it has none."""
    figures = document_figures(rows)
    if not figures:
        return None
    columns = [
        CONTENDER,
        Column("figure", "text"),
        Column("document", "reported"),
        Column("this run"),
        Column("document vs its baseline", "reported"),
        Column("this run vs its baseline"),
    ]
    lines = [
        [
            figure.name,
            figure.label,
            figure.reported,
            figure.measured or ABSENT,
            signed_percent(figure.reported_change),
            signed_percent(figure.measured_change),
        ]
        for figure in figures
    ]
    return make_table("The document's figures and this run's", columns, lines)


def quality_table(rows: Sequence[SummaryRow]) -> Table:
    """Validation and train perplexity and their ratios, loss, bits per byte, accuracy."""
    columns = ["validation PPL", "share of unigram PPL", "validation loss"]
    columns += ["train PPL, best weights", "train PPL, running"]
    columns += ["train / validation PPL, best weights", "gap, validation / running train PPL"]
    columns += ["bits per byte", "accuracy"]
    lines = [
        [
            row.shown_name,
            with_deviation(row.ppl),
            with_deviation(row.unigram_share, numbers.percent),
            with_deviation(row.loss, loss),
            with_deviation(row.train_ppl),
            with_deviation(row.train_ppl_running),
            with_deviation(row.train_validation_ratio, _three),
            with_deviation(row.train_validation_gap, ratio),
            with_deviation(row.bits_per_byte, _three),
            with_deviation(row.accuracy, numbers.percent),
        ]
        for row in rows
    ]
    return make_table("Quality", [CONTENDER, *map(Column, columns)], lines)


def training_table(rows: Sequence[SummaryRow]) -> Table:
    """Sizes, epochs and seconds."""
    columns = ["parameters", "parameters vs baseline", "trainable in phase 2", "best epoch"]
    columns += ["epochs run", "seconds an epoch", "seconds vs baseline", "seconds in all"]
    lines = [
        [
            row.shown_name,
            numbers.count(row.parameters_total),
            signed_percent(row.comparison.parameters),
            numbers.count(row.parameters_trainable),
            with_deviation(row.best_epoch, epoch),
            with_deviation(row.epochs, epoch),
            with_deviation(row.seconds_per_epoch, numbers.seconds),
            signed_percent(row.comparison.seconds_per_epoch),
            with_deviation(row.total_seconds, numbers.seconds),
            row.precision,
            numbers.count(row.target_offset),
            ", ".join(map(str, row.seeds)),
        ]
        for row in rows
    ]
    texts = [Column("precision", "text"), Column("tokens ahead", "text"), Column("seeds", "text")]
    return make_table("Size and training", [CONTENDER, *map(Column, columns), *texts], lines)


def phase1_table(rows: Sequence[SummaryRow]) -> Table | None:
    """How context training ended; None if no contender has a phase 1.

    Validation ranks with and without a context store have a column each.
    """
    trained = [(row, row.phase1) for row in rows if row.phase1 is not None]
    if not trained:
        return None
    kinds = sorted({row.store is not None for row, _ in trained})
    columns = ["iterations", "converged", "effective rank, training stream"]
    columns += map(validation_rank_label, kinds)
    lines = []
    for row, facts in trained:
        validation = _rank(facts.rank_validation, facts.context_dim)
        lines.append(
            [
                row.shown_name,
                with_deviation(facts.iterations, epoch),
                with_deviation(facts.converged, numbers.percent),
                _rank(facts.rank_train, facts.context_dim),
                *(validation if (row.store is not None) == kind else ABSENT for kind in kinds),
                with_deviation(row.phase1_seconds, numbers.seconds),
            ]
        )
    headings = [CONTENDER, *map(Column, columns), Column("seconds")]
    return make_table("Phase 1, context training", headings, lines)


def cache_table(rows: Sequence[SummaryRow]) -> Table:
    """What decoding keeps, per contender and measured length, in bytes."""
    columns = "logical", "logical, bytes", "vs baseline", "resident", "resident, bytes"
    lines = [
        [
            row.shown_name,
            numbers.count(cache.tokens),
            numbers.human_bytes(cache.logical),
            numbers.count(cache.logical),
            signed_percent(row.comparison.cache.get(cache.tokens)),
            numbers.human_bytes(cache.resident),
            numbers.count(cache.resident),
            row.cache_dtype,
        ]
        for row in rows
        for cache in row.cache
    ]
    headings = [CONTENDER, Column("tokens", "text"), *map(Column, columns), Column("dtype", "text")]
    return make_table("Cache of one sequence", headings, lines)


def speed_table(rows: Sequence[SummaryRow]) -> Table:
    """Tokens a second while training, prefilling and decoding, and peak memory."""
    columns = ["training tokens/s", "training vs baseline", "prefill tokens/s"]
    columns += ["prefill vs baseline", "decode tokens/s", "decode vs baseline"]
    columns += ["peak host memory", "peak accelerator memory"]
    lines = []
    for row in rows:
        against, device = row.comparison, row.peak_accelerator_bytes
        lines.append(
            [
                row.shown_name,
                with_deviation(row.training_rate, numbers.rate),
                signed_percent(against.training_rate),
                with_deviation(row.prefill_rate, numbers.rate),
                signed_percent(against.prefill_rate),
                with_deviation(row.decode_rate, numbers.rate),
                signed_percent(against.decode_rate),
                numbers.human_bytes(row.peak_host_bytes),
                ABSENT if device is None else numbers.human_bytes(device),
                numbers.count(row.speed_tokens),
            ]
        )
    headings = [CONTENDER, *map(Column, columns), Column("tokens timed", "text")]
    return make_table("Speed and memory", headings, lines)


def _three(value: float) -> str:
    return numbers.decimal(value, 3)


def _rank(rank: Stat, width: int) -> str:
    share = numbers.percent(rank.mean / width)
    return f"{with_deviation(rank, _one)} of {numbers.count(width)} ({share})"


def _one(value: float) -> str:
    return numbers.decimal(value, 1)
