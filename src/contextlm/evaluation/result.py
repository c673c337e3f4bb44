"""What a run leaves behind, typed and versioned: results, timings, history, environment.

A `Result` holds no times, so that two runs of one recipe can be compared byte by byte; times live
in `Timings`. Pydantic only: reading a run needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from contextlm.errors import InputError

RESULT_VERSION: Literal[1] = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CacheBytes(_Record):
    """What decoding keeps after `tokens` tokens of one sequence.

    `logical` counts the elements of every tensor kept; `resident` the memory that holds them, which
    is larger where a tensor is a view of, or was preallocated in, something bigger.
    """

    tokens: int
    logical: int
    resident: int


class CorpusFacts(_Record):
    """The data that was really used.

    `unigram_ppl` is the validation perplexity of the training tokens' frequencies (each entry
    counted once more than seen): what a model without any context would reach.
    """

    name: str
    tokenizer: str
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    train_windows: int
    validation_windows: int
    sequence_length: int
    unigram_ppl: float | None = None


class RetrievalAccuracy(_Record):
    """Share of right answers, in 0..1, among the validation questions of one level."""

    level: str
    accuracy: float
    answers: int


class PhaseOneFacts(_Record):
    """How context training ended. Effective ranks are in dimensions, of `context_dim`."""

    iterations: int
    converged: float
    context_dim: int
    effective_rank_train: float
    effective_rank_validation: float


class EmbeddingFacts(_Record):
    """Where the token embeddings came from.

    `tokens`, `epochs` and `validation_ppl` are those of the run in which they were learned;
    `frozen` says that phase 2 left them as they were.
    """

    source: Literal["pretrained", "learned", "random"]
    path: str | None = None
    tokens: int | None = None
    epochs: int | None = None
    validation_ppl: float | None = None
    frozen: bool = False


class StoreFacts(_Record):
    """The context stores that phase 2 read. Sizes in bytes.

    The drifts are the mean-square differences between the parallel passes and the exact recurrence,
    per number. Embeddings are not stored: they are looked up by token.
    """

    fill: Literal["sequential", "parallel"]
    dtype: Literal["float32", "bfloat16"]
    train_bytes: int
    validation_bytes: int
    drift_train: float
    drift_validation: float


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
    seed: int
    target_offset: int
    precision: str
    corpus: CorpusFacts
    parameters_total: int
    parameters_trainable: int
    validation_loss: float
    validation_ppl: float
    bits_per_byte: float | None
    accuracy: float
    train_ppl_running: float
    train_ppl: float
    train_ppl_windows: int | None = None
    retrieval: list[RetrievalAccuracy] = []
    best_epoch: int
    epochs: int
    phase1: PhaseOneFacts | None
    embedding: EmbeddingFacts | None = None
    store: StoreFacts | None = None
    cache: list[CacheBytes]
    cache_dtype: str
    reported: dict[str, float]
    reported_epochs: dict[str, list[float | None]] = {}

    @property
    def train_validation_ratio(self) -> float:
        """Train PPL over validation PPL, both on the best weights."""
        return self.train_ppl / self.validation_ppl


class StageMemory(_Record):
    """Memory in use when a stage ended: of the process (resident) and of the accelerator."""

    stage: str
    host_bytes: int
    accelerator_bytes: int | None


class Timings(_Record):
    """Seconds, rates and peak memory of one contender and seed."""

    phase1_seconds: float | None
    store_seconds: float | None = None
    stages: list[StageMemory] = []
    epoch_seconds: list[float]
    evaluation_seconds: float
    total_seconds: float
    training_tokens_per_second: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    speed_tokens: int
    peak_host_bytes: int
    peak_accelerator_bytes: int | None


class PhaseOneRow(_Record):
    """One iteration of context training."""

    phase: Literal[1] = 1
    iteration: int
    converged: float
    loss: float | None


class PhaseTwoRow(_Record):
    """One epoch of next-token training."""

    phase: Literal[2] = 2
    epoch: int
    train_loss: float
    train_ppl: float
    validation_loss: float
    validation_ppl: float
    accuracy: float
    learning_rate: float


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


def read_outcome(folder: Path) -> Outcome:
    """Read one contender-and-seed folder.

    Raises:
        InputError: a file is missing, damaged or of another version; the message names it.
    """
    return Outcome(
        result=_read_record(Result, folder / "result.json"),
        timings=_read_record(Timings, folder / "timings.json"),
        history=_read_history(folder / "history.jsonl"),
    )


def read_run(folder: Path) -> Run:
    """Read a run folder with every contender and seed that has finished, in the recipe's order.

    Raises:
        InputError: it is not a run folder, or one of its files is damaged.
    """
    import yaml

    recipe_file = folder / "recipe.yaml"
    try:
        recipe = yaml.safe_load(_read_text(recipe_file))
    except yaml.YAMLError:
        raise InputError(f"{recipe_file}: not valid YAML") from None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("contenders"), list):
        raise InputError(f"{recipe_file}: not a resolved recipe")
    try:
        environment = json.loads(_read_text(folder / "environment.json"))
    except ValueError:
        raise InputError(f"{folder / 'environment.json'}: not valid JSON") from None
    if not isinstance(environment, dict):
        raise InputError(f"{folder / 'environment.json'}: not a mapping")
    outcomes = []
    for contender in recipe["contenders"]:
        for seed in recipe.get("seeds", [0]):
            place = seed_folder(folder, str(contender.get("name")), seed)
            if (place / "result.json").exists():
                outcomes.append(read_outcome(place))
    return Run(folder=folder, recipe=recipe, environment=environment, outcomes=outcomes)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None


R = TypeVar("R", bound=_Record)


def _read_record(kind: type[R], path: Path) -> R:
    try:
        return kind.model_validate_json(_read_text(path))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"]) or "content"
        raise InputError(f"{path}: {key}: {problem['msg']}") from None


def _read_history(path: Path) -> list[PhaseOneRow | PhaseTwoRow]:
    rows: list[PhaseOneRow | PhaseTwoRow] = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            kind = PhaseOneRow if row["phase"] == 1 else PhaseTwoRow
            rows.append(kind.model_validate(row))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {number} is damaged") from None
    return rows
