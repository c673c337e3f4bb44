"""The questions of `contextlm bench`, by name. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One benchmark: the module that answers it, and the question in words."""

    module: str
    text: str


QUESTIONS = {
    "scan": Question("scan", "How fast are the recurrences on each backend?"),
    "train-step": Question(
        "train_step", "How fast do compressed models train beside attention of their size?"
    ),
    "context-kv": Question(
        "context_kv", "What does attention in dilated windows gain over fetching each context?"
    ),
    "phase1": Question("phase1", "What does projecting each vocabulary entry once gain?"),
    "decode": Question("decode", "How fast is a token after a short and after a long text?"),
    "prefill": Question("prefill", "How fast is a long prompt read?"),
    "stream": Question("stream", "Does memory stay constant over a million tokens?"),
}
