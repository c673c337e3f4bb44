"""The report's smaller print: data, settings, environment and history, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contextlm.report import numbers
from contextlm.report.document import loss
from contextlm.report.numbers import ABSENT
from contextlm.report.sheet import Column, Table, make_table
from contextlm.report.summary import SummaryRow
from contextlm.results.result import PhaseOneRow, PhaseTwoRow, Run

_SEED = Column("seed", "text")
_SETTINGS = (Column("key", "text"), Column("value", "text"))


def data_table(rows: Sequence[SummaryRow]) -> Table:
    """The corpus, tokenizer and tokens that each run really used."""
    columns = ["corpus", "scale", "tokenizer", "vocabulary", "window"]
    columns += ["train tokens", "validation tokens", "train windows", "validation windows"]
    lines: dict[tuple[str, ...], None] = {}
    for row in rows:
        data = row.corpus
        figures = (
            data.vocab_size,
            data.sequence_length,
            data.train_tokens,
            data.validation_tokens,
            data.train_windows,
            data.validation_windows,
        )
        texts = data.name, row.scale, data.tokenizer
        lines[(*texts, *map(numbers.count, figures))] = None  # a dict keeps the order
    return make_table("Data", [Column(c, "text") for c in columns], list(lines))


def settings_table(run: Run) -> Table:
    """The scale and the resolved recipe without its contenders, one dotted key a line.

    Keys without a value are left out.
    """
    skipped = "name", "question", "document", "contenders", "resolved_from", "scale"
    settings = {key: value for key, value in run.recipe.items() if key not in skipped}
    # The recipe's own word for it, `resolved_from`, is there for loading it again.
    scale = run.outcomes[0].result.scale if run.outcomes else run.recipe.get("resolved_from")
    return make_table("Settings", _SETTINGS, _flatten(_given({"scale": scale, **settings})))


def contenders_table(run: Run) -> Table:
    """The contenders' own settings, as far as they have a value.

    The document's figures for them stand elsewhere.
    """
    skipped = "name", "reported", "reported_epochs"
    contenders = {
        str(contender.get("name")): {k: v for k, v in contender.items() if k not in skipped}
        for contender in run.recipe.get("contenders", [])
    }
    return make_table("Contenders", _SETTINGS, _flatten(_given(contenders)))


def environment_table(run: Run) -> Table:
    """What the run ran on: commit, versions, hardware."""
    return make_table("Environment", _SETTINGS, _flatten(run.environment))


def history_tables(row: SummaryRow) -> list[Table]:
    """Every epoch of every seed, then every phase-1 iteration, of one contender."""
    epochs, iterations = [], []
    for outcome in row.outcomes:
        seed = str(outcome.result.seed)
        for line in outcome.history:
            if isinstance(line, PhaseTwoRow):
                epochs.append([seed, *_epoch_cells(line, outcome.result.best_epoch)])
            elif isinstance(line, PhaseOneRow):
                iterations.append([seed, *_iteration_cells(line)])
    tables = []
    if epochs:
        columns = "train loss, running", "train PPL, running", "validation loss", "validation PPL"
        headings = [_SEED, Column("epoch", "text"), *map(Column, (*columns, "accuracy"))]
        headings.append(Column("learning rate", "text"))
        tables.append(make_table(f"Epochs of {row.name}", headings, epochs))
    if iterations:
        headings = [_SEED, Column("iteration", "text"), Column("converged"), Column("loss")]
        tables.append(make_table(f"Phase-1 iterations of {row.name}", headings, iterations))
    return tables


def _epoch_cells(line: PhaseTwoRow, best: int) -> list[str]:
    return [
        f"{line.epoch} (best)" if line.epoch == best else str(line.epoch),
        loss(line.train_loss),
        numbers.perplexity(line.train_ppl),
        loss(line.validation_loss),
        numbers.perplexity(line.validation_ppl),
        numbers.percent(line.accuracy),
        f"{line.learning_rate:.3g}",
    ]


def _iteration_cells(line: PhaseOneRow) -> list[str]:
    shown = ABSENT if line.loss is None else loss(line.loss)
    return [str(line.iteration), numbers.percent(line.converged), shown]


def _given(value: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have a value: no null, no empty list, no mapping of such."""
    kept = {key: _given(item) if isinstance(item, dict) else item for key, item in value.items()}
    return {key: item for key, item in kept.items() if item not in (None, [], {})}


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and printed values; a list of plain values stays on one line."""
    lines: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, list) and any(isinstance(entry, dict) for entry in item):
            item = {str(number): entry for number, entry in enumerate(item)}
        if isinstance(item, dict) and item:
            lines += _flatten(item, f"{name}.")
        else:
            lines.append((name, _plain(item)))
    return lines


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if value is None or value == {}:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
