"""Tokens per second of prefill and decode, as medians of several repetitions."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

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
    for _ in range(REPETITIONS + 1):
        started = now(device)
        cache = feed(model, prompt_1T, None)[1]
        prefilled = now(device)
        for _ in range(decoded):
            cache = feed(model, prompt_1T[:, :1], cache)[1]
        prefill.append(prefilled - started)
        decode.append(now(device) - prefilled)
    model.train(was_training)
    # The first round warms up.
    seconds, decoding = statistics.median(prefill[1:]), statistics.median(decode[1:])
    return Speed(tokens, tokens / seconds, decoded / decoding)


def now(device: torch.device) -> float:
    """Seconds, once an accelerator, which otherwise only queues its work, is done with it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
