"""`contextlm eval CHECKPOINT --long`: what is printed."""

from __future__ import annotations

from pathlib import Path

from contextlm.cli.output import print_json, print_table
from contextlm.evaluation.long_report import LongReport, evaluate_long
from contextlm.report import numbers


def show_long(
    folder: Path,
    corpus: str,
    device: str,
    sequence_length: int | None,
    samples: int | None,
    as_json: bool,
) -> None:
    """Measure a checkpoint on long texts, and print a table or one JSON object.

    Raises:
        InputError: the checkpoint or the corpus is not usable.
    """
    report = evaluate_long(
        folder, corpus=corpus, device=device, sequence_length=sequence_length, samples=samples
    )
    if as_json:
        print_json(report)
        return
    caption = (
        f"{report.checkpoint}: {report.architecture}, {numbers.count(report.parameters)} "
        f"parameters, {report.corpus}, {numbers.count(report.windows)} "
        f"{'texts' if report.positions else 'questions'}, trained on {report.trained:,} tokens"
    )
    if report.positions:
        _print_positions(report, caption)
    else:
        lines = [
            [entry.level, numbers.count(entry.answers), numbers.percent(entry.accuracy)]
            for entry in report.retrieval
        ]
        print_table(["level", "answers", "right answers"], lines, caption=caption)
        for held in report.cache:
            size = numbers.human_bytes(held.logical)
            print(f"cache after {held.tokens:,} tokens: {size}")
    if report.remarks:
        print(f"note: {'; '.join(report.remarks)}")


def _print_positions(report: LongReport, caption: str) -> None:
    held_at = {held.tokens: held for held in report.cache}
    lines = [
        [
            f"{bucket.first:,} to {bucket.last - 1:,}",
            numbers.decimal(bucket.last / report.trained, 2),
            numbers.count(bucket.tokens),
            numbers.decimal(bucket.loss, 4),
            numbers.perplexity(bucket.ppl),
            numbers.human_bytes(held_at[bucket.last].logical),
        ]
        for bucket in report.positions
    ]
    columns = ["positions", "end, x trained", "tokens", "loss", "PPL", "cache at the end"]
    print_table(columns, lines, caption=caption)
