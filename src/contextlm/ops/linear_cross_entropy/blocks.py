"""The loss block by block over tokens: gradients are had with it, and logits thrown away.

For a block of R tokens, with p the softmax of their logits and y ones at targets among zeros::

    loss += sum log(sum exp(logits)) - logits[target]
    d hidden = (p - y) W        d W += (p - y)^T hidden        d b += sum (p - y)

so that one pass gives all that the backward pass only has to scale. Ideas: fused linear
cross-entropy (Liger kernels, Hsu et al., arXiv:2410.10989) and cut cross-entropy (Wijmans et al.,
arXiv:2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of a block: so many that arranging the weight for a product, and reading and writing the
# sum of its gradients, which each block does anew, do not count.
BLOCK = 2**26
_FULL = 64  # products of a multiple of so many tokens leave no incomplete tile
_FEWEST_TO_TURN = 2048  # tokens
_ALIGNED = 64  # rows of logits that begin anywhere make a float32 product half as slow again


def linear_cross_entropy_blocks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """As `linear_cross_entropy`, with products in `dtype` and no target to ignore."""
    if not torch.is_grad_enabled():  # which parameters do not know
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
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
        # The gradient's product reads it faster by columns; turning it round has a price.
        turned_DV = own_VD.t()
        if dtype == torch.bfloat16 and len(hidden_ND) >= _FEWEST_TO_TURN:
            turned_DV = turned_DV.contiguous()
        loss = hidden_ND.new_zeros((), dtype=sums)
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=sums) if wants_weight else None
        d_bias_V = weight_VD.new_zeros(len(weight_VD), dtype=sums) if wants_bias else None
        size = max(1, BLOCK // len(weight_VD))
        size -= size % _FULL if size > _FULL else 0
        memory_RV = _rows(min(size, len(hidden_ND)), len(weight_VD), dtype, hidden_ND.device)
        for start in range(0, len(hidden_ND), size):
            rows = slice(start, start + size)
            own_RD, targets_R = hidden_ND[rows].to(dtype), targets_N[rows]
            d_RV = memory_RV[: len(own_RD)]
            if own_V is None:
                torch.mm(own_RD, own_VD.t(), out=d_RV)
            else:
                torch.addmm(own_V, own_RD, own_VD.t(), out=d_RV)
            loss += _softmax_loss(d_RV, targets_R).sum()
            if d_bias_V is not None:
                d_bias_V += d_RV.sum(0, dtype=sums)
            if d_hidden_ND is not None:
                d_hidden_ND[rows] = d_RV @ turned_DV.t()
            if d_weight_VD is not None and dtype == sums:
                d_weight_VD.addmm_(d_RV.t(), own_RD)
            elif d_weight_VD is not None:
                d_weight_VD += d_RV.t() @ own_RD
        ctx.gradients = d_hidden_ND, d_weight_VD, d_bias_V
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if each is None else each * scale for each in ctx.gradients)
        return (*scaled, None, None)


def _rows(rows: int, entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for logits, ``[R, V]``, whose rows begin at multiples of `_ALIGNED` bytes."""
    step = _ALIGNED // dtype.itemsize
    return torch.empty(rows, -(-entries // step) * step, dtype=dtype, device=device)[:, :entries]


def _softmax_loss(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Each row's loss, in float32 at least; turns its logits into their gradient, in place."""
    if logits_RV.device.type == "cpu":
        from contextlm.ops.linear_cross_entropy.numba import softmax_loss_numba

        return softmax_loss_numba(logits_RV, targets_R)
    sums = torch.promote_types(logits_RV.dtype, torch.float32)
    log_RV = torch.log_softmax(logits_RV, -1, dtype=sums)
    losses_R = -log_RV.gather(1, targets_R[:, None]).squeeze(1)
    log_RV.exp_()
    log_RV[torch.arange(len(log_RV), device=log_RV.device), targets_R] -= 1
    logits_RV.copy_(log_RV)
    return losses_R
