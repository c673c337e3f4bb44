"""The report in sentences: which contender is best, who wins and who loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from contextlm.report import numbers
from contextlm.report.document import reported_change, reported_value
from contextlm.report.frontier import comparable_groups, headline_length, pareto
from contextlm.report.numbers import amount, signed_percent, with_deviation
from contextlm.report.summary import TOO_FEW_SEEDS, SummaryRow
from contextlm.report.tradeoff import tradeoffs

_TELLING = {
    "beyond": "The difference exceeds two standard deviations.",
    "within": "The difference is within two standard deviations: "
    "these seeds do not tell the two apart.",
    "one seed": "One seed cannot tell whether this is more than chance.",
    "two seeds": "Two seeds cannot tell whether this is more than chance.",
}


Outcome = Literal["wins", "loses", "lower", "higher", "ties", "unclear"]
_VERBS: dict[Outcome, str] = {
    "wins": "wins against",
    "loses": "loses to",
    "lower": "is lower in perplexity than",
    "higher": "is higher in perplexity than",
    "ties": "ties with",
}


@dataclass(frozen=True)
class Verdict:
    """One contender against its baseline, in words; `reported` is the document's own difference.

    With too few seeds to tell, `outcome` is ``lower`` or ``higher`` in perplexity, no win or loss.
    `settled` says that the difference exceeds two standard deviations, with seeds enough to tell.
    """

    name: str
    outcome: Outcome
    settled: bool
    measured: str
    reported: str | None


def answer(rows: Sequence[SummaryRow]) -> list[str]:
    """The headline: the lowest perplexity, how many contenders win, and what cache each saves.

    Rows that cannot be compared with each other (other data, other target) are answered apart.
    """
    groups, length = comparable_groups(rows), headline_length(rows)
    answers = []
    for group in groups:
        head = _answer(group, _setting(group) if len(groups) > 1 else "")
        answers.append(" ".join([head, *tradeoffs(group, length)]))
    return answers


def verdicts(rows: Sequence[SummaryRow]) -> list[Verdict]:
    """Every contender that has a baseline to be compared with, in order."""
    by_name = {row.name: row for row in rows}
    length = headline_length(rows)
    return [
        _verdict(row, by_name[row.comparison.reference], rows, length)
        for row in rows
        if row.comparison.reference is not None
    ]


def curves_alt(rows: Sequence[SummaryRow]) -> str:
    """What the learning curves show, for those who cannot see them."""
    lines = [
        f"{row.name}: {with_deviation(row.ppl)} at epoch {with_deviation(row.best_epoch, _epoch)}"
        for row in rows
    ]
    return f"Loss and perplexity by epoch. Best validation perplexity of {'; '.join(lines)}."


def frontier_alt(rows: Sequence[SummaryRow]) -> str:
    """What the frontier plot shows, for those who cannot see it."""
    windows = " or ".join(dict.fromkeys(numbers.count(row.corpus.sequence_length) for row in rows))
    sentences = [f"Validation perplexity on windows of {windows} tokens against cache."]
    for group in comparable_groups(rows):
        length = headline_length(group)
        if length is None:
            continue
        reach = [row for row in group if row.cache_at(length)]
        points = [(float(c.logical), row.ppl.mean) for row in reach if (c := row.cache_at(length))]
        lines = [
            f"{reach[i].name} ({numbers.human_bytes(points[i][0])}, "
            f"perplexity {numbers.perplexity(points[i][1])})"
            for i in pareto(points)
        ]
        sentences.append(f"On the frontier at {numbers.count(length)} tokens: {'; '.join(lines)}.")
    return " ".join(sentences)


def _answer(group: Sequence[SummaryRow], setting: str) -> str:
    lowest = min(row.ppl.mean for row in group)
    best = [row for row in group if row.ppl.mean == lowest]
    if len(group) == 1:
        head = f"only {best[0].name} was measured: validation perplexity {_with_seeds(best[0])}."
    elif len(best) == 1:
        head = f"{best[0].name} has the lowest validation perplexity, {_with_seeds(best[0])}."
    else:
        names = " and ".join(row.name for row in best)
        head = f"{names} share the lowest validation perplexity, {_with_seeds(best[0])}."
    head = f"{setting}: {head}" if setting else head if len(group) > 1 else _capital(head)
    compared = [row for row in group if row.comparison.ppl is not None]
    if len(compared) == 1:
        return f"{head} {_one_compared(compared[0])}{_told(compared)}."
    return f"{head} {_counted(compared)}{_told(compared)}." if compared else head


def _one_compared(row: SummaryRow) -> str:
    outcome, change = _outcome(row), row.comparison.ppl
    text = f"{row.name} {_VERBS[outcome]} the baseline {row.comparison.reference}"
    return f"{text} by {amount(change)}" if change else text


def _outcome(row: SummaryRow) -> Outcome:
    change = row.comparison.ppl
    if change is None:
        return "unclear"
    if change == 0:
        return "ties"
    if row.comparison.certainty in TOO_FEW_SEEDS:
        return "lower" if change < 0 else "higher"
    return "wins" if change < 0 else "loses"


def _counted(compared: Sequence[SummaryRow]) -> str:
    outcomes = [_outcome(row) for row in compared]
    wins, losses, ties = (outcomes.count(name) for name in ("wins", "loses", "ties"))
    lower, higher = outcomes.count("lower"), outcomes.count("higher")
    parts = []
    if wins or losses:
        parts += [f"{wins} {_verb(wins, 'win')}", f"{losses} {_verb(losses, 'lose')}"]
    if lower or higher:
        parts += [f"{lower} {_are(lower)} lower", f"{higher} {_are(higher)} higher in perplexity"]
    if ties:
        parts.append(f"{ties} {_verb(ties, 'tie')}")
    return f"Of {len(compared)} contenders compared with a baseline, {_listed(parts)}"


def _verdict(
    row: SummaryRow, other: SummaryRow, rows: Sequence[SummaryRow], length: int | None
) -> Verdict:
    change, both = row.comparison.ppl, f"{_ppl(row)} against {_ppl(other)}, {_seeds(row, other)}"
    outcome = _outcome(row)
    if change is None:
        text = f"{row.name} cannot be compared with {other.name} ({both})."
    else:
        text = f"{row.name} {_VERBS[outcome]} the baseline {other.name}"
        if outcome in ("wins", "loses"):
            side = "lower" if change < 0 else "higher"
            text += f": its perplexity is {amount(change)} {side}"
        elif change:
            text += f" by {amount(change)}"
        text += f" ({both})."
    if change is not None and row.comparison.certainty is not None:
        text += f" {_TELLING[row.comparison.certainty]}"
    cache = row.cache_at(length) if length is not None else None
    if cache and length is not None:
        saved = row.comparison.cache.get(length)
        beside = "" if saved is None else f" ({signed_percent(saved)})"
        size = numbers.human_bytes(cache.logical)
        text += f" Its cache at {numbers.count(length)} tokens is {size}{beside}."
    settled = row.comparison.certainty == "beyond"
    return Verdict(row.name, outcome, settled, text, _reported(row, other, rows))


def _reported(row: SummaryRow, other: SummaryRow, rows: Sequence[SummaryRow]) -> str | None:
    for key, label in (("val_ppl", "perplexity"), ("val_loss", "loss")):
        mine, theirs = reported_value(row, key), reported_value(other, key)
        if mine is not None and theirs is not None:
            change = signed_percent(reported_change(row, rows, key))
            both = f"{numbers.plain(mine)} against {numbers.plain(theirs)}"
            return f"The document reported {change} of {label} ({both})."
    return None


def _told(compared: Sequence[SummaryRow]) -> str:
    """Whether the seeds tell: how many differences exceed two standard deviations."""
    told = [row.comparison.certainty for row in compared]
    beyond, few = told.count("beyond"), [sure for sure in told if sure in TOO_FEW_SEEDS]
    if len(few) == len(told) and len(set(few)) == 1:
        return f"; {few[0]} cannot tell whether this is more than chance"
    if len(told) == 1:
        return f"; the difference {'exceeds' if beyond else 'is within'} two standard deviations"
    text = f"; {beyond} of these differences {_verb(beyond, 'exceed')} two standard deviations"
    return f"{text}, {len(few)} {_verb(len(few), 'rest')} on too few seeds to tell" if few else text


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _setting(group: Sequence[SummaryRow]) -> str:
    data, ahead = group[0].corpus, group[0].target_offset
    target = "the next token" if ahead == 1 else f"the token {ahead} ahead"
    return (
        f"On {data.name} ({data.tokenizer}, windows of {numbers.count(data.sequence_length)}), "
        f"predicting {target}"
    )


def _ppl(row: SummaryRow) -> str:
    return with_deviation(row.ppl)


def _with_seeds(row: SummaryRow) -> str:
    return f"{_ppl(row)} ({numbers.seeds_text(row.ppl.seeds)})"


def _seeds(row: SummaryRow, other: SummaryRow) -> str:
    if row.ppl.seeds == other.ppl.seeds:
        return numbers.seeds_text(row.ppl.seeds)
    return f"{row.ppl.seeds} and {numbers.seeds_text(other.ppl.seeds)}"


def _verb(number: int, verb: str) -> str:
    return f"{verb}s" if number == 1 else verb


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _epoch(value: float) -> str:
    return numbers.decimal(value, 0 if value == int(value) else 1)
