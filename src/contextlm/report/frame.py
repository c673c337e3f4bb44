"""All that runs found as one table: a row a contender, seed and budget, plain column names.

The report's tables, charts and sentences, and ``results/runs.csv``, are made from this frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from contextlm.results.facts import TaskScore, perplexity
from contextlm.results.result import Outcome, Run

DIVERGED_LOSS = 80.0  # nats a token; no vocabulary's uniform guess comes near it

# What a machine took, which its other work changes: it stays out of files that are kept.
TIMED = (
    "seconds_per_epoch",
    "seconds",
    "phase1_seconds",
    "store_seconds",
    "training_rate",
    "prefill_rate",
    "decode_rate",
    "speed_tokens",
    "peak_host_bytes",
    "peak_accelerator_bytes",
)
_STAGES = "host_bytes_", "accelerator_bytes_"
# Names that recipes have used for one figure of a document.
_ALIASES = {
    "parameters_total": "parameters",
    "parameters_trainable": "trainable",
    "iterations": "phase1_iterations",
    "converged": "phase1_converged",
    "effective_rank": "effective_rank_train",
}


def seed_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a contender, seed and budget, in the order of the runs and of their recipes.

    Columns are flat. Losses are in nats a token, ranks in dimensions of `context_dim`, shares in
    0..1, rates in tokens a second, sizes in bytes. ``cache_bytes_N`` (logical) and
    ``cache_resident_N`` are those after N tokens, ``ppl_at_N`` the perplexity of a long text's
    first N tokens, ``answers_LEVEL`` the share of right answers at a level of a synthetic task,
    ``score_TASK_METRIC`` a figure of a task of lm-eval and ``stderr_TASK_METRIC`` its standard
    error, ``reported_KEY`` the source document's own figures, ``host_bytes_STAGE`` and
    ``accelerator_bytes_STAGE`` the memory in use at the end of a stage; spaces in levels and stages
    become underscores. `share` is the recipe's budget as a share of its training samples,
    `epoch_limit` the epochs that it allows, `epochs` those that were trained. `diverged` says that
    the validation loss is not finite or at least `DIVERGED_LOSS`. What a contender does not have is
    missing (NA or NaN).
    """
    rows = [
        {"run": label, **_row(run, outcome)}
        for run, label in zip(runs, run_labels(runs), strict=True)
        for outcome in run.outcomes
    ]
    names = sorted({name: None for row in rows for name in row}, key=_place)
    return pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in names})


def csv_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` without what depends on how busy a machine was: speeds, times, memory in use."""
    timed = [name for name in frame if name in TIMED or str(name).startswith(_STAGES)]
    return frame.drop(columns=timed).dropna(axis="columns", how="all")


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A short name per run that no other run has: its folder's name, with parents where needed."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path.name} ({number})" for number, path in enumerate(paths, start=1)]


def reported_name(key: str) -> str:
    """The one name of a document's figure, whichever of its names the recipe uses."""
    key = key.replace("validation", "val")
    return _ALIASES.get(key, key)


def _row(run: Run, outcome: Outcome) -> dict[str, Any]:
    result, timings = outcome.result, outcome.timings
    data, phase1, store = result.corpus, result.phase1, result.store
    embedding, healing, seconds = result.embedding, result.healing, timings.epoch_seconds
    return {
        "recipe": result.recipe,
        "scale": result.scale,
        "corpus": data.name,
        "tokenizer": data.tokenizer,
        "vocab_size": data.vocab_size,
        "contender": result.contender,
        "architecture": result.architecture,
        "baseline": result.baseline,
        "seed": result.seed,
        "share": result.budget,
        "job": result.job,
        "setting": result.setting,
        "target_offset": result.target_offset,
        "sequence_length": data.sequence_length,
        "train_tokens": data.train_tokens,
        "validation_tokens": data.validation_tokens,
        "train_windows": data.train_windows,
        "text_passes": data.text_passes,
        "validation_windows": data.validation_windows,
        "precision": result.precision,
        "epoch_limit": _epoch_limit(run),
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "parameters": result.parameters_total,
        "trainable": result.parameters_trainable,
        "learning_rate": result.learning_rate,
        "embedding": embedding.source if embedding else None,
        "validation_loss": result.validation_loss,
        "validation_ppl": result.validation_ppl,
        "diverged": not result.validation_loss < DIVERGED_LOSS,
        "unigram_ppl": data.unigram_ppl,
        "train_ppl": result.train_ppl,
        "train_ppl_windows": result.train_ppl_windows,
        "train_ppl_running": result.train_ppl_running,
        "accuracy": result.accuracy,
        "bits_per_byte": result.bits_per_byte,
        "phase1_iterations": phase1.iterations if phase1 else None,
        "phase1_converged": phase1.converged if phase1 else None,
        "context_dim": phase1.context_dim if phase1 else None,
        "rank_train": phase1.effective_rank_train if phase1 else None,
        "rank_validation": phase1.effective_rank_validation if phase1 else None,
        "policy": healing.policy if healing else None,
        "healed": healing.train if healing else None,
        "policy_share": healing.share if healing else None,
        "policy_tokens": healing.tokens if healing else None,
        "kl_before": healing.before.kl if healing else None,
        "kl_after": healing.after.kl if healing else None,
        "same_before": healing.before.same_tokens if healing else None,
        "same_after": healing.after.same_tokens if healing else None,
        "ppl_original": perplexity(healing.full.loss) if healing else None,
        "ppl_before": perplexity(healing.before.loss) if healing else None,
        "ppl_after": perplexity(healing.after.loss) if healing else None,
        "passkey_original": healing.full.found if healing else None,
        "passkey_before": healing.before.found if healing else None,
        "passkey_after": healing.after.found if healing else None,
        "store_fill": store.fill if store else None,
        "store_dtype": store.dtype if store else None,
        "store_train_bytes": store.train_bytes if store else None,
        "store_validation_bytes": store.validation_bytes if store else None,
        "drift_train": store.drift_train if store else None,
        "drift_validation": store.drift_validation if store else None,
        "cache_dtype": result.cache_dtype,
        **{f"cache_bytes_{cache.tokens}": cache.logical for cache in result.cache},
        **{f"cache_resident_{cache.tokens}": cache.resident for cache in result.cache},
        **{f"ppl_at_{n}": ppl for n, ppl in result.ppl_at().items()},
        **{f"answers_{_plain(entry.level)}": entry.accuracy for entry in result.retrieval},
        **{f"score_{_figure(score)}": score.value for score in result.tasks},
        **{f"stderr_{_figure(score)}": score.stderr for score in result.tasks},
        **{f"reported_{reported_name(key)}": value for key, value in result.reported.items()},
        "seconds_per_epoch": sum(seconds) / len(seconds) if seconds else None,
        "seconds": timings.total_seconds,
        "phase1_seconds": timings.phase1_seconds,
        "store_seconds": timings.store_seconds,
        "training_rate": timings.training_tokens_per_second,
        "prefill_rate": timings.prefill_tokens_per_second,
        "decode_rate": timings.decode_tokens_per_second,
        "speed_tokens": timings.speed_tokens,
        "peak_host_bytes": timings.peak_host_bytes,
        "peak_accelerator_bytes": timings.peak_accelerator_bytes,
        **{f"host_bytes_{_plain(s.stage)}": s.host_bytes for s in timings.stages},
        **{f"accelerator_bytes_{_plain(s.stage)}": s.accelerator_bytes for s in timings.stages},
    }


def _figure(score: TaskScore) -> str:
    return _plain(f"{score.task}_{score.metric}")


def _plain(text: str) -> str:
    return text.replace(" ", "_")


def _epoch_limit(run: Run) -> int | None:
    training = run.recipe.get("training")
    limit = training.get("epochs") if isinstance(training, dict) else None
    return limit if isinstance(limit, int) and 0 <= limit < 2**31 else None


def _place(name: str) -> tuple[int, int]:
    """Where a column stands: those with a length or a level in their name after the plain ones.

    Sorting is stable, so all others keep the order in which rows have them.
    """
    for place, start in enumerate(("ppl_at_", "cache_bytes_", "cache_resident_"), start=1):
        if name.startswith(start):
            return place, int(name.removeprefix(start))
    for place, start in enumerate(("answers_", "score_", "stderr_", "reported_"), start=4):
        if name.startswith(start):
            return place, 0
    return (8 if name in TIMED else 9 if name.startswith(_STAGES) else 0), 0


def _column(values: list[Any]) -> pd.Series[Any]:
    """Whole numbers and truths stay such where some are missing."""
    known = {type(value) for value in values if value is not None}
    if known == {int}:
        return pd.Series(values, dtype="Int64")
    if known <= {int, float} and known:
        return pd.Series([math.nan if v is None else float(v) for v in values], dtype="float64")
    return pd.Series(values, dtype="bool" if known == {bool} else "object")
