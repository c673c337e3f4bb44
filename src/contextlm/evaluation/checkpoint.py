"""Open a saved checkpoint and measure it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.configuration_utils import PreTrainedConfig

from contextlm import models as models  # registers our architectures with the Auto classes
from contextlm.data.corpora import load_corpus
from contextlm.data.token_store import build_token_store, cache_folder
from contextlm.data.tokenizers import keeps_all_words
from contextlm.data.windows import Windows
from contextlm.device import resolve_device
from contextlm.errors import InputError
from contextlm.evaluation.input_cache import InputCacheReport, compare_input_cache
from contextlm.evaluation.memory import measure_cache, position_limit
from contextlm.evaluation.quality import bits_per_byte, evaluate_quality
from contextlm.evaluation.result import CacheBytes
from contextlm.evaluation.speed import measure_speed
from contextlm.evaluation.trained import read_trained
from contextlm.models.build import config_class, meta_model
from contextlm.models.input_cache import InputCache

CACHE_LENGTHS = (128, 512, 2048, 8192)
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class CheckpointReport(BaseModel):
    """Quality on a corpus's validation split, cache bytes and speed of one checkpoint.

    `bits_per_byte` is None where the tokenizer has one token for all unknown words and where the
    model predicts further ahead than the next token, `input_cache` where it was not asked for.
    `remarks` say why these figures are others than those of the run that made the checkpoint.
    """

    checkpoint: str
    architecture: str
    parameters: int
    corpus: str
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


def load_checkpoint(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model, ready to evaluate, and its tokenizer.

    Only a local folder is read; no network is touched and no code from the folder runs.

    Raises:
        InputError: it is not a checkpoint folder, or a part is missing or damaged or does not fit
            the others; the message names the file.
    """
    where = resolve_device(device)
    for name in ("config.json", _WEIGHTS, "tokenizer.json"):
        if name == _WEIGHTS and (folder / _INDEX).is_file():
            continue
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not a checkpoint folder: {name} is missing")
    config = _read_config(folder)
    tokenizer = _read_tokenizer(folder)
    _check_weights(folder)
    model, notes = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that the misfits are told here, by name
        output_loading_info=True,
    )
    if notes["mismatched_keys"] or notes["missing_keys"]:
        weights = _WEIGHTS if (folder / _WEIGHTS).is_file() else _INDEX
        raise InputError(f"{folder}: {weights} does not fit config.json")
    return model.to(where).eval(), tokenizer


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{file}: not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a JSON object")
    return value


def _read_config(folder: Path) -> PreTrainedConfig:
    file = folder / "config.json"
    model_type = _read_object(file).get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{file}: it names no model_type")
    try:
        config_class(model_type)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        meta_model(config)
    except (InputError, StrictDataclassError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}") from None
    return config


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    file = folder / "tokenizer.json"
    _read_object(file)
    if (folder / "tokenizer_config.json").is_file():
        _read_object(folder / "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for what is damaged
        raise InputError(f"{file}: not a tokenizer: {' '.join(str(error).split())}") from None


def _check_weights(folder: Path) -> None:
    """An `InputError` that names the file, unless every file of weights is there and whole."""
    names: Any = {_WEIGHTS}
    if not (folder / _WEIGHTS).is_file():
        shards = _read_object(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise InputError(f"{folder / _INDEX}: it has no weight_map")
        names = set(shards.values())
    for name in sorted(names):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder / name}: damaged or missing: {error}") from None


def evaluate_checkpoint(
    folder: Path,
    *,
    corpus: str,
    device: str,
    sequence_length: int | None,
    samples: int | None,
    cache_lengths: list[int] | None,
    input_cache: bool = False,
) -> CheckpointReport:
    """Measure a checkpoint on the validation split of `corpus`, in windows with state reset.

    Args:
        folder: the checkpoint.
        corpus: as in a recipe.
        device: ``auto``, ``cpu``, ``cuda`` ...
        sequence_length: of the windows; None: 128, or the model's positions if fewer.
        samples: use only the first windows; None: all.
        cache_lengths: tokens at which to count the cache; those beyond the model's positions are
            left out. None: `CACHE_LENGTHS`, or the model's positions where it has fewer.
        input_cache: also measure bytes and speed with an `InputCache`.

    Raises:
        InputError: the checkpoint or the corpus is not usable, no cache length fits, or the model
            cannot have an `InputCache`.
    """
    cache = cache_folder()  # one that cannot be used is told before the work
    model, tokenizer = load_checkpoint(folder, device)
    if input_cache:
        _check_input_cache(model)
    where = next(model.parameters()).device
    limit = position_limit(model)
    length = sequence_length or min(128, limit or 128)
    if limit is not None and length > limit:
        raise InputError(f"--sequence-length {length} is more than the model's {limit} positions")
    lengths = _lengths_within(limit, cache_lengths)
    text = load_corpus(corpus)
    store = build_token_store(text, "validation", tokenizer, cache)
    trained = read_trained(folder)
    ahead = trained.target_offset
    windows = Windows(store.tokens, length, target_offset=ahead, samples=samples)
    quality = evaluate_quality(model, windows, 32, where)
    covered = windows.tokens_covered
    held = measure_cache(model, lengths, where)
    speed = measure_speed(model, 512, where)
    return CheckpointReport(
        checkpoint=str(folder),
        architecture=model.config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        corpus=text.name,
        sequence_length=length,
        windows=len(windows),
        windows_available=len(Windows(store.tokens, length, target_offset=ahead)),
        tokens=quality.tokens,
        loss=quality.loss,
        ppl=quality.ppl,
        bits_per_byte=bits_per_byte(quality.loss, covered, store.byte_count(covered))
        if keeps_all_words(tokenizer) and ahead == 1
        else None,
        accuracy=quality.accuracy,
        cache=held,
        cache_dtype=str(model.dtype).removeprefix("torch."),
        speed_tokens=speed.tokens,
        prefill_tokens_per_second=speed.prefill_tokens_per_second,
        decode_tokens_per_second=speed.decode_tokens_per_second,
        input_cache=compare_input_cache(model, held, speed, where) if input_cache else None,
        remarks=trained.remarks(),
    )


def _check_input_cache(model: PreTrainedModel) -> None:
    """Tell before the work that the model cannot have one."""
    try:
        InputCache(model).remove()
    except InputError as error:
        raise InputError(f"--cache input: {error}") from None


def _lengths_within(limit: int | None, wanted: list[int] | None) -> list[int]:
    """The cache lengths that a model with `limit` positions can reach."""
    fitting = [n for n in wanted or CACHE_LENGTHS if limit is None or n <= limit]
    if fitting:
        return fitting
    if wanted is None and limit is not None:
        return [limit]
    raise InputError(f"--cache-lengths: none is within the model's {limit} positions")
