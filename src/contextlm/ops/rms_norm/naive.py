"""The gated norm in plain torch: the truth for the fast form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_naive(inputs: Tensor, weight_C: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    """As `rms_norm`; differentiable as often as wanted."""
    kind = torch.promote_types(inputs.dtype, torch.float32)
    inner = inputs.to(kind)
    if gate is not None:
        inner = inner * F.silu(gate.to(kind))
    normed = F.rms_norm(inner, weight_C.shape, weight_C.to(kind), eps)
    return normed.to(inputs.dtype if gate is None else gate.dtype)
