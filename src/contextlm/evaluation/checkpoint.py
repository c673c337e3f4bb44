"""Open a saved checkpoint and measure it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from contextlm import models as models  # registers our architectures with the Auto classes
from contextlm.data.corpora import load_corpus
from contextlm.data.token_store import build_token_store, cache_folder
from contextlm.data.windows import Windows
from contextlm.device import resolve_device
from contextlm.errors import InputError
from contextlm.evaluation.memory import measure_cache, position_limit
from contextlm.evaluation.quality import bits_per_byte, evaluate_quality
from contextlm.evaluation.result import CacheBytes
from contextlm.evaluation.speed import measure_speed


class CheckpointReport(BaseModel):
    """Quality on a corpus's validation split, cache bytes and speed of one checkpoint."""

    checkpoint: str
    architecture: str
    parameters: int
    corpus: str
    sequence_length: int
    tokens: int
    loss: float
    ppl: float
    bits_per_byte: float
    accuracy: float
    cache: list[CacheBytes]
    cache_dtype: str
    speed_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def load_checkpoint(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model, ready to evaluate, and its tokenizer.

    Only a local folder is read; no network is touched and no code from the folder runs.

    Raises:
        InputError: it is not a checkpoint folder, or a part is missing or damaged.
    """
    where = resolve_device(device)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if name == "model.safetensors" and (folder / f"{name}.index.json").is_file():
            continue
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not a checkpoint folder: {name} is missing")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except Exception as error:
        # The loaders raise many kinds for a damaged file (JSON, safetensors, shapes, versions).
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: the checkpoint cannot be loaded: {reason}") from error
    return model.to(where).eval(), tokenizer


def evaluate_checkpoint(
    folder: Path,
    *,
    corpus: str,
    device: str,
    sequence_length: int | None,
    samples: int | None,
    cache_lengths: list[int],
) -> CheckpointReport:
    """Measure a checkpoint on the validation split of `corpus`, in windows with state reset.

    Args:
        folder: the checkpoint.
        corpus: as in a recipe.
        device: ``auto``, ``cpu``, ``cuda`` ...
        sequence_length: of the windows; None: 128, or the model's positions if fewer.
        samples: use only the first windows; None: all.
        cache_lengths: tokens at which to count the cache.

    Raises:
        InputError: the checkpoint or the corpus is not usable.
    """
    model, tokenizer = load_checkpoint(folder, device)
    where = next(model.parameters()).device
    limit = position_limit(model)
    length = sequence_length or min(128, limit or 128)
    if limit is not None and length > limit:
        raise InputError(f"--sequence-length {length} is more than the model's {limit} positions")
    text = load_corpus(corpus)
    store = build_token_store(text, "validation", tokenizer, cache_folder())
    windows = Windows(store.tokens, length, samples=samples)
    quality = evaluate_quality(model, windows, 32, where)
    covered = windows.tokens_covered
    speed = measure_speed(model, 512, where)
    return CheckpointReport(
        checkpoint=str(folder),
        architecture=model.config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        corpus=text.name,
        sequence_length=length,
        tokens=quality.tokens,
        loss=quality.loss,
        ppl=quality.ppl,
        bits_per_byte=bits_per_byte(quality.loss, covered, store.byte_count(covered)),
        accuracy=quality.accuracy,
        cache=measure_cache(model, cache_lengths, where),
        cache_dtype=str(model.dtype).removeprefix("torch."),
        speed_tokens=speed.tokens,
        prefill_tokens_per_second=speed.prefill_tokens_per_second,
        decode_tokens_per_second=speed.decode_tokens_per_second,
    )
