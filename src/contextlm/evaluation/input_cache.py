"""What a cache of inputs saves and costs, beside the model's plain cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from contextlm.compress.input_cache import InputCache
from contextlm.evaluation.memory import measure_cache
from contextlm.evaluation.speed import Speed, measure_speed
from contextlm.results.facts import CacheBytes


class InputCacheReport(BaseModel):
    """Bytes and speed with `InputCache`; changes are percent of the figure without it.

    `cache_change_percent` has one entry, of the logical bytes, for each entry of `cache`.
    """

    cache: list[CacheBytes]
    cache_change_percent: list[float]
    prefill_tokens_per_second: float
    prefill_change_percent: float
    decode_tokens_per_second: float
    decode_change_percent: float


def compare_input_cache(
    model: PreTrainedModel, plain: Sequence[CacheBytes], speed: Speed, device: torch.device
) -> InputCacheReport:
    """Measure a model with `InputCache` as it was measured without.

    Args:
        model: a GPT-NeoX or GPT-2 with a head.
        plain: the bytes of its own cache.
        speed: its own speed.
        device: where the model is.

    Raises:
        InputError: the model cannot have an `InputCache`.
    """
    with InputCache(model):
        held = measure_cache(model, [entry.tokens for entry in plain], device)
        timed = measure_speed(model, speed.tokens, device)
    pairs = zip(held, plain, strict=True)
    prefill, decode = timed.prefill_tokens_per_second, timed.decode_tokens_per_second
    return InputCacheReport(
        cache=held,
        cache_change_percent=[_change(new.logical, old.logical) for new, old in pairs],
        prefill_tokens_per_second=prefill,
        prefill_change_percent=_change(prefill, speed.prefill_tokens_per_second),
        decode_tokens_per_second=decode,
        decode_change_percent=_change(decode, speed.decode_tokens_per_second),
    )


def _change(new: float, old: float) -> float:
    return 100 * (new / old - 1)
