"""A cache of its own for each module, and a recipe of two contenders that trains in a second."""

from __future__ import annotations

from pathlib import Path

import pytest

RECIPE = """
name: toy
question: Which rate?
corpus: pydocs
tokenizer: bpe:300
sequence_length: 16
documents: {train: 4, validation: 2}
samples: {train: 24, validation: 6}
training: {batch_size: 8, epochs: 1, precision: float32}
evaluation: {cache_lengths: [16], speed_tokens: 8}
contenders:
  - name: base
    baseline: true
    model: {type: gpt2, n_embd: 16, n_layer: 1, n_head: 2}
  - name: ours
    model: {type: context_pythia, stream: compressed, hidden_size: 16, context_dim: 8,
            num_hidden_layers: 1, num_attention_heads: 2}
    phase1: {max_iterations: 2}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_other_cache(cache, monkeypatch) -> None:
    monkeypatch.setenv("CONTEXTLM_CACHE", str(cache))
    monkeypatch.delenv("CONTEXTLM_DATA", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> str:
    """The path of the recipe."""
    file = tmp_path_factory.mktemp("recipe") / "toy.yaml"
    file.write_text(RECIPE, "utf-8")
    return str(file)


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> str:
    """The same recipe on a small text of its own, which is prepared in no time."""
    folder = tmp_path_factory.mktemp("quick")
    lines = (f"Line {n} of a text has {n * n % 97} words, or {n % 7} letters." for n in range(900))
    (folder / "notes.txt").write_text("\n".join(lines), "utf-8")
    text = RECIPE.replace("corpus: pydocs", f"corpus: text:{folder / 'notes.txt'}")
    file = folder / "toy.yaml"
    file.write_text(text.replace("documents: {train: 4, validation: 2}\n", ""), "utf-8")
    return str(file)
