"""The token embeddings that contenders start from: pretrained, learned first, or random."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.utils import cached_file

from contextlm.base import distribution
from contextlm.base.errors import InputError
from contextlm.base.files import atomic_open, cache_folder, is_folder, with_home
from contextlm.base.progress import Progress
from contextlm.data.hub import from_hub
from contextlm.data.windows import Windows
from contextlm.evaluation.quality import evaluator
from contextlm.lab.live import EpochWatcher, History
from contextlm.models.build import create_model
from contextlm.recipe.settings import EmbeddingSettings, TrainingSettings
from contextlm.results.facts import EmbeddingFacts, perplexity
from contextlm.training.next_token import train_next_token
from contextlm.training.optimisation import resolve_precision
from contextlm.training.phase_two_state import PhaseTwo

# What transformers raises for a folder that holds no whole model.
_UNUSABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
_MOST_PADDING = 512  # entries by which vocabularies are padded
_VERSION = 1  # of how embeddings are learned
_INSTEAD = "set embedding.path to a local checkpoint, or embedding=learned"


@dataclass(frozen=True)
class Embedding:
    """One weight per vocabulary entry, ``[V, D]``, and where it comes from."""

    weight_VD: Tensor
    facts: EmbeddingFacts


@dataclass(frozen=True)
class LearningText:
    """What embeddings may be learned from: tokens of the two splits, and the models' sizes."""

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    width: int


def load_pretrained(
    path: str, tokenizer: PreTrainedTokenizerFast, vocab_size: int, width: int
) -> Embedding:
    """The input embedding of another causal language model with the same vocabulary.

    Args:
        path: a checkpoint's folder, or its name on the hub (``gpt2``).
        tokenizer: the recipe's, whose entries must be the model's.
        vocab_size: V; a larger table is cut, as padded vocabularies are.
        width: D.

    Raises:
        InputError: no such folder, no usable model in it, or an embedding of other entries or of
            another shape.
        RunError: the hub could not be reached.
    """
    where = f"embedding.path {path!r}"
    folder = with_home(path, where)
    local = is_folder(folder)
    if not local and (path.startswith((".", "~", os.sep)) or path.count("/") > 1):
        raise InputError(f"{where}: no such folder")
    path = str(folder) if local else path

    def read(online: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
        return AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=not online,
            trust_remote_code=False,  # else transformers would ask at the terminal
            use_safetensors=True,  # the other formats are pickles, which can run code
            attn_implementation="eager",  # whatever its configuration names might be code on a hub
            output_loading_info=True,
        )

    try:
        model, notes = read(False) if local else from_hub(where, _INSTEAD, read)
    except _UNUSABLE as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise InputError(f"{where}: no model can be loaded from it: {reason}") from None
    parameter = model.get_input_embeddings().weight
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter}
    if names <= set(notes["missing_keys"]):  # transformers would take a random one
        raise InputError(f"{where}: its weights hold no token embedding")
    weight_VD = parameter.detach().float()
    if weight_VD.shape[0] < vocab_size or weight_VD.shape[1] != width:
        raise InputError(
            f"{where}: its embedding is {weight_VD.shape[0]} x {weight_VD.shape[1]}, "
            f"the models need {vocab_size} x {width}"
        )
    _check_entries(where, path, tokenizer, weight_VD.shape[0] - vocab_size)
    facts = EmbeddingFacts(source="pretrained", path=path)
    return Embedding(weight_VD[:vocab_size].clone(), facts)


def _check_entries(where: str, path: str, tokenizer: PreTrainedTokenizerFast, surplus: int) -> None:
    """Rows of another vocabulary would be embeddings of other words."""
    file = cached_file(
        path, "tokenizer.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    if file is None:
        if surplus > _MOST_PADDING:
            raise InputError(
                f"{where}: it has no tokenizer, and {surplus} entries more than the recipe's"
            )
        return
    theirs = Tokenizer.from_file(file).get_vocab(with_added_tokens=True)
    other = next((w for w, i in tokenizer.get_vocab().items() if theirs.get(w) != i), None)
    if other is not None:
        raise InputError(
            f"{where}: its tokenizer is another one than the recipe's: "
            f"{other!r} is not entry {tokenizer.get_vocab()[other]} there"
        )


def check_learning_text(settings: EmbeddingSettings, text: LearningText) -> LearningText:
    """The text as the settings limit it.

    Raises:
        InputError: there is less of it than is asked for, or less than a window.
    """
    limit = settings.tokens or len(text.train)
    if limit > len(text.train):
        raise InputError(f"embedding.tokens: {limit} asked for, there are {len(text.train)}")
    text = replace(text, train=text.train[:limit])
    for tokens, split in ((text.train, "training"), (text.validation, "validation")):
        if len(tokens) <= settings.sequence_length:
            raise InputError(
                f"embedding.sequence_length {settings.sequence_length}: the {split} text has only "
                f"{len(tokens)} tokens"
            )
    return text


def learn_embedding(
    settings: EmbeddingSettings,
    text: LearningText,
    device: torch.device,
    folder: Path,
    progress: Progress,
) -> Embedding:
    """Embeddings of a small GPT-2 trained on next tokens, with its head tied to them.

    What was learned once is kept in the cache folder, by a hash of everything that decides it.

    Args:
        settings: size and training of the small GPT-2.
        text: what it reads, as `check_learning_text` gives it.
        device: where it is trained.
        folder: for working files, from which it resumes; removed when it is done.
        progress: gets its epochs.

    Raises:
        RunError: the loss is not finite.
    """
    precision = resolve_precision("auto", device)
    file = _file(settings, text, device)
    known = distribution.from_main(_read(file))
    if known is not None:
        progress.line(f"embeddings: learned before, {_described(known.facts)}")
        return known
    progress.stage("learning embeddings")
    model = create_model(_small_gpt2(settings, text), settings.seed).to(device)
    outcome = _train(model, settings, text, device, precision, folder, progress)
    best = outcome.epochs[outcome.best_epoch - 1]
    facts = EmbeddingFacts(
        source="learned",
        tokens=len(text.train),
        epochs=outcome.best_epoch,
        validation_ppl=perplexity(best.validation_loss),
    )
    embedding = Embedding(model.get_input_embeddings().weight.detach().cpu().clone(), facts)
    if distribution.is_main():
        _write(file, embedding)
        shutil.rmtree(folder, ignore_errors=True)
    progress.line(f"embeddings: {_described(facts)}")
    return embedding


def is_learned(settings: EmbeddingSettings, text: LearningText, device: torch.device) -> bool:
    """Whether `learn_embedding` has been here before with the same arguments."""
    return _read(_file(settings, text, device)) is not None


def _file(settings: EmbeddingSettings, text: LearningText, device: torch.device) -> Path:
    key = _key(settings, text, resolve_precision("auto", device))
    return cache_folder() / "embeddings" / f"{key}.safetensors"


def _train(
    model: PreTrainedModel,
    settings: EmbeddingSettings,
    text: LearningText,
    device: torch.device,
    precision: str,
    folder: Path,
    progress: Progress,
) -> PhaseTwo:
    """Train the small GPT-2; it ends with its best epoch's weights."""
    length = settings.sequence_length
    validation = Windows(text.validation, length, name="the validation split")
    training = TrainingSettings(
        learning_rate=settings.learning_rate,
        weight_decay=0.1,
        decay="matrices",
        betas=(0.9, 0.95),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        patience=None,
        schedule="cosine",
        minimum_ratio=0.1,
        clip=1.0,
    )
    return train_next_token(
        model,
        Windows(text.train, length, name="the training split"),
        training,
        evaluator(validation, settings.batch_size, device),
        seed=settings.seed,
        device=device,
        precision=precision,
        folder=folder,
        watcher=EpochWatcher(progress, History(folder / "history.jsonl")),
        tell=progress.line,
    )


def _small_gpt2(settings: EmbeddingSettings, text: LearningText) -> GPT2Config:
    return GPT2Config(
        vocab_size=text.vocab_size,
        n_embd=text.width,
        n_layer=settings.layers,
        n_head=text.width // 64 if text.width % 64 == 0 else 1,
        n_positions=settings.sequence_length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def _described(facts: EmbeddingFacts) -> str:
    return (
        f"{facts.tokens:,} tokens, {facts.epochs} epoch{'s' if facts.epochs != 1 else ''}, "
        f"val PPL of their own model {facts.validation_ppl:.1f}"
    )


def _key(settings: EmbeddingSettings, text: LearningText, precision: str) -> str:
    """A hash of all that decides the weights, but for the machine's rounding."""
    parts: list[object] = [_VERSION, settings.model_dump(), text.vocab_size, text.width, precision]
    if distribution.world() > 1:  # several processes round otherwise than one
        parts.append(distribution.world())
    described = json.dumps(parts)
    digest = hashlib.sha256(described.encode())
    for tokens in (text.train, text.validation):
        digest.update(np.ascontiguousarray(tokens, dtype="<i8").tobytes())
    return digest.hexdigest()[:32]


def _read(file: Path) -> Embedding | None:
    """What an earlier run left in the cache, if it is whole."""
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            facts = EmbeddingFacts.model_validate_json(stored.metadata()["facts"])
            return Embedding(stored.get_tensor("embedding"), facts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, embedding: Embedding) -> None:
    data = safetensors.torch.save(
        {"embedding": embedding.weight_VD}, {"facts": embedding.facts.model_dump_json()}
    )
    with atomic_open(file, "wb") as stream:
        stream.write(data)
