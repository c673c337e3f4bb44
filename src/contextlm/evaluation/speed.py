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

from contextlm.evaluation.memory import feed, position_limit

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
    """Time prefill and decode of one sequence with a prompt of `tokens` tokens.

    The prompt is shortened where prompt and decoded tokens would not fit the model's positions.
    """
    limit = position_limit(model)
    decoded = DECODED
    if limit is not None:
        decoded = max(1, min(DECODED, limit // 2))
        tokens = max(1, min(tokens, limit - decoded))
    was_training = model.training
    model.eval()
    prompt_1T = torch.ones(1, tokens, dtype=torch.long, device=device)
    prefill: list[float] = []
    decode: list[float] = []
    for repetition in range(REPETITIONS + 1):
        seconds, cache = _timed(partial(_prefill, model, prompt_1T), device)
        decoding, _ = _timed(partial(_decode, model, cache, decoded, device), device)
        if repetition > 0:  # the first one warms up
            prefill.append(seconds)
            decode.append(decoding / decoded)
    model.train(was_training)
    return Speed(tokens, tokens / statistics.median(prefill), 1 / statistics.median(decode))


def _prefill(model: PreTrainedModel, prompt_1T: torch.Tensor) -> Cache:
    return feed(model, prompt_1T, None)[1]


def _decode(model: PreTrainedModel, cache: Cache, tokens: int, device: torch.device) -> Cache:
    token_11 = torch.ones(1, 1, dtype=torch.long, device=device)
    for _ in range(tokens):
        cache = feed(model, token_11, cache)[1]
    return cache


def _synchronize(device: torch.device) -> None:
    """Wait for an accelerator, which otherwise only queues its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _timed(work: Callable[[], Cache], device: torch.device) -> tuple[float, Cache]:
    _synchronize(device)
    started = time.perf_counter()
    result = work()
    _synchronize(device)
    return time.perf_counter() - started, result
