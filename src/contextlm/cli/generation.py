"""Generating text from a checkpoint folder, and what it cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from contextlm.base.errors import InputError
from contextlm.base.live_line import LiveLine
from contextlm.cli.long_prompt import ReadPrompt, prompt_ids, read_long_prompt
from contextlm.cli.streaming import TextStream, TokenCount
from contextlm.evaluation.checkpoint import load_checkpoint
from contextlm.evaluation.memory import cache_argument, cache_bytes
from contextlm.evaluation.trained import read_trained
from contextlm.report.numbers import human_bytes

SHOWN = 10_000  # characters; a longer prompt is not repeated


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
            given = {}
        # 0 switches off the 50 that transformers would take where only another option is set.
        sampling = {"do_sample": True, "top_k": 0, **given} if given else {"do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


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

    def summary(self) -> str:
        """One line for people."""
        read = (
            f", prompt of {self.prompt_tokens:,} tokens read in {self.prompt_seconds:,.1f} s"
            if self.prompt_seconds
            else ""
        )
        return (
            f"{self.tokens} tokens, {self.tokens_per_second:,.1f} tokens/s, "
            f"cache {human_bytes(self.cache_logical)} "
            f"({human_bytes(self.cache_resident)} resident) "
            f"after {self.prompt_tokens + self.tokens - 1:,} tokens{read}"
        )


def continue_text(
    folder: Path,
    prompt: Iterable[str],
    sampling: Sampling,
    *,
    device: str,
    stream: bool,
    live: LiveLine | None = None,
) -> Continuation:
    """Continue `prompt` with the model in `folder`.

    Args:
        folder: a checkpoint with its tokenizer.
        prompt: the text, in blocks; an empty one starts from the end-of-text token.
        sampling: how to choose tokens.
        device: ``auto``, ``cpu``, ``cuda`` ...
        stream: print the text to stdout as it comes.
        live: tells how far it is.

    Raises:
        InputError: no checkpoint, one that does not predict the next token, or a text that is
            longer than the model's positions.
    """
    model: Any  # transformers leaves `generate` without types
    tokenizer: Any
    model, tokenizer = load_checkpoint(folder, device)
    live = live or LiveLine(None)
    trained = read_trained(folder)
    if trained.target_offset > 1:
        raise InputError(
            f"{folder}: it predicts the token {trained.target_offset} ahead, not the next one, and "
            "so cannot continue a text"
        )
    text = _Remembered(prompt)
    # Lines were trained from their start token on.
    ids = prompt_ids(text, tokenizer, folder, begin=trained.unit == "lines")
    read = read_long_prompt(
        model,
        ids,
        sampling.max_new_tokens,
        folder,
        lambda tokens: live.show(lambda: f"reading the prompt: {tokens:,} tokens"),
    )
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    new_ids, cache = _generate(model, tokenizer, read, sampling, stream, live)
    seconds = time.perf_counter() - start
    held = cache_bytes(cache)
    return Continuation(
        prompt=text.all(),
        # Without cleaning up: else the text would not be the one that was streamed.
        text=tokenizer.decode(
            new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        prompt_tokens=read.tokens,
        prompt_seconds=read.seconds if read.before else 0.0,
        tokens=len(new_ids),
        seconds=seconds,
        tokens_per_second=len(new_ids) / seconds,
        cache_logical=held.logical,
        cache_resident=held.resident,
    )


def _generate(
    model: Any, tokenizer: Any, read: ReadPrompt, sampling: Sampling, stream: bool, live: LiveLine
) -> tuple[torch.Tensor, Cache]:
    """The new ids and the cache after them; the text is streamed and the line kept up to date."""
    began = time.perf_counter()
    newest: list[Cache] = []  # generate shows its cache to nobody before it is done

    def remember(module: Any, inputs: Any, output: Any) -> None:
        newest[:] = [getattr(output, cache_argument(model))]

    def told(tokens: int) -> None:
        if tokens > 0:
            live.show(lambda: words(tokens))

    def words(tokens: int) -> str:
        speed = tokens / (time.perf_counter() - began)
        kept = human_bytes(cache_bytes(newest[0]).logical)
        return f"{tokens:,} tokens, {speed:,.1f} tokens/s, cache {kept}"

    if stream:
        live.text_follows(sys.stdout)
    hook = model.register_forward_hook(remember)
    try:
        output = model.generate(
            read.rest_1T,
            **read.arguments(model),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            streamer=TokenCount(TextStream(tokenizer, sys.stdout) if stream else None, told),
            return_dict_in_generate=True,
            use_cache=True,
            **sampling.arguments(),
        )
    finally:
        hook.remove()
    return output.sequences[0, read.rest_1T.shape[1] :], output.past_key_values


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
