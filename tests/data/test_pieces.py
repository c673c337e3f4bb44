"""A text in pieces has the tokens of the whole text, wherever its blocks are cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from small_corpus import make_corpus

from contextlm.data.pieces import encode_pieces, pieces
from contextlm.data.tokenizers import encode, load_tokenizer

TEXTS = {
    "lines": "\n".join(f"line {n} of words, don't it's\tnaïve ☕ x{n}" for n in range(120)),
    "one line": " ".join(f"word{n} of a line that never ends" for n in range(120)),
    "paragraphs": "\n \n".join(f" = Title {n} = and  some   more text ." for n in range(120)),
    "no spaces": "没有空格的文本。很长" * 300,
    "emoji": "👨‍👩‍👧 " * 600,
}


@pytest.fixture(params=["bpe:300", "word:60"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return load_tokenizer(request.param, make_corpus(list(TEXTS.values())), tmp_path)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("block", [1, 37, 10_000])
def test_the_tokens_are_those_of_the_whole(tokenizer: Any, name: str, block: int) -> None:
    text = TEXTS[name]
    blocks = [text[at : at + block] for at in range(0, len(text), block)]
    parts = list(encode_pieces(tokenizer, blocks, 500))
    assert [i for ids in parts for i in ids] == encode(tokenizer, [text])[0]
    assert (len(parts) > 3) == (name != "emoji"), "emoji hold no border that is sure"


def test_random_texts(tokenizer: Any) -> None:
    draw = random.Random(0)
    for _ in range(30):
        text = "".join(
            draw.choices(["a", "bc", " ", "  ", "\n", "'s", ".", "1", "é", "\r\n"], k=900)
        )
        parts = list(encode_pieces(tokenizer, [text], 50))
        assert [i for ids in parts for i in ids] == encode(tokenizer, [text])[0]
        assert len(parts) > 2


def test_a_text_without_borders_is_cut_where_it_must_be(tokenizer: Any) -> None:
    blocks = ["w" * 100] * 50
    assert list(pieces(tokenizer, blocks, 300)) == ["w" * 5000]
    parts = list(pieces(tokenizer, blocks, 300, 1000))
    assert "".join(parts) == "w" * 5000
    assert max(map(len, parts)) == 1000


def test_a_tokenizer_that_begins_every_text_with_a_space_is_not_cut(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer: Any = load_tokenizer("bpe:300", make_corpus(list(TEXTS.values())), tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = TEXTS["lines"]
    parts = list(encode_pieces(tokenizer, [text], 500))
    assert [i for ids in parts for i in ids] == encode(tokenizer, [text])[0]
