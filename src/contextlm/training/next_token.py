"""Phase 2: next-token training on transformers' `Trainer`, in the documents' protocols.

What differs from the Trainer's defaults, and why: targets come shifted from the data, so that all T
positions of a window are trained and `target_offset` is a matter of data; evaluation is a function
that the caller supplies, exact over tokens; optimiser groups and schedules are the recipe's; a
loss that is not finite stops the run instead of being hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import SAFE_WEIGHTS_NAME

from contextlm import distribution
from contextlm.data.windows import IGNORED, model_inputs
from contextlm.errors import InputError, RunError
from contextlm.training.epochs import Epoch, EpochRecorder, Watcher
from contextlm.training.fully_sharded import copy_to_shard, sharding_arguments, take_weights
from contextlm.training.host_memory import freed_memory_kept
from contextlm.training.optimisation import build_optimizer, build_schedule
from contextlm.training.settings import TrainingSettings
from contextlm.training.sharing import SharedLoader, check_processes


@dataclass(frozen=True)
class NextTokenOutcome:
    """How phase 2 ended; the model holds the weights of `best_epoch`."""

    epochs: list[Epoch]
    best_epoch: int


# Returns the validation loss in nats per token and the accuracy in 0..1, as "loss" and "accuracy".
Evaluate = Callable[[nn.Module], Mapping[str, float]]


def next_token_loss(
    outputs: CausalLMOutputWithPast,
    labels_BT: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy against targets that are shifted already.

    Args:
        outputs: with logits ``[B, T, V]``.
        labels_BT: the target of each position; -100 is ignored.
        num_items_in_batch: targets in all micro-batches of this step; None: of this one.

    Returns:
        A scalar in nats per token.
    """
    logits_NV = outputs.logits.flatten(0, 1).float()
    labels_N = labels_BT.flatten()
    total = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")
    return total / (
        (labels_N != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    )


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
        folder: for the working checkpoints.
        watcher: is told about progress.

    Raises:
        RunError: the loss is not finite; the message names the step.
        InputError: a parameter group matches nothing, or the processes cannot train like this.
    """
    check_processes(settings, device)
    sharded = settings.distributed == "fsdp2"
    arguments = _arguments(
        settings, seed, device, folder, sharding_arguments(model) if sharded else {}
    )
    recorder = EpochRecorder(watcher)
    callbacks: list[TrainerCallback] = [recorder]
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings.patience))
    use_cache = model.config.use_cache
    trained = copy_to_shard(model) if sharded else model
    trainer = _NextTokenTrainer(trained, arguments, train, settings, precision, evaluate, callbacks)
    if sharded and not trainer.accelerator.is_fsdp2:
        raise InputError("training.distributed fsdp2: accelerate does not shard here: use ddp")
    if distribution.rank() > 0:
        torch.manual_seed(seed + distribution.rank())  # else all would draw the same dropout
    with freed_memory_kept():
        trainer.train()
    if sharded:
        take_weights(model, trained, device)
    distribution.barrier()  # until then the others may read rank 0's working checkpoints
    # The Trainer switches the cache off in the configuration, and a saved model would keep that.
    model.config.use_cache = use_cache
    losses = [epoch.validation_loss for epoch in recorder.epochs]
    return NextTokenOutcome(recorder.epochs, best_epoch=losses.index(min(losses)) + 1)


def _arguments(
    settings: TrainingSettings,
    seed: int,
    device: torch.device,
    folder: Path,
    sharding: Mapping[str, Any],
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size
        // settings.accumulation
        // distribution.world(),
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.clip or 0.0,
        train_sampling_strategy="random" if settings.shuffle else "sequential",
        dataloader_drop_last=settings.drop_last,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        **sharding,
    )
    # One process trains on one device; several GPUs are used by several processes, never by
    # DataParallel inside one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _NextTokenTrainer(Trainer):
    """Trainer with the recipe's optimiser and schedule, and evaluation by the caller's function."""

    optimizer: Any
    lr_scheduler: LRScheduler | None
    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        train: Dataset[dict[str, Tensor]],
        settings: TrainingSettings,
        precision: str,
        evaluate: Evaluate,
        callbacks: list[TrainerCallback],
    ):
        super().__init__(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=train,  # never read: `evaluate` below has its own data
            compute_loss_func=next_token_loss,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # The loss is computed here, so the model need not be handed the count of targets.
        self.model_accepts_loss_kwargs = False
        # Targets are shifted in the data, so the first of a window counts like the others.
        self._loss_shifts_labels = False
        self.settings = settings
        self.precision = precision
        self.evaluate_model = evaluate

    def get_train_dataloader(self) -> Any:
        """One process's batches, or this rank's share of each."""
        if distribution.world() == 1:
            return super().get_train_dataloader()
        return SharedLoader(
            self.train_dataset,
            self.settings,
            self.args.seed,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager[Any]:
        """Autocast around the training loss only.

        Asking accelerate for it would wrap `model.forward` for good, and evaluation with it.
        """
        return torch.autocast(
            self.args.device.type,
            torch.bfloat16,
            enabled=self.precision == "bfloat16",
            cache_enabled=cache_enabled,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimiser and parameter groups."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model if model is None else model, self.settings)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The recipe's schedule."""
        if self.lr_scheduler is None:
            steps_per_epoch = num_training_steps // self.settings.epochs
            self.lr_scheduler = build_schedule(
                optimizer or self.optimizer, self.settings, steps_per_epoch
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer does it; a sharded model's folder is there when it looks for the best."""
        if self.is_fsdp_enabled:
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Write the weights under the names that the model itself uses.

        `save_pretrained` gives some an older name (GPT-NeoX's head becomes ``embed_out``), but the
        Trainer reads its checkpoints back without translating, and would leave those weights as the
        last epoch left them.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(self.model, str(folder / SAFE_WEIGHTS_NAME))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer does it, without logits where a window has no targets."""
        arguments, labels_BT = model_inputs(inputs)
        return super().compute_loss(model, {**arguments, "labels": labels_BT}, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; a loss that is not finite ends the run before it spoils the weights."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise RunError(
                f"the training loss is {loss.item()} at step {self.state.global_step + 1}: "
                "lower training.learning_rate or set training.clip"
            )
        return loss

    def evaluate(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Call the caller's function and tell the callbacks (early stopping, best weights)."""
        measured = self.evaluate_model(self.model)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
