"""How fast one more token is, after a short and after a long text."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from contextlm.benchmarks.harness import Answer, Curve, Options, Target, Timing
from contextlm.benchmarks.subjects import SMALL, SUBJECTS, Subject, build
from contextlm.evaluation.memory import CHUNK, cache_bytes, feed
from contextlm.models.cache import CACHE

WINDOW = 32  # tokens of one measurement
COMPARED = 8192
SHORT, LONG = 256, 32_768


class _Text:
    """A model and its cache after some tokens; texts of different lengths share the model."""

    def __init__(self, subject: Subject, model: PreTrainedModel, tokens: int):
        self.subject, self.model, self.tokens = subject, model, tokens
        self.cache: Cache | None = None
        for start in range(0, tokens, CHUNK):
            self._feed(min(CHUNK, tokens - start))
        self.whole: list[float] = []
        self.body: list[float] = []

    def time(self, window: int) -> None:
        """Mean latency over the next tokens one at a time, with and without the head."""
        started = time.perf_counter()
        for _ in range(window):
            self._feed(1)
        self.whole.append((time.perf_counter() - started) / window)
        decoder, ids_11 = self.model.base_model, torch.ones(1, 1, dtype=torch.long)
        started = time.perf_counter()
        for _ in range(window):
            output = decoder(ids_11, use_cache=True, **{CACHE: self.cache})
            self.cache = getattr(output, CACHE)
        self.body.append((time.perf_counter() - started) / window)

    def row(self) -> dict[str, Any]:
        """Of the table; the first measurement only warmed up."""
        each = Timing.of(self.whole[1:])
        assert self.cache is not None
        return {
            "model": self.subject.name,
            "tokens before": self.tokens,
            "tokens/s": 1 / each.median,
            **each.milliseconds(),
            "without head ms": 1e3 * Timing.of(self.body[1:]).median,
            "cache bytes": cache_bytes(self.cache).resident,
        }

    def _feed(self, tokens: int) -> None:
        ids_1T = torch.ones(1, tokens, dtype=torch.long)
        self.cache = feed(self.model, ids_1T, self.cache)[1]


@torch.no_grad()
def measure(options: Options) -> Answer:
    """Latency at several lengths, a family at a time, all its models and lengths in turns.

    A model that keeps everything is read up to `COMPARED` only: beyond, its prefill is quadratic.
    """
    short, compared, long = (8, 32, 64) if options.smoke else (SHORT, COMPARED, LONG)
    rounds, window = options.repeats or 7, 2 if options.smoke else WINDOW
    answer = Answer(settings={"window": window, "B": 1, "dtype": "float32"})
    subjects = (*SUBJECTS, *SMALL)
    for head in [each for each in subjects if each.baseline is None]:
        family = [head, *(each for each in subjects if each.baseline == head.name)]
        texts = []
        for subject in family:
            model = build(subject, narrow=options.smoke)
            lengths = (short, compared, long) if subject.constant else (short, compared)
            texts += [_Text(subject, model, length) for length in lengths]
        for _ in range(1 + rounds):
            for text in texts:
                text.time(window)
        rows = {(text.subject.name, text.tokens): text.row() for text in texts}
        answer.rows += rows.values()
        for subject in family:
            _compare(answer, subject, rows, (short, compared, long))
            own = [row for (name, _), row in rows.items() if name == subject.name]
            answer.curves.append(
                Curve(
                    subject.name,
                    [row["tokens before"] for row in own],
                    [row["median ms"] / 1e3 for row in own],
                    [row["cache bytes"] for row in own],
                )
            )
    return answer


def _compare(
    answer: Answer,
    subject: Subject,
    rows: dict[tuple[str, int], dict[str, Any]],
    lengths: tuple[int, int, int],
) -> None:
    short, compared, long = lengths
    name, baseline = subject.name, subject.baseline
    if baseline is not None:
        hybrid = subject.model["type"] == "context_hybrid"
        own, other = rows[name, short], rows[baseline, short]
        ratio = other["median ms"] / own["median ms"]
        target = Target(1.0) if hybrid else None
        answer.compare(f"decode_{name}_vs_{baseline}_at_{short}", ratio, target)
        own, other = rows[name, compared], rows[baseline, compared]
        ratio = other["median ms"] / own["median ms"]
        target = Target(3.0) if hybrid else Target(2.0) if subject.constant else None
        answer.compare(f"decode_{name}_vs_{baseline}_at_{compared}", ratio, target)
        ratio = other["without head ms"] / own["without head ms"]
        answer.compare(f"decode_without_head_{name}_vs_{baseline}_at_{compared}", ratio)
    if subject.constant:
        # All of what may be kept is there at both lengths.
        ratio = rows[name, long]["median ms"] / rows[name, compared]["median ms"]
        target = Target(1.1, at_least=False)
        answer.compare(f"latency_{name}_{long}_vs_{compared}", ratio, target)
