"""The report in sentences: the answer, and what to know before believing the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from contextlm.report import numbers
from contextlm.report.contenders import CACHE, Contender, cache_length, comparable_groups
from contextlm.report.frame import run_labels
from contextlm.report.numbers import with_deviation
from contextlm.report.tables import (
    difference_text,
    interval_text,
    ppl_text,
    setting_of,
    verdict_text,
)
from contextlm.results.result import Run

STOP_AT = 0.9  # a recipe's phase 1 stops at this converged share unless it says otherwise
MATCHED_PERCENT = 2.0  # contenders within this of the baseline's parameters count as matched
NAMED_KEYS = 6  # of a setting's departures; the report's settings list them all
FULL, SMOKE = "full", "smoke"


def answers(rows: Sequence[Contender]) -> list[str]:
    """The answer in one sentence, for each list of contenders that may be ranked."""
    groups = comparable_groups(rows)
    if len(groups) == 1:
        return [_answer(groups[0])]
    return [f"On {setting_of(group)}: {_answer(group)}" for group in groups]


def notes(runs: Sequence[Run], rows: Sequence[Contender]) -> list[str]:
    """What to beware of; empty if there is nothing."""
    return [
        *_setting_notes(runs, rows),
        *_missing_notes(runs),
        *(note for row in rows for note in _row_notes(row)),
        *_phase1_notes(runs, rows),
        *(
            f"{', '.join(row.name for row in group)} were trained in different precisions."
            for group in comparable_groups(rows)
            if len({row.value("precision") for row in group}) > 1
        ),
    ]


def _answer(group: Sequence[Contender]) -> str:
    ranked = sorted((row for row in group if not row.diverged), key=_rank)
    if not ranked:
        return "Training diverged in every contender."
    best = ranked[0]
    told = with_deviation(best.stat("accuracy"), numbers.percent) if best.task else ppl_text(best)
    told += f" ({numbers.seeds_text(len(best.seeds))})"
    if len(group) == 1:
        measure = "right answers" if best.task else "validation perplexity"
        return f"Only {best.name} was measured: {measure} {told}."
    alike = [row.name for row in ranked if _rank(row) == _rank(best)]
    most = "most right answers" if best.task else "lowest validation perplexity"
    if len(alike) > 1:
        return f"{' and '.join(alike)} share the {most}, {told}."
    head = f"{best.name} has the {most}, {told}"
    if best.difference is not None:
        return f"{head}: {_against(best)}{_cache(best, group)}."
    for row in ranked[1:]:  # the nearest of those that are compared with the best
        if row.difference and row.reference and row.reference.name == best.name:
            return f"{head}; the nearest, {row.name}, is {_against(row)}{_cache(row, group)}."
    return f"{head}."


def _against(row: Contender) -> str:
    """The difference from the baseline, and whether the seeds tell it."""
    found, size = row.difference, difference_text(row).lstrip("+-")
    if found is None or row.reference is None:
        return ""
    side = "lower" if found.mean < 0 else "higher"
    text = f"{size} {side} than" if found.mean else "the same as"
    text += f" the baseline {row.reference.name}"
    if found.p is None:
        return f"{text} ({found.verdict}: no interval)"
    told, verdict = f"95% interval {interval_text(row)}", verdict_text(row)
    return f"{text} ({told if verdict == side else f'{verdict}, {told}'})"


def _cache(row: Contender, group: Sequence[Contender]) -> str:
    length = cache_length(group)
    change = row.change(f"{CACHE}{length}")
    if length is None or change is None:
        return ""
    size = f"{numbers.amount(change)} {'less' if change < 0 else 'more'}" if change else "as much"
    return f", with {size} cache at {numbers.count(length)} tokens"


def _row_notes(row: Contender) -> list[str]:
    found, other = [], row.reference
    share, change = row.stat("unigram_share"), row.change("parameters")
    if share is not None and share.mean >= 1 and not row.diverged:
        unigram = numbers.perplexity(row.value("unigram_ppl"))
        found.append(
            f"{row.name} has learned nothing beyond how frequent each token is: that alone reaches "
            f"a perplexity of {unigram}."
        )
    if other is not None and change is not None and abs(change) > MATCHED_PERCENT:
        side = "more" if change > 0 else "fewer"
        found.append(
            f"{row.name} has {numbers.amount(change)} {side} parameters than {other.name}: the two "
            "are not matched in size."
        )
    tuning = row.outcomes[0].result.tuning
    if tuning is not None and tuning.at_an_end:
        found.append(
            f"The learning rate of {row.name}, {tuning.chosen:g}, is the end of its grid: another "
            "may be better."
        )
    return found


def _phase1_notes(runs: Sequence[Run], rows: Sequence[Contender]) -> list[str]:
    wanted = {
        (label, contender["name"]): (contender.get("phase1") or {}).get("stop_at", STOP_AT)
        for run, label in zip(runs, run_labels(runs), strict=True)
        for contender in run.recipe["contenders"]
    }
    found = []
    for row in rows:
        reached = row.seeds.phase1_converged.min()
        stop_at = wanted.get((row.value("run"), row.value("contender")), STOP_AT)
        if reached < stop_at:  # never where the row has no phase 1
            found.append(
                f"Phase 1 of {row.name} stopped at its limit of iterations with "
                f"{100 * reached:.5g}% converged (the recipe asks for {100 * stop_at:g}%)."
            )
    return found


def _missing_notes(runs: Sequence[Run]) -> list[str]:
    missing = [
        f"{f'{label}/' if len(runs) > 1 else ''}{name} (seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))})"
        for run, label in zip(runs, run_labels(runs), strict=True)
        for name, seeds in run.missing_seeds().items()
    ]
    return [f"Not finished, and so not shown: {'; '.join(missing)}."] if missing else []


def _setting_notes(runs: Sequence[Run], rows: Sequence[Contender]) -> list[str]:
    """How far runs are from the setting that they stand for, a document's or a recipe's.

    A run's recipe says in ``departs_from_full`` in which keys it departs from its top level; one
    that does not know departs in its scale, as far as is known.
    """
    found: list[str] = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        scale = run.outcomes[0].result.scale
        documented = [
            row.value("contender")
            for row in rows
            if label in set(row.seeds.run) and _documented(row)
        ]
        departs = run.recipe.get("departs_from_full")
        if departs is None:
            departs = [] if scale == FULL else ["scale"]
        others = tuple(
            f"contenders.{contender['name']}."
            for contender in run.recipe["contenders"]
            if contender["name"] not in documented
        )
        keys = [key for key in map(str, departs) if not key.startswith(others)]
        where = f" ({label})" if len(runs) > 1 else ""
        if scale == SMOKE:
            found.append(
                f"Scale smoke only tests that everything runs{where}: draw no conclusions."
            )
        elif documented and keys:
            more = len(keys) - NAMED_KEYS
            named = ", ".join(keys[:NAMED_KEYS]) + (f", {more} more" if more > 0 else "")
            differ = f"{named} differ{'' if len(keys) > 1 else 's'}"
            found.append(
                f"Not the document's setting{where}: {differ}. Compare the differences from the "
                "baseline rather than the figures themselves."
            )
        elif not documented and departs and scale != FULL:
            found.append(f"Measured at scale {scale}, not at the recipe's full setting{where}.")
    return found


def _documented(row: Contender) -> bool:
    result = row.outcomes[0].result
    return bool(result.reported or result.reported_epochs)


def _rank(row: Contender) -> float:
    found = row.stat("accuracy" if row.task else "validation_loss")
    if found is None:  # not a number in every seed
        return math.inf
    return -found.mean if row.task else found.mean
