"""From the outcomes of seeds to one typed row per contender, compared with its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Literal

from contextlm.report.numbers import Stat, percent_change
from contextlm.report.resources import StageSummary, StoreSummary, stage_summaries, store_summary
from contextlm.results.facts import CacheBytes, CorpusFacts, EmbeddingFacts
from contextlm.results.result import Outcome, Run

Certainty = Literal["beyond", "within", "one seed", "two seeds"]
SEEDS_TO_TELL = 3
TOO_FEW_SEEDS: tuple[Certainty, ...] = ("one seed", "two seeds")


@dataclass(frozen=True)
class PhaseOneSummary:
    """Phase 1 over the seeds. Ranks in dimensions of `context_dim`, `converged` in 0..1."""

    iterations: Stat
    converged: Stat
    context_dim: int
    rank_train: Stat
    rank_validation: Stat


@dataclass(frozen=True)
class Comparison:
    """Differences from the reference, in percent of it; None where one of the two has no figure.

    `reference` is the row's name, None for a baseline and where there is nothing to compare with.
    `certainty` is ``beyond`` or ``within`` two standard deviations of the difference of the mean
    perplexities, or says that there are too few seeds to tell. `cache` maps tokens to the
    difference in logical bytes.
    """

    reference: str | None = None
    ppl: float | None = None
    loss: float | None = None
    parameters: float | None = None
    seconds_per_epoch: float | None = None
    training_rate: float | None = None
    prefill_rate: float | None = None
    decode_rate: float | None = None
    cache: dict[int, float | None] = field(default_factory=dict)
    certainty: Certainty | None = None


@dataclass(frozen=True)
class SummaryRow:
    """One contender: means over its seeds. Losses in nats, rates in tokens a second.

    `name` is unique in the report, `contender` is the recipe's name. Memory peaks are the largest
    over the seeds, `stages` medians. `train_validation_gap` is validation PPL over the best epoch's
    running train PPL, `unigram_share` validation PPL over the data's unigram PPL.
    """

    name: str
    run: str
    contender: str
    architecture: str
    recipe: str
    scale: str
    precision: str
    baseline: bool
    target_offset: int
    seeds: tuple[int, ...]
    corpus: CorpusFacts
    parameters_total: int
    parameters_trainable: int
    loss: Stat
    ppl: Stat
    unigram_share: Stat | None
    bits_per_byte: Stat | None
    accuracy: Stat
    train_ppl: Stat
    train_ppl_running: Stat
    train_validation_ratio: Stat
    train_validation_gap: Stat
    best_epoch: Stat
    epochs: Stat
    seconds_per_epoch: Stat | None
    total_seconds: Stat
    phase1: PhaseOneSummary | None
    phase1_seconds: Stat | None
    embedding: EmbeddingFacts | None
    store: StoreSummary | None
    stages: tuple[StageSummary, ...]
    cache: tuple[CacheBytes, ...]
    cache_dtype: str
    training_rate: Stat
    prefill_rate: Stat
    decode_rate: Stat
    speed_tokens: int
    peak_host_bytes: int
    peak_accelerator_bytes: int | None
    reported: dict[str, float]
    reported_epochs: dict[str, list[float | None]]
    outcomes: tuple[Outcome, ...] = field(repr=False)
    comparison: Comparison = field(default_factory=Comparison)

    @property
    def shown_name(self) -> str:
        """The name, which says of a baseline that it is one."""
        return f"{self.name} (baseline)" if self.baseline else self.name

    def stage(self, name: str) -> StageSummary | None:
        """The memory at the end of a stage, None where the contender had no such stage."""
        return next((stage for stage in self.stages if stage.stage == name), None)

    def cache_at(self, tokens: int) -> CacheBytes | None:
        """The cache measured after `tokens` tokens, None where the model stops short of them."""
        return next((cache for cache in self.cache if cache.tokens == tokens), None)


def summarise(outcomes: Sequence[Outcome], run: str = "") -> list[SummaryRow]:
    """One row per contender, in the order of `outcomes`, each compared with the run's baseline."""
    by_name: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_name.setdefault(outcome.result.contender, []).append(outcome)
    rows = [_row(seeds, run) for seeds in by_name.values()]
    return [replace(row, comparison=_comparison(row, rows)) for row in rows]


def summarise_runs(runs: Sequence[Run]) -> list[SummaryRow]:
    """The rows of several runs; each row is compared with the baseline of its own run.

    Contenders whose names clash get their run folder's name in front (``run-3/new-llm``).
    """
    labels = run_labels(runs)
    rows = [
        row
        for run, label in zip(runs, labels, strict=True)
        for row in summarise(run.outcomes, label)
    ]
    names = [row.contender for row in rows]
    clashing = {name for name in names if names.count(name) > 1}

    def shown(run: str, contender: str) -> str:
        return f"{run}/{contender}" if contender in clashing else contender

    renamed = []
    for row in rows:
        against = row.comparison
        if against.reference is not None:
            against = replace(against, reference=shown(row.run, against.reference))
        renamed.append(replace(row, name=shown(row.run, row.contender), comparison=against))
    return renamed


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A short name per run that no other run has: its folder's name, with parents where needed."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path.name} ({number})" for number, path in enumerate(paths, start=1)]


def certainty(row: Stat, reference: Stat) -> Certainty:
    """Whether |difference of means| exceeds 2 sqrt(sd_a^2 + sd_b^2); needs 3 seeds each."""
    fewest = min(row.seeds, reference.seeds)
    if fewest < SEEDS_TO_TELL:
        return "one seed" if fewest == 1 else "two seeds"
    spread = sqrt((row.sd or 0.0) ** 2 + (reference.sd or 0.0) ** 2)
    return "beyond" if abs(row.mean - reference.mean) > 2 * spread else "within"


def reference_of(row: SummaryRow, rows: Sequence[SummaryRow]) -> SummaryRow | None:
    """What `row` is compared with: the baseline, if it predicts the same token.

    A contender with another target offset is compared with the one that has the baseline's
    architecture and parameter count and its own offset. None for these two themselves.
    """
    baseline = next((other for other in rows if other.baseline), None)
    if baseline is None:
        return None
    for other in rows:
        same_model = (other.architecture, other.parameters_total) == (
            baseline.architecture,
            baseline.parameters_total,
        )
        stands_in = other is baseline or (
            same_model and other.target_offset != baseline.target_offset
        )
        if stands_in and other.target_offset == row.target_offset:
            return None if other is row else other
    return None


def _comparison(row: SummaryRow, rows: Sequence[SummaryRow]) -> Comparison:
    other = reference_of(row, rows)
    if other is None:
        return Comparison()
    cache: dict[int, float | None] = {}
    for mine in row.cache:
        theirs = other.cache_at(mine.tokens)
        cache[mine.tokens] = percent_change(mine.logical, theirs.logical) if theirs else None
    # A model with few positions is timed on a shorter prompt, which is another question.
    same_prompt = row.speed_tokens == other.speed_tokens
    return Comparison(
        reference=other.contender,
        ppl=percent_change(row.ppl.mean, other.ppl.mean),
        loss=percent_change(row.loss.mean, other.loss.mean),
        parameters=percent_change(row.parameters_total, other.parameters_total),
        seconds_per_epoch=_stat_change(row.seconds_per_epoch, other.seconds_per_epoch),
        training_rate=_stat_change(row.training_rate, other.training_rate),
        prefill_rate=_stat_change(row.prefill_rate, other.prefill_rate) if same_prompt else None,
        decode_rate=_stat_change(row.decode_rate, other.decode_rate) if same_prompt else None,
        cache=cache,
        certainty=certainty(row.ppl, other.ppl),
    )


def _stat_change(value: Stat | None, base: Stat | None) -> float | None:
    return percent_change(value.mean, base.mean) if value and base else None


def _row(outcomes: Sequence[Outcome], run: str) -> SummaryRow:
    results = [outcome.result for outcome in outcomes]
    timings = [outcome.timings for outcome in outcomes]
    first = results[0]
    epochs = [t.epoch_seconds for t in timings if t.epoch_seconds]
    peaks = [t.peak_accelerator_bytes for t in timings if t.peak_accelerator_bytes is not None]
    return SummaryRow(
        name=first.contender,
        run=run,
        contender=first.contender,
        architecture=first.architecture,
        recipe=first.recipe,
        scale=first.scale,
        precision=first.precision,
        baseline=first.baseline,
        target_offset=first.target_offset,
        seeds=tuple(result.seed for result in results),
        corpus=first.corpus,
        parameters_total=first.parameters_total,
        parameters_trainable=first.parameters_trainable,
        loss=Stat.of(r.validation_loss for r in results),
        ppl=Stat.of(r.validation_ppl for r in results),
        unigram_share=Stat.of_known(
            r.validation_ppl / base if (base := r.corpus.unigram_ppl) is not None else None
            for r in results
        ),
        bits_per_byte=Stat.of_known(r.bits_per_byte for r in results),
        accuracy=Stat.of(r.accuracy for r in results),
        train_ppl=Stat.of(r.train_ppl for r in results),
        train_ppl_running=Stat.of(r.train_ppl_running for r in results),
        train_validation_ratio=Stat.of(r.train_validation_ratio for r in results),
        train_validation_gap=Stat.of(r.validation_ppl / r.train_ppl_running for r in results),
        best_epoch=Stat.of(r.best_epoch for r in results),
        epochs=Stat.of(r.epochs for r in results),
        seconds_per_epoch=Stat.of(sum(e) / len(e) for e in epochs) if epochs else None,
        total_seconds=Stat.of(t.total_seconds for t in timings),
        phase1=_phase1(outcomes),
        phase1_seconds=Stat.of_known(t.phase1_seconds for t in timings),
        embedding=first.embedding,
        store=store_summary(outcomes),
        stages=stage_summaries(timings),
        cache=_largest_caches(outcomes),
        cache_dtype=first.cache_dtype,
        training_rate=Stat.of(t.training_tokens_per_second for t in timings),
        prefill_rate=Stat.of(t.prefill_tokens_per_second for t in timings),
        decode_rate=Stat.of(t.decode_tokens_per_second for t in timings),
        speed_tokens=timings[0].speed_tokens,
        peak_host_bytes=max(t.peak_host_bytes for t in timings),
        peak_accelerator_bytes=max(peaks) if peaks else None,
        reported=dict(first.reported),
        reported_epochs=dict(first.reported_epochs),
        outcomes=tuple(outcomes),
    )


def _phase1(outcomes: Sequence[Outcome]) -> PhaseOneSummary | None:
    facts = [o.result.phase1 for o in outcomes if o.result.phase1 is not None]
    if not facts:
        return None
    return PhaseOneSummary(
        iterations=Stat.of(f.iterations for f in facts),
        converged=Stat.of(f.converged for f in facts),
        context_dim=facts[0].context_dim,
        rank_train=Stat.of(f.effective_rank_train for f in facts),
        rank_validation=Stat.of(f.effective_rank_validation for f in facts),
    )


def _largest_caches(outcomes: Sequence[Outcome]) -> tuple[CacheBytes, ...]:
    """Per length the largest over the seeds: a cache does not depend on the weights."""
    largest: dict[int, CacheBytes] = {}
    for outcome in outcomes:
        for cache in outcome.result.cache:
            known = largest.get(cache.tokens, cache)
            largest[cache.tokens] = CacheBytes(
                tokens=cache.tokens,
                logical=max(cache.logical, known.logical),
                resident=max(cache.resident, known.resident),
            )
    return tuple(largest[tokens] for tokens in sorted(largest))
