"""The facts that a result is made of, each checked when it is read back.

Pydantic only: reading a run needs no torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

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


def perplexity(loss: float) -> float:
    """``exp(loss)``; beyond a loss of 200, which no report can tell apart, that of 200."""
    return math.exp(min(loss, 200.0))


class Record(BaseModel):
    """Base of everything that a run writes down: fixed once made, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CacheBytes(Record):
    """What decoding keeps after `tokens` tokens of one sequence.

    `logical` counts the elements of every tensor kept; `resident` the memory that holds them, which
    is larger where a tensor is a view of, or was preallocated in, something bigger.
    """

    tokens: Positive
    logical: Count
    resident: Count


class CorpusFacts(Record):
    """The data that was really used.

    `unigram_ppl` is the validation perplexity of the training tokens' frequencies (each entry
    counted once more than seen): what a model without any context would reach. Documents repeat
    others where they differ in white space and case at most; older results do not tell.
    `text_passes` is how often a budget read its text, where that is more than once.
    """

    name: str
    tokenizer: str
    vocab_size: Count
    train_tokens: Count
    validation_tokens: Count
    train_windows: Count
    validation_windows: Count
    sequence_length: Count
    text_passes: Figure | None = None
    unigram_ppl: Perplexity | None = None
    repeated_documents: Count | None = None
    validation_documents_in_training: Count | None = None

    def repetition(self) -> str | None:
        """A sentence on repeated documents, where there are any."""
        if not self.repeated_documents:
            return None
        shared = self.validation_documents_in_training or 0
        return (
            f"{self.name}: {self.repeated_documents:,} documents repeat an earlier one; "
            f"{shared or 'none'} of the validation documents {'is' if shared == 1 else 'are'} "
            "in the training text."
        )


class RetrievalAccuracy(Record):
    """Share of right answers, in 0..1, among the validation questions of one level."""

    level: str
    accuracy: Figure
    answers: Count


class TaskScore(Record):
    """One figure of a task of lm-eval, by lm-eval's names.

    `stderr` is its standard error over the questions, of which there are `samples`; None where
    lm-eval gives none, as for the figure of a group.
    """

    task: str
    metric: str
    value: Figure
    stderr: Figure | None
    samples: Count | None


class PhaseOneFacts(Record):
    """How context training ended. Effective ranks are in dimensions, of `context_dim`."""

    iterations: Count
    converged: Figure
    context_dim: Positive
    effective_rank_train: Figure
    effective_rank_validation: Figure


class EmbeddingFacts(Record):
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


class StoreFacts(Record):
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


class PositionLoss(Record):
    """The targets at positions ``first`` to ``last - 1`` of long texts.

    `loss` is the mean over all `tokens` of them, in nats.
    """

    first: Count
    last: Positive
    tokens: Positive
    loss: Figure
    ppl: Figure


class TuningTrial(Record):
    """One learning rate tried; the loss is the best epoch's, in nats per token.

    It is None where training broke down.
    """

    learning_rate: Figure
    validation_loss: Figure | None


class TuningFacts(Record):
    """How a contender's learning rate was chosen: the trials, on a share of the windows."""

    share: Figure
    seed: Count
    trials: list[TuningTrial]

    @model_validator(mode="after")
    def _one_went_well(self) -> Self:
        if all(trial.validation_loss is None for trial in self.trials):
            raise ValueError("no trial has a validation_loss")
        return self

    @property
    def chosen(self) -> float:
        """The rate with the lowest validation loss."""
        losses = {t.learning_rate: t.validation_loss for t in self.trials}
        return min((loss, rate) for rate, loss in losses.items() if loss is not None)[1]

    @property
    def at_an_end(self) -> bool:
        """Whether no higher or no lower rate than the chosen one was tried."""
        rates = [trial.learning_rate for trial in self.trials]
        return self.chosen in (min(rates), max(rates))


class Fidelity(Record):
    """How near a model is to an original with its full cache, on one text.

    `loss` and `kl`, the mean divergence KL(original || model), are in nats a token; `same_tokens`
    is the share of positions with the same likeliest token, `passkey` the share of digits found by
    depth.
    """

    loss: Figure
    kl: Figure
    same_tokens: Finite
    passkey: dict[str, Finite]

    @property
    def found(self) -> float:
        """The share of passkeys' digits found at all depths."""
        return sum(self.passkey.values()) / len(self.passkey)


class HealingFacts(Record):
    """What training under a policy bought, read off `tokens` tokens that were held out.

    `share` are the bytes of cache at their end, of the original's; `train` says which parameters
    were trained. `full` is the original itself, `before` it with the policy, `after` the result.
    """

    policy: str
    train: str
    loss_weight: Finite
    kl_weight: Finite
    tokens: Positive
    share: Finite
    full: Fidelity
    before: Fidelity
    after: Fidelity
