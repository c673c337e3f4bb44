"""Groups of settings in a recipe. Pydantic only: a recipe is checked without torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

SEQUENCE_LENGTH = 128  # tokens, wherever a recipe does not say

# Far beyond any use, and small enough for the libraries that count with machine integers.
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Base of every group of settings, which never change once made.

    An unknown key is an error, and so is a value of another type (`true` or `3.0` for a count,
    ``"3e-4"`` in quotes for a rate) or one that is not finite.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True
    )


class PhaseOneSettings(Settings):
    """Context training by origin-anchored centroid dispersion (OACD), see `training.oacd`."""

    learning_rate: PositiveFloat = Field(0.002, description="of Adam")
    noise: NonNegativeFloat = Field(
        0.1, description="standard deviation added to the contexts that are fed back"
    )
    stop_at: float = Field(
        0.90, gt=0, le=1, description="stop at this share of converged positions"
    )
    max_iterations: Count = Field(60, description="the random start counts as the first")
    batch_size: Count = Field(5000, description="positions per batch")
    threshold: PositiveFloat = Field(
        0.03, description="a position has converged when its mean squared change is below this"
    )
    mean_weight: NonNegativeFloat = Field(0.1, description="weight of ||mean||^2 in the loss")
    clip: PositiveFloat = Field(2.0, description="largest gradient norm")


class ContextStoreSettings(Settings):
    """Contexts of a whole stream, computed once for phase 2, see `training.context_store`."""

    fill: Literal["sequential", "parallel"] = Field(
        "sequential",
        description="sequential: the exact recurrence, as decoding sees it; "
        "parallel: one more shifted pass over phase 1's contexts, the documents' way",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type on disk")
    keep: bool = Field(False, description="leave the stores in the run folder")


class EmbeddingSettings(Settings):
    """Where the token embeddings of all contenders come from; a bare word is the source."""

    source: Literal["pretrained", "learned", "random"] = Field(
        "random",
        description="pretrained: another model's; learned: by a short next-token run of a small "
        "GPT-2 beforehand; random: as the model draws them",
    )
    path: str = Field("gpt2", min_length=1, description="pretrained: a checkpoint, folder or hub")
    layers: Count = Field(2, description="learned: of the small GPT-2")
    tokens: Count | None = Field(
        None, description="learned: the first tokens of the training split; null: those trained on"
    )
    sequence_length: Count = Field(SEQUENCE_LENGTH, description="learned: of its windows")
    batch_size: Count = Field(32, description="learned: windows per step")
    epochs: Count = Field(1, description="learned: at most this many, stopping at the best")
    learning_rate: PositiveFloat = Field(1e-3, description="learned: at the peak, then a cosine")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="learned: of the small GPT-2; one table serves all of the recipe's seeds"
    )

    @model_validator(mode="before")
    @classmethod
    def _a_bare_word_is_the_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class TuningSettings(Settings):
    """A learning rate for each contender, found by one rule for all, see `tuning`."""

    learning_rates: list[PositiveFloat] = Field(min_length=2, description="ascending")
    share: float = Field(0.25, gt=0, le=1, description="of the training windows, and of warmup")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of the trials")
    extensions: Annotated[int, Field(ge=0, le=10)] = Field(
        3, description="further rates, each twice or half the end of the grid that was best"
    )

    @model_validator(mode="after")
    def _rates_ascend(self) -> Self:
        if any(b <= a for a, b in pairwise(self.learning_rates)):
            raise ValueError("learning_rates must ascend")
        return self


class MatchSettings(Settings):
    """A contender is made as large as the baseline, by one field of its model."""

    field: str = Field(description="a whole number of the model's configuration")
    within: float = Field(0.02, gt=0, lt=1, description="of the baseline's parameters")
    multiple_of: Count = Field(1, description="the field's value is a multiple of this")


class HealingSettings(Settings):
    """How a trained model learns to decode by a policy, see `training.distillation`."""

    loss: NonNegativeFloat = Field(1.0, description="weight of the next-token loss")
    kl: NonNegativeFloat = Field(
        1.0, description="weight of the KL divergence from the original with its full cache"
    )
    train: Literal["all", "lora", "policy"] = Field(
        "all",
        description="all parameters; lora: low-rank adapters (PEFT), merged at the end, and what "
        "the policy has of its own; policy: that alone, which only latent has",
    )
    rank: Count = Field(16, description="lora: of the adapters")

    @model_validator(mode="after")
    def _something_is_minimised(self) -> Self:
        if not self.loss and not self.kl:
            raise ValueError("loss and kl are both 0: nothing would be minimised")
        return self


class ParameterGroup(Settings):
    """Parameters whose names match get their own learning rate or weight decay."""

    match: str = Field(description="shell pattern on parameter names, e.g. '*.dca.*'")
    learning_rate: PositiveFloat | None = Field(None, description="null: that of the others")
    weight_decay: NonNegativeFloat | None = Field(None, description="null: that of the others")


class TrainingSettings(Settings):
    """Next-token training (phase 2), see `training.next_token`."""

    optimizer: Literal["adam", "adamw"] = Field(
        "adamw", description="adam adds no weight decay, as in the documents"
    )
    learning_rate: PositiveFloat = Field(1e-4, description="at the peak of the schedule")
    weight_decay: NonNegativeFloat | None = Field(
        None, description="null: 0.01 with adamw; adam has none"
    )
    decay: Literal["all", "matrices"] = Field(
        "all", description="which parameters decay; 'matrices' spares vectors (norms and biases)"
    )
    # Not strict, so that a recipe's list becomes a tuple.
    betas: tuple[Momentum, Momentum] = Field(
        (0.9, 0.999), strict=False, description="of the optimiser's two running means"
    )
    batch_size: Count = Field(32, description="windows per optimiser step")
    accumulation: Count = Field(1, description="micro-batches that make up one batch")
    epochs: Count = Field(10, description="at most this many")
    patience: Count | None = Field(
        1, description="stop after this many epochs without a better validation loss; null: never"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "constant", description="of the learning rate; wsd: warmup, stable, decay"
    )
    schedule_unit: Literal["step", "epoch"] = Field(
        "step", description="after what the rate changes"
    )
    warmup: Annotated[int, Field(ge=0, le=1_000_000_000)] = Field(0, description="in steps")
    minimum_ratio: float = Field(
        0.0, ge=0, le=1, description="cosine and wsd end at this share of the learning rate"
    )
    cooldown: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="wsd: the last share of the steps, in which the rate falls; null: 0.2",
    )
    clip: PositiveFloat | None = Field(None, description="largest gradient norm; null: no clipping")
    shuffle: bool = Field(True, description="windows anew each epoch, by the seed")
    drop_last: bool = Field(False, description="drop a last incomplete batch")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="autocast type; auto: bfloat16 where the machine is faster with it"
    )
    parameter_groups: list[ParameterGroup] = Field(
        [], description="parameters with a learning rate or weight decay of their own"
    )

    @model_validator(mode="after")
    def _values_fit_together(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation ({self.accumulation}) must divide batch_size ({self.batch_size})"
            )
        if self.drop_last and self.accumulation > 1:
            raise ValueError("drop_last with accumulation would drop micro-batches: set only one")
        if self.warmup and self.schedule_unit == "epoch":
            raise ValueError("warmup with schedule_unit epoch would train epochs at rate 0")
        decays = [self.weight_decay, *(group.weight_decay for group in self.parameter_groups)]
        if self.optimizer == "adam" and any(decays):
            raise ValueError("weight_decay is for optimizer adamw; adam has none")
        if self.minimum_ratio and self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"minimum_ratio is for schedules cosine and wsd, not {self.schedule}")
        if self.cooldown is not None and self.schedule != "wsd":
            raise ValueError(f"cooldown is for schedule wsd, not {self.schedule}")
        if self.schedule == "wsd" and self.schedule_unit == "epoch":
            raise ValueError("schedule wsd changes the rate by step: schedule_unit must be step")
        return self

    def stable_until(self, steps: int) -> int:
        """How many of a training's steps schedule wsd takes before the rate begins to fall."""
        return steps - max(1, round((0.2 if self.cooldown is None else self.cooldown) * steps))

    def decay_rate(self) -> float:
        """The weight decay of parameters outside the groups."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.01 if self.optimizer == "adamw" else 0.0


class EvaluationSettings(Settings):
    """What is measured after training."""

    batch_size: PositiveInt = Field(32, description="windows per batch")
    cache_lengths: list[PositiveInt] = Field(
        [128, 512, 2048, 8192], min_length=1, description="tokens after which the cache is measured"
    )
    speed_tokens: PositiveInt = Field(512, description="length of the timed prefill and decode")
    train_samples: PositiveInt | None = Field(
        None, description="training windows on which the best weights are scored again; null: all"
    )
    long: bool = Field(
        False, description="also score long texts, up to eight times the windows, by position"
    )
    tasks: list[str] = Field([], description="of lm-eval, by name (extra lm-eval)")
