"""One contender with one seed: phase 1, phase 2, measurements, and the files that hold them."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel

from contextlm.base import distribution
from contextlm.base.files import atomic_folder, write_json
from contextlm.base.progress import Progress
from contextlm.data.synthetic import find_task
from contextlm.evaluation.checkpoint import TrainingNote, write_trained
from contextlm.evaluation.memory import PeakMemory, measure_cache
from contextlm.evaluation.quality import (
    Quality,
    bits_per_byte,
    evaluate_quality,
    evaluator,
    perplexity,
    retrieval_accuracy,
)
from contextlm.evaluation.speed import measure_speed
from contextlm.lab.contexts import STORES, Contexts, Text, make_contexts, stage_memory
from contextlm.lab.live import EpochWatcher, History
from contextlm.lab.preparation import Prepared, windows_per_epoch
from contextlm.models.build import create_model
from contextlm.recipe.schema import Contender, Recipe
from contextlm.results.facts import EmbeddingFacts, TuningFacts
from contextlm.results.result import Result, StageMemory, Timings
from contextlm.training.next_token import NextTokenOutcome, train_next_token
from contextlm.training.phase_one_state import PhaseOneState
from contextlm.training.precision import resolve_precision


@dataclass(frozen=True)
class _Trained:
    """What training left, beside the model itself."""

    outcome: NextTokenOutcome
    precision: str
    contexts: Contexts


def run_contender(
    recipe: Recipe,
    contender: Contender,
    seed: int,
    prepared: Prepared,
    folder: Path,
    device: torch.device,
    progress: Progress,
    working: Path,
    tuning: TuningFacts | None = None,
) -> None:
    """Train and measure one contender; `result.json` is written last and marks it as finished.

    With several processes all call this; rank 0 alone writes, and measures cache and speed.

    Args:
        recipe: the comparison.
        contender: which of its models.
        seed: governs weights, noise, shuffling and dropout.
        prepared: the recipe's data and configurations.
        folder: for this contender and seed.
        device: where to compute.
        progress: is told what happens.
        working: for what a killed process goes on from; removed when all is done.
        tuning: how its learning rate was chosen, for the result.

    Raises:
        RunError: training broke down (a loss that is not finite), or the disk is full.
    """
    started = time.perf_counter()
    peak = PeakMemory(device)
    progress.stage(f"{contender.name}, seed {seed}")
    stages = [stage_memory("data loaded", device)]
    model = _model(contender, seed, prepared, device)
    stages.append(stage_memory("model initialised", device))
    trained = _train(
        recipe, contender, seed, model, prepared, folder, device, progress, stages, working
    )
    # Before anything is measured: a fault in a measurement must not cost the weights.
    made = TrainingNote(
        target_offset=recipe.target_offset_of(contender),
        unit=recipe.unit,
        stream=trained.contexts.store is not None,
        sequence_length=recipe.sequence_length,
    )
    if distribution.is_main():
        _save_checkpoint(model, prepared, made, folder / "checkpoint")
    progress.update("measuring quality, cache and speed")
    measured = time.perf_counter()
    size = recipe.evaluation.batch_size
    validation = evaluate_quality(model, trained.contexts.validation, size, device)
    again = _first(trained.contexts.train, recipe.evaluation.train_samples)
    train = evaluate_quality(model, again, size, device)
    retrieval = []
    if recipe.unit == "answers":
        task = find_task(recipe.corpus)
        retrieval = retrieval_accuracy(model, trained.contexts.validation, task, size, device)
    if not distribution.is_main():
        return
    cache = measure_cache(model, recipe.evaluation.cache_lengths, device)
    speed = measure_speed(model, recipe.evaluation.speed_tokens, device)
    now = time.perf_counter()
    offset = recipe.target_offset_of(contender)
    epoch_seconds = [epoch.seconds for epoch in trained.outcome.epochs]
    tokens_per_epoch = windows_per_epoch(recipe, contender, prepared) * recipe.sequence_length
    timings = Timings(
        phase1_seconds=trained.contexts.phase1_seconds,
        store_seconds=trained.contexts.store_seconds,
        stages=stages,
        epoch_seconds=epoch_seconds,
        evaluation_seconds=now - measured,
        total_seconds=now - started,
        training_tokens_per_second=tokens_per_epoch / median(epoch_seconds),
        prefill_tokens_per_second=speed.prefill_tokens_per_second,
        decode_tokens_per_second=speed.decode_tokens_per_second,
        speed_tokens=speed.tokens,
        peak_host_bytes=peak.host_bytes(),
        peak_accelerator_bytes=peak.accelerator_bytes(),
    )
    result = Result(
        recipe=recipe.name,
        scale=recipe.scale,
        contender=contender.name,
        architecture=model.config.model_type,
        baseline=contender.baseline,
        seed=seed,
        target_offset=offset,
        precision=trained.precision,
        corpus=prepared.facts,
        parameters_total=sum(p.numel() for p in model.parameters()),
        parameters_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        train_ppl_windows=len(again),
        learning_rate=recipe.training_of(contender).learning_rate,
        tuning=tuning,
        **_quality_fields(validation, train, trained.outcome, prepared, offset),
        retrieval=retrieval,
        phase1=trained.contexts.phase1,
        embedding=_embedding_facts(model, prepared),
        store=trained.contexts.store,
        cache=cache,
        cache_dtype=str(model.dtype).removeprefix("torch."),
        reported=contender.reported,
        reported_epochs=dict(contender.reported_epochs),
    )
    write_json(folder / "timings.json", timings.model_dump())
    write_json(folder / "result.json", result.model_dump())
    shutil.rmtree(working, ignore_errors=True)


def try_contender(
    recipe: Recipe,
    contender: Contender,
    seed: int,
    prepared: Prepared,
    folder: Path,
    device: torch.device,
    progress: Progress,
    working: Path,
) -> float:
    """Train one contender and keep nothing but its history; the best epoch's validation loss.

    Args as in `run_contender`; what is in `working` is left for the caller to remove.

    Raises:
        RunError: training broke down (a loss that is not finite), or the disk is full.
    """
    model = _model(contender, seed, prepared, device)
    stages: list[StageMemory] = []
    trained = _train(
        recipe, contender, seed, model, prepared, folder, device, progress, stages, working
    )
    return min(epoch.validation_loss for epoch in trained.outcome.epochs)


def _model(
    contender: Contender, seed: int, prepared: Prepared, device: torch.device
) -> PreTrainedModel:
    """The contender's model with the recipe's embeddings."""
    model = create_model(prepared.configs[contender.name], seed)
    if prepared.embedding is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(prepared.embedding.weight_VD)
    return model.to(device)


def _embedding_facts(model: PreTrainedModel, prepared: Prepared) -> EmbeddingFacts:
    frozen = not model.get_input_embeddings().weight.requires_grad
    known = EmbeddingFacts(source="random")
    if prepared.embedding is not None:
        known = prepared.embedding.facts
    return known.model_copy(update={"frozen": frozen})


def _first(windows: Text, count: int | None) -> Subset[dict[str, torch.Tensor]]:
    """The first `count` windows, or all."""
    return Subset(windows, range(min(count or len(windows), len(windows))))


def _quality_fields(
    validation: Quality,
    train: Quality,
    outcome: NextTokenOutcome,
    prepared: Prepared,
    target_offset: int,
) -> dict[str, float | int | None]:
    best = outcome.epochs[outcome.best_epoch - 1]
    return {
        "validation_loss": validation.loss,
        "validation_ppl": validation.ppl,
        "bits_per_byte": bits_per_byte(
            validation.loss, prepared.facts.validation_tokens, prepared.validation_bytes
        )
        if target_offset == 1 and prepared.validation_bytes is not None
        else None,
        "accuracy": validation.accuracy,
        "train_ppl_running": perplexity(best.train_loss),
        "train_ppl": train.ppl,
        "best_epoch": outcome.best_epoch,
        "epochs": len(outcome.epochs),
    }


def _train(
    recipe: Recipe,
    contender: Contender,
    seed: int,
    model: PreTrainedModel,
    prepared: Prepared,
    folder: Path,
    device: torch.device,
    progress: Progress,
    stages: list[StageMemory],
    working: Path,
) -> _Trained:
    history = History(folder / "history.jsonl")
    training = recipe.training_of(contender)
    precision = resolve_precision(training.precision, device)
    # Beside the contenders' folders, so that contenders with the same block share a store.
    stores = folder.parents[1] / STORES
    alone = distribution.world() == 1  # several processes begin anew
    state = PhaseOneState(working / "phase1", progress.line) if alone else None
    contexts = make_contexts(
        recipe, contender, seed, model, prepared, stores, device, history, progress, stages, state
    )
    outcome = train_next_token(
        model,
        contexts.train,
        training,
        evaluator(contexts.validation, recipe.evaluation.batch_size, device),
        seed=seed,
        device=device,
        precision=precision,
        folder=working / "phase2",
        watcher=EpochWatcher(progress, history),
        tell=progress.line,
    )
    stages.append(stage_memory("trained", device))
    return _Trained(outcome, precision, contexts)


def _save_checkpoint(
    model: PreTrainedModel, prepared: Prepared, trained: TrainingNote, folder: Path
) -> None:
    """Weights, configuration, tokenizer and a note on training, in a folder that appears whole."""
    # For padded batches; not in the configuration, where it would freeze an embedding at zero.
    model.generation_config.pad_token_id = prepared.tokenizer.pad_token_id
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        prepared.tokenizer.save_pretrained(partial)
        write_trained(partial, trained)
