"""Phase 2: next-token training on transformers' `Trainer`, in the documents' protocols.

What differs from the Trainer's defaults, and why: targets come shifted from the data, so that all T
positions of a window are trained and `target_offset` is a matter of data; evaluation is a function
that the caller supplies, exact over tokens; optimiser groups and schedules are the recipe's; a
loss that is not finite stops the run instead of being hidden; checkpoints are checked, and training
goes on from the newest whole one in its folder.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainerCallback,
)

from contextlm.base import distribution
from contextlm.base.interrupts import deferred
from contextlm.recipe.settings import TrainingSettings
from contextlm.training.checkpoints import Tell, silent
from contextlm.training.epochs import Epoch, EpochRecorder, Watcher
from contextlm.training.fully_sharded import copy_to_shard, sharding_arguments, take_weights
from contextlm.training.host_memory import freed_memory_kept
from contextlm.training.phase_two_state import CheckpointKeeper
from contextlm.training.sharing import check_processes
from contextlm.training.trainer import Evaluate, NextTokenTrainer, training_arguments


@dataclass(frozen=True)
class NextTokenOutcome:
    """How phase 2 ended; the model holds the weights of `best_epoch`."""

    epochs: list[Epoch]
    best_epoch: int


def train_next_token(
    model: PreTrainedModel,
    train: Dataset[dict[str, Tensor]],
    settings: TrainingSettings,
    evaluate: Evaluate,
    *,
    seed: int,
    device: torch.device,
    precision: str,
    folder: Path,
    watcher: Watcher,
    tell: Tell = silent,
) -> NextTokenOutcome:
    """Train until the stopping rule or the last epoch, then restore the best epoch's weights.

    With several processes all call this with the same arguments; each batch is shared out among
    them, and all end with the same weights.

    Args:
        model: to train in place; only parameters that require gradients change.
        train: items ``{"input_ids": [T], "labels": [T]}``, labels shifted already; whatever else
            they hold is passed to the model.
        settings: optimiser, schedule, batch size, stopping rule.
        evaluate: called after each epoch.
        seed: of shuffling and dropout.
        device: where to compute.
        precision: ``float32`` or ``bfloat16`` (autocast).
        folder: for the working checkpoints. Training goes on from the newest whole one of the same
            training that is in there. They stay: the caller removes them.
        watcher: is told about progress.
        tell: takes a line about checkpoints.

    Raises:
        RunError: the loss is not finite (`NotFiniteError`), or a checkpoint cannot be written; the
            message names the step or the file, a note the last good checkpoint.
        InputError: a parameter group matches nothing, or the processes cannot train like this.
        KeyboardInterrupt: the process was told to stop, and has written a checkpoint.
    """
    check_processes(settings, device)
    recorder = EpochRecorder(watcher)
    use_cache = model.config.use_cache
    described = [settings.model_dump(mode="json"), seed, precision, _shapes(model, train)]
    alone = distribution.world() == 1
    # Several processes keep the Trainer's own checkpoints and begin anew after a fault.
    with deferred() if alone else nullcontext() as asked, freed_memory_kept():
        keeper = checkpoint = None
        if asked is not None:
            keeper = CheckpointKeeper(folder, described, recorder, asked, tell)
            checkpoint = keeper.latest()
        if keeper is not None and checkpoint is not None and keeper.ended(checkpoint):
            keeper.load_best(checkpoint, model)
        else:
            callbacks: list[TrainerCallback] = [recorder]
            if settings.patience is not None:
                callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings.patience))
            sharded = settings.distributed == "fsdp2"
            trained = copy_to_shard(model) if sharded else model
            arguments = training_arguments(
                settings, seed, device, folder, sharding_arguments(model) if sharded else {}
            )
            trainer = NextTokenTrainer(
                trained, arguments, train, settings, precision, evaluate, callbacks, keeper
            )
            trainer.run(checkpoint)
            if sharded:
                take_weights(model, trained, device)
            distribution.barrier()  # until then the others may read rank 0's working checkpoints
            # The Trainer switches the cache off, and a saved model would keep that.
            model.config.use_cache = use_cache
    losses = [epoch.validation_loss for epoch in recorder.epochs]
    return NextTokenOutcome(recorder.epochs, best_epoch=losses.index(min(losses)) + 1)


def _shapes(model: PreTrainedModel, train: Dataset[dict[str, Tensor]]) -> list[Any]:
    """What of the model and its data tells one training from another."""
    named = {name: [*p.shape, p.requires_grad] for name, p in model.named_parameters()}
    return [named, len(train)]  # type: ignore[arg-type]  # datasets with a length
