"""The token embeddings that contenders start from: pretrained, learned first, or random."""

from __future__ import annotations

import hashlib
import json
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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gpt2.configuration_gpt2 import GPT2Config

from contextlm.data.hub import from_hub
from contextlm.data.token_store import cache_folder
from contextlm.data.windows import Windows
from contextlm.errors import InputError
from contextlm.evaluation.quality import evaluate_quality, perplexity
from contextlm.evaluation.result import EmbeddingFacts
from contextlm.files import atomic_open
from contextlm.live import EpochWatcher, History
from contextlm.models.build import create_model
from contextlm.progress import Progress
from contextlm.training.next_token import train_next_token
from contextlm.training.precision import resolve_precision
from contextlm.training.settings import EmbeddingSettings, TrainingSettings

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


def load_pretrained(path: str, vocab_size: int, width: int) -> Embedding:
    """The input embedding of another causal language model.

    Args:
        path: a checkpoint's folder, or its name on the hub (``gpt2``).
        vocab_size: V; a larger table is cut, as padded vocabularies are.
        width: D.

    Raises:
        InputError: the folder holds no usable model, or its embedding has another shape.
        RunError: the hub could not be reached.
    """
    where = f"embedding.path {path!r}"

    def read(online: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
        return AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=not online,
            trust_remote_code=False,  # else transformers would ask at the terminal
            output_loading_info=True,
        )

    try:
        model, notes = read(False) if Path(path).is_dir() else from_hub(where, _INSTEAD, read)
    except _UNUSABLE as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise InputError(f"{where}: no model can be loaded from it: {reason}") from None
    parameter = model.get_input_embeddings().weight
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter}
    if names <= set(notes["missing_keys"]):  # transformers would go on with a random one
        raise InputError(f"{where}: its weights hold no token embedding")
    weight_VD = parameter.detach().float()
    if weight_VD.shape[0] < vocab_size or weight_VD.shape[1] != width:
        raise InputError(
            f"{where}: its embedding is {weight_VD.shape[0]} x {weight_VD.shape[1]}, "
            f"the models need {vocab_size} x {width}"
        )
    facts = EmbeddingFacts(source="pretrained", path=path)
    return Embedding(weight_VD[:vocab_size].clone(), facts)


def learn_embedding(
    settings: EmbeddingSettings,
    text: LearningText,
    seed: int,
    device: torch.device,
    folder: Path,
    progress: Progress,
) -> Embedding:
    """Embeddings of a small GPT-2 trained on next tokens, with its head tied to them.

    What was learned once is kept in the cache folder, by a hash of everything that decides it.

    Args:
        settings: size and training of the small GPT-2.
        text: what it reads.
        seed: governs its weights and shuffling.
        device: where to compute.
        folder: for working files; removed afterwards.
        progress: is told what happens.

    Raises:
        InputError: the text is too short for one window.
        RunError: the loss is not finite.
    """
    limit = settings.tokens or len(text.train)
    if limit > len(text.train):
        raise InputError(f"embedding.tokens: {limit} asked for, there are {len(text.train)}")
    text = replace(text, train=text.train[:limit])
    file = cache_folder() / "embeddings" / f"{_key(settings, text, seed)}.safetensors"
    known = _read(file)
    if known is not None:
        progress.line(f"embeddings: learned before, {_described(known.facts)}")
        return known
    progress.stage("learning embeddings")
    model = create_model(_small_gpt2(settings, text), seed).to(device)
    validation_loss = _train(model, settings, text, seed, device, folder, progress)
    facts = EmbeddingFacts(
        source="learned",
        tokens=limit,
        epochs=settings.epochs,
        validation_ppl=perplexity(validation_loss),
    )
    embedding = Embedding(model.get_input_embeddings().weight.detach().cpu().clone(), facts)
    _write(file, embedding)
    progress.line(f"embeddings: {_described(facts)}")
    return embedding


def _train(
    model: PreTrainedModel,
    settings: EmbeddingSettings,
    text: LearningText,
    seed: int,
    device: torch.device,
    folder: Path,
    progress: Progress,
) -> float:
    """Train the small GPT-2; its best validation loss in nats per token."""
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

    def evaluate(module: nn.Module) -> dict[str, float]:
        quality = evaluate_quality(module, validation, settings.batch_size, device)
        return {"loss": quality.loss, "accuracy": quality.accuracy}

    try:
        outcome = train_next_token(
            model,
            Windows(text.train, length, name="the training split"),
            training,
            evaluate,
            seed=seed,
            device=device,
            precision=resolve_precision(training.precision, device),
            folder=folder,
            watcher=EpochWatcher(progress, History(folder / "history.jsonl")),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome.epochs[outcome.best_epoch - 1].validation_loss


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


def _key(settings: EmbeddingSettings, text: LearningText, seed: int) -> str:
    """A hash of all that decides the weights, but for the machine's rounding."""
    described = json.dumps([settings.model_dump(), text.vocab_size, text.width, seed])
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
