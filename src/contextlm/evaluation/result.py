"""What a run leaves behind, typed and versioned: results, timings, history, environment.

A `Result` holds no times, so that two runs of one recipe can be compared byte by byte; times live
in `Timings`. Pydantic only: reading a run needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from contextlm.errors import InputError
from contextlm.evaluation.run_folder import first_problem, read_mapping, read_recipe, read_text
from contextlm.paths import is_file
from contextlm.visible import shown

RESULT_VERSION: Literal[1] = 1
_LARGEST = 1e100  # of a finite figure: sums and squares of such are finite too


def _usable(value: float) -> float:
    if _LARGEST < abs(value) < float("inf"):
        raise ValueError("expected a figure of at most 1e100, or one that is not finite")
    return value


def _positive(value: float) -> float:
    if value <= 0:  # not a number is neither: it says that a measurement broke down
        raise ValueError("expected a figure above 0")
    return value


# Figures may be infinite or not a number, where a model broke down; the report says so.
Figure = Annotated[float, AfterValidator(_usable)]
Perplexity = Annotated[float, AfterValidator(_usable), AfterValidator(_positive)]
Finite = Annotated[float, AfterValidator(_usable), Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**62)]
Positive = Annotated[int, Field(ge=1, lt=2**62)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CacheBytes(_Record):
    """What decoding keeps after `tokens` tokens of one sequence.

    `logical` counts the elements of every tensor kept; `resident` the memory that holds them, which
    is larger where a tensor is a view of, or was preallocated in, something bigger.
    """

    tokens: Positive
    logical: Count
    resident: Count


class CorpusFacts(_Record):
    """The data that was really used.

    `unigram_ppl` is the validation perplexity of the training tokens' frequencies (each entry
    counted once more than seen): what a model without any context would reach.
    """

    name: str
    tokenizer: str
    vocab_size: Count
    train_tokens: Count
    validation_tokens: Count
    train_windows: Count
    validation_windows: Count
    sequence_length: Count
    unigram_ppl: Perplexity | None = None


class RetrievalAccuracy(_Record):
    """Share of right answers, in 0..1, among the validation questions of one level."""

    level: str
    accuracy: Figure
    answers: Count


class PhaseOneFacts(_Record):
    """How context training ended. Effective ranks are in dimensions, of `context_dim`."""

    iterations: Count
    converged: Figure
    context_dim: Positive
    effective_rank_train: Figure
    effective_rank_validation: Figure


class EmbeddingFacts(_Record):
    """Where the token embeddings came from.

    `tokens`, `epochs` and `validation_ppl` are those of the run in which they were learned;
    `frozen` says that phase 2 left them as they were.
    """

    source: Literal["pretrained", "learned", "random"]
    path: str | None = None
    tokens: Count | None = None
    epochs: Count | None = None
    validation_ppl: Figure | None = None
    frozen: bool = False


class StoreFacts(_Record):
    """The context stores that phase 2 read. Sizes in bytes.

    The drifts are the mean-square differences between the parallel passes and the exact recurrence,
    per number. Embeddings are not stored: they are looked up by token.
    """

    fill: Literal["sequential", "parallel"]
    dtype: Literal["float32", "bfloat16"]
    train_bytes: Count
    validation_bytes: Count
    drift_train: Figure
    drift_validation: Figure


class TuningTrial(_Record):
    """One learning rate tried; the loss is the best epoch's, in nats per token."""

    learning_rate: Figure
    validation_loss: Figure


class TuningFacts(_Record):
    """How a contender's learning rate was chosen: the trials, on a share of the windows."""

    share: Figure
    seed: Count
    trials: list[TuningTrial] = Field(min_length=1)

    @property
    def chosen(self) -> float:
        """The rate with the lowest validation loss."""
        return min(self.trials, key=lambda trial: trial.validation_loss).learning_rate


class Result(_Record):
    """One contender with one seed. Losses in nats per token, `accuracy` and `converged` in 0..1.

    `bits_per_byte` is None where targets lie further ahead than the next token: a loss is a code
    length only if every token is predicted from all before it. It is None, too, where samples are
    lines or questions, and where the tokenizer has one token for all unknown words.
    `train_ppl_windows` says on how many training windows `train_ppl` was measured. `retrieval` is
    empty but for a corpus of tasks.
    """

    version: Literal[1] = RESULT_VERSION
    recipe: str
    scale: str
    contender: str
    architecture: str
    baseline: bool
    seed: Count
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
    best_epoch: Count
    epochs: Count
    learning_rate: Figure | None = None
    tuning: TuningFacts | None = None
    phase1: PhaseOneFacts | None
    embedding: EmbeddingFacts | None = None
    store: StoreFacts | None = None
    cache: list[CacheBytes]
    cache_dtype: str
    reported: dict[str, Finite]
    reported_epochs: dict[str, list[Finite | None]] = {}

    @property
    def train_validation_ratio(self) -> float:
        """Train PPL over validation PPL, both on the best weights."""
        return self.train_ppl / self.validation_ppl


class StageMemory(_Record):
    """Memory in use when a stage ended: of the process (resident) and of the accelerator."""

    stage: str
    host_bytes: Count
    accelerator_bytes: Count | None


class Timings(_Record):
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


class PhaseOneRow(_Record):
    """One iteration of context training."""

    phase: Literal[1] = 1
    iteration: Count
    converged: Figure
    loss: Figure | None


class PhaseTwoRow(_Record):
    """One epoch of next-token training."""

    phase: Literal[2] = 2
    epoch: Count
    train_loss: Figure
    train_ppl: Figure
    validation_loss: Figure
    validation_ppl: Figure
    accuracy: Figure
    learning_rate: Figure


class Outcome(_Record):
    """All that one contender and seed left in its folder."""

    result: Result
    timings: Timings
    history: list[PhaseOneRow | PhaseTwoRow]


class Run(_Record):
    """A run folder, read back. `recipe` is the resolved recipe, `environment` what it ran on."""

    folder: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    outcomes: list[Outcome]


def seed_folder(run: Path, contender: str, seed: int) -> Path:
    """Where one contender and seed keeps its files."""
    return run / contender / f"seed-{seed}"


def read_outcome(run: Path, contender: str, seed: int) -> Outcome:
    """Read what one contender and seed left in the folder `run`.

    Raises:
        InputError: a file is missing, damaged, of another version or of another contender or seed,
            or leads out of the run folder; the message names it.
    """
    folder = seed_folder(run, contender, seed)
    file = folder / "result.json"
    result = _read_record(Result, run, file)
    for key, value, place in (
        ("contender", result.contender, contender),
        ("seed", result.seed, seed),
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
        read_outcome(folder, contender["name"], seed)
        for contender in recipe["contenders"]
        for seed in recipe.get("seeds", [0])
        if is_file(seed_folder(folder, contender["name"], seed) / "result.json")
    ]
    return Run(folder=folder, recipe=recipe, environment=environment, outcomes=outcomes)


R = TypeVar("R", bound=_Record)


def _read_record(kind: type[R], run: Path, file: Path) -> R:
    try:
        return kind.model_validate_json(read_text(run, file))
    except ValidationError as error:
        raise InputError(f"{file}: {first_problem(error)}") from None


def _read_history(run: Path, path: Path) -> list[PhaseOneRow | PhaseTwoRow]:
    rows: list[PhaseOneRow | PhaseTwoRow] = []
    for number, line in enumerate(read_text(run, path).splitlines(), start=1):
        try:
            row = json.loads(line)
            kind = PhaseOneRow if row["phase"] == 1 else PhaseTwoRow
            rows.append(kind.model_validate(row))
        except ValidationError as error:
            raise InputError(f"{path}: line {number}: {first_problem(error)}") from None
        except (ValueError, LookupError, TypeError, RecursionError):
            raise InputError(f"{path}: line {number} is damaged") from None
    return rows
