"""How fast one more token is, after a short and after a long text."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from contextlm.benchmarks.harness import (
    Curve,
    Outcome,
    Setting,
    Target,
    milliseconds,
    timing,
)
from contextlm.benchmarks.subjects import Subject, build, subjects
from contextlm.evaluation.memory import CHUNK, cache_bytes, feed

WINDOW = 32  # tokens of one measurement
COMPARED = 8192
SHORT, LONG = 256, 32_768


class _Text:
    """A model and its cache after some tokens, in a text that goes on."""

    def __init__(self, subject: Subject, *, narrow: bool):
        self.subject = subject
        self.model: PreTrainedModel = build(subject, narrow=narrow)
        self.cache: Cache | None = None
        self.seen = 0

    def read(self, until: int) -> None:
        """Feed tokens in chunks up to a length."""
        while self.seen < until:
            self._feed(min(CHUNK, until - self.seen))

    def seconds_a_token(self, tokens: int) -> float:
        """Mean latency over the next tokens, one at a time."""
        started = time.perf_counter()
        for _ in range(tokens):
            self._feed(1)
        return (time.perf_counter() - started) / tokens

    def seconds_without_head(self, tokens: int) -> float:
        """The same without the product with the vocabulary."""
        decoder, ids_11 = self.model.base_model, torch.ones(1, 1, dtype=torch.long)
        started = time.perf_counter()
        for _ in range(tokens):
            self.cache = decoder(ids_11, past_key_values=self.cache, use_cache=True).past_key_values
        self.seen += tokens
        return (time.perf_counter() - started) / tokens

    def _feed(self, tokens: int) -> None:
        ids_1T = torch.ones(1, tokens, dtype=torch.long)
        self.cache = feed(self.model, ids_1T, self.cache)[1]
        self.seen += tokens


@torch.no_grad()
def measure(setting: Setting) -> Outcome:
    """Latency at several lengths; models at one length take turns.

    Baselines are read up to `COMPARED` only: beyond, their prefill is quadratic.
    """
    short, compared, long = (8, 32, 64) if setting.smoke else (SHORT, COMPARED, LONG)
    rounds, window = setting.repeats or 5, 2 if setting.smoke else WINDOW
    texts = [_Text(subject, narrow=setting.smoke) for subject in subjects()]
    outcome = Outcome(settings={"window": window, "B": 1, "dtype": "float32"})
    latency: dict[tuple[str, int], float] = {}
    bodies: dict[str, float] = {}
    for length in (short, compared, long):
        asked = [text for text in texts if length <= compared or text.subject.constant]
        for row in _at_length(asked, length, rounds, window):
            outcome.rows.append(row)
            latency[row["model"], length] = row["median ms"]
            if length == compared:
                bodies[row["model"]] = row["without head ms"]
    _compare(outcome, latency, bodies, (short, compared, long))
    for text in texts:
        rows = [row for row in outcome.rows if row["model"] == text.subject.name]
        outcome.curves.append(
            Curve(
                text.subject.name,
                [row["tokens before"] for row in rows],
                [row["median ms"] / 1e3 for row in rows],
                [row["cache bytes"] for row in rows],
            )
        )
    return outcome


def _at_length(texts: list[_Text], length: int, rounds: int, window: int) -> list[dict[str, Any]]:
    """One row a model: medians over several windows after so many tokens."""
    whole: dict[str, list[float]] = {text.subject.name: [] for text in texts}
    body: dict[str, list[float]] = {text.subject.name: [] for text in texts}
    for text in texts:
        text.read(length)
        text.seconds_a_token(2)  # warm-up
    for _ in range(rounds):
        for text in texts:
            whole[text.subject.name].append(text.seconds_a_token(window))
            body[text.subject.name].append(text.seconds_without_head(window))
    rows = []
    for text in texts:
        name, each = text.subject.name, timing(whole[text.subject.name])
        assert text.cache is not None
        row = {"model": name, "tokens before": length, "tokens/s": 1 / each.median}
        row |= milliseconds(each)
        row["without head ms"] = 1e3 * timing(body[name]).median
        rows.append({**row, "cache bytes": cache_bytes(text.cache).resident})
    return rows


def _compare(
    outcome: Outcome,
    latency: dict[tuple[str, int], float],
    bodies: dict[str, float],
    lengths: tuple[int, int, int],
) -> None:
    short, compared, long = lengths
    for subject in subjects():
        name, baseline = subject.name, subject.baseline
        if baseline is not None:
            ratio = latency[baseline, compared] / latency[name, compared]
            target = Target(2.0) if subject.constant else None
            outcome.compare(f"decode_{name}_vs_{baseline}_at_{compared}", ratio, target)
            ratio = bodies[baseline] / bodies[name]
            outcome.compare(f"decode_without_head_{name}_vs_{baseline}_at_{compared}", ratio)
    for subject in subjects():
        if subject.constant:
            ratio = latency[subject.name, long] / latency[subject.name, short]
            target = Target(1.1, at_least=False)
            outcome.compare(f"latency_{subject.name}_{long}_vs_{short}", ratio, target)
