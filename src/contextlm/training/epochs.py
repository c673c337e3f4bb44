"""Epochs as they happen: what is recorded of each, and who is told."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from contextlm.base.errors import NotFiniteError


@dataclass(frozen=True)
class Epoch:
    """One finished epoch. Losses in nats per token; `seconds` without the evaluation."""

    number: int
    train_loss: float
    validation_loss: float
    accuracy: float
    learning_rate: float
    seconds: float


class Watcher(Protocol):
    """Told about the steps and epochs as they happen."""

    def on_epoch_begin(self, number: int, steps: int) -> None:
        """An epoch of `steps` optimiser steps begins."""

    def on_step(self) -> None:
        """One optimiser step is done."""

    def on_epoch_end(self, epoch: Epoch, best: bool) -> None:
        """An epoch was trained and evaluated."""


class EpochRecorder(TrainerCallback):
    """Collects and times epochs; stops at a validation loss that is not finite."""

    def __init__(self, watcher: Watcher):
        self.watcher = watcher
        self.epochs: list[Epoch] = []
        self._started = 0.0
        self._earlier = 0.0  # seconds of the epoch before its process was killed
        self._seconds = 0.0
        self._train_loss = math.nan
        self._learning_rate = 0.0

    def restore(self, epochs: list[Epoch], seconds: float) -> None:
        """Go on after `epochs`, and after `seconds` of the one that follows them."""
        for epoch in epochs:
            self._add(epoch)
        self._earlier = seconds

    def seconds_in_epoch(self) -> float:
        """Seconds since the epoch that is at work began."""
        return time.perf_counter() - self._started

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = max(1, state.max_steps // int(args.num_train_epochs))
        self.watcher.on_epoch_begin(len(self.epochs) + 1, steps)
        for _ in range(state.global_step - len(self.epochs) * steps):  # where it goes on inside one
            self.watcher.on_step()
        self._started = time.perf_counter() - self._earlier
        self._earlier = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watcher.on_step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds = time.perf_counter() - self._started

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self._train_loss = logs["loss"]
            self._learning_rate = logs["learning_rate"]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = kwargs["metrics"]
        if not math.isfinite(metrics["eval_loss"]):
            raise NotFiniteError(
                f"the validation loss is {metrics['eval_loss']} after step {state.global_step}"
            )
        self._add(
            Epoch(
                number=len(self.epochs) + 1,
                train_loss=self._train_loss,
                validation_loss=metrics["eval_loss"],
                accuracy=metrics["eval_accuracy"],
                learning_rate=self._learning_rate,
                seconds=self._seconds,
            )
        )

    def _add(self, epoch: Epoch) -> None:
        best = all(epoch.validation_loss < earlier.validation_loss for earlier in self.epochs)
        self.epochs.append(epoch)
        self.watcher.on_epoch_end(epoch, best)
