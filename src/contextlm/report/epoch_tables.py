"""The source document's perplexities epoch by epoch, beside those of this run's epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from contextlm.report import numbers
from contextlm.report.document import reported_value
from contextlm.report.numbers import ABSENT, Stat, with_deviation
from contextlm.report.sheet import Column, Table, make_table
from contextlm.report.summary import SummaryRow
from contextlm.results.result import PhaseTwoRow

BEST = " *"  # beside the validation figure of a best epoch

Epochs = dict[int, PhaseTwoRow]


def epoch_tables(rows: Sequence[SummaryRow]) -> list[Table]:
    """A table for each contender whose perplexities the document gives by epoch.

    It has a row for every epoch of the longer of both; the measured figures are means over the
    seeds that reached the epoch.
    """
    return [_table(row) for row in rows if any(map(_known, row.reported_epochs.values()))]


def _table(row: SummaryRow) -> Table:
    seeds = [_epochs(row, number) for number in range(len(row.outcomes))]
    measured_best = {outcome.result.best_epoch for outcome in row.outcomes}
    document_best = _document_best(row)
    unigram = row.corpus.unigram_ppl
    columns = [
        Column("epoch", "text"),
        Column("document train PPL", "reported"),
        Column("document validation PPL", "reported"),
        Column("train PPL, running"),
        Column("validation PPL"),
        *([] if unigram is None else [Column("share of unigram PPL")]),
    ]
    lines = []
    for epoch in range(1, _last(row, seeds) + 1):
        line = [
            str(epoch),
            _reported(row, "train_ppl", epoch),
            _starred(_reported(row, "val_ppl", epoch), epoch == document_best),
            _measured(seeds, epoch, lambda e: e.train_ppl, numbers.perplexity),
            _starred(
                _measured(seeds, epoch, lambda e: e.validation_ppl, numbers.perplexity),
                epoch in measured_best,
            ),
        ]
        if unigram is not None:
            share = _share_of(unigram)
            line.append(_measured(seeds, epoch, share, numbers.percent))
        lines.append(line)
    return make_table(f"Epoch by epoch, document and this run: {row.name}", columns, lines)


def _epochs(row: SummaryRow, seed: int) -> Epochs:
    """The lines of phase 2 of one seed, by epoch."""
    history = row.outcomes[seed].history
    return {line.epoch: line for line in history if isinstance(line, PhaseTwoRow)}


def _last(row: SummaryRow, seeds: Sequence[Epochs]) -> int:
    """The last epoch that the document or a seed has a figure of."""
    lengths = [max(_known(values), default=0) for values in row.reported_epochs.values()]
    return max(*lengths, *(max(epochs, default=0) for epochs in seeds), 0)


def _known(values: Sequence[float | None]) -> dict[int, float]:
    """Epoch, from 1, to figure, without the epochs that the document leaves out."""
    return {epoch: value for epoch, value in enumerate(values, start=1) if value is not None}


def _document_best(row: SummaryRow) -> int | None:
    """The best epoch as the document names it; without a name the one of lowest validation PPL."""
    named = reported_value(row, "best_epoch")
    if named is not None:
        return int(named)
    curve = _known(row.reported_epochs.get("val_ppl", []))
    return min(curve, key=lambda epoch: curve[epoch], default=None)


def _reported(row: SummaryRow, key: str, epoch: int) -> str:
    """The document's figure, with the decimals of the longest in its column (1,326.00)."""
    known = _known(row.reported_epochs.get(key, []))
    if epoch not in known:
        return ABSENT
    places = max(len(numbers.plain(value).partition(".")[2]) for value in known.values())
    return numbers.decimal(known[epoch], places)


def _measured(
    seeds: Sequence[Epochs],
    epoch: int,
    figure: Callable[[PhaseTwoRow], float],
    show: Callable[[float], str],
) -> str:
    """The mean over the seeds that reached the epoch, which says so where not all did."""
    stat = Stat.of_known(figure(epochs[epoch]) if epoch in epochs else None for epochs in seeds)
    text = with_deviation(stat, show)
    if stat is None or stat.seeds == len(seeds):
        return text
    return f"{text} ({stat.seeds} of {numbers.seeds_text(len(seeds))})"


def _share_of(unigram: float) -> Callable[[PhaseTwoRow], float]:
    return lambda epoch: epoch.validation_ppl / unigram


def _starred(text: str, best: bool) -> str:
    return text + BEST if best else text
