"""What each contender saves and what it pays: cache against perplexity, a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report import numbers
from contextlm.report.numbers import amount, signed_percent
from contextlm.report.summary import SummaryRow

SHOWN = 3  # contenders spelled out in the answer; the verdicts name them all
AS_MUCH_PERCENT = 1.0  # caches within this of the baseline's count as equally large


def tradeoffs(rows: Sequence[SummaryRow], length: int | None) -> list[str]:
    """A sentence for each contender that has a baseline; of many, those of lowest perplexity.

    How many are left out is then said at the end.

    Args:
        rows: contenders that may be compared with each other.
        length: the cache length to speak of, in tokens; a contender without a figure there is
            spoken of at the longest that it shares with its baseline.
    """
    found = [(row.ppl.mean, text) for row in rows if (text := _tradeoff(row, length)) is not None]
    best = sorted(ppl for ppl, _ in found)[:SHOWN]
    sentences = [text for ppl, text in found if ppl in best][:SHOWN]
    left = len(found) - len(sentences)
    return [*sentences, f"The findings below name {left} more."] if left else sentences


def _tradeoff(row: SummaryRow, length: int | None) -> str | None:
    saved = {
        tokens: change for tokens, change in row.comparison.cache.items() if change is not None
    }
    cost = row.comparison.ppl
    if cost is None or not saved:
        return None
    tokens = length if length in saved else max(saved)
    cache = saved[tokens]
    if abs(cache) < AS_MUCH_PERCENT:
        size = f"as much cache ({signed_percent(cache)})" if cache else "as much cache"
    else:
        size = f"{amount(cache)} {_side(cache)} cache"
    price = f"{amount(cost)} {_side(cost)} perplexity" if cost else "the same perplexity"
    # Better, or worse, in both is no trade.
    joined = "and has" if abs(cache) >= AS_MUCH_PERCENT and cache * cost > 0 else "for"
    return f"{row.name} keeps {size} at {numbers.count(tokens)} tokens {joined} {price}."


def _side(change: float) -> str:
    return "less" if change < 0 else "more"
