"""The loss block by block over tokens: gradients are had with it, and logits thrown away.

For a block of R tokens, with p the softmax of their logits and y their targets as ones among zeros::

    loss += sum log(sum exp(logits)) - logits[target]
    d hidden = (p - y) W        d W += (p - y)^T hidden        d b += sum (p - y)

so that one pass gives all that the backward pass only has to scale. Ideas: fused linear
cross-entropy (Liger kernels, Hsu et al., arXiv:2410.10989) and cut cross-entropy (Wijmans et al.,
arXiv:2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of a block: few enough to stay small beside the weight, enough to repay reading the weight.
BLOCK = 2**24


def linear_cross_entropy_blocks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """As `linear_cross_entropy`, with products in `dtype` and no target to ignore."""
    return _Blocks.apply(hidden_ND, weight_VD, bias_V, targets_N, dtype)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        sums = torch.promote_types(dtype, torch.float32)
        own_VD = weight_VD.to(dtype)
        own_V = None if bias_V is None else bias_V.to(dtype)
        loss = hidden_ND.new_zeros((), dtype=sums)
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=sums) if wants_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=sums) if wants_bias else None
        size = max(1, BLOCK // len(weight_VD))
        for start in range(0, len(hidden_ND), size):
            rows = slice(start, start + size)
            own_RD, targets_R1 = hidden_ND[rows].to(dtype), targets_N[rows, None]
            logits_RV = F.linear(own_RD, own_VD, own_V).to(sums)
            log_RV = torch.log_softmax(logits_RV, -1)
            loss -= log_RV.gather(1, targets_R1).sum()
            if not any(ctx.needs_input_grad):
                continue
            d_RV = log_RV.exp_()
            d_RV.scatter_add_(1, targets_R1, torch.full_like(targets_R1, -1, dtype=sums))
            if d_bias_V is not None:
                d_bias_V += d_RV.sum(0)
            d_RV = d_RV.to(dtype)
            if d_hidden_ND is not None:
                d_hidden_ND[rows] = d_RV @ own_VD
            if d_weight_VD is not None:
                d_weight_VD += d_RV.t() @ own_RD
        ctx.gradients = d_hidden_ND, d_weight_VD, d_bias_V
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if each is None else each * scale for each in ctx.gradients)
        return (*scaled, None, None)
