"""A byte-level BPE, learnt from a corpus."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from contextlm.data.parallelism import parallel_tokenizers

END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257  # 256 bytes and the end-of-text token
# Learning takes time in the square of a word's length, so an endless one is learnt from in parts.
_LONGEST_WORD = 1000
_ENDLESS_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1}}}|\s{{{_LONGEST_WORD + 1}}}")


def train_bpe(texts: Sequence[str], size: int) -> Any:
    """A byte-level BPE (`tokenizers.Tokenizer`) of at most `size` entries, the same each time.

    All 256 bytes are entries, no space is added in front and nothing is normalised, so that every
    text comes back unchanged. The end-of-text token has id 0.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with parallel_tokenizers():
        backend.train_from_iterator(_learnable(texts), trainer=trainer)
    return backend


def _learnable(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        if _ENDLESS_WORD.search(text):
            yield from (text[i : i + _LONGEST_WORD] for i in range(0, len(text), _LONGEST_WORD))
        else:
            yield text
