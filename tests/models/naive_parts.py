"""Parts of the naive forms, written out for one vector at a time and without torch's layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear(module: torch.nn.Module, x: Tensor) -> Tensor:
    return module.weight @ x + module.bias


def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    """Layer norm with an epsilon of 1e-5."""
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * module.weight + module.bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def turned(x_E: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Rotary positions on pairs of channels (e, e + E/2)."""
    out, half = x_E.clone(), len(x_E) // 2
    for e in range(half):
        angle = position * theta ** (-2 * e / len(x_E))
        out[e] = x_E[e] * math.cos(angle) - x_E[e + half] * math.sin(angle)
        out[e + half] = x_E[e + half] * math.cos(angle) + x_E[e] * math.sin(angle)
    return out


def attended(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int) -> Tensor:
    """What one query reads, head by head."""
    size = len(query) // heads
    mixed = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(size)
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        mixed.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)))
    return torch.cat(mixed)
