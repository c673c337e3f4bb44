"""What a run leaves behind, typed and versioned: results, timings, history, environment.

A `Result` holds no times, so that two runs of one recipe can be compared byte by byte; times live
in `Timings`. Pydantic only: reading a run needs no torch.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from contextlm.base.errors import InputError
from contextlm.base.files import is_file
from contextlm.base.visible import shown
from contextlm.results.facts import (
    CacheBytes,
    CorpusFacts,
    Count,
    EmbeddingFacts,
    Figure,
    Finite,
    HealingFacts,
    Perplexity,
    PhaseOneFacts,
    PositionLoss,
    Positive,
    Record,
    RetrievalAccuracy,
    StoreFacts,
    TaskScore,
    TuningFacts,
    perplexity,
)
from contextlm.results.run_files import first_problem, read_mapping, read_recipe, read_text

RESULT_VERSION: Literal[1] = 1


class Result(Record):
    """One contender with one seed. Losses in nats per token, `accuracy` and `converged` in 0..1.

    `bits_per_byte` is None where targets lie further ahead than the next token: a loss is a code
    length only if every token is predicted from all before it. It is None, too, where samples are
    lines or questions, and where the tokenizer has one token for all unknown words.
    `trained_tokens` are the targets that phase 2 trained on up to the weights that were measured,
    repeats counted; `budget` is the share of the recipe's training samples that they come from,
    where the recipe names such, and `corpus` then counts that share.
    `train_ppl_windows` says on how many training windows `train_ppl` was measured. `retrieval` is
    empty but for a synthetic task, `positions` but for `evaluation.long`, `healing` but for a
    trained model that was trained under a policy. `job` is the identity of the job that made it,
    `setting` the same without the seed: results of one setting are seeds of one experiment, in
    whichever runs.
    `diverged` says what happened where training did not stay finite: then losses are infinite, and
    nothing was measured.
    """

    version: Literal[1] = RESULT_VERSION
    recipe: str
    scale: str
    contender: str
    architecture: str
    baseline: bool
    seed: Count
    budget: Figure | None = None
    target_offset: Positive
    precision: str
    corpus: CorpusFacts
    parameters_total: Count
    parameters_trainable: Count
    validation_loss: Figure
    validation_ppl: Perplexity
    bits_per_byte: Figure | None
    accuracy: Figure
    train_ppl_running: Perplexity
    train_ppl: Perplexity
    train_ppl_windows: Count | None = None
    retrieval: list[RetrievalAccuracy] = []
    positions: list[PositionLoss] = []
    tasks: list[TaskScore] = []
    best_epoch: Count
    epochs: Count
    trained_tokens: Count | None = None
    learning_rate: Figure | None = None
    tuning: TuningFacts | None = None
    phase1: PhaseOneFacts | None
    embedding: EmbeddingFacts | None = None
    healing: HealingFacts | None = None
    store: StoreFacts | None = None
    cache: list[CacheBytes]
    cache_dtype: str
    reported: dict[str, Finite]
    reported_epochs: dict[str, list[Finite | None]] = {}
    job: str | None = None
    setting: str | None = None
    diverged: str | None = None

    def ppl_at(self) -> dict[int, float]:
        """Perplexity of the first N tokens of long texts, for each N where a stretch ends."""
        found, loss, tokens = {}, 0.0, 0
        for bucket in self.positions:
            loss += bucket.tokens * bucket.loss
            tokens += bucket.tokens
            found[bucket.last] = perplexity(loss / tokens)
        return found


class TrialResult(Record):
    """One learning rate tried by the job of that identity.

    The loss is the best epoch's in nats a token, None where training diverged.
    """

    version: Literal[1] = 1
    job: str
    learning_rate: Figure
    validation_loss: Figure | None


class StageMemory(Record):
    """Memory in use when a stage ended: of the process (resident) and of the accelerator."""

    stage: str
    host_bytes: Count
    accelerator_bytes: Count | None


class Timings(Record):
    """Seconds, rates and peak memory of one contender and seed."""

    phase1_seconds: Figure | None
    store_seconds: Figure | None = None
    stages: list[StageMemory] = []
    epoch_seconds: list[Figure]
    evaluation_seconds: Figure
    total_seconds: Figure
    training_tokens_per_second: Figure
    prefill_tokens_per_second: Figure
    decode_tokens_per_second: Figure
    speed_tokens: Count
    peak_host_bytes: Count
    peak_accelerator_bytes: Count | None


class PhaseOneRow(Record):
    """One iteration of context training."""

    phase: Literal[1] = 1
    iteration: Count
    converged: Figure
    loss: Figure | None


class StepRow(Record):
    """One optimiser step of next-token training, counted from 1 over all epochs.

    `loss` is that step's own, over all targets of its batch; `tokens` are the targets trained on up
    to there, which older results do not tell. A training of more steps than a plot can tell apart
    keeps one in every so many, evenly.
    """

    phase: Literal[2] = 2
    step: Count
    epoch: Count
    loss: Figure
    learning_rate: Figure
    tokens: Count | None = None


class PhaseTwoRow(Record):
    """One epoch of next-token training; `tokens` as in `StepRow`."""

    phase: Literal[2] = 2
    epoch: Count
    train_loss: Figure
    train_ppl: Figure
    validation_loss: Figure
    validation_ppl: Figure
    accuracy: Figure
    learning_rate: Figure
    tokens: Count | None = None


HistoryRow = PhaseOneRow | StepRow | PhaseTwoRow


class Outcome(Record):
    """All that one contender and seed left in its folder."""

    result: Result
    timings: Timings
    history: list[HistoryRow]


class Run(Record):
    """A run folder, read back. `recipe` is the resolved recipe, `environment` what it ran on."""

    folder: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    outcomes: list[Outcome]

    def missing_seeds(self) -> dict[str, list[int]]:
        """The recipe's seeds that lack a result, by contender; those that lack none left out."""
        done = {(o.result.contender, o.result.seed, o.result.budget) for o in self.outcomes}
        seeds, budgets = self.recipe.get("seeds", [0]), self.recipe.get("budgets") or [None]
        names = [str(contender.get("name")) for contender in self.recipe.get("contenders", [])]
        missing = {
            name: [s for s in seeds if any((name, s, budget) not in done for budget in budgets)]
            for name in names
        }
        return {name: lacking for name, lacking in missing.items() if lacking}


def seed_folder(run: Path, contender: str, seed: int, budget: float | None = None) -> Path:
    """Where one contender and seed, and budget if any, keeps its files."""
    place = run / contender if budget is None else run / contender / f"budget-{budget:.12g}"
    return place / f"seed-{seed}"


def read_outcome(run: Path, contender: str, seed: int, budget: float | None = None) -> Outcome:
    """Read what one contender and seed, and budget if any, left in the folder `run`.

    Raises:
        InputError: a file is missing, damaged, of another version or of another contender, seed or
            budget, or leads out of the run folder; the message names it.
    """
    folder = seed_folder(run, contender, seed, budget)
    file = folder / "result.json"
    result = _read_record(Result, run, file)
    for key, value, place in (
        ("contender", result.contender, contender),
        ("seed", result.seed, seed),
        ("budget", result.budget, budget),
    ):
        if value != place:
            raise InputError(
                f"{file}: {key}: expected {place!r} in this folder, got {shown(value)}"
            )
    return Outcome(
        result=result,
        timings=_read_record(Timings, run, folder / "timings.json"),
        history=_read_history(run, folder / "history.jsonl"),
    )


def read_run(folder: Path) -> Run:
    """Read a run folder with every contender and seed that has finished, in the recipe's order.

    Raises:
        InputError: it is not a run folder, or one of its files is damaged.
    """
    recipe = read_recipe(folder)
    environment = read_mapping(folder, folder / "environment.json")
    outcomes = [
        read_outcome(folder, *which)
        for which in itertools.product(
            [contender["name"] for contender in recipe["contenders"]],
            recipe.get("seeds", [0]),
            recipe.get("budgets") or [None],
        )
        if is_file(seed_folder(folder, *which) / "result.json")
    ]
    return Run(folder=folder, recipe=recipe, environment=environment, outcomes=outcomes)


def read_trial(folder: Path) -> TrialResult | None:
    """The trial whose folder it is; None where there is none, or a damaged one."""
    try:
        return TrialResult.model_validate_json((folder / "result.json").read_text("utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


R = TypeVar("R", bound=Record)


def _read_record(kind: type[R], run: Path, file: Path) -> R:
    try:
        return kind.model_validate_json(read_text(run, file))
    except ValidationError as error:
        raise InputError(f"{file}: {first_problem(error)}") from None


def _history_kind(row: dict[str, Any]) -> type[HistoryRow]:
    if row["phase"] == 1:
        return PhaseOneRow
    return StepRow if "step" in row else PhaseTwoRow


def _read_history(run: Path, path: Path) -> list[HistoryRow]:
    rows: list[HistoryRow] = []
    for number, line in enumerate(read_text(run, path).splitlines(), start=1):
        try:
            row = json.loads(line)
            kind = _history_kind(row)
            rows.append(kind.model_validate(row))
        except ValidationError as error:
            raise InputError(f"{path}: line {number}: {first_problem(error)}") from None
        except (ValueError, LookupError, TypeError, RecursionError):
            raise InputError(f"{path}: line {number} is damaged") from None
    return rows
