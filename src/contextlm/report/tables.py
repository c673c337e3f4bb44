"""The report's tables: lists of columns over the rows of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from contextlm.report import numbers
from contextlm.report.contenders import (
    ANSWERS,
    CACHE,
    Contender,
    cache_length,
    comparable_groups,
)
from contextlm.report.numbers import ABSENT, signed_percent, with_deviation
from contextlm.report.sheet import Column, Table, make_table
from contextlm.report.statistics import stat

Show = Callable[[float], str]


def mean(heading: str, column: str, show: Show) -> Column[Contender]:
    """Mean and deviation over the seeds of a column of the seed frame."""
    return Column(heading, lambda row: with_deviation(row.stat(column), show))


def shared(heading: str, column: str, show: Callable[[Any], str] = str) -> Column[Contender]:
    """What all seeds share; a text, unless it is shown as a number."""
    kind = "text" if show is str else "measured"
    return Column(heading, lambda row: _shown(row.value(column), show), kind)


def change(heading: str, column: str) -> Column[Contender]:
    """The difference of a column's mean from the baseline's, in percent."""
    return Column(heading, lambda row: signed_percent(row.change(column)))


CONTENDER: Column[Contender] = Column("contender", lambda row: row.shown_name, "text")
SEEDS: Column[Contender] = Column("seeds", lambda row: ", ".join(map(str, row.seeds.seed)), "text")


def four(value: float) -> str:
    """Nats, four decimals."""
    return numbers.decimal(value, 4)


def whole(value: float) -> str:
    """An epoch or iteration: one decimal only where the mean is not whole."""
    return numbers.decimal(value, 0 if value == int(value) else 1)


QUALITY: list[Column[Contender]] = [
    CONTENDER,
    mean("validation PPL", "validation_ppl", numbers.perplexity),
    mean("share of unigram PPL", "unigram_share", numbers.percent),
    mean("validation loss, nats", "validation_loss", four),
    mean("train PPL, best weights", "train_ppl", numbers.perplexity),
    shared("train windows scored", "train_ppl_windows", numbers.count),
    mean("train PPL, running", "train_ppl_running", numbers.perplexity),
    mean("train / validation PPL", "train_validation_ratio", lambda v: numbers.decimal(v, 3)),
    mean("validation / running train PPL", "train_val_gap", lambda v: numbers.decimal(v, 2)),
    mean("bits per byte", "bits_per_byte", lambda v: numbers.decimal(v, 3)),
    mean("accuracy", "accuracy", numbers.percent),
]
TRAINING: list[Column[Contender]] = [
    CONTENDER,
    shared("parameters", "parameters", numbers.count),
    change("vs baseline", "parameters"),
    shared("trained in phase 2", "trainable", numbers.count),
    shared("learning rate", "learning_rate", lambda value: f"{value:g}"),
    mean("best epoch", "best_epoch", whole),
    mean("epochs run", "epochs", whole),
    shared("precision", "precision"),
    shared("tokens ahead", "target_offset"),
    Column("embeddings", lambda row: _embeddings(row), "text"),
    SEEDS,
]
PHASE_ONE: list[Column[Contender]] = [
    CONTENDER,
    mean("iterations", "phase1_iterations", whole),
    mean("converged", "phase1_converged", numbers.percent),
    Column("effective rank, training stream", lambda row: _rank(row, "train")),
    Column("effective rank, validation", lambda row: _rank(row, "validation")),
    mean("seconds", "phase1_seconds", numbers.seconds),
]
STORES: list[Column[Contender]] = [
    CONTENDER,
    shared("fill", "store_fill"),
    shared("dtype", "store_dtype"),
    shared("training text", "store_train_bytes", numbers.human_bytes),
    shared("validation text", "store_validation_bytes", numbers.human_bytes),
    shared("both", "store_bytes", numbers.human_bytes),
    mean("drift, training text", "drift_train", numbers.significant),
    mean("drift, validation text", "drift_validation", numbers.significant),
    mean("seconds to fill", "store_seconds", numbers.seconds),
]
SPEED: list[Column[Contender]] = [
    CONTENDER,
    mean("seconds an epoch", "seconds_per_epoch", numbers.seconds),
    mean("seconds in all", "seconds", numbers.seconds),
    mean("training tokens/s", "training_rate", numbers.rate),
    change("vs baseline", "training_rate"),
    mean("prefill tokens/s", "prefill_rate", numbers.rate),
    mean("decode tokens/s", "decode_rate", numbers.rate),
    Column("vs baseline", lambda row: _timed_alike(row, "decode_rate")),
    shared("tokens timed", "speed_tokens", numbers.count),
    mean("peak host memory", "peak_host_bytes", numbers.human_bytes),
    mean("peak accelerator memory", "peak_accelerator_bytes", numbers.human_bytes),
]


def main_tables(rows: Sequence[Contender]) -> list[Table]:
    """The comparison at a glance, a table for each list of contenders that may be ranked."""
    groups = comparable_groups(rows)
    return [
        make_table(
            setting_of(group) if len(groups) > 1 else "Comparison",
            _main_columns(group),
            group,
            tests_note(group),
        )
        for group in groups
    ]


def setting_of(group: Sequence[Contender]) -> str:
    """What a list of contenders shares: data, windows, budget and target."""
    value, ahead = group[0].value, group[0].value("target_offset")
    parts = [
        f"{value('corpus')}, {value('tokenizer')}",
        f"{numbers.count(value('train_tokens'))} training tokens",
        f"windows of {numbers.count(value('sequence_length'))}",
    ]
    if (epochs := value("epoch_limit")) is not None:
        parts.insert(2, f"at most {numbers.count(epochs)} epoch{'s' if epochs > 1 else ''}")
    return ", ".join([*parts, *([f"{ahead} tokens ahead"] if ahead > 1 else [])])


def measured_tables(rows: Sequence[Contender]) -> list[Table]:
    """Everything that was measured, by topic; topics of which no row has anything are left out."""
    phase1 = [row for row in rows if row.value("phase1_iterations") is not None]
    stored = [row for row in rows if row.value("store_fill") is not None]
    tables = [
        retrieval_table(rows),
        make_table("Quality", QUALITY, rows),
        make_table("Size and training", TRAINING, rows),
        make_table("Phase 1, context training", PHASE_ONE, phase1) if phase1 else None,
        make_table("Context stores", STORES, stored) if stored else None,
        cache_table(rows),
        make_table("Speed and memory", SPEED, rows),
    ]
    return [table for table in tables if table is not None]


def retrieval_table(rows: Sequence[Contender]) -> Table | None:
    """The share of right answers at each level and in all; None if there was no synthetic task."""
    asked = [row for row in rows if row.task]
    levels = dict.fromkeys(level for row in asked for level in row.levels)
    columns = [
        mean(level.removeprefix(ANSWERS).replace("_", " "), level, numbers.percent)
        for level in levels
    ]
    whole_task = mean("all answers", "accuracy", numbers.percent)
    return make_table("Right answers", [CONTENDER, *columns, whole_task], asked) if asked else None


def cache_table(rows: Sequence[Contender]) -> Table:
    """What decoding keeps at every measured length; memory that holds it where that is larger."""
    lengths = sorted({length for row in rows for length in row.cache_lengths})
    columns: list[Column[Contender]] = [CONTENDER]
    for length in lengths:
        columns.append(_size(f"at {numbers.count(length)} tokens", f"{CACHE}{length}"))
        columns.append(change("vs baseline", f"{CACHE}{length}"))
        if any(
            row.value(f"cache_resident_{length}") != row.value(f"{CACHE}{length}") for row in rows
        ):
            columns.append(_size("resident", f"cache_resident_{length}"))
    return make_table("Cache of one sequence", [*columns, shared("dtype", "cache_dtype")], rows)


def epoch_tables(rows: Sequence[Contender]) -> list[Table]:
    """A table for each contender whose perplexities the document gives epoch by epoch.

    Measured figures are means over the seeds that reached the epoch.
    """
    return [_epoch_table(row) for row in rows if any(map(any, _reported_epochs(row).values()))]


def history_tables(row: Contender) -> list[Table]:
    """Every epoch of every seed, then every phase-1 iteration, of one contender."""
    best = row.seeds.set_index("seed").best_epoch
    epochs, iterations = row.epochs(), row.iterations()
    epochs["mark"] = np.where(epochs.epoch == epochs.seed.map(best), " (best)", "")
    ppl = numbers.perplexity
    tables = {
        "Epochs": (
            epochs,
            Column[Any]("seed", lambda line: str(line.seed), "text"),
            Column[Any]("epoch", lambda line: f"{line.epoch}{line.mark}", "text"),
            _of_line("train loss, running", "train_loss", four),
            _of_line("train PPL, running", "train_ppl", ppl),
            _of_line("validation loss", "validation_loss", four),
            _of_line("validation PPL", "validation_ppl", ppl),
            _of_line("accuracy", "accuracy", numbers.percent),
            _of_line("learning rate", "learning_rate", lambda value: f"{value:.3g}"),
        ),
        "Phase-1 iterations": (
            iterations,
            Column[Any]("seed", lambda line: str(line.seed), "text"),
            _of_line("iteration", "iteration", numbers.count),
            _of_line("converged", "converged", numbers.percent),
            _of_line("loss", "loss", four),
        ),
    }
    return [
        make_table(f"{caption} of {row.name}", columns, list(lines.itertuples()))
        for caption, (lines, *columns) in tables.items()
        if len(lines)
    ]


DATA: list[Column[Contender]] = [
    shared("corpus", "corpus"),
    shared("scale", "scale"),
    shared("tokenizer", "tokenizer"),
    shared("vocabulary", "vocab_size", numbers.count),
    shared("window", "sequence_length", numbers.count),
    shared("train tokens", "train_tokens", numbers.count),
    shared("validation tokens", "validation_tokens", numbers.count),
    shared("train windows", "train_windows", numbers.count),
    shared("validation windows", "validation_windows", numbers.count),
    shared("unigram PPL", "unigram_ppl", numbers.perplexity),
]


def data_table(rows: Sequence[Contender]) -> Table:
    """The corpus, tokenizer and tokens that each run really used."""
    used = {tuple(column.cell(row) for column in DATA): row for row in rows}
    return make_table("Data", DATA, used.values())


def difference_text(row: Contender) -> str:
    """The difference that counts: of perplexity in percent, or of right answers in points."""
    return ABSENT if row.difference is None else _in_unit(row, row.difference.mean)


def interval_text(row: Contender) -> str:
    """The bounds of its 95 % interval, in the same unit; a dash with too few seeds."""
    found = row.difference
    if found is None or found.low is None or found.high is None:
        return ABSENT
    return f"{_in_unit(row, found.low)} to {_in_unit(row, found.high)}"


def verdict_text(row: Contender) -> str:
    """``lower``, ``higher`` or ``undecided``, and what leaves it so where that is no interval."""
    if row.difference is None:
        return ABSENT
    verdict, low, high = row.difference.verdict, row.difference.low, row.difference.high
    if low is None or high is None:
        return f"undecided ({verdict})"
    by_holm = verdict == "undecided" and low * high > 0  # the correction, not the interval
    return "undecided (Holm)" if by_holm else verdict


def ppl_text(row: Contender) -> str:
    """Mean validation perplexity and deviation, or that training diverged."""
    if not row.diverged:
        return with_deviation(row.stat("validation_ppl"))
    seeds = len(row.seeds)
    if seeds == 1:
        return "diverged"
    return f"diverged ({len(row.diverged)} of {numbers.seeds_text(seeds)})"


def tests_note(group: Sequence[Contender]) -> str:
    """How the intervals and verdicts of a table were made; empty where it has none."""
    tested = [row.difference for row in group if row.difference and row.difference.p is not None]
    if not tested:
        return ""
    paired = {found.paired for found in tested}
    test = "paired t over the same seeds" if True in paired else "Welch's t over different seeds"
    if len(paired) > 1:
        test += ", Welch's where seeds differ"
    holm = f"; verdicts at 5% after Holm's correction over {len(tested)} comparisons"
    return f"95% intervals: {test}{holm if len(tested) > 1 else ''}."


def _main_columns(group: Sequence[Contender]) -> list[Column[Contender]]:
    length = cache_length(group)
    tasks = [mean("right answers", "accuracy", numbers.percent)] if group[0].task else []
    measure = "answers" if tasks else "PPL"
    documented = Column[Contender](
        "validation PPL",
        lambda row: _shown(row.value("reported_val_ppl"), numbers.plain),
        "reported",
    )
    against = Column[Contender](
        "PPL vs baseline", lambda row: signed_percent(row.reported_change("val_ppl")), "reported"
    )
    cache = [
        _size(f"cache at {numbers.count(length)} tokens", f"{CACHE}{length}"),
        change("cache vs baseline", f"{CACHE}{length}"),
    ]
    uneven = len({len(row.seeds) for row in group}) > 1
    seeds = Column[Contender](
        "seeds", lambda row: str(len(row.seeds)) if uneven else ABSENT, "text"
    )
    return [
        CONTENDER,
        *tasks,
        Column("validation PPL", ppl_text),
        Column(f"{measure} vs baseline", difference_text),
        Column("95% interval", interval_text),
        Column("verdict", verdict_text, "text"),
        documented,
        against,
        *(cache if length is not None else []),
        shared("parameters", "parameters", numbers.count),
        seeds,
    ]


def _in_unit(row: Contender, value: float) -> str:
    if row.task:
        points = numbers.decimal(100 * value, 1)
        return f"{'+' if value > 0 else ''}{points} points"
    # A difference of losses is the logarithm of a ratio of perplexities.
    return signed_percent(100 * math.expm1(min(value, 500.0)))


def _size(heading: str, column: str) -> Column[Contender]:
    # The largest over the seeds: a cache does not depend on the weights.
    return Column(
        heading,
        lambda row: (
            ABSENT if row.value(column) is None else numbers.human_bytes(row.seeds[column].max())
        ),
    )


def _shown(value: Any, show: Callable[[Any], str]) -> str:
    return ABSENT if value is None else show(value)


def _rank(row: Contender, split: str) -> str:
    rank, share = row.stat(f"rank_{split}"), row.stat(f"rank_share_{split}")
    if rank is None or share is None:
        return ABSENT
    width = numbers.count(row.value("context_dim"))
    spread = with_deviation(rank, lambda value: numbers.decimal(value, 1))
    return f"{spread} of {width} ({numbers.percent(share.mean)})"


def _timed_alike(row: Contender, column: str) -> str:
    """A model with few positions is timed on a shorter prompt, which is another question."""
    other = row.reference
    alike = other is not None and row.value("speed_tokens") == other.value("speed_tokens")
    return signed_percent(row.change(column)) if alike else ABSENT


def _embeddings(row: Contender) -> str:
    facts = row.outcomes[0].result.embedding
    if facts is None:
        return ABSENT
    origin = [facts.source, *([facts.path] if facts.path else [])]
    if facts.tokens is not None:
        origin.append(f"on {numbers.count(facts.tokens)} tokens")
    return " ".join(origin) + (", frozen" if facts.frozen else "")


def _reported_epochs(row: Contender) -> dict[str, list[float | None]]:
    return row.outcomes[0].result.reported_epochs


def _epoch_table(row: Contender) -> Table:
    reported, seeds = _reported_epochs(row), len(row.seeds)
    history = row.epochs()
    history["share"] = history.validation_ppl / (row.value("unigram_ppl") or math.nan)
    measured = {int(epoch): lines for epoch, lines in history.groupby("epoch")}
    curve = {e: v for e, v in enumerate(reported.get("val_ppl", []), 1) if v is not None}
    lowest = min(curve, key=lambda epoch: curve[epoch], default=0)
    best = {"val_ppl": {row.value("reported_best_epoch") or lowest}}
    best["validation_ppl"] = set(row.seeds.best_epoch)

    def told(key: str) -> Callable[[int], str]:
        values = dict(enumerate(reported.get(key, []), 1))
        known = [numbers.plain(v).partition(".")[2] for v in values.values() if v is not None]

        def cell(epoch: int) -> str:
            value = values.get(epoch)
            text = ABSENT if value is None else numbers.decimal(value, max(map(len, known)))
            return text + (" *" if epoch in best.get(key, ()) else "")

        return cell

    def found(column: str, show: Show = numbers.perplexity) -> Callable[[int], str]:
        def cell(epoch: int) -> str:
            mean = stat(measured[epoch][column]) if epoch in measured else None
            text = with_deviation(mean, show) + (" *" if epoch in best.get(column, ()) else "")
            part = mean is not None and mean.seeds < seeds
            return f"{text} ({mean.seeds} of {seeds} seeds)" if mean and part else text

        return cell

    columns: list[Column[int]] = [
        Column("epoch", str, "text"),
        Column("train PPL", told("train_ppl"), "reported"),
        Column("validation PPL", told("val_ppl"), "reported"),
        Column("train PPL, running", found("train_ppl")),
        Column("validation PPL", found("validation_ppl")),
        Column("share of unigram PPL", found("share", numbers.percent)),
    ]
    last = max([*measured, *map(len, reported.values())])
    return make_table(
        f"Epoch by epoch, document and this run: {row.name}",
        columns,
        range(1, last + 1),
        "An asterisk marks the best epoch; with several seeds, that of each.",
    )


def _of_line(heading: str, name: str, show: Show) -> Column[Any]:
    def cell(line: Any) -> str:
        value = getattr(line, name)
        return ABSENT if value is None or pd.isna(value) else show(value)

    return Column(heading, cell)
