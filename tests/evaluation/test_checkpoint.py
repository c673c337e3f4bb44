"""Opening checkpoints: whole ones, and damaged ones, whose error names the file at fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from contextlm.base.errors import InputError
from contextlm.evaluation.checkpoint import evaluate_checkpoint, load_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny model with 64 positions and a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {byte: number for number, byte in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab={**letters, "<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path / "checkpoint"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def with_values(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def halved(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def in_shards(index: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def test_a_whole_checkpoint_opens_in_evaluation_mode(checkpoint: Path) -> None:
    model, tokenizer = load_checkpoint(checkpoint, "cpu")
    assert not model.training
    assert tokenizer.decode(tokenizer("naïve 🐍")["input_ids"]) == "naïve 🐍"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_values(n_embd=32), "model.safetensors does not fit config.json"),
        (with_values(vocab_size=300), "model.safetensors does not fit config.json"),
        (with_values(n_layer=2), "model.safetensors does not fit config.json"),
        (with_values(n_head=3), "config.json: model type 'gpt2': "),
        (with_values(n_embd="wide"), "config.json: "),
        (with_values(model_type="gpt22"), "unknown model type 'gpt22' (did you mean 'gpt2'?)"),
        (with_values(model_type=None), "config.json: it names no model_type"),
        (written("config.json", "[]"), "config.json: not a JSON object"),
        (halved("config.json"), "config.json: not valid JSON"),
        (halved("tokenizer.json"), "tokenizer.json: not valid JSON"),
        (written("tokenizer.json", "[1]"), "tokenizer.json: not a JSON object"),
        (written("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer"),
        (halved("tokenizer_config.json"), "tokenizer_config.json: not valid JSON"),
        (halved("model.safetensors"), "model.safetensors: damaged or missing"),
        (written("model.safetensors", ""), "model.safetensors: damaged or missing"),
        (in_shards("{}"), "model.safetensors.index.json: it has no weight_map"),
        (in_shards('{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors: damaged or missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_a_damaged_checkpoint_names_the_file(
    checkpoint: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(checkpoint)
    with pytest.raises(InputError) as caught:
        load_checkpoint(checkpoint, "cpu")
    said = str(caught.value)
    assert message in said
    assert str(checkpoint) in said
    assert "ignore_mismatched_sizes" not in said
    assert "pip install" not in said


@pytest.mark.parametrize(
    ("asked", "measured"), [([8, 32, 128], [8, 32]), (None, [64]), ([64], [64])]
)
def test_what_is_measured(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[int] | None,
    measured: list[int],
) -> None:
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "notes.txt"
    text.write_text("some words of a text, " * 200)
    report = evaluate_checkpoint(
        checkpoint,
        corpus=f"text:{text}",
        device="cpu",
        sequence_length=None,
        samples=2,
        cache_lengths=asked,
    )
    assert [entry.tokens for entry in report.cache] == measured
    assert (report.sequence_length, report.windows) == (64, 2)
    assert report.windows_available > 2
    assert report.tokens == 128


def test_cache_lengths_that_are_all_too_long(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"--cache-lengths: .* 64 positions"):
        evaluate_checkpoint(
            checkpoint,
            corpus="pydocs",
            device="cpu",
            sequence_length=None,
            samples=None,
            cache_lengths=[128],
        )
