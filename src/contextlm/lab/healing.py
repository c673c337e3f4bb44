"""`contextlm heal`: a model with a policy, trained towards what it was; a run of one contender."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contextlm.base.errors import InputError
from contextlm.base.files import cache_folder
from contextlm.base.progress import Progress
from contextlm.data.corpora import load_corpus
from contextlm.data.token_store import build_token_store
from contextlm.data.tokenizers import load_tokenizer
from contextlm.lab.compressing import memory_text
from contextlm.lab.matching import parameters
from contextlm.lab.pretrained import as_trained, config_of, folder_of
from contextlm.lab.running import run
from contextlm.models.build import meta_model
from contextlm.recipe.loading import check_recipe
from contextlm.recipe.schema import Contender
from contextlm.recipe.settings import HealingSettings
from contextlm.report.numbers import human_bytes

NAME = "healed"  # the contender
VALIDATION = 16  # windows on which the training is watched
WARMUP = 0.05  # of the steps


@dataclass(frozen=True)
class HealSettings:
    """What to train and on what.

    Attributes:
        policy: its spec.
        text: a corpus; its training split is trained on, its validation split measured.
        tokens: to train on, in windows from all over the text.
        precision: ``auto``, ``float32`` or ``bfloat16``.
        seed: of the windows' order and of adapters.
    """

    policy: str
    text: str
    tokens: int
    sequence_length: int
    batch_size: int
    learning_rate: float
    healing: HealingSettings
    precision: Literal["auto", "float32", "bfloat16"]
    seed: int = 0


def heal(named: str, settings: HealSettings, out: Path, device: str, progress: Progress) -> Path:
    """Train, measure and save; the run folder, which `contextlm run --resume` can finish.

    Args:
        named: the model's folder, or its name on the hub.
        out: where the run folder goes.
        device: as for `run`.

    Raises:
        InputError: the model, its policy or the text is not usable; told before anything is loaded.
        RunError: a fault while running.
    """
    folder = folder_of(named)
    contender = {
        "name": NAME,
        "baseline": True,
        "from": named,
        "policy": settings.policy,
        "healing": settings.healing,
    }
    progress.line(memory_text(folder))
    progress.line(_training_memory(Contender.model_validate(contender)))
    recipe = check_recipe({**_training(folder, settings), "contenders": [contender]})
    return run(recipe, out, device=device, progress=progress)


def _training(folder: Path, settings: HealSettings) -> dict[str, Any]:
    """The recipe but for its contender; its windows lie evenly all over the training text.

    Raises:
        InputError: the text is too short.
    """
    cache, corpus = cache_folder(), load_corpus(settings.text)
    tokenizer = load_tokenizer(str(folder), corpus, cache)
    there, held_out = (
        len(build_token_store(corpus, split, tokenizer, cache).tokens)
        for split in ("train", "validation")
    )
    length = settings.sequence_length
    windows = -(-settings.tokens // length)
    room = there - 1 - length
    if room < (windows - 1) * length:
        raise InputError(
            f"corpus {corpus.name!r} has {there:,} tokens to train on, fewer than {windows:,} "
            f"windows of {length:,}: lower --tokens {settings.tokens} or name a longer --text"
        )
    stride = max(length, room // max(1, windows - 1))
    validation = min(VALIDATION, max(1, (held_out - 1 - length) // stride + 1))
    steps = -(-windows // settings.batch_size)
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.resolve().name).lstrip("_.-")[:48] or "model"
    return {
        "name": f"heal-{name}",
        "question": f"What do {settings.tokens:,} tokens of training buy {name} with the policy "
        f"{settings.policy}?",
        "corpus": settings.text,
        "tokenizer": str(folder.absolute()),
        "sequence_length": length,
        "stride": stride,
        "samples": {"train": windows, "validation": validation},
        "seeds": [settings.seed],
        "training": {
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "epochs": 1,
            "schedule": "cosine",
            "warmup": int(WARMUP * steps),
            "clip": 1.0,
            "precision": settings.precision,
        },
        "evaluation": {
            "batch_size": settings.batch_size,
            "cache_lengths": [512, 2048],
            "train_samples": min(windows, VALIDATION),
            "speed_tokens": 128,
        },
    }


def _training_memory(contender: Contender) -> str:
    """About how much training takes, before anything is loaded."""
    model = meta_model(config_of(contender, 1))
    total = parameters(model)
    trained = sum(p.numel() for p in as_trained(contender, model).parameters() if p.requires_grad)
    held = 4 * (2 * total + 3 * trained)
    return (
        f"training takes about {human_bytes(held)} (weights of the original and of the copy, "
        "gradients, the optimiser's moments), and what a batch takes"
    )
