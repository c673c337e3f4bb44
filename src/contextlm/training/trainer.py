"""The Trainer of phase 2, which computes its loss from targets that are shifted already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import SAFE_WEIGHTS_NAME

from contextlm.base import distribution
from contextlm.base.errors import InputError, NotFiniteError, RunError
from contextlm.data.windows import IGNORED, model_inputs
from contextlm.recipe.settings import TrainingSettings
from contextlm.training.optimisation import build_optimizer, build_schedule
from contextlm.training.phase_two_state import CheckpointKeeper
from contextlm.training.sharing import SharedLoader

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


def training_arguments(
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
        restore_callback_states_from_checkpoint=True,
        # One process keeps more of its own (`CheckpointKeeper`).
        save_total_limit=1 if distribution.world() > 1 else None,
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


class NextTokenTrainer(Trainer):
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
        keeper: CheckpointKeeper | None,
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
        self.keeper = keeper
        if keeper is not None:
            keeper.attach(self)

    def run(self, checkpoint: Path | None) -> None:
        """Train from the beginning, or go on from a checkpoint of the keeper's."""
        if self.settings.distributed == "fsdp2" and not self.accelerator.is_fsdp2:
            raise InputError("training.distributed fsdp2: accelerate does not shard here: use ddp")
        if distribution.rank() > 0:
            # Else all would draw the same dropout.
            torch.manual_seed(self.args.seed + distribution.rank())
        try:
            self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except RunError as error:
            if self.keeper is not None:
                error.add_note(self.keeper.last())
            raise

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

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer does it, then completed and sealed."""
        if self.keeper is None:
            super()._save_checkpoint(*args, **kwargs)
            return
        with self.keeper.writing(self.state.global_step):
            super()._save_checkpoint(*args, **kwargs)

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
            raise NotFiniteError(
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
