"""Tokenizers learnt from a corpus: a byte-level BPE, and a vocabulary of whole words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

END_OF_TEXT = "<|endoftext|>"
# The special entries of a vocabulary of words, ids 0 to 3, under transformers' names for their use.
WORD_ROLES = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
}
# A run of letters, digits and underscores, or a single other character that can be seen.
_WORD = r"\w+|[^\w\s]"
# Learning takes time in the square of a word's length, so an endless one is learnt from in parts.
_LONGEST_WORD = 1000
_ENDLESS_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1}}}|\s{{{_LONGEST_WORD + 1}}}")

_set_here: set[str] = set()  # environment variables that the user had left unset


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Within the block `tokenizers` uses all cores, unless the user's environment forbids it.

    Afterwards, where the user had not set ``TOKENIZERS_PARALLELISM``, it is off: a process that
    forks after a parallel use (a data loader's workers) would warn at each fork, or hang.
    """
    variable = "TOKENIZERS_PARALLELISM"
    if variable not in os.environ:
        _set_here.add(variable)
    if variable in _set_here:
        os.environ[variable] = "true"
    try:
        yield
    finally:
        if variable in _set_here:
            os.environ[variable] = "false"


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
        backend.train_from_iterator(_without_endless_words(texts), trainer=trainer)
    return backend


def _without_endless_words(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        if _ENDLESS_WORD.search(text):
            yield from (text[i : i + _LONGEST_WORD] for i in range(0, len(text), _LONGEST_WORD))
        else:
            yield text


def train_word_level(texts: Sequence[str], size: int) -> Any:
    """The most frequent words (a `tokenizers.Tokenizer`), `size` entries at most (DESIGN 1.1).

    Words end at white space and punctuation; a punctuation mark is a word of its own. Ids 0 to 3
    are padding, unknown, beginning and end; the words follow by falling frequency, equally frequent
    ones in the order of their code points, so that the result is the same each time. Case is kept.

    It is lossy: every other word becomes ``<unk>``, and decoding puts one space between any two
    words.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.WordLevel(unk_token=WORD_ROLES["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=size, special_tokens=list(WORD_ROLES.values()), show_progress=False
    )
    with parallel_tokenizers():
        backend.train_from_iterator(texts, trainer=trainer)
    return backend


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer that is trained on the corpus, named ``KIND:SIZE``.

    `roles` names its special tokens as transformers does. A new `version` makes those in the cache
    useless; `smallest` is explained by `needed`.
    """

    train: Callable[[Sequence[str], int], Any]
    version: int
    smallest: int
    needed: str
    example: str
    roles: Mapping[str, str]


def all_roles(end: str) -> dict[str, str]:
    """One token that begins, ends and pads."""
    return {"bos_token": end, "eos_token": end, "pad_token": end}


KINDS = {
    "bpe": Kind(
        train=train_bpe,
        version=1,
        smallest=257,
        needed="256 bytes and the end-of-text token",
        example="bpe:4096",
        roles=all_roles(END_OF_TEXT),
    ),
    "word": Kind(
        train=train_word_level,
        version=3,
        smallest=len(WORD_ROLES) + 1,
        needed="padding, unknown, beginning, end and one word",
        example="word:1000",
        roles=WORD_ROLES,
    ),
}
