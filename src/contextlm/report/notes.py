"""The report in sentences: the answer, and what to know before believing the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
FULL, SMOKE = "full", "smoke"
_NAMED_KEYS = 6  # of a setting's departures; the report's settings list them all


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
            f"{_names(group)} were trained in different precisions."
            for group in comparable_groups(rows)
            if len({row.value("precision") for row in group}) > 1
        ),
    ]


def curves_alt(rows: Sequence[Contender]) -> str:
    """What the learning curves show, for those who cannot see them."""
    best = "; ".join(f"{row.name}: {ppl_text(row)}" for row in rows)
    return f"Loss and perplexity while training. Best validation perplexity of {best}."


def frontier_alt(rows: Sequence[Contender]) -> str:
    """What the chart of perplexity against cache shows, for those who cannot see it."""
    points = [
        f"{row.name}: {ppl_text(row)} with {numbers.human_bytes(size)} at {numbers.count(length)}"
        for group in comparable_groups(rows)
        if (length := cache_length(group)) is not None
        for row in group
        if (size := row.value(f"{CACHE}{length}")) is not None
    ]
    return f"Validation perplexity against cache and tokens kept. {'; '.join(points)}."


def _answer(group: Sequence[Contender]) -> str:
    sound = [row for row in group if not row.diverged]
    if not sound:
        return "Training diverged in every contender."
    ranked = sorted(sound, key=_rank)
    best = ranked[0]
    seeds = numbers.seeds_text(len(best.seeds))
    if len(group) == 1:
        return f"Only {best.name} was measured: {_measure(best)} {_quality(best)} ({seeds})."
    alike = [row.name for row in ranked if _rank(row) == _rank(best)]
    most = "most right answers" if best.task else "lowest validation perplexity"
    head = f"{' and '.join(alike)} {'share' if len(alike) > 1 else 'has'} the {most}, "
    head += f"{_quality(best)} ({seeds})"
    if len(alike) > 1:
        return f"{head}."
    if best.difference is not None:
        return f"{head}: {_against(best)}{_cache(best, group)}."
    nearest = next(
        (
            row
            for row in ranked
            if row.difference and row.reference and row.reference.name == best.name
        ),
        None,
    )
    if nearest is None:
        return f"{head}."
    return f"{head}; the nearest, {nearest.name}, is {_against(nearest)}{_cache(nearest, group)}."


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
    told = f"95% interval {interval_text(row)}"
    verdict = verdict_text(row)
    return f"{text} ({told if verdict == side else f'{verdict}, {told}'})"


def _cache(row: Contender, group: Sequence[Contender]) -> str:
    length = cache_length(group)
    change = None if length is None else row.change(f"{CACHE}{length}")
    if length is None or change is None:
        return ""
    size = (
        "as much" if change == 0 else f"{numbers.amount(change)} {'less' if change < 0 else 'more'}"
    )
    return f", with {size} cache at {numbers.count(length)} tokens"


def _row_notes(row: Contender) -> list[str]:
    found, other = [], row.reference
    if row.diverged:
        seeds = ", ".join(map(str, row.diverged))
        found.append(f"{row.name} diverged (seed{'s' if ',' in seeds else ''} {seeds}).")
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
    ahead = row.value("target_offset")
    if ahead > 1:
        found.append(
            f"{row.name} predicts the token {ahead} ahead, which is harder than the next one."
        )
    if other is not None and other.value("speed_tokens") != row.value("speed_tokens"):
        found.append(
            f"{row.name} was timed on {numbers.count(row.value('speed_tokens'))} tokens, "
            f"{other.name} on {numbers.count(other.value('speed_tokens'))}: their "
            "prefill and decode speeds are not compared."
        )
    return found


def _phase1_notes(runs: Sequence[Run], rows: Sequence[Contender]) -> list[str]:
    recipes = {label: run.recipe for run, label in zip(runs, run_labels(runs), strict=True)}
    found = []
    for row in rows:
        if row.value("phase1_converged") is None:
            continue
        listed = recipes[row.value("run")].get("contenders", [])
        own = next((c for c in listed if c.get("name") == row.value("contender")), {})
        wanted = float((own.get("phase1") or {}).get("stop_at", STOP_AT))
        reached = row.seeds.phase1_converged.min()
        if reached < wanted:
            # More decimals where one would round the share up to what was asked for.
            places = 1 if round(100 * reached, 1) < 100 * wanted else 3
            found.append(
                f"Phase 1 of {row.name} stopped at its limit of iterations with "
                f"{numbers.decimal(100 * reached, places)}% converged (the recipe asks for "
                f"{numbers.plain(100 * wanted)}%)."
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

    A run's recipe says in ``departs_from_full`` in which keys it departs from its top level.
    """
    found: list[str] = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        mine = [row for row in rows if label in set(row.seeds.run)]
        scale = mine[0].value("scale") if mine else FULL
        documented = [row for row in mine if _documented(row)]
        departs = run.recipe.get("departs_from_full")
        keys = _departures(departs, documented)
        where = f" ({label})" if len(runs) > 1 else ""
        if scale == SMOKE:
            found.append(
                f"Scale smoke only tests that everything runs{where}: draw no conclusions."
            )
        elif documented and (keys or (keys is None and scale != FULL)):
            differ = _listed(keys) if keys else f"scale {scale}"
            found.append(
                f"Not the document's setting{where}: {differ}. Compare the differences from the "
                "baseline rather than the figures themselves."
            )
        elif not documented and scale != FULL and departs != []:
            found.append(f"Measured at scale {scale}, not at the recipe's full setting{where}.")
    return found


def _departures(keys: Any, documented: Sequence[Contender]) -> list[str] | None:
    """The keys in which documented contenders depart; None where an older run does not say."""
    if not isinstance(keys, list):
        return None
    own = tuple(f"contenders.{row.value('contender')}." for row in documented)
    return [k for k in map(str, keys) if not k.startswith("contenders.") or k.startswith(own)]


def _documented(row: Contender) -> bool:
    result = row.outcomes[0].result
    return bool(result.reported or result.reported_epochs)


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - _NAMED_KEYS
    named = [*keys[:_NAMED_KEYS], *([f"{more} more"] if more > 0 else [])]
    return f"{', '.join(named)} differ" if len(named) > 1 else f"{named[0]} differs"


def _rank(row: Contender) -> float:
    found = row.stat("accuracy" if row.task else "validation_loss")
    if found is None:  # not a number in every seed
        return math.inf
    return -found.mean if row.task else found.mean


def _quality(row: Contender) -> str:
    if row.task:
        return with_deviation(row.stat("accuracy"), numbers.percent)
    return ppl_text(row)


def _measure(row: Contender) -> str:
    return "right answers" if row.task else "validation perplexity"


def _names(rows: Sequence[Contender]) -> str:
    return ", ".join(row.name for row in rows)
