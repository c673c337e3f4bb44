"""Optimisers, parameter groups and learning-rate schedules as recipes describe them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from contextlm.base.errors import InputError
from contextlm.recipe.settings import TrainingSettings


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Adam or AdamW over the trainable parameters, in the recipe's groups.

    Raises:
        InputError: a group's pattern matches no trainable parameter.
    """
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    groups = parameter_groups(model, settings)
    return kind(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def parameter_groups(model: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """The trainable parameters by learning rate and weight decay, as torch's optimisers take them.

    A parameter belongs to the first group whose pattern matches its name. Plain Adam takes no
    weight decay, as in the documents.

    Raises:
        InputError: a group's pattern matches no trainable parameter.
    """
    buckets: dict[tuple[float, float], list[nn.Parameter]] = {}
    unused = {group.match for group in settings.parameter_groups}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, decay = settings.learning_rate, settings.decay_rate()
        group = next((g for g in settings.parameter_groups if fnmatchcase(name, g.match)), None)
        if settings.decay == "matrices" and parameter.dim() < 2:
            decay = 0.0
        if group is not None:
            unused.discard(group.match)
            rate = rate if group.learning_rate is None else group.learning_rate
            decay = decay if group.weight_decay is None else group.weight_decay
        buckets.setdefault((rate, decay), []).append(parameter)
    if unused:
        raise InputError(
            f"training.parameter_groups: {sorted(unused)[0]!r} matches no trainable parameter"
        )
    return [
        {
            "params": parameters,
            "lr": rate,
            "weight_decay": decay if settings.optimizer == "adamw" else 0.0,
        }
        # The recipe's own rate first: it is the one that a history shows.
        for (rate, decay), parameters in sorted(
            buckets.items(), key=lambda item: item[0][0] != settings.learning_rate
        )
    ]


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings, steps_per_epoch: int
) -> LRScheduler:
    """The learning-rate schedule, stepped once per optimiser step.

    With ``schedule_unit: epoch`` the rate changes between epochs only: the schedule is built over
    epochs and read at the number of finished epochs.

    Args:
        optimizer: whose rates to drive.
        settings: of phase 2.
        steps_per_epoch: optimiser steps in one epoch.
    """
    by_epoch = settings.schedule_unit == "epoch"
    total = settings.epochs if by_epoch else settings.epochs * steps_per_epoch
    name: str = settings.schedule
    options = None
    if name == "constant":
        name = "constant_with_warmup"
    elif name == "cosine" and settings.minimum_ratio:
        name, options = "cosine_with_min_lr", {"min_lr_rate": settings.minimum_ratio}
    schedule = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=settings.warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=options,
    )
    if not by_epoch:
        return schedule
    assert isinstance(schedule, LambdaLR)
    factor = schedule.lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: factor(step // steps_per_epoch))
