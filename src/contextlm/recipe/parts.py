"""Small groups of settings in a recipe. Pydantic only, as in `recipe`."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from contextlm.recipe.settings import Settings


class Split(Settings):
    """Two counts, one for each split."""

    train: PositiveInt
    validation: PositiveInt


class EvaluationSettings(Settings):
    """What is measured after training."""

    batch_size: PositiveInt = Field(32, description="windows per batch")
    cache_lengths: list[PositiveInt] = Field([128, 512, 2048, 8192], min_length=1)
    speed_tokens: PositiveInt = Field(512, description="length of the timed prefill and decode")
    train_samples: PositiveInt | None = Field(
        None, description="training windows on which the best weights are scored again; null: all"
    )
