"""What belongs beside the table of the data, in sentences: unigram perplexity and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report import numbers
from contextlm.report.summary import SummaryRow
from contextlm.results.facts import EmbeddingFacts


def data_remarks(rows: Sequence[SummaryRow]) -> list[str]:
    """Each sentence once; none about what older results do not tell."""
    repetitions = filter(None, (row.corpus.repetition() for row in rows))
    return [*unigram_remarks(rows), *dict.fromkeys(repetitions), *_embeddings(rows)]


def unigram_remarks(rows: Sequence[SummaryRow]) -> list[str]:
    """What knowing no context at all reaches, a sentence per data set where that is known."""
    sentences = [
        f"On {data.name} ({data.tokenizer}, {numbers.count(data.train_tokens)} train tokens), "
        "a model that only knows the training tokens' frequencies reaches a validation PPL of "
        f"{numbers.perplexity(data.unigram_ppl)}."
        for row in rows
        if (data := row.corpus).unigram_ppl is not None
    ]
    return list(dict.fromkeys(sentences))


def _embeddings(rows: Sequence[SummaryRow]) -> list[str]:
    alike: dict[EmbeddingFacts, list[str]] = {}
    for row in rows:
        if row.embedding is not None:
            alike.setdefault(row.embedding, []).append(row.name)
    return [
        f"Token embeddings of {_who(names, rows)}: {_origin(facts)}, "
        f"{'frozen' if facts.frozen else 'trained'} in phase 2."
        for facts, names in alike.items()
    ]


def _who(names: Sequence[str], rows: Sequence[SummaryRow]) -> str:
    return "all contenders" if 1 < len(names) == len(rows) else ", ".join(names)


def _origin(facts: EmbeddingFacts) -> str:
    if facts.source == "random":
        return "drawn at random"
    if facts.source == "pretrained":
        return "pretrained" if facts.path is None else f"pretrained, from {facts.path}"
    text = "learned beforehand"
    if facts.tokens is not None:
        text += f" on {numbers.count(facts.tokens)} tokens"
    if facts.epochs is not None:
        text += f" in {numbers.count(facts.epochs)} {'epoch' if facts.epochs == 1 else 'epochs'}"
    if facts.validation_ppl is not None:
        text += f" (validation PPL of their own model {numbers.perplexity(facts.validation_ppl)})"
    return text
