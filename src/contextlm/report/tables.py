"""The report's tables: lists of columns over the rows of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from contextlm.report import numbers
from contextlm.report.contenders import (
    ANSWERS,
    CACHE,
    PPL_AT,
    SCORE,
    STDERR,
    Contender,
    cache_length,
    comparable_groups,
)
from contextlm.report.language import say
from contextlm.report.numbers import ABSENT, signed_percent, with_deviation
from contextlm.report.sheet import Column, Kind, Table, make_table
from contextlm.results.facts import Fidelity, HealingFacts, perplexity

Show = Callable[[float], str]


def mean(heading: str, column: str, show: Show) -> Column[Contender]:
    """Mean and deviation over the seeds of a column of the seed frame."""
    return Column(heading, lambda row: with_deviation(row.stat(column), show))


def shared(
    heading: str, column: str, show: Callable[[Any], str] = str, kind: Kind | None = None
) -> Column[Contender]:
    """What all seeds share; a text, unless it is shown as a number."""

    def cell(row: Contender) -> str:
        value = row.value(column)
        return ABSENT if value is None else show(value)

    return Column(heading, cell, kind or ("text" if show is str else "measured"))


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
    mean("effective rank, training stream", "rank_train", lambda v: numbers.decimal(v, 1)),
    mean("effective rank, validation", "rank_validation", lambda v: numbers.decimal(v, 1)),
    shared("of dimensions", "context_dim", numbers.count),
    mean("seconds", "phase1_seconds", numbers.seconds),
]
HEALING: list[Column[Contender]] = [
    CONTENDER,
    shared("policy", "policy"),
    shared("cache, of the full one", "policy_share", numbers.percent),
    shared("parameters trained", "healed"),
    shared("tokens read", "policy_tokens", numbers.count),
    mean("KL before, nats", "kl_before", numbers.significant),
    mean("KL after, nats", "kl_after", numbers.significant),
    mean("same likeliest token before", "same_before", numbers.percent),
    mean("same likeliest token after", "same_after", numbers.percent),
    mean("PPL, original", "ppl_original", numbers.perplexity),
    mean("PPL before", "ppl_before", numbers.perplexity),
    mean("PPL after", "ppl_after", numbers.perplexity),
    mean("passkey digits, original", "passkey_original", numbers.percent),
    mean("passkey digits before", "passkey_before", numbers.percent),
    mean("passkey digits after", "passkey_after", numbers.percent),
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
    epochs, passes = value("epoch_limit"), value("text_passes")
    parts = [
        f"{value('corpus')}, {value('tokenizer')}",
        say("{tokens} training tokens", tokens=numbers.count(value("train_tokens"))),
        epochs
        and (say("1 epoch") if epochs == 1 else say("at most {epochs} epochs", epochs=epochs)),
        passes and say("text read {times} times", times=numbers.significant(passes)),
        say("windows of {tokens}", tokens=numbers.count(value("sequence_length"))),
        say("{ahead} tokens ahead", ahead=ahead) if ahead > 1 else None,
    ]
    return ", ".join(part for part in parts if part)


def measured_tables(rows: Sequence[Contender]) -> list[Table]:
    """Everything that was measured, by topic; topics of which no row has anything are left out."""
    tables = [
        retrieval_table(rows),
        task_table(rows),
        make_table("Quality", QUALITY, rows),
        make_table("Size and training", TRAINING, rows),
        make_table("Phase 1, context training", PHASE_ONE, rows),
        make_table("Context stores", STORES, rows),
        make_table("Healing", HEALING, rows),
        long_table(rows),
        cache_table(rows),
        make_table("Speed and memory", SPEED, rows),
    ]
    return [table for table in tables if table is not None and table.rows]


def retrieval_table(rows: Sequence[Contender]) -> Table | None:
    """The share of right answers at each level and in all; None if there was no synthetic task."""
    asked = [row for row in rows if row.task]
    levels = dict.fromkeys(level for row in asked for level in row.levels)
    columns = [mean(level_name(level), level, numbers.percent) for level in levels]
    whole_task = mean("all answers", "accuracy", numbers.percent)
    return make_table("Right answers", [CONTENDER, *columns, whole_task], asked) if asked else None


def level_name(column: str) -> str:
    """A level of a synthetic task, as its corpus calls it: ``4 pairs``."""
    return column.removeprefix(ANSWERS).replace("_", " ")


def long_table(rows: Sequence[Contender]) -> Table:
    """Perplexity of long texts' first tokens, at every length that was scored."""
    lengths = sorted({int(n.removeprefix(PPL_AT)) for row in rows for n in row.columns(PPL_AT)})
    columns = [mean(_at(length), f"{PPL_AT}{length}", numbers.perplexity) for length in lengths]
    return make_table("Perplexity of long texts", [CONTENDER, *columns], rows)


def healing_table(facts: HealingFacts) -> Table:
    """How near to its original a model decodes by a policy, before training and after."""
    states = [
        (say("full cache"), 1.0, facts.full),
        (facts.policy, facts.share, facts.before),
        (say("{policy}, healed", policy=facts.policy), facts.share, facts.after),
    ]
    columns: list[Column[tuple[str, float, Fidelity]]] = [
        Column("policy", lambda one: one[0], "text"),
        Column("of the full cache", lambda one: numbers.percent(one[1])),
        Column("KL, nats", lambda one: numbers.significant(one[2].kl)),
        Column("same likeliest token", lambda one: numbers.percent(one[2].same_tokens)),
        Column("PPL", lambda one: numbers.perplexity(perplexity(one[2].loss))),
        Column("passkey digits found", lambda one: numbers.percent(one[2].found)),
    ]
    return make_table("Healing", columns, states)


def task_table(rows: Sequence[Contender]) -> Table | None:
    """Perplexity and the scores of lm-eval's tasks; None if none were asked for."""
    figures = dict.fromkeys(name for row in rows for name in row.scores)
    columns = [CONTENDER, mean("validation PPL", "validation_ppl", numbers.perplexity)]
    for name in figures:
        columns.append(mean(name.replace("_", " "), f"{SCORE}{name}", numbers.significant))
        columns.append(mean("standard error", f"{STDERR}{name}", numbers.significant))
    scored = [row for row in rows if row.scores]
    note = say("Standard errors are lm-eval's, over the questions of a task.")
    return make_table("Tasks of lm-eval", columns, scored, note) if scored else None


def cache_table(rows: Sequence[Contender]) -> Table:
    """What decoding keeps at every measured length; memory that holds it where that is larger."""
    lengths = sorted({length for row in rows for length in row.cache_lengths})
    columns: list[Column[Contender]] = [CONTENDER]
    for length in lengths:
        columns.append(shared(_at(length), f"{CACHE}{length}", numbers.human_bytes))
        columns.append(change("vs baseline", f"{CACHE}{length}"))
        if any(
            row.value(f"cache_resident_{length}") != row.value(f"{CACHE}{length}") for row in rows
        ):
            columns.append(shared("resident", f"cache_resident_{length}", numbers.human_bytes))
    return make_table("Cache of one sequence", [*columns, shared("dtype", "cache_dtype")], rows)


DATA: list[Column[Contender]] = [
    shared("corpus", "corpus"),
    shared("scale", "scale"),
    shared("tokenizer", "tokenizer"),
    shared("vocabulary", "vocab_size", numbers.count),
    shared("window", "sequence_length", numbers.count),
    shared("train tokens", "train_tokens", numbers.count),
    shared("validation tokens", "validation_tokens", numbers.count),
    shared("train windows", "train_windows", numbers.count),
    shared("times text read", "text_passes", numbers.significant),
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
    return say("{low} to {high}", low=_in_unit(row, found.low), high=_in_unit(row, found.high))


def verdict_text(row: Contender) -> str:
    """``lower``, ``higher`` or ``undecided``, and what leaves it so where that is no interval."""
    if row.difference is None:
        return ABSENT
    verdict, low, high = row.difference.verdict, row.difference.low, row.difference.high
    if low is None or high is None:
        return say("undecided ({why})", why=say(verdict))
    by_holm = verdict == "undecided" and low * high > 0  # the correction, not the interval
    return say("undecided ({why})", why="Holm") if by_holm else say(verdict)


def versus_text(row: Contender) -> str:
    """Difference, verdict and interval in one phrase."""
    told = [verdict_text(row), interval_text(row)]
    return " · ".join([difference_text(row), *(text for text in told if text != ABSENT)])


def quality_text(row: Contender) -> str:
    """What counts: right answers, or perplexity."""
    if row.task and not row.diverged:
        return with_deviation(row.stat("accuracy"), numbers.percent)
    return ppl_text(row)


def ppl_text(row: Contender) -> str:
    """Mean validation perplexity and deviation, or that training diverged."""
    if not row.diverged:
        return with_deviation(row.stat("validation_ppl"))
    seeds = len(row.seeds)
    if seeds == 1:
        return say("diverged")
    return say("diverged ({seeds} of {all} seeds)", seeds=len(row.diverged), all=seeds)


def tests_note(group: Sequence[Contender]) -> str:
    """How the intervals and verdicts of a table were made; empty where it has none."""
    tested = [row.difference for row in group if row.difference and row.difference.p is not None]
    if not tested:
        return ""
    paired = {found.paired for found in tested}
    if len(paired) > 1:
        said = say("95% intervals: paired t over the same seeds, Welch's where seeds differ.")
    elif True in paired:
        said = say("95% intervals: paired t over the same seeds.")
    else:
        said = say("95% intervals: Welch's t over different seeds.")
    if len(tested) == 1:
        return said
    holm = say("Verdicts at 5% after Holm's correction over {n} comparisons.", n=len(tested))
    return f"{said} {holm}"


def _main_columns(group: Sequence[Contender]) -> list[Column[Contender]]:
    task, length = group[0].task, cache_length(group)
    uneven = len({len(row.seeds) for row in group}) > 1
    columns = [
        CONTENDER,
        *([mean("right answers", "accuracy", numbers.percent)] if task else []),
        Column("validation PPL", ppl_text),
        Column(say("answers vs baseline") if task else say("PPL vs baseline"), difference_text),
        Column("95% interval", interval_text),
        Column("verdict", verdict_text, "text"),
        shared("validation PPL", "reported_val_ppl", numbers.plain, "reported"),
        Column(
            "PPL vs baseline",
            lambda row: signed_percent(row.reported_change("val_ppl")),
            "reported",
        ),
    ]
    if length is not None:
        size, tokens = f"{CACHE}{length}", numbers.count(length)
        heading = say("cache at {tokens} tokens", tokens=tokens)
        columns.append(shared(heading, size, numbers.human_bytes))
        columns.append(change("cache vs baseline", size))
    columns.append(shared("parameters", "parameters", numbers.count))
    columns.append(change("parameters vs baseline", "parameters"))
    if uneven:
        columns.append(Column("seeds", lambda row: str(len(row.seeds)), "text"))
    return columns


def _at(length: int) -> str:
    return say("at {tokens} tokens", tokens=numbers.count(length))


def _in_unit(row: Contender, value: float) -> str:
    if row.task:
        points = numbers.decimal(100 * value, 1)
        return say("{points} points", points=f"{'+' if value > 0 else ''}{points}")
    # A difference of losses is the logarithm of a ratio of perplexities.
    return signed_percent(100 * math.expm1(min(value, 500.0)))


def _timed_alike(row: Contender, column: str) -> str:
    """A model with few positions is timed on a shorter prompt, which is another question."""
    other = row.reference
    alike = other is not None and row.value("speed_tokens") == other.value("speed_tokens")
    return signed_percent(row.change(column)) if alike else ABSENT


def _embeddings(row: Contender) -> str:
    facts = row.outcomes[0].result.embedding
    if facts is None:
        return ABSENT
    origin = [say(facts.source), *([facts.path] if facts.path else [])]
    if facts.tokens is not None:
        origin.append(say("on {tokens} tokens", tokens=numbers.count(facts.tokens)))
    return " ".join(origin) + (say(", frozen") if facts.frozen else "")
