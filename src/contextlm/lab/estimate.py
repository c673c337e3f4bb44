"""What a recipe would build and cost, found out without training anything."""

from __future__ import annotations

import time

import torch
from pydantic import BaseModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError
from contextlm.data.tokenizers import known_vocab_size
from contextlm.lab.preparation import Entry, Prepared, prepare
from contextlm.models.build import build_config, meta_model
from contextlm.recipe.schema import Contender, Recipe

# A training step reaches only a part of what one large matrix product reaches: losses, norms and
# optimisers are bound by memory. Seen on two cores; the estimate is a guide, not a promise.
_EFFICIENCY = 0.35


class ParameterCount(BaseModel):
    """Parameters of one contender, counted on its real modules.

    `trainable` require gradients once the model is built; `trainable_phase2` are those that
    next-token training updates.
    """

    name: str
    total: int
    trainable: int
    trainable_phase2: int


class ContenderCost(ParameterCount):
    """Cost of one contender over all seeds and epochs; time and memory are rough estimates.

    Where the recipe tunes, FLOPs and time hold the trials of the grid, not those beyond its ends.
    """

    tokens_per_epoch: int
    epochs: int
    seeds: int
    tuning_trials: int
    flops: float
    seconds_estimate: float
    memory_bytes_estimate: int


class RecipeCost(BaseModel):
    """Cost of a whole recipe."""

    name: str
    scale: str
    corpus: str
    tokenizer: str
    train_tokens: int
    validation_tokens: int
    contenders: list[ContenderCost]


def count_parameters(recipe: Recipe) -> list[ParameterCount]:
    """Parameters of every contender; needs no corpus.

    Raises:
        InputError: a contender's configuration is not valid.
    """
    vocab_size = recipe.vocab_size or known_vocab_size(recipe.tokenizer)
    if vocab_size is None:
        raise InputError(f"tokenizer {recipe.tokenizer!r}: it has no tokenizer.json to count")
    return [_count(c.name, _meta(c, vocab_size)) for c in recipe.contenders]


def _meta(contender: Contender, vocab_size: int) -> PreTrainedModel:
    try:
        return meta_model(build_config(contender.model, vocab_size))
    except InputError as error:
        raise InputError(f"contenders.{contender.name}: {error}") from None


def dry_run(recipe: Recipe, *, device: str) -> RecipeCost:
    """Check a recipe with its corpus and estimate what a run would take; writes no run folder.

    Time rests on one quick measurement of this machine's matrix products; memory counts weights,
    gradients, optimiser state and the logits of one step.

    Raises:
        InputError: the recipe or its corpus is not usable.
    """
    prepared = prepare(recipe, resolve_device(device))
    contenders = [_cost(prepared, entry) for entry in prepared.entries.values()]
    facts = prepared.facts
    return RecipeCost(
        name=recipe.name,
        scale=recipe.scale,
        corpus=facts.name,
        tokenizer=facts.tokenizer,
        train_tokens=facts.train_tokens,
        validation_tokens=facts.validation_tokens,
        contenders=contenders,
    )


def _count(name: str, model: PreTrainedModel) -> ParameterCount:
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ParameterCount(name=name, total=total, trainable=trainable, trainable_phase2=trainable)


def _cost(prepared: Prepared, entry: Entry) -> ContenderCost:
    recipe, training, model = prepared.recipe, entry.training, entry.meta
    counts = _count(entry.contender.name, model)
    tokens = prepared.facts.train_windows * recipe.sequence_length
    trials = 0 if recipe.tuning is None else len(recipe.tuning.learning_rates)
    share = 0.0 if recipe.tuning is None else recipe.tuning.share
    runs = training.epochs * (len(recipe.seeds) + trials * share)
    # A backward pass costs about two forward passes.
    flops = 3.0 * _forward_flops(model, recipe.sequence_length) * tokens * runs
    dtype = torch.bfloat16 if entry.precision == "bfloat16" else torch.float32
    logits = training.batch_size * recipe.sequence_length * model.config.vocab_size
    return ContenderCost(
        **counts.model_dump(),
        tokens_per_epoch=tokens,
        epochs=training.epochs,
        seeds=len(recipe.seeds),
        tuning_trials=trials,
        flops=flops,
        seconds_estimate=flops / (_EFFICIENCY * _matmul_flops_per_second(prepared.device, dtype)),
        # float32 weights, gradients and two moments; logits, their float copy and gradient.
        memory_bytes_estimate=4 * (counts.total + 3 * counts.trainable + 3 * logits),
    )


def _forward_flops(model: PreTrainedModel, tokens: int) -> float:
    """Floating-point operations of a forward pass per token, counted on the meta device.

    With a cache, because without one transformers looks for packed sequences by reading values,
    which meta tensors do not have.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=True)
    return counter.get_total_flops() / tokens


def _matmul_flops_per_second(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
