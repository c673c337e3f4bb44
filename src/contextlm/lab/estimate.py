"""What a recipe would build and cost, found out without training more than a few steps."""

from __future__ import annotations

import psutil
import torch
from pydantic import BaseModel
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError
from contextlm.compress.checkpoint import plain_config
from contextlm.data.tokenizers import known_vocab_size
from contextlm.lab.matching import Match, matched, parameters
from contextlm.lab.preparation import Entry, Prepared, on_first_part, prepare
from contextlm.lab.pretrained import Start, as_trained, config_of
from contextlm.models.base import ReadsStoredContexts
from contextlm.models.build import create_model, meta_model
from contextlm.recipe.schema import Contender, Recipe
from contextlm.training.next_token import seconds_a_step


class ParameterCount(BaseModel):
    """Parameters of one contender, counted on its real modules.

    `trainable` require gradients once the model is built; `trainable_phase2` are those that
    next-token training updates; `versus_baseline_percent` compares the totals. `matched` is the
    field that the recipe's `match` was to find, and the value chosen.
    """

    name: str
    total: int
    trainable: int
    trainable_phase2: int
    versus_baseline_percent: float
    matched: dict[str, int]


class ContenderCost(ParameterCount):
    """Cost of one contender over all seeds, budgets and epochs.

    `seconds_estimate` rests on a few real steps; None where the memory estimated, which is rough,
    is more than this machine has free. Where the recipe tunes, FLOPs and time hold the trials of
    the grid, not those beyond its ends.
    """

    tokens_per_epoch: int
    epochs: int
    seeds: int
    tuning_trials: int
    steps: int
    flops: float
    seconds_estimate: float | None
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
    contenders, matches = matched(recipe, vocab_size)
    models = {contender.name: _meta(contender, vocab_size) for contender in contenders}
    of_baseline = parameters(models[recipe.baseline.name])
    return [
        _count(contender, models[contender.name], of_baseline, matches.get(contender.name))
        for contender in contenders
    ]


def _meta(contender: Contender, vocab_size: int) -> PreTrainedModel:
    try:
        return meta_model(config_of(contender, vocab_size))
    except InputError as error:
        raise InputError(f"contenders.{contender.name}: {error}") from None


def dry_run(recipe: Recipe, *, device: str) -> RecipeCost:
    """Check a recipe with its corpus and find out what a run would take; writes no run folder.

    Each contender takes a few optimiser steps on its first windows; memory counts weights,
    gradients, optimiser state and the logits of one step, and a teacher's weights and logits.

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


def _count(
    contender: Contender, model: PreTrainedModel, of_baseline: int, match: Match | None
) -> ParameterCount:
    total = parameters(model)
    trainable, trainable_phase2 = (
        sum(p.numel() for p in each.parameters() if p.requires_grad)
        for each in (model, as_trained(contender, model))
    )
    return ParameterCount(
        name=contender.name,
        total=total,
        trainable=trainable,
        trainable_phase2=trainable_phase2,
        versus_baseline_percent=100 * (total / of_baseline - 1),
        matched={} if match is None else {match.field: match.value},
    )


def _cost(prepared: Prepared, entry: Entry) -> ContenderCost:
    recipe, training, model = prepared.recipe, entry.training, entry.meta
    contender = entry.contender
    baseline = parameters(prepared.entries[recipe.baseline.name].meta)
    counts = _count(contender, model, baseline, prepared.matches.get(contender.name))
    length, tuning = recipe.sequence_length, recipe.tuning
    trained = [entry.at(budget) for budget in prepared.budgets] * len(recipe.seeds)
    trials = 0 if tuning is None else len(tuning.learning_rates)
    if tuning is not None:
        trained += [on_first_part(entry, tuning)] * trials
    shared = _shared_steps(prepared, entry)
    windows = training.epochs * sum(part.windows_per_epoch for part in trained)
    windows -= shared * training.batch_size
    steps = sum(part.steps for part in trained) - shared
    logits = training.batch_size * length * model.config.vocab_size
    # float32 weights, gradients and two moments; logits, their float copy and gradient.
    memory = 4 * (counts.total + 3 * counts.trainable_phase2 + 3 * logits)
    if contender.is_healed:
        memory += 4 * (counts.total + logits)
    return ContenderCost(
        **counts.model_dump(),
        tokens_per_epoch=len(entry.train) * length,
        epochs=training.epochs,
        seeds=len(recipe.seeds),
        tuning_trials=trials,
        steps=steps,
        # A backward pass costs about two forward passes, and a teacher makes one.
        flops=(4.0 if contender.is_healed else 3.0)
        * _forward_flops(_plain(entry), length)
        * length
        * windows,
        seconds_estimate=_seconds(prepared, entry, steps, memory),
        memory_bytes_estimate=memory,
    )


def _shared_steps(prepared: Prepared, entry: Entry) -> int:
    """Steps that longer budgets need not take, because shorter ones have taken them."""
    if entry.training.schedule != "wsd":
        return 0
    steps = [entry.at(budget).steps for budget in prepared.budgets]
    return sum(map(entry.training.stable_until, steps[:-1])) * len(prepared.recipe.seeds)


def _seconds(prepared: Prepared, entry: Entry, steps: int, memory: int) -> float | None:
    device = prepared.device
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    if memory > free:
        return None
    make_loss = None
    if entry.contender.from_ is not None:
        start = Start.of(entry.contender, prepared.stream, device, 0)
        model, make_loss = start.model, start.make_loss
    else:
        model = create_model(entry.config, 0).to(device)
    windows: Dataset[dict[str, Tensor]] = entry.train
    if entry.reads_store:
        windows = _WithContexts(entry, model.base_model)
    each = seconds_a_step(
        model,
        windows,
        entry.training,
        device=device,
        precision=entry.precision,
        make_loss=make_loss,
    )
    return each * steps


def _plain(entry: Entry) -> PreTrainedModel:
    """The model that operations are counted on: without a policy, which reads values of tensors."""
    plain = plain_config(entry.config)
    return entry.meta if plain is entry.config else meta_model(plain)


class _WithContexts(Dataset[dict[str, Tensor]]):
    """The windows of a contender with contexts of zeros, in the place of a store's."""

    def __init__(self, entry: Entry, decoder: ReadsStoredContexts):
        self.windows = entry.train
        self.rows = decoder.history + entry.train.sequence_length
        self.width = decoder.context_block.context_dim

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.windows[index], "contexts": torch.zeros(self.rows, self.width)}


def _forward_flops(model: PreTrainedModel, tokens: int) -> float:
    """Floating-point operations of a forward pass per token, counted on the meta device.

    With a cache, because without one transformers looks for packed sequences by reading values,
    which meta tensors do not have.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=True)
    return counter.get_total_flops() / tokens
