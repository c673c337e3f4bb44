"""The sentences beside the table of the data."""

from __future__ import annotations

import pytest

from contextlm.report.remarks import data_remarks
from contextlm.report.summary import summarise
from contextlm.results.facts import EmbeddingFacts

LEARNED = EmbeddingFacts(
    source="learned", tokens=117_600, epochs=4, validation_ppl=447.13, frozen=True
)


def test_older_results_say_nothing(made):
    assert data_remarks(summarise([made(baseline=True), made("a")])) == []


def test_unigram_perplexity_once_per_data_set(made):
    data = made().result.corpus.model_copy(update={"unigram_ppl": 1225.63})
    other = data.model_copy(update={"name": "wikitext-2", "unigram_ppl": 9.5})
    outcomes = [made(corpus=data), made("a", corpus=data), made("b", corpus=other)]
    said = "a model that only knows the training tokens' frequencies reaches a validation PPL of"
    assert data_remarks(summarise(outcomes)) == [
        f"On pydocs (Python 3.11.7) (bpe:4096, 512,000 train tokens), {said} 1,225.6.",
        f"On wikitext-2 (bpe:4096, 512,000 train tokens), {said} 9.50.",
    ]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            LEARNED,
            "learned beforehand on 117,600 tokens in 4 epochs (validation PPL of their own model "
            "447.1), frozen in phase 2.",
        ),
        (EmbeddingFacts(source="learned", epochs=1), "learned beforehand in 1 epoch, trained in"),
        (
            EmbeddingFacts(source="pretrained", path="gpt2", frozen=True),
            "pretrained, from gpt2, frozen in phase 2.",
        ),
        (EmbeddingFacts(source="pretrained"), "pretrained, trained in phase 2."),
        (EmbeddingFacts(source="random"), "drawn at random, trained in phase 2."),
    ],
)
def test_where_embeddings_came_from(made, facts, said):
    (alone,) = data_remarks(summarise([made(embedding=facts), made(embedding=facts, seed=1)]))
    assert alone.startswith(f"Token embeddings of mha: {said}")
    (shared,) = data_remarks(summarise([made(embedding=facts), made("a", embedding=facts)]))
    assert shared.startswith(f"Token embeddings of all contenders: {said}")


def test_different_embeddings_name_their_contenders(made):
    thawed = LEARNED.model_copy(update={"frozen": False})
    facts = {"mha": thawed, "a": LEARNED, "b": LEARNED, "older": None}
    outcomes = [made(name, embedding=one) for name, one in facts.items()]
    first, second = data_remarks(summarise(outcomes))
    assert first.startswith("Token embeddings of mha: ")
    assert first.endswith(", trained in phase 2.")
    assert second.startswith("Token embeddings of a, b: ")
    assert second.endswith(", frozen in phase 2.")
