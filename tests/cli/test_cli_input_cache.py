"""`contextlm eval --cache input`: bytes and time beside the plain cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.models.context_pythia import ContextPythiaConfig

WIDTH, LAYERS, POSITIONS = 16, 2, 32
SHARED = {"vocab_size": 257, "hidden_size": WIDTH, "num_attention_heads": 2}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(
        **SHARED, num_hidden_layers=LAYERS, max_position_embeddings=POSITIONS, intermediate_size=32
    ),
    "gpt2": GPT2Config(
        vocab_size=257, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=POSITIONS
    ),
    "context_pythia": ContextPythiaConfig(
        **SHARED, num_hidden_layers=LAYERS, context_dim=8, max_position_embeddings=POSITIONS
    ),
}
Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Evaluate]:
    """Run `contextlm eval` on an untrained model: exit code, stdout, stderr."""
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("some words of a text, " * 200)
    logging.disable_progress_bar()
    letters = {byte: n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**letters, "<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()

    def run(name: str, *options: str) -> tuple[int, str, str]:
        folder = tmp_path / name
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
        corpus = ("--corpus", f"text:{tmp_path / 'notes.txt'}", "--samples", "2")
        code = execute(app, ["eval", str(folder), "--device", "cpu", *corpus, *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    yield run
    logging.enable_progress_bar()


def change(new: float, old: float) -> Any:
    return pytest.approx(100 * (new / old - 1))


@pytest.mark.parametrize(("name", "position_bytes"), [("gpt_neox", 4), ("gpt2", 0)])
def test_both_caches_are_measured(evaluate: Evaluate, name: str, position_bytes: int) -> None:
    code, out, _ = evaluate(name, "--cache", "input", "--cache-lengths", "8,32", "--json")
    assert code == 0
    report = json.loads(out)
    ours = report["input_cache"]
    lengths = (8, 32)
    assert [entry["tokens"] for entry in ours["cache"]] == list(lengths)
    for entry, plain, percent in zip(
        ours["cache"], report["cache"], ours["cache_change_percent"], strict=True
    ):
        tokens = entry["tokens"]
        assert plain["logical"] == 2 * tokens * LAYERS * WIDTH * 4
        assert entry["logical"] == plain["logical"] // 2 + tokens * position_bytes
        assert entry["logical"] <= entry["resident"] <= 1.125 * entry["logical"]
        assert percent == change(entry["logical"], plain["logical"])
    for rate in ("prefill", "decode"):
        mine, plain = ours[f"{rate}_tokens_per_second"], report[f"{rate}_tokens_per_second"]
        assert mine > 0
        assert ours[f"{rate}_change_percent"] == change(mine, plain)


def test_the_table_shows_both(evaluate: Evaluate) -> None:
    code, out, _ = evaluate("gpt2", "--cache", "input", "--cache-lengths", "8")
    assert code == 0
    lines = {line.strip().rpartition("  ")[0].strip(): line for line in out.splitlines()}
    assert "2.0 KB (2.0 KB resident)" in lines["cache at 8 tokens"]
    assert "1.0 KB, -50.0% (1.1 KB resident)" in lines["input cache at 8 tokens"]
    for rate in ("prefill", "decode"):
        row = rf"^ *input cache: {rate} tokens/s, \d+ tokens +[\d,.]+, [-+]?[\d,.]+% *$"
        assert len(re.findall(row, out, re.MULTILINE)) == 1


def test_without_the_option_there_is_none(evaluate: Evaluate) -> None:
    code, out, _ = evaluate("gpt2", "--cache-lengths", "8", "--json")
    assert code == 0
    assert json.loads(out)["input_cache"] is None


def test_other_models_are_refused_in_one_line(evaluate: Evaluate) -> None:
    code, out, said = evaluate("context_pythia", "--cache", "input")
    assert (code, out) == (2, "")
    assert said == (
        "contextlm: error: --cache input: InputCache supports gpt_neox and gpt2, not "
        "'context_pythia'\n"
    )


def test_an_unknown_kind_of_cache(evaluate: Evaluate) -> None:
    code, out, said = evaluate("gpt2", "--cache", "output")
    assert (code, out) == (2, "")
    assert said.count("\n") == 1
    assert "--cache" in said
    assert "input" in said
