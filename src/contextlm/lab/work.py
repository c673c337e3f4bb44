"""Doing a job: train and measure a contender, try a learning rate, or learn the embedding."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel

from contextlm.base import distribution
from contextlm.base.errors import NotFiniteError
from contextlm.base.files import atomic_folder, write_json, write_text
from contextlm.base.progress import Progress
from contextlm.data.synthetic import find_task
from contextlm.evaluation.checkpoint import TrainingNote, write_trained
from contextlm.evaluation.long_texts import score_positions
from contextlm.evaluation.memory import PeakMemory, measure_cache
from contextlm.evaluation.quality import (
    bits_per_byte,
    evaluate_quality,
    evaluator,
    retrieval_accuracy,
)
from contextlm.evaluation.speed import measure_speed
from contextlm.evaluation.tasks import load_tasks, task_scores
from contextlm.lab.contexts import Contexts, make_contexts, stage_memory, stores_folder
from contextlm.lab.embeddings import learn_embedding
from contextlm.lab.jobs import Job, Planner, write_job
from contextlm.lab.live import EpochWatcher, History
from contextlm.lab.model_card import model_card
from contextlm.lab.preparation import Entry, Prepared, on_first_part
from contextlm.lab.pretrained import MEASURED, Start, text_to_read
from contextlm.lab.tracking import tracking
from contextlm.models.build import create_model
from contextlm.results.facts import EmbeddingFacts, TuningFacts, perplexity
from contextlm.results.result import Result, StageMemory, Timings, TrialResult
from contextlm.training.next_token import train_next_token
from contextlm.training.oacd import PhaseOneState
from contextlm.training.optimisation import build_schedule, steps_per_epoch
from contextlm.training.phase_two_state import PhaseTwo


def execute(
    job: Job, planner: Planner, run: Path, progress: Progress, track: Sequence[str] = ()
) -> None:
    """Do a job; its `result.json` is written last and says that it is done.

    Where several processes share the job, all call this: rank 0 alone writes, and measures cache
    and speed. A training whose loss stops being finite is a result too: the same again would end
    the same way.

    Args:
        job: of the planner's, ready to be done.
        planner: with all that the job reads.
        run: the run folder.
        progress: gets iterations and epochs.
        track: names of trackers, which get them too.

    Raises:
        RunError: a fault while running, such as a full disk.
    """
    prepared = planner.prepared
    if job.kind == "embedding":
        assert prepared.learning_text is not None
        settings, text = prepared.recipe.embedding, prepared.learning_text
        learn_embedding(settings, text, prepared.device, run / job.working, progress)
        return
    if distribution.is_main():
        write_job(run, job)
    entry, tuning = _entry(prepared, job), None
    try:
        told_once = {"job": job.identity, **job.decides}
        with tracking(track, run, str(job.folder), told_once) as told:
            history = History(run / job.folder / "history.jsonl", told)
            if job.kind == "trial":
                _try(job, prepared, run, history, progress)
            else:
                tuning = planner.tuning(run, entry)
                if tuning is not None:
                    entry = _with_rate(entry, tuning.chosen)
                _run(job, prepared, entry, tuning, run, history, progress)
    except NotFiniteError as error:
        if distribution.world() > 1:
            raise  # where rank 0 works alone, in phase 1, the others hear only that it failed
        progress.line(f"diverged: {error}")
        _write_divergence(job, prepared, entry, tuning, run, str(error))
    if distribution.is_main():
        shutil.rmtree(run / job.working, ignore_errors=True)
        if all(other.shared != job.shared for other in planner.left(run, job.seed)):
            shutil.rmtree(run / job.shared, ignore_errors=True)
        store = prepared.recipe.context_store
        if store is not None and not store.keep and not planner.left(run, job.seed):
            place = run / stores_folder(job.seed)
            shutil.rmtree(place, ignore_errors=True)  # they are large
            with suppress(OSError):  # another seed's are in there
                place.parent.rmdir()


def _entry(prepared: Prepared, job: Job) -> Entry:
    """The job's contender, on the job's budget."""
    budgets = {budget.share: budget for budget in prepared.budgets if budget is not None}
    budget = None if job.budget is None else budgets[job.budget]
    return prepared.entries[job.contender].at(budget)


def _write_divergence(
    job: Job,
    prepared: Prepared,
    entry: Entry,
    tuning: TuningFacts | None,
    run: Path,
    reason: str,
) -> None:
    """The result of a training that did not stay finite."""
    folder = run / job.folder
    if job.kind == "trial":
        assert job.rate is not None
        trial = TrialResult(job=job.identity, learning_rate=job.rate, validation_loss=None)
        write_json(folder / "result.json", trial.model_dump())
        return
    told = {"diverged": reason, "tuning": tuning}
    result = _result(job, prepared, entry, entry.meta, math.inf, 0.0).model_copy(update=told)
    timings = Timings(
        phase1_seconds=None,
        epoch_seconds=[],
        evaluation_seconds=0.0,
        total_seconds=0.0,
        training_tokens_per_second=math.nan,
        prefill_tokens_per_second=math.nan,
        decode_tokens_per_second=math.nan,
        speed_tokens=0,
        peak_host_bytes=0,
        peak_accelerator_bytes=None,
    )
    (folder / "history.jsonl").touch()
    write_json(folder / "timings.json", timings.model_dump())
    write_json(folder / "result.json", result.model_dump())


def _result(
    job: Job,
    prepared: Prepared,
    entry: Entry,
    model: PreTrainedModel,
    validation_loss: float,
    accuracy: float,
) -> Result:
    """What a result says of any training, with nothing else measured."""
    recipe, contender, budget = prepared.recipe, entry.contender, entry.budget
    seen: dict[str, float | None] = {}
    if budget is not None:
        seen = {"train_tokens": budget.tokens, "train_windows": entry.samples}
        seen["text_passes"] = budget.text_passes
    return Result(
        recipe=recipe.name,
        scale=recipe.scale,
        contender=job.contender,
        architecture=model.config.model_type,
        baseline=contender.baseline,
        seed=job.seed,
        budget=job.budget,
        job=job.identity,
        setting=job.setting,
        target_offset=recipe.target_offset_of(contender),
        precision=entry.precision,
        corpus=prepared.facts.model_copy(update=seen),
        parameters_total=sum(p.numel() for p in model.parameters()),
        parameters_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        validation_loss=validation_loss,
        validation_ppl=math.inf if math.isinf(validation_loss) else perplexity(validation_loss),
        bits_per_byte=None,
        accuracy=accuracy,
        train_ppl_running=math.inf,
        train_ppl=math.inf,
        best_epoch=0,
        epochs=0,
        learning_rate=entry.training.learning_rate,
        phase1=None,
        cache=[],
        cache_dtype=str(model.dtype).removeprefix("torch."),
        reported=contender.reported,
        reported_epochs=dict(contender.reported_epochs),
    )


def _try(job: Job, prepared: Prepared, run: Path, history: History, progress: Progress) -> None:
    """Train on the first part of the windows and keep nothing but the best loss and the history."""
    assert job.rate is not None
    part = first_part(prepared, job.contender)
    entry = _with_rate(part.entries[job.contender], job.rate)
    stages: list[StageMemory] = []
    model, _, start = _new_model(job, part, entry, run, progress)
    trained = _train(job, part, entry, model, start, run, history, progress, stages)
    loss = min(epoch.validation_loss for epoch in trained.phase2.epochs)
    trial = TrialResult(job=job.identity, learning_rate=job.rate, validation_loss=loss)
    if distribution.is_main():
        write_json(run / job.folder / "result.json", trial.model_dump())


def first_part(prepared: Prepared, contender: str) -> Prepared:
    """A contender with the share of the text, and of warm-up, that tuning tries rates on."""
    assert prepared.recipe.tuning is not None
    part = on_first_part(prepared.entries[contender], prepared.recipe.tuning)
    return replace(prepared, entries={contender: part}, stream=part.train.stream())


def _with_rate(entry: Entry, rate: float) -> Entry:
    training = entry.training.model_copy(update={"learning_rate": rate})
    return replace(entry, training=training)


@dataclass(frozen=True)
class _Trained:
    """What training left, beside the model itself."""

    phase2: PhaseTwo
    contexts: Contexts
    train: Dataset[dict[str, torch.Tensor]]


def _run(
    job: Job,
    prepared: Prepared,
    entry: Entry,
    tuning: TuningFacts | None,
    run: Path,
    history: History,
    progress: Progress,
) -> None:
    """Train the contender, save its checkpoint, measure it, and write what came of it."""
    started = time.perf_counter()
    recipe, device, folder = prepared.recipe, prepared.device, run / job.folder
    peak = PeakMemory(device)
    stages = [stage_memory("data loaded", device)]
    model, embedding, start = _new_model(job, prepared, entry, run, progress)
    stages.append(stage_memory("model initialised", device))
    trained = _train(job, prepared, entry, model, start, run, history, progress, stages)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if start is not None:
        model = start.finish()
    # Before anything is measured: a fault in a measurement must not cost the weights.
    offset = recipe.target_offset_of(entry.contender)
    if distribution.is_main():
        note = TrainingNote(
            target_offset=offset,
            unit=recipe.unit,
            stream=trained.contexts.store is not None,
            sequence_length=recipe.sequence_length,
        )
        _save_checkpoint(model, prepared, note, folder / "checkpoint")
    progress.update("measuring quality, cache and speed")
    measured = time.perf_counter()
    size = recipe.evaluation.batch_size
    again = _first(trained.train, recipe.evaluation.train_samples)
    train = evaluate_quality(model, again, size, device)
    best = trained.phase2.epochs[trained.phase2.best_epoch - 1]
    loss, accuracy = best.validation_loss, best.accuracy
    if start is not None:  # what is saved: rounded to the original's type, adapters merged
        saved = evaluate_quality(model, trained.contexts.validation, size, device)
        loss, accuracy = saved.loss, saved.accuracy
    task = find_task(recipe.corpus)
    retrieval = []
    if task is not None:
        retrieval = retrieval_accuracy(model, trained.contexts.validation, task, size, device)
    if not distribution.is_main():
        return
    tasks = []
    if recipe.evaluation.tasks:
        loaded = load_tasks(recipe.evaluation.tasks)
        tasks = task_scores(model, prepared.tokenizer, loaded, size)
    # The windows' length too, so that cache and quality can be told at one length.
    lengths, positions = [*recipe.evaluation.cache_lengths, recipe.sequence_length], []
    if recipe.evaluation.long:
        documents = prepared.validation_documents
        long = score_positions(model, documents, recipe.sequence_length, ahead=offset)
        positions = long.positions
        lengths += [edge for edge in long.edges if edge > recipe.sequence_length]
    healing = None
    if start is not None:
        held_out_T = text_to_read(prepared.validation_documents, MEASURED)
        healing = start.facts(prepared.tokenizer, held_out_T, progress.update)
    cache = measure_cache(model, lengths, device)
    speed = measure_speed(model, recipe.evaluation.speed_tokens, device)
    now = time.perf_counter()
    epochs = trained.phase2.epochs
    seconds = [epoch.seconds for epoch in epochs]
    timings = Timings(
        phase1_seconds=trained.contexts.phase1_seconds,
        store_seconds=trained.contexts.store_seconds,
        stages=stages,
        epoch_seconds=seconds,
        evaluation_seconds=now - measured,
        total_seconds=now - started,
        training_tokens_per_second=entry.windows_per_epoch
        * recipe.sequence_length
        / median(seconds),
        prefill_tokens_per_second=speed.prefill_tokens_per_second,
        decode_tokens_per_second=speed.decode_tokens_per_second,
        speed_tokens=speed.tokens,
        peak_host_bytes=peak.host_bytes(),
        peak_accelerator_bytes=peak.accelerator_bytes(),
    )
    measured_too = {
        "learning_rate": _highest_rate(entry, len(trained.phase2.losses)),
        "bits_per_byte": _bits_per_byte(loss, prepared, offset),
        "train_ppl_running": perplexity(best.train_loss),
        "train_ppl": train.ppl,
        "train_ppl_windows": len(again),
        "retrieval": retrieval,
        "positions": positions,
        "tasks": tasks,
        "best_epoch": trained.phase2.best_epoch,
        "epochs": len(epochs),
        "trained_tokens": best.tokens,
        "parameters_trainable": trainable,
        "healing": healing,
        "tuning": tuning,
        "phase1": trained.contexts.phase1,
        "embedding": embedding,
        "store": trained.contexts.store,
        "cache": cache,
    }
    result = _result(job, prepared, entry, model, loss, accuracy).model_copy(update=measured_too)
    write_text(folder / "checkpoint" / "README.md", model_card(result, recipe, entry))
    write_json(folder / "timings.json", timings.model_dump())
    write_json(folder / "result.json", result.model_dump())


def _new_model(
    job: Job, prepared: Prepared, entry: Entry, run: Path, progress: Progress
) -> tuple[PreTrainedModel, EmbeddingFacts, Start | None]:
    """The contender's model, where its embedding comes from, and what it starts from if trained."""
    contender = entry.contender
    if contender.from_ is not None:
        progress.update(f"loading {contender.from_}")
        start = Start.of(contender, prepared.stream, prepared.device, job.seed)
        path = prepared.recipe.written.get(f"contenders.{contender.name}.from", contender.from_)
        return start.model, EmbeddingFacts(source="pretrained", path=path), start
    model = create_model(entry.config, job.seed)
    embedding = prepared.embedding
    if prepared.learning_text is not None:
        settings, text = prepared.recipe.embedding, prepared.learning_text
        # Learned before, by a job of its own; only a machine with another cache learns it again.
        place = run / job.working / "embedding"
        embedding = learn_embedding(settings, text, prepared.device, place, progress)
    facts = EmbeddingFacts(source="random")
    if embedding is not None:
        facts = embedding.facts
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(embedding.weight_VD)
    frozen = not model.get_input_embeddings().weight.requires_grad
    return model.to(prepared.device), facts.model_copy(update={"frozen": frozen}), None


def _train(
    job: Job,
    prepared: Prepared,
    entry: Entry,
    model: PreTrainedModel,
    start: Start | None,
    run: Path,
    history: History,
    progress: Progress,
    stages: list[StageMemory],
) -> _Trained:
    """Phase 1, the context store and phase 2, as far as the contender has them."""
    working, shared = run / job.working, run / job.shared
    state = PhaseOneState(shared / "phase1", progress.line)
    contexts = make_contexts(job, prepared, entry, model, run, history, progress, stages, state)
    size = prepared.recipe.evaluation.batch_size
    train: Dataset[dict[str, torch.Tensor]] = contexts.train
    training, trunk = entry.training, None
    if entry.budget is not None:
        train = Subset(entry.pool, entry.budget.order(job.seed, shuffle=training.shuffle))
        training = training.model_copy(update={"shuffle": False})
        trunk = shared / "trunk" if training.schedule == "wsd" else None
    phase2 = train_next_token(
        model,
        train,
        training,
        evaluator(contexts.validation, size, prepared.device),
        seed=job.seed,
        device=prepared.device,
        precision=entry.precision,
        folder=working / "phase2",
        watcher=EpochWatcher(progress, history),
        tell=progress.line,
        trunk=trunk,
        make_loss=None if start is None else start.make_loss,
    )
    stages.append(stage_memory("trained", prepared.device))
    return _Trained(phase2, contexts, train)


def _save_checkpoint(
    model: PreTrainedModel, prepared: Prepared, note: TrainingNote, at: Path
) -> None:
    """Weights, configuration, tokenizer and a note on training, in a folder that appears whole."""
    # For padded batches; not in the configuration, where it would freeze an embedding at zero.
    model.generation_config.pad_token_id = prepared.tokenizer.pad_token_id
    with atomic_folder(at) as partial:
        model.save_pretrained(partial)
        prepared.tokenizer.save_pretrained(partial)
        write_trained(partial, note)


def _highest_rate(entry: Entry, steps: int) -> float:
    """The rate that training really reached: patience may have ended it within the warm-up."""
    share = build_schedule(entry.training, steps_per_epoch(entry.training, entry.samples))
    return entry.training.learning_rate * max(map(share, range(steps)))


def _bits_per_byte(loss: float, prepared: Prepared, target_offset: int) -> float | None:
    if target_offset > 1 or prepared.validation_bytes is None:
        return None
    tokens = prepared.facts.validation_tokens
    return bits_per_byte(loss, tokens, prepared.validation_bytes)


def _first(
    windows: Dataset[dict[str, torch.Tensor]], count: int | None
) -> Subset[dict[str, torch.Tensor]]:
    """The first `count` windows, or all."""
    there = len(windows)  # type: ignore[arg-type]  # ours have a length
    return Subset(windows, range(min(count or there, there)))
