"""Opening whole and damaged checkpoints, the note on their training, and measuring them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from contextlm.base.errors import InputError
from contextlm.evaluation.checkpoint import (
    TrainingNote,
    load_checkpoint,
    read_trained,
    write_trained,
)
from contextlm.evaluation.generation import Sampling, continue_text
from contextlm.evaluation.measure import evaluate_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path, saved: Callable[..., Path]) -> Path:
    """A tiny model with 64 positions."""
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    return saved(tmp_path / "checkpoint", config)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A corpus of one file of 4,200 bytes."""
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("some words of a text " * 200)
    return f"text:{tmp_path / 'notes.txt'}"


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
        (with_values(vocab_size=300), "model.safetensors does not fit config.json"),
        (with_values(n_layer=2), "model.safetensors does not fit config.json"),
        (with_values(n_head=3), "config.json: model type 'gpt2': "),
        (with_values(n_embd="wide"), "config.json: "),
        (with_values(model_type="gpt22"), "unknown model type 'gpt22' (did you mean 'gpt2'?)"),
        (with_values(model_type=None), "config.json: it names no model_type"),
        (written("config.json", "[]"), "config.json: not a JSON object"),
        (halved("config.json"), "config.json: not valid JSON"),
        (written("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer"),
        (halved("tokenizer_config.json"), "tokenizer_config.json: not valid JSON"),
        (halved("model.safetensors"), "model.safetensors: damaged or missing"),
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


# --- the note ------------------------------------------------------------------------------------


def test_a_note_is_read_back(tmp_path: Path) -> None:
    assert read_trained(tmp_path) == TrainingNote()
    assert TrainingNote().remarks() == []
    note = TrainingNote(target_offset=2, unit="lines", stream=True)
    write_trained(tmp_path, note)
    assert read_trained(tmp_path) == note
    assert len(note.remarks()) == 3


@pytest.mark.parametrize("text", ["", "[]", '{"target_offset": 0}', '{"unit": "words"}'])
def test_a_damaged_note_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "contextlm.json").write_text(text)
    with pytest.raises(InputError, match=r"contextlm\.json: "):
        read_trained(tmp_path)


def test_a_model_is_scored_on_what_it_was_trained_for(checkpoint: Path, notes: str) -> None:
    plain = evaluate_checkpoint(checkpoint, corpus=notes, device="cpu", samples=4)
    write_trained(checkpoint, TrainingNote(target_offset=2))
    ahead = evaluate_checkpoint(checkpoint, corpus=notes, device="cpu", samples=4)
    assert plain.bits_per_byte is not None
    assert ahead.bits_per_byte is None
    assert ahead.loss != plain.loss
    assert ahead.remarks == ["it predicts the token 2 ahead, and is scored on that"]
    with pytest.raises(InputError, match="predicts the token 2 ahead"):
        continue_text(checkpoint, ["Return"], Sampling(4), device="cpu")


def test_a_model_of_lines_begins_with_the_start_token(checkpoint: Path) -> None:
    lengths = []
    for unit in ("windows", "lines"):
        write_trained(checkpoint, TrainingNote(unit=unit))
        made = continue_text(checkpoint, ["Return"], Sampling(2), device="cpu")
        lengths.append(made.prompt_tokens)
    assert lengths == [6, 7]


# --- measuring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "measured"), [([8, 32, 128], [8, 32]), (None, [64])])
def test_what_is_measured(
    checkpoint: Path, notes: str, asked: list[int] | None, measured: list[int]
) -> None:
    options: dict[str, Any] = {"corpus": notes, "device": "cpu", "samples": 2}
    report = evaluate_checkpoint(checkpoint, **options, cache_lengths=asked)
    assert [entry.tokens for entry in report.cache] == measured
    assert (report.sequence_length, report.windows, report.tokens) == (64, 2, 128)


@pytest.mark.parametrize(
    ("split", "least", "most"),
    [(None, 4150, 4202), ("train", 3000, 4100), ("validation", 64, 1000)],
)
def test_a_corpus_of_ones_own_is_scored_whole_unless_a_split_is_asked_for(
    checkpoint: Path, notes: str, split: Any, least: int, most: int
) -> None:
    report = evaluate_checkpoint(
        checkpoint, corpus=notes, device="cpu", split=split, sequence_length=8, cache_lengths=[8]
    )
    assert report.split == (split or "all")
    assert report.windows == report.windows_available
    assert least <= report.tokens <= most


def test_cache_lengths_that_are_all_too_long(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"--cache-lengths: .* 64 positions"):
        evaluate_checkpoint(checkpoint, corpus="pydocs", device="cpu", cache_lengths=[128])
