"""The rows of a report: contenders over their seeds, each with what it is compared with.

A row is one contender in one setting with one budget. Seeds of one setting are one row, whichever
runs they are in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd

from contextlm.base.errors import InputError
from contextlm.base.visible import shown
from contextlm.report.frame import seed_frame
from contextlm.report.language import say
from contextlm.report.numbers import count, percent_change
from contextlm.report.statistics import Difference, Stat, corrected, difference, stat
from contextlm.results.result import Outcome, PhaseTwoRow, Run, StepRow

CACHE = "cache_bytes_"
PPL_AT = "ppl_at_"
ANSWERS = "answers_"
SCORE = "score_"
STDERR = "stderr_"
REPORTED = "reported_"
# Contenders that share the first are of one task, and may be ranked if they share the others too.
_SAME_DATA = [
    "corpus",
    "tokenizer",
    "vocab_size",
    "validation_tokens",
    "sequence_length",
    "target_offset",
]
_SAME_BUDGET = ["train_tokens", "epoch_limit"]


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
        return say("{name} (baseline)", name=self.name) if self.value("baseline") else self.name

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
        return self.columns(ANSWERS)

    @property
    def scores(self) -> list[str]:
        """The figures of tasks of lm-eval, without what their columns begin with."""
        return [name.removeprefix(SCORE) for name in self.columns(SCORE)]

    @property
    def reported(self) -> list[str]:
        """The keys of the document's figures."""
        return [name.removeprefix(REPORTED) for name in self.columns(REPORTED)]

    @property
    def cache_lengths(self) -> list[int]:
        """Tokens at which its cache was measured."""
        return [int(name.removeprefix(CACHE)) for name in self.columns(CACHE)]

    @property
    def budget(self) -> int:
        """Tokens that it may train on, counted anew each epoch."""
        return int(self.value("train_tokens")) * int(self.value("epoch_limit") or 1)

    @property
    def learned_nothing(self) -> bool:
        """Whether knowing how frequent each token is would do as well."""
        share = self.stat("unigram_share")
        return share is not None and share.mean >= 1 and not self.diverged

    def value(self, column: str) -> Any:
        """What all seeds share; None where the row has no such figure."""
        return next(iter(self._known.get(column, ())), None)

    def stat(self, column: str) -> Stat | None:
        """Mean and deviation over the seeds; None where the row has no such figure."""
        return stat(self._known.get(column, ()))

    @cached_property
    def _known(self) -> dict[str, list[Any]]:
        """The figures of each column, without those that are missing."""
        columns = {str(name): self.seeds[name].tolist() for name in self.seeds}
        return {
            name: [value for value in values if not pd.isna(value)]
            for name, values in columns.items()
        }

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

    def positions(self) -> dict[int, Stat]:
        """Perplexity over the seeds of each stretch of long texts, by the stretch's end."""
        found: dict[int, list[float]] = {}
        for outcome in self.outcomes:
            for bucket in outcome.result.positions:
                found.setdefault(bucket.last, []).append(bucket.ppl)
        told = {last: stat(values) for last, values in found.items()}
        return {last: one for last, one in told.items() if one is not None}

    def columns(self, start: str) -> list[str]:
        """Its columns of the seed frame that begin so and hold something."""
        names = [str(name) for name in self.seeds if str(name).startswith(start)]
        return [name for name in names if self.value(name) is not None]

    def _history(self, kind: type[PhaseTwoRow | StepRow]) -> pd.DataFrame:
        fields = attrgetter(*kind.model_fields)
        lines = [
            (outcome.result.seed, *fields(line))
            for outcome in self.outcomes
            for line in outcome.history
            if type(line) is kind
        ]
        return pd.DataFrame(lines, columns=["seed", *kind.model_fields])


def contenders(runs: Sequence[Run], against: str | None = None) -> list[Contender]:
    """The rows of a report, in the order of the runs, each compared with its run's baseline.

    Rows of several runs with one contender and one non-null `setting` are one row over all their
    seeds. Of others whose names clash, each gets its run's name in front (``run-3/new-llm``), or
    its training tokens behind where one run has it with several budgets.

    Args:
        runs: the runs.
        against: the name of a contender, or of a row, that takes the baselines' place.

    Raises:
        InputError: nothing is called `against`.
    """
    frame = _with_derived(seed_frame(runs))
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    one = ["run", "contender", *_SAME_BUDGET]
    settings = frame.groupby(one, dropna=False).setting.transform("first")
    frame["row"] = settings.where(settings.notna(), frame.run)
    frame = frame.drop_duplicates(["contender", "row", *_SAME_BUDGET, "seed"])
    rows = [
        Contender(str(key[0]), seeds, tuple(outcomes[i] for i in seeds.index))
        for key, seeds in frame.groupby(
            ["contender", "row", *_SAME_BUDGET], sort=False, dropna=False
        )
    ]
    rows.sort(key=lambda row: row.seeds.index[0])
    rows = _with_names(rows)
    return _compared(rows if against is None else _with_baseline(rows, against))


def comparable_groups(rows: Sequence[Contender]) -> list[list[Contender]]:
    """Rows that may be ranked in one list: the same data, tokenizer, windows, target and budget."""
    return _grouped(rows, [*_SAME_DATA, *_SAME_BUDGET])


def same_data_groups(rows: Sequence[Contender]) -> list[list[Contender]]:
    """Rows that may stand in one chart by training tokens: the same but for their budgets."""
    return _grouped(rows, _SAME_DATA)


def ranked(group: Sequence[Contender]) -> list[Contender]:
    """The best first; at the end those that diverged."""
    return sorted(group, key=lambda row: (bool(row.diverged), rank(row)))


def rank(row: Contender) -> float:
    """The loss, or for a synthetic task minus the right answers; infinite without a number."""
    found = row.stat("accuracy" if row.task else "validation_loss")
    if found is None or math.isnan(found.mean):  # not a number in every seed
        return math.inf
    return -found.mean if row.task else found.mean


def cache_length(group: Sequence[Contender]) -> int | None:
    """The length at which cache and quality are told together: that of quality's windows.

    None where no cache was measured there.
    """
    window = group[0].value("sequence_length")
    return int(window) if any(window in row.cache_lengths for row in group) else None


def scored_lengths(group: Sequence[Contender]) -> list[int]:
    """Lengths beyond the windows at which all have both a cache and a perplexity (``ppl_at_N``)."""
    shared = set(group[0].cache_lengths).intersection(*(row.cache_lengths for row in group[1:]))
    window = int(group[0].value("sequence_length"))
    return sorted(
        length
        for length in shared
        if length > window and all(row.value(f"{PPL_AT}{length}") is not None for row in group)
    )


def row_facts(row: Contender) -> dict[str, Any]:
    """A row for programs: what its seeds share, and mean, sd and number of seeds of what varies."""
    shared = ["run", "recipe", "scale", "contender", "architecture", "baseline", "precision"]
    shared += ["target_offset", "corpus", "tokenizer", "sequence_length", "train_tokens"]
    shared += ["parameters", "trainable", "learning_rate", "cache_dtype", "speed_tokens"]
    varying = ["validation_loss", "validation_ppl", "unigram_share", "bits_per_byte", "accuracy"]
    varying += ["train_ppl", "train_ppl_running", "best_epoch", "epochs", *row.levels]
    varying += row.columns(PPL_AT)
    varying += [start + name for name in row.scores for start in (SCORE, STDERR)]
    varying += ["phase1_iterations", "phase1_converged", "rank_train", "rank_validation"]
    varying += ["seconds_per_epoch", "training_rate", "prefill_rate", "decode_rate"]
    caches = [name for n in row.cache_lengths for name in (f"{CACHE}{n}", f"cache_resident_{n}")]
    against = row.difference
    return {
        "name": row.name,
        "seeds": row.seeds.seed.tolist(),
        "diverged": row.diverged,
        "budget": row.budget,
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


def _grouped(rows: Sequence[Contender], columns: Sequence[str]) -> list[list[Contender]]:
    groups: dict[tuple[object, ...], list[Contender]] = {}
    for row in rows:
        groups.setdefault(_key(row, columns), []).append(row)
    return list(groups.values())


def _key(row: Contender, columns: Sequence[str]) -> tuple[object, ...]:
    return tuple(row.value(column) for column in columns)


def _with_names(rows: Sequence[Contender]) -> list[Contender]:
    named = []
    for row in rows:
        alike = [other for other in rows if other.name == row.name]
        name = row.name
        if len({other.value("run") for other in alike}) > 1:
            name = f"{row.value('run')}/{name}"
        if sum(other.value("run") == row.value("run") for other in alike) > 1:
            name = say("{name}, {tokens} tokens", name=name, tokens=count(row.budget))
        named.append(replace(row, name=name))
    return named


def _with_baseline(rows: Sequence[Contender], name: str) -> list[Contender]:
    chosen = {row for row in rows if name in (row.name, row.value("contender"))}
    if not chosen:
        known = ", ".join(dict.fromkeys(row.name for row in rows))
        raise InputError(f"--against {shown(name)}: no such contender, there are {known}")
    return [replace(row, seeds=row.seeds.assign(baseline=row in chosen)) for row in rows]


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
    """The baseline among what `row` may be ranked with, that of its own run if it has one.

    A contender with another target offset is compared with the one that has the baseline's
    architecture and parameter count and its own offset. None for these two themselves.
    """
    columns = [name for name in (*_SAME_DATA, *_SAME_BUDGET) if name != "target_offset"]
    runs = set(row.seeds.run)
    alike = [other for other in rows if _key(other, columns) == _key(row, columns)]
    alike.sort(key=lambda other: not runs & set(other.seeds.run))
    baseline = next((other for other in alike if other.value("baseline")), None)
    if baseline is None:
        return None

    def model(one: Contender) -> tuple[object, ...]:
        return one.value("architecture"), one.value("parameters")

    for other in alike:
        offset = other.value("target_offset")
        stand_in = model(other) == model(baseline) and offset != baseline.value("target_offset")
        if (other is baseline or stand_in) and offset == row.value("target_offset"):
            return None if other is row else other
    return None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
