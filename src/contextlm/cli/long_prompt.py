"""A prompt of any length is tokenised and read by the model piece by piece; nothing of it is kept
but the model's cache.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from contextlm.base.errors import InputError
from contextlm.data.pieces import encode_pieces
from contextlm.evaluation.memory import CHUNK, cache_argument, feed, position_limit

PIECE = 2**15  # characters that are tokenised at once
LONGEST_WORD = 2**18  # characters without a border, after which the text is cut all the same

Told = Callable[[int], None]


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that a model has read but for its end.

    Attributes:
        rest_1T: the ids still to be read: all of a short prompt, one of a long one.
        cache: what the model keeps of the others, or None where there are none.
        before: how many these are.
        seconds: that reading them took.
    """

    rest_1T: Tensor
    cache: Cache | None
    before: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Length of the whole prompt."""
        return self.before + self.rest_1T.shape[1]

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """What `generate` needs to go on from here, the same whatever the prompt's length.

        `generate` takes ids that are shorter than their mask as new ones. A mask without a zero is
        then dropped, so that one more entry than ids says all it would with an entry for each token
        read; positions are given because they would be counted from the mask.
        """
        rest = self.rest_1T.shape[1]
        mask_1M = torch.ones(1, rest + (self.cache is not None), dtype=torch.long)
        given: dict[str, Any] = {"attention_mask": mask_1M.to(self.rest_1T.device)}
        if self.cache is not None:
            given[cache_argument(model)] = self.cache
            if "position_ids" in inspect.signature(model.forward).parameters:
                positions_1T = torch.arange(self.before, self.before + rest).unsqueeze(0)
                given["position_ids"] = positions_1T.to(self.rest_1T.device)
        return given


def prompt_ids(
    blocks: Iterable[str], tokenizer: Any, folder: Path, *, begin: bool
) -> Iterator[list[int]]:
    """The prompt's ids, some at a time, at least one in all.

    Args:
        blocks: the text, cut anywhere.
        tokenizer: of the checkpoint.
        folder: the checkpoint's, for the error.
        begin: put the start token in front, which an empty prompt is given in any case.

    Raises:
        InputError: there is no start token.
    """
    empty = not begin
    if begin:
        yield [_start(tokenizer, folder)]
    for ids in encode_pieces(tokenizer, blocks, PIECE, LONGEST_WORD):
        empty = empty and not ids
        yield ids
    if empty:
        yield [_start(tokenizer, folder)]


def _start(tokenizer: Any, folder: Path) -> int:
    for first in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if first is not None:
            return int(first)
    raise InputError(f"{folder}: the prompt is empty, and the tokenizer has no start token")


@torch.no_grad()
def read_long_prompt(
    model: PreTrainedModel,
    ids: Iterable[list[int]],
    new_tokens: int,
    folder: Path,
    told: Told,
    chunk: int = CHUNK,
) -> ReadPrompt:
    """Let a model read a prompt, holding no more of it than a chunk and a piece.

    The ids for a model with a position limit are counted before it reads the first.

    Args:
        model: a causal language model in evaluation mode.
        ids: of the prompt, some at a time.
        new_tokens: how many are to follow.
        folder: the checkpoint's, for the error.
        told: called with the tokens read so far, after each chunk.
        chunk: tokens that the model reads at once. A prompt of no more is left to `generate`.

    Raises:
        InputError: prompt and new tokens are more than the model's positions.
    """
    limit = position_limit(model)
    if limit is not None:
        # Asked beforehand: rotary models run past their positions without an error.
        ids = [_within(ids, new_tokens, limit, folder)]
    started = time.perf_counter()
    held: list[int] = []
    before, cache = 0, None
    for more in ids:
        held += more
        # One at least is left over, for `generate` to begin with.
        while len(held) > chunk:
            cache = feed(model, _tensor(held[:chunk], model), cache)[1]
            before += chunk
            del held[:chunk]
            told(before)
    if cache is not None and len(held) > 1:
        cache = feed(model, _tensor(held[:-1], model), cache)[1]
        before += len(held) - 1
        del held[:-1]
    return ReadPrompt(_tensor(held, model), cache, before, time.perf_counter() - started)


def _within(ids: Iterable[list[int]], new_tokens: int, limit: int, folder: Path) -> list[int]:
    """All ids of a prompt, refused as soon as they are too many."""
    held: list[int] = []
    pieces = iter(ids)
    for more in pieces:
        held += more
        if len(held) + new_tokens > limit:
            at_least = "at least " if any(pieces) else ""
            raise InputError(
                f"{folder}: prompt and --max-new-tokens make {at_least}{len(held) + new_tokens} "
                f"tokens, more than the model's {limit} positions"
            )
    return held


def _tensor(ids: list[int], model: PreTrainedModel) -> Tensor:
    return torch.tensor([ids], device=model.device)
