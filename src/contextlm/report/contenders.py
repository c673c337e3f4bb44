"""The rows of a report: contenders over their seeds, each with what it is compared with.

A row is one contender in one setting. Seeds of one setting are one row, whichever runs they are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from contextlm.report.frame import seed_frame
from contextlm.report.numbers import percent_change
from contextlm.report.statistics import Difference, Stat, corrected, difference, stat
from contextlm.results.result import Outcome, PhaseTwoRow, Run, StepRow

CACHE = "cache_bytes_"
ANSWERS = "answers_"
SCORE = "score_"
STDERR = "stderr_"
REPORTED = "reported_"
# Contenders that share all of these may be ranked: the same data, target and budget.
_COMPARABLE = [
    "corpus",
    "tokenizer",
    "vocab_size",
    "validation_tokens",
    "sequence_length",
    "target_offset",
    "train_tokens",
    "epoch_limit",
]


@dataclass(frozen=True, eq=False)
class Contender:
    """One row. `name` is unique in the report, `seeds` its part of the seed frame.

    `difference` is that of the measure that counts, in its unit: of validation loss, or for a
    synthetic task of the share of right answers. None where the row is a baseline, has none, or one
    of the two diverged.
    """

    name: str
    seeds: pd.DataFrame
    outcomes: tuple[Outcome, ...] = field(repr=False)
    reference: Contender | None = None
    difference: Difference | None = None

    @property
    def shown_name(self) -> str:
        """The name, which says of a baseline that it is one."""
        return f"{self.name} (baseline)" if self.value("baseline") else self.name

    @property
    def diverged(self) -> list[int]:
        """The seeds whose training broke down."""
        return [int(seed) for seed in self.seeds.seed[self.seeds.diverged]]

    @property
    def task(self) -> bool:
        """Whether it answered a synthetic task, where right answers count and not perplexity."""
        return bool(self.levels)

    @property
    def levels(self) -> list[str]:
        """The columns of the levels that it answered."""
        return self._columns(ANSWERS)

    @property
    def scores(self) -> list[str]:
        """The figures of tasks of lm-eval, without what their columns begin with."""
        return [name.removeprefix(SCORE) for name in self._columns(SCORE)]

    @property
    def reported(self) -> list[str]:
        """The keys of the document's figures."""
        return [name.removeprefix(REPORTED) for name in self._columns(REPORTED)]

    @property
    def cache_lengths(self) -> list[int]:
        """Tokens at which its cache was measured."""
        return [int(name.removeprefix(CACHE)) for name in self._columns(CACHE)]

    def value(self, column: str) -> Any:
        """What all seeds share; None where the row has no such figure."""
        known = self.seeds[column].dropna() if column in self.seeds else pd.Series([])
        return None if known.empty else known.iloc[0]

    def stat(self, column: str) -> Stat | None:
        """Mean and deviation over the seeds; None where the row has no such figure."""
        return stat(self.seeds[column]) if column in self.seeds else None

    def change(self, column: str) -> float | None:
        """By how many percent its mean lies above or below that of its baseline."""
        mine, theirs = self.stat(column), self.reference and self.reference.stat(column)
        return percent_change(mine.mean, theirs.mean) if mine and theirs else None

    def reported_change(self, key: str) -> float | None:
        """The document's own difference of it from its baseline, in percent."""
        mine = self.value(REPORTED + key)
        theirs = self.reference.value(REPORTED + key) if self.reference else None
        return None if mine is None or theirs is None else percent_change(mine, theirs)

    def epochs(self) -> pd.DataFrame:
        """Every epoch of every seed, in order: `seed`, and the fields of `PhaseTwoRow`."""
        return self._history(PhaseTwoRow)

    def steps(self) -> pd.DataFrame:
        """Every step that was written down of every seed: `seed`, and the fields of `StepRow`."""
        return self._history(StepRow)

    def _columns(self, start: str) -> list[str]:
        names = [str(name) for name in self.seeds if str(name).startswith(start)]
        return [name for name in names if self.value(name) is not None]

    def _history(self, kind: type[PhaseTwoRow | StepRow]) -> pd.DataFrame:
        lines = [
            {"seed": outcome.result.seed, **dict(line)}
            for outcome in self.outcomes
            for line in outcome.history
            if isinstance(line, kind)
        ]
        return pd.DataFrame(lines, columns=["seed", *kind.model_fields])


def contenders(runs: Sequence[Run]) -> list[Contender]:
    """The rows of a report, in the order of the runs, each compared with its run's baseline.

    Rows of several runs with one contender and one non-null `setting` are one row over all their
    seeds. Of others whose names clash, each gets its run's name in front (``run-3/new-llm``).
    """
    frame = _with_derived(seed_frame(runs))
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    settings = frame.groupby(["run", "contender"]).setting.transform("first")
    frame["row"] = settings.where(settings.notna(), frame.run)
    frame = frame.drop_duplicates(["contender", "row", "seed"])
    clashing = frame.groupby("contender").row.nunique().loc[lambda number: number > 1].index
    rows = []
    for (contender, _), seeds in frame.groupby(["contender", "row"], sort=False):
        name = f"{seeds.run.iloc[0]}/{contender}" if contender in clashing else str(contender)
        rows.append(Contender(name, seeds, tuple(outcomes[i] for i in seeds.index)))
    rows.sort(key=lambda row: row.seeds.index[0])
    return _compared(rows)


def comparable_groups(rows: Sequence[Contender]) -> list[list[Contender]]:
    """Rows that may be ranked in one list: the same data, tokenizer, windows, target and budget."""
    groups: dict[tuple[object, ...], list[Contender]] = {}
    for row in rows:
        key = tuple(row.value(column) for column in _COMPARABLE)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def cache_length(group: Sequence[Contender]) -> int | None:
    """The length at which cache and quality are told together: that of quality's windows.

    The nearest measured length at or above it; the longest where all are shorter; None without any.
    """
    lengths = sorted({length for row in group for length in row.cache_lengths})
    window = max((int(row.value("sequence_length")) for row in group), default=0)
    return next((length for length in lengths if length >= window), max(lengths, default=None))


def row_facts(row: Contender) -> dict[str, Any]:
    """A row for programs: what its seeds share, and mean, sd and number of seeds of what varies."""
    shared = ["run", "recipe", "scale", "contender", "architecture", "baseline", "precision"]
    shared += ["target_offset", "corpus", "tokenizer", "sequence_length", "train_tokens"]
    shared += ["parameters", "trainable", "learning_rate", "cache_dtype", "speed_tokens"]
    varying = ["validation_loss", "validation_ppl", "unigram_share", "bits_per_byte", "accuracy"]
    varying += ["train_ppl", "train_ppl_running", "best_epoch", "epochs", *row.levels]
    varying += [start + name for name in row.scores for start in (SCORE, STDERR)]
    varying += ["phase1_iterations", "phase1_converged", "rank_train", "rank_validation"]
    varying += ["seconds_per_epoch", "training_rate", "prefill_rate", "decode_rate"]
    caches = [name for n in row.cache_lengths for name in (f"{CACHE}{n}", f"cache_resident_{n}")]
    against = row.difference
    return {
        "name": row.name,
        "seeds": row.seeds.seed.tolist(),
        "diverged": row.diverged,
        **{name: _plain(row.value(name)) for name in [*shared, *caches]},
        **{name: row.stat(name) for name in varying},
        "reported": {key: _plain(row.value(REPORTED + key)) for key in row.reported},
        "reference": row.reference.name if row.reference else None,
        "difference": against,
        "verdict": against.verdict if against else None,
    }


def _with_derived(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(
        unigram_share=frame.validation_ppl / frame.unigram_ppl,
        train_validation_ratio=frame.train_ppl / frame.validation_ppl,
        train_val_gap=frame.validation_ppl / frame.train_ppl_running,
        rank_share_train=frame.rank_train / frame.context_dim,
        rank_share_validation=frame.rank_validation / frame.context_dim,
        store_bytes=frame.store_train_bytes + frame.store_validation_bytes,
    )


def _compared(rows: Sequence[Contender]) -> list[Contender]:
    """The rows with references and differences, corrected among those that are ranked together."""
    found: dict[str, Contender] = {}
    for group in comparable_groups(rows):
        references = [_reference(row, rows) for row in group]
        told = corrected([_difference(*pair) for pair in zip(group, references, strict=True)])
        for row, other, one in zip(group, references, told, strict=True):
            found[row.name] = replace(row, reference=other, difference=one)
    return [found[row.name] for row in rows]


def _difference(row: Contender, other: Contender | None) -> Difference | None:
    if other is None or row.diverged or other.diverged:
        return None
    column = "accuracy" if row.task else "validation_loss"
    mine, theirs = (one.seeds.set_index("seed")[column].astype(float) for one in (row, other))
    if not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
        return None
    return difference(mine, theirs)


def _reference(row: Contender, rows: Sequence[Contender]) -> Contender | None:
    """The baseline of a run that `row` is in, if both predict the same token.

    A contender with another target offset is compared with the one that has the baseline's
    architecture and parameter count and its own offset. None for these two themselves.
    """
    runs = set(row.seeds.run)
    beside = [other for other in rows if runs & set(other.seeds.run)]
    baseline = next((other for other in beside if other.value("baseline")), None)
    if baseline is None:
        return None

    def model(one: Contender) -> tuple[object, ...]:
        return one.value("architecture"), one.value("parameters")

    for other in beside:
        offset = other.value("target_offset")
        stand_in = model(other) == model(baseline) and offset != baseline.value("target_offset")
        if (other is baseline or stand_in) and offset == row.value("target_offset"):
            return None if other is row else other
    return None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
