"""Whether memory stays constant while a model reads a million tokens.

The models are narrow: what must not grow does not depend on the width, and time does.
"""

from __future__ import annotations

import gc
import time

import torch

from contextlm.benchmarks.harness import Answer, Curve, Options, Target
from contextlm.benchmarks.subjects import SUBJECTS, Subject, build
from contextlm.evaluation.memory import CHUNK, cache_bytes, feed, memory_now

TOKENS = 1_000_000
WARM = 16  # chunks before memory is first looked at: by then every buffer has been made
MEGABYTE = 1e6


def measure(options: Options) -> Answer:
    """Growth of the resident set between the warm-up and the end, model after model."""
    chunk, tokens = (64, (WARM + 2) * 64) if options.smoke else (CHUNK, TOKENS)
    answer = Answer(settings={"tokens": tokens, "chunk": chunk})
    for subject in SUBJECTS:
        if subject.constant:
            _stream(answer, subject, tokens, chunk)
    return answer


@torch.no_grad()
def _stream(answer: Answer, subject: Subject, tokens: int, chunk: int) -> None:
    model, cache = build(subject, narrow=True), None
    ids_1T = torch.ones(1, chunk, dtype=torch.long)
    chunks = -(-tokens // chunk)
    first, most, curve = 0, 0, Curve(subject.name, [], [], [])
    started = checked = time.perf_counter()
    every = max(1, chunks // 10)
    for number in range(1, chunks + 1):
        cache = feed(model, ids_1T, cache)[1]
        if number == WARM:
            gc.collect()
            first = memory_now(ids_1T.device)[0]
        if number >= WARM and (number % every == 0 or number == chunks):
            gc.collect()
            most = max(most, memory_now(ids_1T.device)[0])
            now = time.perf_counter()
            curve.tokens.append(number * chunk)
            curve.seconds.append((now - checked) / (every * chunk))
            curve.cache_bytes.append(cache_bytes(cache).resident)
            checked = now
    growth = (most - first) / MEGABYTE
    answer.rows.append(
        {
            "model": subject.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens/s": chunks * chunk / (time.perf_counter() - started),
            "cache bytes": curve.cache_bytes[-1],
            "growth MB": growth,
        }
    )
    answer.compare(f"stream_{subject.name}_growth_mb", growth, Target(20.0, at_least=False))
    answer.curves.append(curve)
