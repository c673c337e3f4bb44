"""Perplexity by position against one forward pass a window, and what `eval --long` reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contextlm.base.errors import InputError
from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.data.corpora import load_corpus
from contextlm.data.tokenizers import load_tokenizer, vocab_entries
from contextlm.evaluation.checkpoint import TrainingNote, write_trained
from contextlm.evaluation.long_texts import (
    bucket_edges,
    buckets,
    evaluate_long,
    losses_by_position,
    windows_of,
)
from contextlm.evaluation.memory import position_limit
from contextlm.models.base import registry
from contextlm.models.build import build_config, create_model

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2}
MODELS = {
    "context_kv": registry()["context_kv"].tiny[0],
    "post_ln_transformer": registry()["post_ln_transformer"].tiny[0],
    "mamba": {**SMALL, "state_size": 4},
}


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_pass_in_chunks_equals_one_window_at_once(name: str, ahead: int) -> None:
    model: Any = create_model(build_config({"type": name, **MODELS[name]}, 50), 0).double().train()
    length = min(45, position_limit(model) or 45)
    draw = np.random.default_rng(0)
    drawn = draw.integers(1, model.config.vocab_size, (6, length + ahead)).astype(np.uint16)
    windows = list(drawn)
    found_W = losses_by_position(model, windows, ahead, CPU, chunk=7)
    assert model.training
    model.eval()
    expected_W = torch.zeros(length, dtype=torch.float64)
    for window in windows:
        ids_1W = torch.tensor(window.astype(np.int64))[None]
        logits_TV = model(ids_1W[:, :length]).logits[0]
        expected_W += F.cross_entropy(logits_TV.double(), ids_1W[0, ahead:], reduction="none")
    # Mamba's scan is in float32 whatever its weights are.
    rounding = 1e-5 if model.config.model_type == "mamba" else 1e-9
    torch.testing.assert_close(found_W, expected_W, rtol=rounding, atol=rounding)
    edges = bucket_edges(8, length)
    for bucket in buckets(found_W, len(windows), edges):
        mean = float(expected_W[bucket.first : bucket.last].mean()) / len(windows)
        assert bucket.loss == pytest.approx(mean, rel=rounding)
        assert bucket.tokens == len(windows) * (bucket.last - bucket.first)


def test_edges_double_up_to_the_training_length_and_step_by_it_beyond() -> None:
    assert bucket_edges(64, 256) == [0, 8, 16, 32, 64, 128, 192, 256]
    assert bucket_edges(64, 100) == [0, 8, 16, 32, 64, 100]
    assert bucket_edges(64, 12) == [0, 8, 12]
    assert bucket_edges(1, 3) == [0, 1, 2, 3]


def test_windows_come_from_as_many_documents_as_possible() -> None:
    documents = [np.arange(10), np.arange(20, 23), np.arange(30, 34)]
    found = [window.tolist() for window in windows_of(documents, 4, 3)]
    assert found == [[0, 1, 2, 3], [30, 31, 32, 33], [4, 5, 6, 7]]
    assert len(windows_of(documents, 4, 99)) == 3
    assert windows_of(documents, 11, 99) == []


# --- the whole ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, untrained, of questions of associative recall with 16 tokens each."""
    folder = tmp_path_factory.mktemp("recall")
    tokenizer = load_tokenizer("word:200", load_corpus("recall:4"), folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    fields = {"type": "llama", **small, "num_attention_heads": 2}
    model = create_model(build_config(fields, vocab_entries(tokenizer)), 0)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "checkpoint")
    write_trained(folder / "checkpoint", TrainingNote(unit="answers", sequence_length=16))
    return folder / "checkpoint"


@pytest.fixture
def report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run `contextlm eval --long`: the JSON object, and what people get."""
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))

    def run(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
        command = ["eval", str(folder), "--long", "--device", "cpu", *options]
        assert execute(app, command) == 0
        table = capsys.readouterr().out
        assert execute(app, [*command, "--json"]) == 0
        return json.loads(capsys.readouterr().out), table

    return run


def test_other_questions_are_asked(checkpoint: Path, report: Any) -> None:
    found, table = report(checkpoint, "--corpus", "recall:8", "--samples", "12")
    assert [entry["level"] for entry in found["retrieval"]] == ["2 pairs", "4 pairs", "8 pairs"]
    assert [entry["answers"] for entry in found["retrieval"]] == [4 * 2, 4 * 4, 4 * 8]
    assert (found["positions"], found["length"], found["trained"]) == ([], 32, 16)
    assert found["cache"][0]["tokens"] == 32
    assert "8 pairs" in table


def test_texts_go_beyond_the_training_length(checkpoint: Path, tmp_path: Path, report: Any) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("k1 v2 k3 v4 " * (40 + number % 2))
    found, table = report(checkpoint, "--corpus", f"text:{tmp_path}", "--samples", "3")
    assert found["length"] == 8 * 16
    edges = [(bucket["first"], bucket["last"]) for bucket in found["positions"]]
    assert edges[:5] == [(0, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    assert edges[-1] == (112, 128)
    assert sum(bucket["tokens"] for bucket in found["positions"]) == found["windows"] * 128
    assert [held["tokens"] for held in found["cache"]] == [last for _, last in edges]
    assert "112 to 127" in table
    assert "all of it" in table


def test_a_position_limit_is_kept_and_told(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("k1 v2 k3 v4 " * 60)
    limited = tmp_path / "limited"
    shutil.copytree(checkpoint, limited)
    config = json.loads((limited / "config.json").read_text())
    (limited / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 50}))
    found = evaluate_long(limited, corpus=f"text:{tmp_path}", device="cpu", samples=2)
    assert found.length == found.positions[-1].last == 50
    assert "measured up to the model's 50 positions" in found.remarks
    with pytest.raises(InputError, match="has 64 tokens, more than the model's 50 positions"):
        evaluate_long(limited, corpus="recall:16", device="cpu", samples=6)


def test_what_long_texts_cannot_be_asked(checkpoint: Path) -> None:
    assert execute(app, ["eval", str(checkpoint), "--long", "--cache-lengths", "8"]) == 2
    with pytest.raises(InputError, match="does not know all of its words"):
        evaluate_long(checkpoint, corpus="needles:2", device="cpu", samples=4)
    with pytest.raises(InputError, match="--split all"):
        evaluate_long(checkpoint, corpus="recall:4", device="cpu", split="all")
