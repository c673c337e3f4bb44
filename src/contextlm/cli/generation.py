"""Generating text from a checkpoint folder, and what it cost."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from contextlm.cli.streaming import TextStream
from contextlm.errors import InputError
from contextlm.evaluation.checkpoint import load_checkpoint
from contextlm.evaluation.memory import cache_bytes, position_limit
from contextlm.evaluation.trained import read_trained
from contextlm.report.numbers import human_bytes


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
    """The text that was generated, without its prompt. `logical` and `resident` are bytes."""

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    tokens_per_second: float
    cache_logical: int
    cache_resident: int

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.tokens} tokens, {self.tokens_per_second:,.1f} tokens/s, "
            f"cache {human_bytes(self.cache_logical)} "
            f"({human_bytes(self.cache_resident)} resident) "
            f"after {self.prompt_tokens + self.tokens - 1:,} tokens"
        )


def continue_text(
    folder: Path, prompt: str, sampling: Sampling, *, device: str, stream: bool
) -> Continuation:
    """Continue `prompt` with the model in `folder`.

    Args:
        folder: a checkpoint with its tokenizer.
        prompt: the text; an empty one starts from the end-of-text token.
        sampling: how to choose tokens.
        device: ``auto``, ``cpu``, ``cuda`` ...
        stream: print the text to stdout as it comes.

    Raises:
        InputError: no checkpoint, one that does not predict the next token, or a text that is
            longer than the model's positions.
    """
    model: Any  # transformers leaves `generate` without types
    tokenizer: Any
    model, tokenizer = load_checkpoint(folder, device)
    trained = read_trained(folder)
    if trained.target_offset > 1:
        raise InputError(
            f"{folder}: it predicts the token {trained.target_offset} ahead, not the next one, and "
            "so cannot continue a text"
        )
    # Lines were trained from their start token on.
    input_ids_1T = _encode(prompt, tokenizer, folder, begin=trained.unit == "lines")
    input_ids_1T = input_ids_1T.to(model.device)
    _check_positions(model, input_ids_1T.shape[1] + sampling.max_new_tokens, folder)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    output = model.generate(
        input_ids_1T,
        attention_mask=torch.ones_like(input_ids_1T),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        streamer=TextStream(tokenizer, sys.stdout) if stream else None,
        return_dict_in_generate=True,
        use_cache=True,
        **sampling.arguments(),
    )
    seconds = time.perf_counter() - start
    new_ids = output.sequences[0, input_ids_1T.shape[1] :]
    held = cache_bytes(output.past_key_values)
    return Continuation(
        prompt=prompt,
        # Without cleaning up: else the text would not be the one that was streamed.
        text=tokenizer.decode(
            new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        prompt_tokens=input_ids_1T.shape[1],
        tokens=len(new_ids),
        seconds=seconds,
        tokens_per_second=len(new_ids) / seconds,
        cache_logical=held.logical,
        cache_resident=held.resident,
    )


def _check_positions(model: Any, wanted: int, folder: Path) -> None:
    # Asked beforehand: rotary models run past their positions without an error.
    limit = position_limit(model)
    if limit is not None and wanted > limit:
        raise InputError(
            f"{folder}: prompt and --max-new-tokens make {wanted} tokens, "
            f"more than the model's {limit} positions"
        )


def _encode(prompt: str, tokenizer: Any, folder: Path, *, begin: bool) -> torch.Tensor:
    """Token ids ``[1, T]`` with at least one token; `begin` puts the start token in front."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if begin or not ids:
        first = next(
            (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None
        )
        if first is None:
            raise InputError(f"{folder}: the prompt is empty, and the tokenizer has no start token")
        ids = [first, *ids]
    return torch.tensor([ids])
