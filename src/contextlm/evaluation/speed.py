"""Tokens per second of prefill and decode, as medians of several repetitions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from contextlm.evaluation.memory import cache_of, position_limit

REPETITIONS = 3
DECODED = 32


@dataclass(frozen=True)
class Speed:
    """Rates for one sequence: a prompt of `tokens` at once, then one token at a time after it."""

    tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@torch.no_grad()
def measure_speed(model: PreTrainedModel, tokens: int, device: torch.device) -> Speed:
    """Time prefill and decode of one sequence.

    Args:
        model: a causal language model.
        tokens: length of the prompt; shortened so that prompt and decoded tokens fit the positions.
        device: where the model is.
    """
    limit = position_limit(model)
    if limit is not None:
        tokens = max(1, min(tokens, limit - DECODED))
    was_training = model.training
    model.eval()
    prompt_1T = torch.ones(1, tokens, dtype=torch.long, device=device)
    prefill: list[float] = []
    decode: list[float] = []
    for repetition in range(REPETITIONS + 1):
        seconds, cache = _timed(partial(_feed, model, prompt_1T, None), device)
        per_token, _ = _timed(partial(_decode, model, cache, device), device)
        if repetition > 0:  # the first one warms up
            prefill.append(seconds)
            decode.append(per_token / DECODED)
    model.train(was_training)
    return Speed(tokens, tokens / statistics.median(prefill), 1 / statistics.median(decode))


def _feed(model: PreTrainedModel, ids_1T: torch.Tensor, cache: Cache | None) -> Cache:
    return cache_of(model(ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1))


def _decode(model: PreTrainedModel, cache: Cache, device: torch.device) -> Cache:
    token_11 = torch.ones(1, 1, dtype=torch.long, device=device)
    for _ in range(DECODED):
        cache = _feed(model, token_11, cache)
    return cache


def _timed(work: Callable[[], Cache], device: torch.device) -> tuple[float, Cache]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result
