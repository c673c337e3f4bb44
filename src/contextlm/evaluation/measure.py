"""Measuring a checkpoint: quality on a corpus, bytes of cache, speed; these with `InputCache`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contextlm.base.errors import InputError
from contextlm.base.files import cache_folder
from contextlm.compress.inputs import InputCache
from contextlm.data.corpora import Corpus, load_corpus, whole_corpus
from contextlm.data.token_store import TokenStore, build_token_store
from contextlm.data.windows import Windows
from contextlm.evaluation.checkpoint import load_checkpoint, read_trained
from contextlm.evaluation.memory import measure_cache, position_limit
from contextlm.evaluation.quality import bits_per_byte, evaluate_quality
from contextlm.evaluation.speed import Speed, measure_speed
from contextlm.recipe.settings import EvaluationSettings
from contextlm.results.facts import CacheBytes

Split = Literal["train", "validation", "all"]

SEQUENCE_LENGTH = 128  # where neither the caller nor the checkpoint's note says one
MEASURED = EvaluationSettings()  # as in a recipe that does not say otherwise
_OWN = ("text:", "jsonl:")  # corpora of the user's own files


class InputCacheReport(BaseModel):
    """Bytes and speed with `InputCache`; changes are percent of the figure without it.

    `cache_change_percent` has one entry, of the logical bytes, for each entry of `cache`.
    """

    cache: list[CacheBytes]
    cache_change_percent: list[float]
    prefill_tokens_per_second: float
    prefill_change_percent: float
    decode_tokens_per_second: float
    decode_change_percent: float


class CheckpointReport(BaseModel):
    """Quality on a split of a corpus, cache bytes and speed of one checkpoint.

    `bits_per_byte` is None where the tokens do not decode to the text, and where the
    model predicts further ahead than the next token, `input_cache` where it was not asked for.
    `remarks` say why these figures are others than those of the run that made the checkpoint.
    """

    checkpoint: str
    architecture: str
    parameters: int
    corpus: str
    split: Split
    sequence_length: int
    windows: int
    windows_available: int
    tokens: int
    loss: float
    ppl: float
    bits_per_byte: float | None
    accuracy: float
    cache: list[CacheBytes]
    cache_dtype: str
    speed_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    input_cache: InputCacheReport | None = None
    remarks: list[str] = []


def evaluate_checkpoint(
    folder: Path,
    *,
    corpus: str,
    device: str,
    split: Split | None = None,
    sequence_length: int | None = None,
    samples: int | None = None,
    cache_lengths: list[int] | None = None,
    input_cache: bool = False,
) -> CheckpointReport:
    """Measure a checkpoint on `corpus`, in windows with state reset.

    Args:
        corpus: as in a recipe.
        split: None: as `open_corpus` chooses.
        sequence_length: of the windows; None: `SEQUENCE_LENGTH`, or the model's positions if fewer.
        samples: use only the first windows; None: all.
        cache_lengths: tokens at which to count the cache; those beyond the model's positions are
            left out. None: a recipe's own, or the model's positions where it has fewer.
        input_cache: also measure bytes and speed with an `InputCache`.

    Raises:
        InputError: the checkpoint or the corpus is not usable, no cache length fits, or the model
            cannot have an `InputCache`.
    """
    cache = cache_folder()  # one that cannot be used is told before the work
    model, tokenizer = load_checkpoint(folder, device)
    if input_cache:
        _check_input_cache(model)
    place = next(model.parameters()).device
    limit = position_limit(model)
    length = sequence_length or min(SEQUENCE_LENGTH, limit or SEQUENCE_LENGTH)
    if limit is not None and length > limit:
        raise InputError(f"--sequence-length {length} is more than the model's {limit} positions")
    lengths = _lengths_within(limit, cache_lengths)
    text, split, store = open_corpus(corpus, split, tokenizer, cache)
    note = read_trained(folder)
    ahead = note.target_offset
    windows = Windows(
        store.tokens,
        length,
        target_offset=ahead,
        samples=samples,
        name=f"corpus {corpus!r} ({split})",
    )
    quality = evaluate_quality(model, windows, MEASURED.batch_size, place)
    covered = windows.tokens_covered
    held = measure_cache(model, lengths, place)
    speed = measure_speed(model, MEASURED.speed_tokens, place)
    is_code_length = store.facts.keeps_text and ahead == 1
    return CheckpointReport(
        checkpoint=str(folder),
        architecture=model.config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        corpus=text.name,
        split=split,
        sequence_length=length,
        windows=len(windows),
        windows_available=len(Windows(store.tokens, length, target_offset=ahead)),
        tokens=quality.tokens,
        loss=quality.loss,
        ppl=quality.ppl,
        bits_per_byte=bits_per_byte(quality.loss, covered, store.byte_count(covered))
        if is_code_length
        else None,
        accuracy=quality.accuracy,
        cache=held,
        cache_dtype=str(model.dtype).removeprefix("torch."),
        speed_tokens=speed.tokens,
        prefill_tokens_per_second=speed.prefill_tokens_per_second,
        decode_tokens_per_second=speed.decode_tokens_per_second,
        input_cache=_with_input_cache(model, held, speed, place) if input_cache else None,
        remarks=note.remarks(),
    )


def open_corpus(
    name: str, split: Split | None, tokenizer: PreTrainedTokenizerFast, cache: Path
) -> tuple[Corpus, Split, TokenStore]:
    """A corpus, the split of it to read, and that split's tokens.

    Without a split, the user's own files are read whole, since nobody has held out a part of them,
    and of every other corpus the validation split.

    Raises:
        InputError: the corpus is not usable.
    """
    if split is None:
        split = "all" if name.startswith(_OWN) else "validation"
    if split == "all" and name.startswith(_OWN):
        corpus = whole_corpus(name)
        return corpus, split, build_token_store(corpus, "validation", tokenizer, cache)
    corpus = load_corpus(name)
    if split == "all":
        whole = replace(
            corpus,
            read=lambda: ([], [*corpus.train, *corpus.validation]),
            fingerprint=f"{corpus.fingerprint}-{split}",
        )
        return corpus, split, build_token_store(whole, "validation", tokenizer, cache)
    return corpus, split, build_token_store(corpus, split, tokenizer, cache)


def _check_input_cache(model: PreTrainedModel) -> None:
    """Tell before the work that the model cannot have one."""
    try:
        InputCache(model).remove()
    except InputError as error:
        raise InputError(f"--cache input: {error}") from None


def _lengths_within(limit: int | None, wanted: list[int] | None) -> list[int]:
    """The cache lengths that a model with `limit` positions can reach."""
    lengths = wanted or MEASURED.cache_lengths
    fitting = [length for length in lengths if limit is None or length <= limit]
    if fitting:
        return fitting
    if wanted is None and limit is not None:
        return [limit]
    raise InputError(f"--cache-lengths: none is within the model's {limit} positions")


def _with_input_cache(
    model: PreTrainedModel, plain: Sequence[CacheBytes], speed: Speed, device: torch.device
) -> InputCacheReport:
    """Measure the model once more, as it was measured with its own cache."""
    with InputCache(model):
        held = measure_cache(model, [entry.tokens for entry in plain], device)
        timed = measure_speed(model, speed.tokens, device)
    prefill, decode = timed.prefill_tokens_per_second, timed.decode_tokens_per_second
    return InputCacheReport(
        cache=held,
        cache_change_percent=[
            _change(new.logical, old.logical) for new, old in zip(held, plain, strict=True)
        ],
        prefill_tokens_per_second=prefill,
        prefill_change_percent=_change(prefill, speed.prefill_tokens_per_second),
        decode_tokens_per_second=decode,
        decode_change_percent=_change(decode, speed.decode_tokens_per_second),
    )


def _change(new: float, old: float) -> float:
    return 100 * (new / old - 1)
