"""Phase 2: next-token training in the documents' protocols, from the batch to the best weights.

Targets come shifted from the data, so that all T positions of a window are trained and
`target_offset` is a matter of data. A loss is the sum over all targets of a batch divided by their
number, however the batch is cut into micro-batches and shared among processes; so one process and
several see the same batches and have the same loss curve, up to rounding.

accelerate brings several processes (DDP, and FSDP2 where `accelerate launch` is configured so);
`phase_two_state` is what makes training resume.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast,
    send_to_device,
    set_seed,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import PreTrainedModel

from contextlm.base import distribution
from contextlm.base.errors import InputError, NotFiniteError, RunError
from contextlm.base.interrupts import deferred
from contextlm.data.windows import IGNORED, model_inputs
from contextlm.models.head import split_head
from contextlm.ops.linear_cross_entropy import linear_cross_entropy
from contextlm.recipe.settings import TrainingSettings
from contextlm.training.checkpoints import Tell
from contextlm.training.host_memory import freed_memory_kept
from contextlm.training.optimisation import build_optimizer, build_schedule, steps_per_epoch
from contextlm.training.phase_two_state import (
    Epoch,
    PhaseTwo,
    PhaseTwoState,
    best_of,
    load_weights,
    trained_weights,
)

Batch = dict[str, Tensor]
# Returns the validation loss in nats per token and the accuracy in 0..1, as "loss" and "accuracy".
Evaluate = Callable[[nn.Module], Mapping[str, float]]
# Makes of a model a module that is called as `NextTokenLoss` is; `whole` as there.
MakeLoss = Callable[..., nn.Module]

_DDP = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}

# What FSDP2 must not shard by itself: models also call it otherwise than by its forward, which is
# where sharding gathers the weights.
_NOT_SHARDED_ALONE = {"ContextBlock", "GatedContextBlock"}


class Watcher(Protocol):
    """Told about steps and epochs as they happen; when training resumes, about earlier ones too."""

    def on_epoch_begin(self, number: int, epochs: int, steps: int) -> None:
        """Epoch `number` of at most `epochs` begins, each of `steps` optimiser steps."""

    def on_step(self, step: int, loss: float, learning_rate: float, tokens: int) -> None:
        """Optimiser step `step` is done, counted from 1 over all epochs; its batch's loss.

        `tokens` are the targets trained on up to here, repeats counted.
        """

    def on_epoch_end(self, epoch: Epoch, best: bool) -> None:
        """An epoch was trained and evaluated."""


def train_next_token(
    model: PreTrainedModel,
    train: Dataset[Batch],
    settings: TrainingSettings,
    evaluate: Evaluate,
    *,
    seed: int,
    device: torch.device,
    precision: str,
    folder: Path,
    watcher: Watcher,
    tell: Tell,
    trunk: Path | None = None,
    make_loss: MakeLoss | None = None,
) -> PhaseTwo:
    """Train until the stopping rule or the last epoch, then restore the best epoch's weights.

    Trainings with schedule wsd that differ only in how far they go share a `trunk`: each leaves its
    state there before its rate falls, and goes on from what a shorter one has left. It ends as it
    would alone, to the bit on a CPU.

    With several processes all call this with the same arguments; each batch is shared out among
    them, and all end with the same weights. Only one process keeps checkpoints.

    Args:
        model: on `device`; trained in place, only parameters that require gradients.
        train: items ``{"input_ids": [T], "labels": [T]}``, labels shifted already; whatever else
            they hold is passed to the model.
        seed: of shuffling and dropout.
        precision: ``float32`` or ``bfloat16`` (autocast around the loss, not the evaluation).
        folder: for this training's checkpoints alone; training resumes from the newest whole one
            in there. They stay: the caller removes them.
        tell: takes a line about checkpoints.
        trunk: for the states that such trainings share, all of one model, seed and order of
            windows; they have one epoch, and several processes share nothing.
        make_loss: what is minimised; by default `NextTokenLoss`.

    Raises:
        RunError: the loss is not finite (`NotFiniteError`), or a checkpoint cannot be written; the
            message names the step or the file, a note the last good checkpoint.
        InputError: a parameter group matches nothing, or the processes cannot train like this.
        KeyboardInterrupt: the process was told to stop, and has written a checkpoint.
    """
    check_processes(settings)
    several = distribution.world() > 1
    steps = steps_per_epoch(settings, len(train))  # type: ignore[arg-type]  # ours have a length
    with nullcontext() if several else deferred() as asked, freed_memory_kept():
        stepper = _Stepper(model, settings, steps, precision, device, seed, make_loss)
        state = None if asked is None else PhaseTwoState(folder, device, asked, tell)
        branch = settings.stable_until(steps)
        done = PhaseTwo()
        if state is not None:
            done = state.restore(stepper.model, stepper.optimizer, trunk, branch)
        best_weights: Mapping[str, Tensor] = {}  # of several processes, on rank 0

        def begin(number: int) -> int:
            """Begin an epoch; how many of its steps are done, which the watcher is told again."""
            watcher.on_epoch_begin(number, settings.epochs, steps)
            known = range((number - 1) * steps, min(number * steps, len(done.losses)))
            for before in known:
                tell_step(before + 1)
            return len(known)

        def tell_step(step: int) -> None:
            loss, tokens = done.losses[step - 1], done.tokens[step - 1]
            watcher.on_step(step, loss, stepper.learning_rate(step), tokens)

        try:
            for number, epoch in enumerate(done.epochs, 1):
                begin(number)
                watcher.on_epoch_end(epoch, best_of(done.epochs[:number]) is epoch)
            while not _is_over(done, settings):
                number = len(done.epochs) + 1
                taken = begin(number)
                started = time.perf_counter() - done.seconds
                micro_batches = _micro_batches(train, settings, seed, number, taken, device)
                stepper.parallel.train()
                for step in range((number - 1) * steps + taken + 1, number * steps + 1):
                    batch = list(islice(micro_batches, settings.accumulation))
                    loss, targets = stepper.take(step, batch)
                    done.losses.append(loss)
                    done.tokens.append(done.trained_tokens + targets)
                    tell_step(step)
                    if state is None or step == number * steps:
                        continue
                    done.seconds = time.perf_counter() - started
                    if trunk is not None and step == branch:
                        state.leave(trunk, stepper.model, stepper.optimizer, done)
                    if state.due():
                        state.save(stepper.model, stepper.optimizer, done)
                done.seconds, seconds = 0.0, time.perf_counter() - started

                measured = evaluate(stepper.model)
                if not math.isfinite(measured["loss"]):
                    raise NotFiniteError(
                        f"the validation loss is {measured['loss']} after step {number * steps}"
                    )
                epoch = Epoch(
                    number=number,
                    step=number * steps,
                    tokens=done.trained_tokens,
                    train_loss=fmean(done.losses[-steps:]),
                    validation_loss=measured["loss"],
                    accuracy=measured["accuracy"],
                    learning_rate=stepper.learning_rate(number * steps),
                    seconds=seconds,
                )
                done.epochs.append(epoch)
                is_best = best_of(done.epochs) is epoch
                watcher.on_epoch_end(epoch, is_best)
                if state is not None:
                    state.save(stepper.model, stepper.optimizer, done)
                elif is_best:
                    weights = trained_weights(stepper.model)
                    if distribution.is_main():
                        best_weights = {k: v.to("cpu", copy=True) for k, v in weights.items()}
        except RunError as error:
            if state is not None:
                error.add_note(state.checkpoints.last())
            raise

        if state is not None and best_of(done.epochs) is not done.epochs[-1]:
            best_weights = state.checkpoints.tensors(best_of(done.epochs).step, "weights")
        load_weights(model.to(device), best_weights)
        if several:
            for parameter in model.parameters():
                broadcast(parameter.data)
    return done


def _is_over(done: PhaseTwo, settings: TrainingSettings) -> bool:
    """Whether the last epoch is done, or the best is `patience` epochs ago."""
    epochs = len(done.epochs)
    patience = settings.patience or settings.epochs
    return epochs > 0 and (epochs == settings.epochs or epochs - done.best_epoch >= patience)


def seconds_a_step(
    model: PreTrainedModel,
    train: Dataset[Batch],
    settings: TrainingSettings,
    *,
    device: torch.device,
    precision: str,
    make_loss: MakeLoss | None = None,
) -> float:
    """Seconds of an optimiser step, measured on a few, which train the model.

    Each has twice as many windows as the one before, up to a whole micro-batch; when one has taken
    half a second, a batch is taken to need as much more time as it has more windows.
    """
    with freed_memory_kept():
        stepper = _Stepper(model, settings, 1, precision, device, 0, make_loss)
        stepper.parallel.train()
        most, windows = settings.batch_size // settings.accumulation, 1

        def seconds() -> float:
            items = [train[index % len(train)] for index in range(windows)]  # type: ignore[arg-type]
            started = time.perf_counter()
            stepper.take(1, [default_collate(items)])
            if device.type != "cpu":
                torch.get_device_module(device).synchronize()
            return time.perf_counter() - started

        seconds()  # warms up
        while (took := seconds()) < 0.5 and windows < most:
            windows = min(2 * windows, most)
            if windows == most:
                seconds()
        return min(took, seconds()) * settings.batch_size / windows


def check_processes(settings: TrainingSettings, name: str = "training") -> None:
    """Check that the processes at hand can share each micro-batch equally.

    Raises:
        InputError: they cannot; `name` is that of the settings.
    """
    if (settings.batch_size // settings.accumulation) % distribution.world():
        parts = f" in {settings.accumulation} micro-batches" if settings.accumulation > 1 else ""
        raise InputError(
            f"{name}.batch_size {settings.batch_size}{parts} cannot be shared equally by "
            f"{distribution.world()} processes"
        )


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor, targets: float) -> Tensor:
    """Cross-entropy against targets that are shifted already, in nats per token: a scalar.

    The sum over a micro-batch's targets is divided by the number of `targets` in the whole batch.
    """
    logits_NV = logits_BTV.flatten(0, 1).float()
    summed = F.cross_entropy(logits_NV, labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return summed / targets


class NextTokenLoss(nn.Module):
    """A model's `next_token_loss`, whose logits are never held all at once where that can be.

    `whole` asks for all logits.
    """

    def __init__(self, model: PreTrainedModel, *, whole: bool = False):
        super().__init__()
        self.model = model
        self._parts = None if whole else split_head(model)

    def forward(self, labels_BT: Tensor, targets: float, **arguments: Any) -> tuple[Tensor, Tensor]:
        """What is minimised, and what is told of it: here the same, but for its gradient.

        Arguments are those of `next_token_loss`, and the model's own in place of logits.
        """
        if self._parts is None:
            logits_BTV = self.model(**arguments, use_cache=False).logits
            loss = next_token_loss(logits_BTV, labels_BT, targets)
            return loss, loss.detach()
        head, hidden_BTD = self._parts.head, self._parts.hidden(**arguments)
        summed = linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            head.weight,
            head.bias,
            labels_BT.flatten(),
            ignore_index=IGNORED,
        )
        loss = summed / targets
        return loss, loss.detach()


class _Stepper:
    """Takes optimiser steps, each on this rank's share of a batch.

    Attributes:
        model: what is trained: `model`, but for FSDP2, which shards a copy.
        parallel: it, or its loss, wrapped for several processes.
        optimizer: of `model`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: TrainingSettings,
        steps: int,
        precision: str,
        device: torch.device,
        seed: int,
        make_loss: MakeLoss | None = None,
    ):
        make_loss = make_loss or NextTokenLoss
        self.accelerator = Accelerator(
            device_placement=False,  # the model is placed already
            mixed_precision="no",  # autocast is around the loss only, see `take`
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if self.accelerator.is_fsdp2:
            self.accelerator.state.fsdp_plugin = _sharding(model)
            # Sharding is for good, and what is trained is to be measured and saved like any other.
            model = copy.deepcopy(model.to("cpu"))
        elif self.accelerator.distributed_type not in _DDP:
            kind = self.accelerator.distributed_type.value
            raise InputError(f"the launcher asks for {kind}: phase 2 works with DDP or FSDP2")
        set_seed(seed, device_specific=True)  # each rank has its own dropout
        self.model = model
        self.optimizer = build_optimizer(model, settings)
        self.precision = precision
        self.device = device
        self.clip = settings.clip
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._share = build_schedule(settings, steps)
        sharded = self.accelerator.is_fsdp2  # a head by itself would not have its weights gathered
        trained = model if sharded else make_loss(model)
        self.parallel, self._optimizer = self.accelerator.prepare(trained, self.optimizer)
        self._loss = make_loss(self.parallel, whole=True) if sharded else self.parallel

    def learning_rate(self, step: int) -> float:
        """The recipe's rate at `step`, counted from 1."""
        return float(self._rates[0] * self._share(step - 1))

    def take(self, step: int, micro_batches: Sequence[Batch]) -> tuple[float, int]:
        """Take one step; the mean loss over all targets of all ranks' micro-batches, and how many.

        Raises:
            NotFiniteError: the loss is not finite; the weights are as they were.
        """
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._share(step - 1)
        own = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
        (targets,) = distribution.totals([own])
        summed = torch.zeros(2, device=self.device)
        for batch in micro_batches[:-1]:
            with self.accelerator.no_sync(self.parallel):
                summed += self._backward(batch, targets)
        summed += self._backward(micro_batches[-1], targets)
        loss, minimised = distribution.totals(summed.tolist())
        if not math.isfinite(minimised):
            raise NotFiniteError(
                f"the training loss is {minimised} at step {step}: "
                "lower training.learning_rate or set training.clip"
            )
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self.parallel.parameters(), self.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss, int(targets)

    def _backward(self, batch: Batch, targets: float) -> Tensor:
        """Add a micro-batch's gradients; its part of what is told, and of what is minimised."""
        arguments, labels_BT = model_inputs(send_to_device(batch, self.device, non_blocking=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss, told = self._loss(labels_BT, targets, **arguments)
        # Ranks' gradients are averaged, and are to be summed.
        self.accelerator.backward(loss * distribution.world())
        return torch.stack((told, loss.detach()))


def _micro_batches(
    windows: Dataset[Batch],
    settings: TrainingSettings,
    seed: int,
    epoch: int,
    skipped: int,
    device: torch.device,
) -> Iterator[Batch]:
    """This rank's share of every micro-batch of an epoch, but for those of the skipped steps.

    A rank that gets nothing of a micro-batch takes its first window without targets, because all
    ranks must take part in every step.
    """
    count = len(windows)  # type: ignore[arg-type]  # ours have a length
    order: Sequence[int] = range(count)
    if settings.shuffle:
        generator = torch.Generator().manual_seed(seed + epoch - 1)
        order = torch.randperm(count, generator=generator).tolist()
    size = settings.batch_size // settings.accumulation
    stop = count - count % settings.batch_size if settings.drop_last else count
    wholes = [order[i : i + size] for i in range(skipped * settings.batch_size, stop, size)]
    shares = [_share(whole) for whole in wholes]
    loader = DataLoader(
        windows,
        batch_sampler=[
            list(share or whole[:1]) for share, whole in zip(shares, wholes, strict=True)
        ],
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # it draws a number that dropout's generator is to keep
    )
    return (
        batch if share else {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
        for share, batch in zip(shares, iter(loader), strict=True)
    )


def _share(whole: Sequence[int]) -> Sequence[int]:
    """This rank's part of a micro-batch; an incomplete one is shared as equally as can be."""
    each, more = divmod(len(whole), distribution.world())
    start = distribution.rank() * each + min(distribution.rank(), more)
    return whole[start : start + each + (distribution.rank() < more)]


def _sharding(model: PreTrainedModel) -> FullyShardedDataParallelPlugin:
    """FSDP2 as the launcher configures it; unless it names layers, by those that are not split."""
    plugin = FullyShardedDataParallelPlugin()
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        alone = set(model._no_split_modules or ()) & present - _NOT_SHARDED_ALONE
        plugin.transformer_cls_names_to_wrap = sorted(alone)
    return plugin
