"""A small corpus and a hub that is never there."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_corpus import make_corpus

from contextlm.data.corpus import Corpus
from contextlm.data.tokenizers import load_tokenizer


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on a network, nor on what is set on the machine that runs it."""
    monkeypatch.setattr("contextlm.data.hub.hub_reachable", lambda: False)
    monkeypatch.delenv("CONTEXTLM_DATA", raising=False)
    monkeypatch.delenv("CONTEXTLM_CACHE", raising=False)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the hub could be reached; the test says what it delivers."""
    monkeypatch.setattr("contextlm.data.hub.hub_reachable", lambda: True)


@pytest.fixture
def corpus() -> Corpus:
    return make_corpus(["the cat sat on the mat", "naïve café ☕ " * 5, "", "the end\n"])


@pytest.fixture
def tokenizer(corpus: Corpus, tmp_path: Path):
    return load_tokenizer("bpe:300", corpus, tmp_path / "tokenizer-cache")
