"""Long texts, cut into pieces where that cannot change their tokens.

An encoded text takes some hundred times its size in memory, so that a text of gigabytes can only be
encoded piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from contextlm.data.tokenizers import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Where pre-tokenizers separate, the surest first: after a line feed between two visible characters;
# before a space between two letters; between a letter and a punctuation mark.
_BORDERS = (
    re.compile(r"(?<=\S\n)(?=\S)"),
    re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])"),
    re.compile(r"(?<=[^\W\d_])(?=[,.;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"),
)
_AROUND = 200  # characters on either side of a border with which it is tried out
_TRIES = 20


def encode_pieces(
    tokenizer: PreTrainedTokenizerFast,
    blocks: Iterable[str],
    longest: int,
    most: int | None = None,
) -> Iterator[list[int]]:
    """Token ids of a text that comes in blocks, as if it were encoded whole.

    Args:
        tokenizer: a fast one.
        blocks: the text, cut anywhere; no more than about `longest` characters and one block are
            held.
        longest: about so many characters are encoded at once.
        most: where there is no border for so many characters, the text is cut all the same, and
            the tokens there may be others than those of the whole; None: never.

    Yields:
        The ids of one piece after the other.
    """
    for piece in pieces(tokenizer, blocks, longest, most):
        yield encode(tokenizer, [piece])[0]


def pieces(
    tokenizer: PreTrainedTokenizerFast,
    blocks: Iterable[str],
    longest: int,
    most: int | None = None,
) -> Iterator[str]:
    """The text of `encode_pieces`, cut; see there."""
    held = ""
    for block in blocks:
        held += block
        while (cut := _cut(tokenizer, held, longest, most)) is not None:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _cut(
    tokenizer: PreTrainedTokenizerFast, text: str, longest: int, most: int | None
) -> int | None:
    """Where to cut, or None to wait for more; what is near the end is not judged yet."""
    last = len(text) - _AROUND
    if last <= longest:
        return None
    for border in _BORDERS:
        for match in islice(border.finditer(text, longest, last), _TRIES):
            if _is_clean(tokenizer, text, match.start()):
                return match.start()
    return most if most is not None and last > most else None


def _is_clean(tokenizer: PreTrainedTokenizerFast, text: str, cut: int) -> bool:
    """Whether the tokens on both sides are those of the uncut text.

    Some tokenizers begin every text with a space, and some have tokens across spaces.
    """
    left, right = text[max(0, cut - _AROUND) : cut], text[cut : cut + _AROUND]
    both, before, after = encode(tokenizer, [left + right, left, right])
    return both == before + after
