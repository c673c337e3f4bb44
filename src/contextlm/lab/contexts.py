"""What phase 2 reads: a trained context block, and the windows with or without stored contexts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from contextlm.base import distribution
from contextlm.base.progress import Progress
from contextlm.data.windows import Windows
from contextlm.evaluation.memory import memory_now
from contextlm.evaluation.quality import effective_rank, sample_rows, window_contexts
from contextlm.lab.jobs import Job
from contextlm.lab.live import History, IterationWatcher
from contextlm.lab.preparation import Entry, Prepared, Samples
from contextlm.models.base import HasContextBlock, ReadsStoredContexts
from contextlm.results.facts import PhaseOneFacts, StoreFacts
from contextlm.results.result import StageMemory
from contextlm.training.context_store import ContextStore, StoredWindows, fill_context_store
from contextlm.training.oacd import (
    PhaseOne,
    PhaseOneState,
    initial_contexts,
    train_context_block,
)

_STORES = "_contexts"  # folder of a run; no contender can be named so

Text = Samples | StoredWindows


@dataclass(frozen=True)
class Contexts:
    """What phase 1 and the stores left: the windows of both splits, and facts for the result."""

    train: Text
    validation: Text
    phase1: PhaseOneFacts | None = None
    phase1_seconds: float | None = None
    store: StoreFacts | None = None
    store_seconds: float | None = None


def stores_folder(seed: int) -> Path:
    """Where, below a run folder, the context stores of a seed are; contenders share them."""
    return Path(_STORES, f"seed-{seed}")


def stage_memory(stage: str, device: torch.device) -> StageMemory:
    """The memory in use now, at the end of a stage."""
    host, accelerator = memory_now(device)
    return StageMemory(stage=stage, host_bytes=host, accelerator_bytes=accelerator)


def make_contexts(
    job: Job,
    prepared: Prepared,
    entry: Entry,
    model: PreTrainedModel,
    run: Path,
    history: History,
    progress: Progress,
    stages: list[StageMemory],
    state: PhaseOneState,
) -> Contexts:
    """Train the context block by phase 1 and fill the stores, as far as the contender has either.

    With several processes all call this; rank 0 does the work.

    Args:
        job, prepared, entry: whose.
        model: trained in place.
        run: the run folder; contenders with the same block share its stores.
        history: takes phase 1's iterations.
        progress: gets them too.
        stages: takes the memory in use after each step.
        state: keeps on disk where phase 1 is, and brings that back.

    Raises:
        NotFiniteError: phase 1's loss is not finite.
    """
    train, validation = entry.train, entry.validation
    device, seed, phase1 = prepared.device, job.seed, entry.contender.phase1
    decoder = model.base_model
    if not isinstance(decoder, HasContextBlock):
        return Contexts(train, validation)
    outcome = None
    if phase1 is not None:
        outcome = train_context_block(
            decoder.context_block,
            decoder.embed_normalised,
            prepared.stream,
            phase1,
            seed=seed,
            device=device,
            on_iteration=IterationWatcher(progress, history),
            state=state,
        )
        stages.append(stage_memory("after phase 1", device))
    elif decoder.context_block.frozen:
        progress.line("the context block stays as it was drawn: it is frozen and has no phase1")
    filling = time.perf_counter()
    stores = None
    if entry.reads_store:
        progress.update("filling the context stores")
        stores = _fill(decoder, prepared, outcome, seed, run / stores_folder(seed))
        stages.append(stage_memory("phase 2 prepared", device))
    filled = time.perf_counter()
    facts, phase1_seconds = None, None
    if outcome is not None:
        if distribution.is_main():  # who has all contexts
            facts = _phase_one_facts(decoder, outcome, stores, validation, seed, device)
        facts = distribution.from_main(facts)
        # Those before a kill count too.
        phase1_seconds = sum(iteration.seconds for iteration in outcome.iterations)
    if stores is None:
        return Contexts(train, validation, facts, phase1_seconds)
    assert isinstance(decoder, ReadsStoredContexts)
    assert isinstance(train, Windows)  # lines have no store
    assert isinstance(validation, Windows)
    return Contexts(
        StoredWindows(train, stores[0], decoder.history),
        StoredWindows(validation, stores[1], decoder.history),
        facts,
        phase1_seconds,
        _store_facts(prepared, *stores),
        filled - filling,
    )


def _fill(
    decoder: HasContextBlock,
    prepared: Prepared,
    outcome: PhaseOne | None,
    seed: int,
    folder: Path,
) -> tuple[ContextStore, ContextStore]:
    """The stores of both splits.

    Parallel passes continue from phase 1's contexts where there are such, that is on the training
    text; on the validation text they start where phase 1 starts, and are as many.
    """
    settings, device = prepared.recipe.context_store, prepared.device
    assert settings is not None  # else nobody reads a store
    block, embed = decoder.context_block, decoder.embed_normalised

    def fill(tokens: np.ndarray, start_PC: Tensor, passes: int) -> ContextStore:
        return fill_context_store(block, embed, tokens, start_PC, passes, settings, folder)

    fresh_PC = initial_contexts(len(prepared.validation_stream), block.context_dim, seed, device)
    if outcome is None:
        start_PC = initial_contexts(len(prepared.stream), block.context_dim, seed, device)
        return fill(prepared.stream, start_PC, 1), fill(prepared.validation_stream, fresh_PC, 1)
    passes = len(outcome.iterations)
    return (
        fill(prepared.stream, outcome.contexts_PC, 1),
        fill(prepared.validation_stream, fresh_PC, passes),
    )


def _store_facts(prepared: Prepared, train: ContextStore, validation: ContextStore) -> StoreFacts:
    settings = prepared.recipe.context_store
    assert settings is not None
    return StoreFacts(
        fill=settings.fill,
        dtype=settings.dtype,
        train_bytes=train.nbytes,
        validation_bytes=validation.nbytes,
        drift_train=train.drift,
        drift_validation=validation.drift,
    )


def _phase_one_facts(
    decoder: HasContextBlock,
    outcome: PhaseOne,
    stores: tuple[ContextStore, ContextStore] | None,
    validation: Samples,
    seed: int,
    device: torch.device,
) -> PhaseOneFacts:
    block = decoder.context_block
    if stores is None:
        contexts_NC = window_contexts(block, decoder.embed_normalised, validation, 32, device)
    else:
        contexts_NC = stores[1].rows(0, stores[1].positions)
    return PhaseOneFacts(
        iterations=len(outcome.iterations),
        converged=outcome.converged,
        context_dim=block.context_dim,
        effective_rank_train=effective_rank(sample_rows(outcome.contexts_PC, seed)),
        effective_rank_validation=effective_rank(sample_rows(contexts_NC, seed)),
    )
