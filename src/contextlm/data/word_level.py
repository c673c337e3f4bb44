"""A vocabulary of whole words, learnt from a corpus (DESIGN 1.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from contextlm.data.parallelism import parallel_tokenizers

# The special entries, ids 0 to 3, under transformers' names for what they do.
WORD_LEVEL_ROLES = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
}
SMALLEST_WORD_LEVEL = len(WORD_LEVEL_ROLES) + 1
# A run of letters, digits and underscores, or a single other character that can be seen.
_WORD = r"\w+|[^\w\s]"


def train_word_level(texts: Sequence[str], size: int) -> Any:
    """The most frequent words (a `tokenizers.Tokenizer`), `size` entries at most, the same always.

    Words end at white space and punctuation; a punctuation mark is a word of its own. Ids 0 to 3
    are padding, unknown, beginning and end; the words follow by falling frequency, equally frequent
    ones in the order of their code points. Case is kept.

    It is lossy: every other word becomes ``<unk>``, and decoding puts one space between any two
    words. What a model pays for ``<unk>`` is no code length of the text behind it, so that bits per
    byte mean little here.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.WordLevel(unk_token=WORD_LEVEL_ROLES["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=size, special_tokens=list(WORD_LEVEL_ROLES.values()), show_progress=False
    )
    # Where a text holds a special entry (WikiText's <unk>), encoding finds it before any words.
    special = re.compile("|".join(WORD_LEVEL_ROLES.values()))
    with parallel_tokenizers():
        backend.train_from_iterator((special.sub(" ", text) for text in texts), trainer=trainer)
    return backend
