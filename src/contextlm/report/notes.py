"""The report in sentences: the answer, and what to know before believing the tables."""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report import numbers
from contextlm.report.contenders import (
    CACHE,
    Contender,
    cache_length,
    comparable_groups,
    rank,
    ranked,
)
from contextlm.report.frame import run_labels
from contextlm.report.language import say
from contextlm.report.tables import (
    difference_text,
    interval_text,
    quality_text,
    setting_of,
    verdict_text,
)
from contextlm.results.result import Run

STOP_AT = 0.9  # a recipe's phase 1 stops at this converged share unless it says otherwise
MATCHED_PERCENT = 2.0  # contenders within this of the baseline's parameters count as matched
NAMED_KEYS = 6  # of a setting's departures; the report's settings list them all
FULL, SMOKE = "full", "smoke"


def answers(rows: Sequence[Contender]) -> list[str]:
    """The answer in two sentences, for each list of contenders that may be ranked."""
    groups = comparable_groups(rows)
    if len(groups) == 1:
        return [_answer(groups[0])]
    return [
        say("On {setting}: {answer}", setting=setting_of(group), answer=_answer(group))
        for group in groups
    ]


def notes(runs: Sequence[Run], rows: Sequence[Contender]) -> list[str]:
    """What to beware of; empty if there is nothing."""
    return [
        *_setting_notes(runs, rows),
        *_missing_notes(runs),
        *(note for row in rows for note in _row_notes(row)),
        *_phase1_notes(runs, rows),
        *(
            say(
                "{names} were trained in different precisions.",
                names=", ".join(row.name for row in group),
            )
            for group in comparable_groups(rows)
            if len({row.value("precision") for row in group}) > 1
        ),
    ]


def _answer(group: Sequence[Contender]) -> str:
    order = [row for row in ranked(group) if not row.diverged]
    if not order:
        return say("Training diverged in every contender.")
    best, task = order[0], order[0].task
    told = f"{quality_text(best)} ({numbers.seeds_text(len(best.seeds))})"
    if len(group) == 1:
        if task:
            return say("Only {name} was measured: right answers {told}.", name=best.name, told=told)
        return say(
            "Only {name} was measured: validation perplexity {told}.", name=best.name, told=told
        )
    alike = [row.name for row in order if rank(row) == rank(best)]
    if len(alike) > 1:
        names = say(" and ").join(alike)
        if task:
            return say("{names} share the most right answers, {told}.", names=names, told=told)
        return say(
            "{names} share the lowest validation perplexity, {told}.", names=names, told=told
        )
    # The best beside the baseline; where it is the baseline, the nearest of the others.
    other = best
    if best.difference is None:
        nearest = (row for row in order[1:] if row.reference and row.reference.name == best.name)
        other = next(nearest, best)
    values = {"name": best.name, "told": told, "against": _against(best)}
    if best.difference is None and task:
        first = say("{name} has the most right answers, {told}.", **values)
    elif best.difference is None:
        first = say("{name} has the lowest validation perplexity, {told}.", **values)
    elif task:
        first = say("{name} has the most right answers, {told}: {against}.", **values)
    else:
        first = say("{name} has the lowest validation perplexity, {told}: {against}.", **values)
    if all(row.learned_nothing for row in order):
        second = say("No contender has learned more than how frequent each token is.")
    elif other is not best:
        second = say(
            "The nearest, {name}, is {against}{cache}.",
            name=other.name,
            against=_against(other),
            cache=_cache(other, group, say(", with {amount} cache at {tokens} tokens")),
        )
    else:
        second = _cache(best, group, say("It keeps {amount} cache at {tokens} tokens."))
    return f"{first} {second}".rstrip()


def _against(row: Contender) -> str:
    """The difference from the baseline, and whether the seeds tell it."""
    found, size = row.difference, difference_text(row).lstrip("+-")
    if found is None or row.reference is None:
        return ""
    name = row.reference.name
    if found.mean < 0:
        text = say("{size} lower than the baseline {name}", size=size, name=name)
    elif found.mean > 0:
        text = say("{size} higher than the baseline {name}", size=size, name=name)
    else:
        text = say("the same as the baseline {name}", name=name)
    if found.p is None:
        return say("{text} ({seeds}: no interval)", text=text, seeds=say(found.verdict))
    values = {"text": text, "interval": interval_text(row), "verdict": verdict_text(row)}
    if found.verdict == ("lower" if found.mean < 0 else "higher"):
        return say("{text} (95% interval {interval})", **values)
    return say("{text} ({verdict}, 95% interval {interval})", **values)


def _cache(row: Contender, group: Sequence[Contender], sentence: str) -> str:
    """`sentence` on the cache at the length at which quality was measured; empty without one."""
    length = cache_length(group)
    change = row.change(f"{CACHE}{length}")
    if length is None or change is None:
        return ""
    size = numbers.amount(change)
    if change < 0:
        size = say("{size} less", size=size)
    else:
        size = say("{size} more", size=size) if change else say("as much")
    return sentence.format(amount=size, tokens=numbers.count(length))


def _row_notes(row: Contender) -> list[str]:
    found, other = [], row.reference
    if row.learned_nothing:
        share = row.stat("unigram_share")
        assert share is not None
        found.append(
            say(
                "{name} has learned nothing beyond how frequent each token is: that alone reaches "
                "a perplexity of {unigram}, and it has {share} of that.",
                name=row.name,
                unigram=numbers.perplexity(row.value("unigram_ppl")),
                share=numbers.percent(share.mean),
            )
        )
    change = row.change("parameters")
    if other is not None and change is not None and abs(change) > MATCHED_PERCENT:
        values = {"name": row.name, "amount": numbers.amount(change), "other": other.name}
        found.append(
            say(
                "{name} has {amount} more parameters than {other}: they are not matched in size.",
                **values,
            )
            if change > 0
            else say(
                "{name} has {amount} fewer parameters than {other}: they are not matched in size.",
                **values,
            )
        )
    tuning = row.outcomes[0].result.tuning if row.outcomes else None
    if tuning is not None and tuning.at_an_end:
        found.append(
            say(
                "The learning rate of {name}, {rate}, is the end of its grid: another may be "
                "better.",
                name=row.name,
                rate=f"{tuning.chosen:g}",
            )
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
                say(
                    "Phase 1 of {name} stopped at its limit of iterations with {reached}% "
                    "converged (the recipe asks for {wanted}%).",
                    name=row.name,
                    reached=f"{100 * reached:.5g}",
                    wanted=f"{100 * stop_at:g}",
                )
            )
    return found


def _missing_notes(runs: Sequence[Run]) -> list[str]:
    missing = [
        say("{name} (seeds {seeds})" if len(seeds) > 1 else "{name} (seed {seeds})").format(
            name=f"{label}/{name}" if len(runs) > 1 else name, seeds=", ".join(map(str, seeds))
        )
        for run, label in zip(runs, run_labels(runs), strict=True)
        for name, seeds in run.missing_seeds().items()
    ]
    return [say("Not finished, and so not shown: {names}.", names="; ".join(missing))] * bool(
        missing
    )


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
                say(
                    "Scale smoke only tests that everything runs{where}: draw no conclusions.",
                    where=where,
                )
            )
        elif documented and keys:
            more = len(keys) - NAMED_KEYS
            named = ", ".join(keys[:NAMED_KEYS])
            if more > 0:
                named = say("{keys}, {number} more", keys=named, number=more)
            found.append(
                say(
                    "Not the document's setting{where}, it differs in: {keys}. Compare the "
                    "differences from the baseline rather than the figures themselves.",
                    where=where,
                    keys=named,
                )
            )
        elif not documented and departs and scale != FULL:
            found.append(
                say(
                    "Measured at scale {scale}, not at the recipe's full setting{where}.",
                    scale=scale,
                    where=where,
                )
            )
    return found


def _documented(row: Contender) -> bool:
    return any(
        outcome.result.reported or outcome.result.reported_epochs for outcome in row.outcomes[:1]
    )
