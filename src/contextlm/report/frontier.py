"""Which contenders may be compared, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report.summary import SummaryRow


def comparable_groups(rows: Sequence[SummaryRow]) -> list[list[SummaryRow]]:
    """Rows whose perplexities mean the same: same data, tokenizer, windows and target."""
    groups: dict[tuple[object, ...], list[SummaryRow]] = {}
    for row in rows:
        data = row.corpus
        key = (
            data.name,
            data.tokenizer,
            data.vocab_size,
            data.validation_tokens,
            data.sequence_length,
            row.target_offset,
        )
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def headline_length(rows: Sequence[SummaryRow], wanted: int = 2048) -> int | None:
    """The cache length nearest to `wanted` (by ratio) that half the rows reach, baselines included.

    Where there is none such, the one that most rows reach; None without any measured cache.
    """
    reached = {row.name: {cache.tokens for cache in row.cache} for row in rows}
    lengths = sorted(set().union(*reached.values()))
    counts = {n: sum(n in known for known in reached.values()) for n in lengths}
    half = [n for n in lengths if 2 * counts[n] >= len(rows)]
    anchors = {row.comparison.reference or row.name for row in rows} & set(reached)
    fair = [n for n in half if all(n in reached[name] for name in anchors)]
    most = [n for n in lengths if counts[n] == max(counts.values())]
    return min(fair or most, key=lambda n: (max(n, wanted) / min(n, wanted), n), default=None)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats, by rising first coordinate.

    Less is better in both; a point is beaten by one that is no worse in both and better in one.
    """

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other[0] <= point[0] and other[1] <= point[1] and other != point for other in points
        )

    return sorted(
        (i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i]
    )
