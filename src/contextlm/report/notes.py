"""What a reader must know before believing the tables, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contextlm.report import numbers
from contextlm.report.document import windows_of_train_ppl
from contextlm.report.frontier import comparable_groups
from contextlm.report.numbers import amount
from contextlm.report.setting import setting_notes
from contextlm.report.summary import SummaryRow, run_labels
from contextlm.results.facts import PhaseOneFacts, TuningTrial
from contextlm.results.result import Run

STOP_AT = 0.9  # a recipe's phase 1 stops at this converged share unless it says otherwise
MATCHED_PERCENT = 2.0  # contenders within this of the baseline's parameters count as matched


def notes(runs: Sequence[Run], rows: Sequence[SummaryRow]) -> list[str]:
    """The notes of a report; empty if there is nothing to beware of.

    Args:
        runs: what is reported.
        rows: `summarise_runs(runs)`.
    """
    return [
        *setting_notes(runs, rows),
        *_phase1_notes(runs, rows),
        *_missing_notes(runs),
        *_tuning_notes(rows),
        *_comparison_notes(rows),
        *_size_notes(rows),
        *_length_notes(rows),
    ]


def detail_notes(rows: Sequence[SummaryRow]) -> list[str]:
    """Notes on figures that only the full report shows."""
    first: dict[tuple[int, int], list[SummaryRow]] = {}
    for row in rows:
        part = windows_of_train_ppl(row)
        if part is not None:
            first.setdefault(part, []).append(row)
    return [
        f"Train PPL with the best weights was measured on the first {numbers.count(windows)} of "
        f"{numbers.count(total)} train windows ({_names(measured)})."
        for (windows, total), measured in first.items()
    ]


def _phase1_notes(runs: Sequence[Run], rows: Sequence[SummaryRow]) -> list[str]:
    recipes = {label: run.recipe for run, label in zip(runs, run_labels(runs), strict=True)}
    found = []
    for row in rows:
        facts = [o.result.phase1 for o in row.outcomes if o.result.phase1 is not None]
        if facts:
            contenders = recipes[row.run].get("contenders", [])
            settings = next(
                (c.get("phase1") for c in contenders if c.get("name") == row.contender), None
            )
            found += _unconverged(row.name, min(facts, key=lambda f: f.converged), settings or {})
    return found


def _unconverged(name: str, worst: PhaseOneFacts, settings: Mapping[str, Any]) -> list[str]:
    """The note on the seed that converged least, if that was not enough."""
    wanted = float(settings.get("stop_at", STOP_AT))
    if worst.converged >= wanted:
        return []
    limit = settings.get("max_iterations", worst.iterations)
    # More decimals where one would round the share up to what was asked for.
    places = 1 if round(100 * worst.converged, 1) < 100 * wanted else 3
    return [
        f"Phase 1 of {name} stopped at its limit of {numbers.count(limit)} iterations with "
        f"{numbers.decimal(100 * worst.converged, places)} % converged "
        f"(the recipe asks for {numbers.plain(100 * wanted)} %)."
    ]


def _tuning_notes(rows: Sequence[SummaryRow]) -> list[str]:
    """How each learning rate was chosen, contenders with the same trials' settings together."""
    found: dict[tuple[float, int], list[str]] = {}
    for row in rows:
        facts = row.outcomes[0].result.tuning
        if facts is not None:
            tried = ", ".join(_tried(trial) for trial in facts.trials)
            end = "; at the end of what was tried, another may be better" if facts.at_an_end else ""
            chosen = f"{row.name} {facts.chosen:g} (tried: {tried}{end})"
            found.setdefault((facts.share, facts.seed), []).append(chosen)
    return [
        f"Learning rates were chosen by validation loss after training on "
        f"{numbers.percent(share)} of the windows with seed {seed}: {'; '.join(chosen)}."
        for (share, seed), chosen in found.items()
    ]


def _tried(trial: TuningTrial) -> str:
    broke = " (broke down)" if trial.validation_loss is None else ""
    return f"{trial.learning_rate:g}{broke}"


def _missing_notes(runs: Sequence[Run]) -> list[str]:
    missing = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        above = f"{label}/" if len(runs) > 1 else ""
        for name, seeds in run.missing_seeds().items():
            plural = "seed" if len(seeds) == 1 else "seeds"
            missing.append(f"{above}{name} ({plural} {', '.join(map(str, seeds))})")
    return [f"Not finished, and so not shown: {'; '.join(missing)}."] if missing else []


def _comparison_notes(rows: Sequence[SummaryRow]) -> list[str]:
    found = []
    groups = comparable_groups(rows)
    for group in groups:
        if len({row.corpus.train_tokens for row in group}) > 1:
            found.append(f"{_names(group)} were trained on different numbers of tokens.")
        if len({row.precision for row in group}) > 1:
            found.append(f"{_names(group)} were trained in different precisions.")
    if len({group[0].corpus.model_dump_json(exclude={"unigram_ppl"}) for group in groups}) > 1:
        found.append(
            "The runs differ in data, tokenizer or window; perplexities are compared only "
            "between contenders that share them."
        )
    for row in rows:
        reference = row.comparison.reference
        if row.target_offset > 1:
            beside = f"; it is compared with {reference}" if reference else ""
            found.append(
                f"{row.name} predicts the token {row.target_offset} ahead, which is harder than "
                f"the next one{beside}."
            )
        alone = reference is None and not row.baseline
        if alone and not any(other.comparison.reference == row.name for other in rows):
            found.append(f"{row.name} has no baseline result to be compared with.")
    return found


def _size_notes(rows: Sequence[SummaryRow]) -> list[str]:
    found = []
    for row in rows:
        change = row.comparison.parameters
        if change is not None and abs(change) > MATCHED_PERCENT:
            found.append(
                f"{row.name} has {amount(change)} {'more' if change > 0 else 'fewer'} parameters "
                f"than {row.comparison.reference}: the two are not matched in size."
            )
    return found


def _length_notes(rows: Sequence[SummaryRow]) -> list[str]:
    longest = max((cache.tokens for row in rows for cache in row.cache), default=0)
    found = []
    for row in rows:
        reach = max((cache.tokens for cache in row.cache), default=0)
        if reach < longest:
            measured = f"up to {numbers.count(reach)}" if reach else "at none of the lengths"
            head = f"{row.name} stops short of {numbers.count(longest)} tokens"
            found.append(f"{head}: its cache was measured {measured}.")
    return found


def _names(rows: Sequence[SummaryRow]) -> str:
    return ", ".join(row.name for row in rows)
