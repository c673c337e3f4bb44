"""Optimisers, learning-rate schedules and precision as recipes describe them."""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from contextlm.base.errors import InputError
from contextlm.recipe.settings import TrainingSettings


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Adam or AdamW over `parameter_groups`."""
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


def steps_per_epoch(settings: TrainingSettings, windows: int) -> int:
    """Optimiser steps in an epoch of so many windows."""
    whole, rest = divmod(windows, settings.batch_size)
    return whole + (rest > 0 and not settings.drop_last)


def build_schedule(settings: TrainingSettings, steps: int) -> Callable[[int], float]:
    """The share of its learning rate at which a group takes a step, by the number of those before.

    In a warmup of W steps the share rises from 1/W at the first to 1 at the last. Then ``linear``
    and ``cosine`` fall from 1 to 0 (or `minimum_ratio`) at the end of the last epoch; with
    ``schedule_unit: epoch``, which has no warmup, the share changes between epochs only. ``wsd``
    stays at 1 and falls as ``1 - sqrt(x)`` in the last steps (Haegele et al., arXiv:2405.18392).

    The warmup is shorter than all epochs of so many `steps`.
    """
    by_epoch = settings.schedule_unit == "epoch"
    end = settings.epochs * (1 if by_epoch else steps)
    stable = settings.stable_until(end)

    def share(before: int) -> float:
        now = before // steps if by_epoch else before
        if now < settings.warmup:
            return (now + 1) / settings.warmup
        done = (now - settings.warmup) / (end - settings.warmup)
        if settings.schedule == "linear":
            return max(0.0, 1 - done)
        if settings.schedule == "cosine":
            falling = (1 + math.cos(math.pi * done)) / 2
        elif settings.schedule == "wsd":
            falling = 1 - math.sqrt(max(0, now - stable) / (end - stable))
        else:
            return 1.0
        return settings.minimum_ratio + (1 - settings.minimum_ratio) * falling

    return share


def resolve_precision(wanted: str, device: torch.device) -> str:
    """``float32`` or ``bfloat16``; ``auto`` becomes the one that suits the machine.

    The decision rests on what the hardware has, never on a timing, so that two runs on one machine
    agree: bfloat16 where matrix units for it exist (AMX or AVX512-BF16 on a CPU, Ampere or later on
    CUDA), float32 elsewhere.
    """
    if wanted != "auto":
        return wanted
    multiplies_bfloat16 = False
    if device.type == "cuda":
        multiplies_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Older torch cannot tell.
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        multiplies_bfloat16 = has.get("amx_bf16", False) or has.get("avx512_bf16", False)
    return "bfloat16" if multiplies_bfloat16 else "float32"
