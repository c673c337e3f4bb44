"""Open a saved checkpoint and measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.configuration_utils import PreTrainedConfig

from contextlm import models as models  # registers our architectures with the Auto classes
from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError
from contextlm.base.files import is_file
from contextlm.base.visible import shown
from contextlm.compress.input_cache import InputCache
from contextlm.data.corpora import load_corpus
from contextlm.data.token_store import build_token_store, cache_folder
from contextlm.data.tokenizers import vocab_entries
from contextlm.data.windows import Windows
from contextlm.evaluation.checkpoint_files import (
    INDEX,
    WEIGHTS,
    check_names_no_code,
    check_parts,
    check_weights,
    read_object,
)
from contextlm.evaluation.input_cache import InputCacheReport, compare_input_cache
from contextlm.evaluation.memory import measure_cache, position_limit
from contextlm.evaluation.quality import bits_per_byte, evaluate_quality
from contextlm.evaluation.speed import measure_speed
from contextlm.evaluation.trained import read_trained
from contextlm.models.build import check_values, config_class, meta_model, reason
from contextlm.results.facts import CacheBytes

CACHE_LENGTHS = (128, 512, 2048, 8192)
# Quantised weights are stored packed, several to a number.
_MOST_PACKED = 16
# What transformers raises for a folder that holds no whole model.
_UNUSABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    RecursionError,
    SafetensorError,
    StrictDataclassError,
)


class CheckpointReport(BaseModel):
    """Quality on a corpus's validation split, cache bytes and speed of one checkpoint.

    `bits_per_byte` is None where the tokens do not decode to the text, and where the
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
    check_parts(folder)
    config = _read_config(folder)
    tokenizer = _read_tokenizer(folder)
    weights = WEIGHTS if is_file(folder / WEIGHTS) else INDEX
    # Asked before anything is loaded: weights that a file lacks would be drawn at random, however
    # large config.json says that they are.
    stored = check_weights(folder)
    wanted = sum(parameter.numel() for parameter in meta_model(config).parameters())
    if wanted > _MOST_PACKED * stored:
        raise InputError(f"{folder}: {weights} does not fit config.json")
    model, notes = _load(folder, config)
    if notes["mismatched_keys"] or notes["missing_keys"]:
        raise InputError(f"{folder}: {weights} does not fit config.json")
    entries = model.get_input_embeddings().weight.shape[0]
    if vocab_entries(tokenizer) > entries:
        raise InputError(
            f"{folder}: tokenizer.json has {vocab_entries(tokenizer)} entries, the model {entries}"
        )
    model.generation_config = _plain_generation(folder, model, entries)
    return model.to(where).eval(), tokenizer


def _load(folder: Path, config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that the misfits are told by name
            output_loading_info=True,
        )
    except _UNUSABLE as error:
        raise InputError(f"{folder}: cannot be loaded: {reason(error)}") from None


def _plain_generation(folder: Path, model: PreTrainedModel, entries: int) -> GenerationConfig:
    """Only the special tokens of the checkpoint's generation settings.

    The rest, such as beams, penalties, or another model as an assistant, is asked for on the
    command line or not at all.
    """
    given = model.generation_config or GenerationConfig()
    tokens = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(given, name, None)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int for token in listed):
            file = folder / "generation_config.json"
            raise InputError(f"{file}: {name}: expected an entry's number, got {shown(value)}")
        known = [token for token in listed if 0 <= token < entries]
        tokens[name] = known[0] if len(known) == 1 else known or None
    return GenerationConfig(**tokens)


def _read_config(folder: Path) -> PreTrainedConfig:
    file = folder / "config.json"
    given = read_object(file)
    model_type = given.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{file}: it names no model_type")
    check_names_no_code(given, file)
    try:
        config_class(model_type)
        check_values(given)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        meta_model(config)
    except (InputError, *_UNUSABLE) as error:
        raise InputError(f"{file}: {reason(error)}") from None
    return config


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    file = folder / "tokenizer.json"
    read_object(file)
    if is_file(folder / "tokenizer_config.json"):
        read_object(folder / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception for what is damaged
        raise InputError(f"{file}: not a tokenizer: {reason(error)}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{folder / 'tokenizer_config.json'}: it asks for no fast tokenizer")
    try:  # some settings are looked at only when there is text
        tokenizer.decode(tokenizer("a")["input_ids"])
    except Exception as error:  # whatever a value of another type leads to
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: damaged, the tokenizer cannot be used: "
            f"{reason(error)}"
        ) from None
    return tokenizer


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
    windows = Windows(
        store.tokens,
        length,
        target_offset=ahead,
        samples=samples,
        name=f"corpus {corpus!r} (validation)",
    )
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
        if store.facts.keeps_text and ahead == 1
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
