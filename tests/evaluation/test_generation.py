"""Continuing texts: prompts of any length, read in pieces; text that is given out as it comes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from contextlm.base.errors import InputError
from contextlm.evaluation import generation
from contextlm.evaluation.checkpoint import load_checkpoint
from contextlm.evaluation.generation import (
    Sampling,
    TextStream,
    continue_text,
    prompt_ids,
    read_long_prompt,
)
from contextlm.evaluation.memory import position_limit
from contextlm.models.base import registry
from contextlm.models.build import build_config, create_model
from contextlm.models.dual_context import DualContextConfig

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
THEIRS = {
    "gpt_neox": {**WIDTH, "intermediate_size": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {**WIDTH, "intermediate_size": 32, "num_key_value_heads": 1},
    "mistral": {**WIDTH, "intermediate_size": 32, "num_key_value_heads": 1, "sliding_window": 5},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}
NEW = 6
HERE = Path("checkpoint")


@pytest.fixture(scope="module", params=[*registry(), *THEIRS])
def model(request: pytest.FixtureRequest) -> Any:
    """One of each architecture: the contract tests feed all variants in pieces."""
    name = request.param
    fields = THEIRS[name] if name in THEIRS else registry()[name].tiny[:2][-1]
    return create_model(build_config({"type": name, **fields}, 50), 0).double().eval()


def prompt_of(model: Any) -> list[int]:
    length = min(61, (position_limit(model) or 99) - NEW)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, model.config.vocab_size, (length,), generator=generator).tolist()


def generated(model: Any, ids_1T: Tensor, **arguments: Any) -> tuple[list[int], Tensor]:
    """New ids, and the logits behind them."""
    output = model.generate(
        ids_1T,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    return output.sequences[0, ids_1T.shape[1] :].tolist(), torch.cat(output.logits)


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 0}])
def test_a_prompt_in_chunks_is_continued_as_if_read_at_once(
    model: Any, sampling: dict[str, Any]
) -> None:
    ids = prompt_of(model)
    torch.manual_seed(7)
    whole, expected = generated(model, torch.tensor([ids]), **sampling)
    told: list[int] = []
    read = read_long_prompt(model, [ids[:20], [], ids[20:]], NEW, HERE, told.append, chunk=7)
    assert read.tokens == len(ids)
    assert read.rest_1T.shape == (1, 1)
    assert told == list(range(7, len(ids), 7))
    torch.manual_seed(7)
    ours, logits = generated(model, read.rest_1T, **read.arguments(model), **sampling)
    assert ours == whole
    # Mamba's scan is in float32 whatever its weights are.
    rounding = 1e-5 if model.config.model_type == "mamba" else 1e-9
    torch.testing.assert_close(logits, expected, rtol=rounding, atol=rounding)
    short = read_long_prompt(model, [ids], NEW, HERE, told.append, chunk=len(ids))
    assert (short.rest_1T.tolist(), short.cache) == ([ids], None)  # left to `generate`


def test_too_long_a_prompt_is_refused_before_all_of_it_is_read() -> None:
    model = create_model(build_config({"type": "gpt2", **THEIRS["gpt2"], "n_positions": 32}, 50), 0)
    model.forward = None  # nothing may be computed
    taken: list[int] = []

    def endless() -> Iterator[list[int]]:
        while True:
            taken.append(1)
            yield [1] * 10

    with pytest.raises(InputError, match=r"checkpoint: .* at least 34 tokens, .* 32 positions"):
        read_long_prompt(model, endless(), 4, HERE, lambda tokens: None)
    assert len(taken) == 4
    with pytest.raises(InputError, match="make 33 tokens, more than the model's 32 positions"):
        read_long_prompt(model, [[1] * 29], 4, HERE, lambda tokens: None)


# --- from a checkpoint ----------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, saved: Callable[..., Path]) -> Path:
    """A model without a position limit, and a tokenizer of bytes."""
    config = DualContextConfig(
        vocab_size=257,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        window=8,
        max_representatives=4,
        placement="integrated",
    )
    return saved(tmp_path / "checkpoint", config)


def tensor_elements() -> int:
    gc.collect()
    return sum(found.numel() for found in gc.get_objects() if type(found) is Tensor)


def test_what_is_held_does_not_grow_with_the_prompt(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "PIECE", 4096)
    model, tokenizer = load_checkpoint(checkpoint, "cpu")
    tensors: list[int] = []
    python: list[int] = []

    def look(tokens: int) -> None:
        if tokens % 2_560 == 0:
            tensors.append(tensor_elements())
            python.append(tracemalloc.get_traced_memory()[0])

    blocks = ("A line of a long text, grün.\n" * 50 for _ in range(12))
    ids = prompt_ids(blocks, tokenizer, checkpoint, begin=False)
    tracemalloc.start()
    try:
        read = read_long_prompt(model, ids, 4, checkpoint, look, chunk=512)
    finally:
        tracemalloc.stop()
    assert read.tokens == 12 * 50 * 30
    assert len(tensors) == read.tokens // 2_560 == 7
    assert max(tensors) == min(tensors)
    # A list of all the ids would be 8 bytes for each: 120,000 more at the end.
    assert max(python[1:]) - python[0] < 60_000


def test_the_text_after_a_long_prompt_is_that_after_the_whole(checkpoint: Path) -> None:
    text = "A line of a long text, grün.\n" * 60
    blocks = [text[at : at + 11] for at in range(0, len(text), 11)]
    read: list[int] = []
    cache_lengths: list[int] = []
    made = continue_text(
        checkpoint,
        blocks,
        Sampling(8),
        device="cpu",
        on_prompt=read.append,
        on_token=lambda tokens, seconds, cache: cache_lengths.append(cache.get_seq_length()),
    )
    assert (made.prompt, made.prompt_tokens, made.tokens) == (text, len(text.encode()), 8)
    assert read == [1024]
    assert cache_lengths == [*range(1800, 1808)]
    model, tokenizer = load_checkpoint(checkpoint, "cpu")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    whole = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, -8:]
    assert made.text == tokenizer.decode(whole, skip_special_tokens=True)


def test_a_very_long_prompt_is_not_repeated(checkpoint: Path) -> None:
    made = continue_text(checkpoint, ["long text "] * 1001, Sampling(1), device="cpu")
    assert (made.prompt, made.prompt_tokens) == (None, 10_010)


@pytest.mark.parametrize(
    "text", ["👨‍👩‍👧 naïve 😀", "没有空格的文本" * 20, "x" * 50, "a\n\nb  c \n", "<end>", ""]
)
def test_text_is_given_out_by_characters(checkpoint: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # At the end and before it: bytes that are no character.
    for ids in ([*tokenizer(text)["input_ids"], 200], [201, *tokenizer(text)["input_ids"], 256]):
        pieces: list[str] = []
        counts: list[int] = []
        stream = TextStream(tokenizer, pieces.append, counts.append)
        stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for token in ids:
            stream.put(torch.tensor([token]))
        before = len(pieces)
        stream.end()
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert before >= len(text.replace("<end>", "")) - 1
        assert counts == [*range(1, len(ids) + 1)]
