"""Continuing a text with a checkpoint.

A prompt of any length is tokenised and read piece by piece; nothing of it is kept but the model's
cache. The text is given out as it is generated.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from contextlm.base.errors import InputError
from contextlm.data.pieces import encode_pieces
from contextlm.evaluation.checkpoint import load_checkpoint, read_trained
from contextlm.evaluation.memory import CHUNK, cache_argument, cache_bytes, feed, position_limit
from contextlm.models.cache import CACHE

SHOWN = 10_000  # characters; a longer prompt is not repeated
PIECE = 2**15  # characters that are tokenised at once
LONGEST_WORD = 2**18  # characters without a border, after which the text is cut all the same

_DROPS_MASKS = "_mask_length" in GenerationConfig.__annotations__  # noted when one is dropped


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one unless a sampling option is set."""

    max_new_tokens: int
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """The same, as `generate` wants it."""
        chosen = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        given = {name: value for name, value in chosen.items() if value is not None}
        if not given or self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        # 0 switches off the 50 that transformers would take where only another option is set.
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "top_k": 0, **given}


@dataclass(frozen=True)
class Continuation:
    """The text that was generated, without its prompt.

    `prompt` is None where it is longer than `SHOWN`. `prompt_seconds` went into reading what comes
    before a long prompt's last token, `seconds` into all else. `cache_logical` and `cache_resident`
    are bytes.
    """

    prompt: str | None
    text: str
    prompt_tokens: int
    prompt_seconds: float
    tokens: int
    seconds: float
    tokens_per_second: float
    cache_logical: int
    cache_resident: int


def continue_text(
    folder: Path,
    prompt: Iterable[str],
    sampling: Sampling,
    *,
    device: str,
    write: Callable[[str], object] | None = None,
    on_prompt: Callable[[int], object] = lambda tokens: None,
    on_token: Callable[[int, float, Cache], object] = lambda tokens, seconds, cache: None,
) -> Continuation:
    """Continue `prompt` with the model in `folder`.

    Args:
        folder: a checkpoint with its tokenizer.
        prompt: the text, in blocks; an empty one starts from the end-of-text token.
        write: given the text as it comes.
        on_prompt: given the tokens of a long prompt that have been read so far.
        on_token: after each token, given how many there are, their seconds, and their cache.

    Raises:
        InputError: no checkpoint, one that does not predict the next token, or a text that is
            longer than the model's positions.
    """
    model: Any  # transformers leaves `generate` without types
    model, tokenizer = load_checkpoint(folder, device)
    note = read_trained(folder)
    if note.target_offset > 1:
        raise InputError(
            f"{folder}: it predicts the token {note.target_offset} ahead, not the next one, and "
            "so cannot continue a text"
        )
    text = _Remembered(prompt)
    # Lines were trained from their start token on.
    ids = prompt_ids(text, tokenizer, folder, begin=note.unit == "lines")
    read = read_long_prompt(model, ids, sampling.max_new_tokens, folder, on_prompt)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    newest: list[Cache] = []  # generate shows its cache to nobody before it is done

    def remember(module: Any, inputs: Any, output: Any) -> None:
        newest[:] = [getattr(output, cache_argument(model))]

    def told(tokens: int) -> None:
        on_token(tokens, time.perf_counter() - start, newest[0])

    hook = model.register_forward_hook(remember)
    start = time.perf_counter()
    try:
        output = model.generate(
            read.rest_1T,
            **read.arguments(model),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            streamer=TextStream(tokenizer, write, told),
            return_dict_in_generate=True,
            use_cache=True,
            **sampling.arguments(),
        )
    finally:
        hook.remove()
    seconds = time.perf_counter() - start
    new_ids = output.sequences[0, read.rest_1T.shape[1] :]
    held = cache_bytes(getattr(output, CACHE))
    return Continuation(
        prompt=text.all(),
        # Without cleaning up: else the text would not be the one that was streamed.
        text=str(
            tokenizer.decode(new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ),
        prompt_tokens=read.tokens,
        prompt_seconds=read.seconds if read.before else 0.0,
        tokens=len(new_ids),
        seconds=seconds,
        tokens_per_second=len(new_ids) / seconds,
        cache_logical=held.logical,
        cache_resident=held.resident,
    )


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
        """What `generate` needs to continue from here, the same whatever the prompt's length.

        `generate` takes ids that are shorter than their mask as new ones. A mask without a zero is
        then dropped, so that one more entry than ids says all it would with an entry for each token
        read; positions are given because they would be counted from the mask. transformers 5.17
        does not drop it, and gets the whole; but a cache by an older name goes with new ids alone.
        """
        rest, name = self.rest_1T.shape[1], cache_argument(model)
        earlier = 1 if _DROPS_MASKS else self.before
        if self.cache is None or name != CACHE:
            earlier = 0
        mask_1M = torch.ones(1, rest + earlier, dtype=torch.long)
        given: dict[str, Any] = {"attention_mask": mask_1M.to(self.rest_1T.device)}
        if self.cache is not None:
            given[name] = self.cache
            if "position_ids" in inspect.signature(model.forward).parameters:
                positions_1T = torch.arange(self.before, self.before + rest).unsqueeze(0)
                given["position_ids"] = positions_1T.to(self.rest_1T.device)
        return given


def prompt_ids(
    blocks: Iterable[str], tokenizer: Any, folder: Path, *, begin: bool
) -> Iterator[list[int]]:
    """The prompt's ids, some at a time, at least one in all.

    With `begin` the start token stands in front, which an empty prompt is given in any case.

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
    told: Callable[[int], object],
    chunk: int = CHUNK,
) -> ReadPrompt:
    """Let a model read a prompt, holding no more of it than a chunk and a piece.

    The ids for a model with a position limit are counted before it reads the first.

    Args:
        ids: of the prompt, some at a time.
        new_tokens: how many are to follow.
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


class TextStream(BaseStreamer):
    """Gives out each character as soon as its last token is there, in time linear in the text.

    transformers' own streamer waits for a space, and decodes the whole line again at every token.

    `write` is given the text, `on_token` after each token the number of tokens so far.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], object] | None,
        on_token: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._write, self._on_token = write, on_token
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._prompt_is_next = True

    def put(self, value: Any) -> None:
        """Take new ids, a tensor of one sequence; the first call brings the prompt."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            self._ids.append(token)
            if self._write is not None:
                self._give(self._decoder.step(self._backend, token) or "")
            self._on_token(len(self._ids))

    def end(self) -> None:
        """Give out what is left, such as half a character."""
        whole = self._backend.decode(self._ids, skip_special_tokens=True)
        given = "".join(self._pieces)
        if whole.startswith(given):
            self._give(whole[len(given) :])

    def _give(self, piece: str) -> None:
        if piece and self._write is not None:
            self._pieces.append(piece)
            self._write(piece)


class _Remembered:
    """Passes blocks of text on, and remembers them while they are not too long to be shown."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self._blocks = blocks
        self._kept: list[str] = []
        self._characters = 0

    def __iter__(self) -> Iterator[str]:
        for block in self._blocks:
            self._characters += len(block)
            self._kept = [*self._kept, block] if self._characters <= SHOWN else []
            yield block

    def all(self) -> str | None:
        """The whole text, or None where it is too long."""
        return "".join(self._kept) if self._characters <= SHOWN else None
