"""The context recurrence as a plain loop over tokens and layers: the truth for the faster forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def context_step(
    context_NC: Tensor,
    projected_NC: Tensor,
    weight_CC: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """One context layer applied to N independent contexts: the new contexts, ``[N, C]``.

    `projected_NC` is the tokens' part, ``W_e e + b``; the recurrent weight is ``[out, in]``, as in
    ``nn.Linear``.
    """
    update_NC = F.gelu(torch.addmm(projected_NC, context_NC, weight_CC.t()))
    return F.layer_norm(
        context_NC + update_NC, norm_weight_C.shape, norm_weight_C, norm_bias_C, eps
    )


def context_scan_naive(
    projected_BTC: Sequence[Tensor],
    weights_CC: Sequence[Tensor],
    norm_weights_C: Sequence[Tensor],
    norm_biases_C: Sequence[Tensor],
    initial_BC: Tensor,
    *,
    mask_BT: Tensor | None,
    eps: float,
) -> Tensor:
    """As `context_scan`, on any device; differentiable in every tensor."""
    steps = list(zip(*(p_BTC.unbind(1) for p_BTC in projected_BTC), strict=True))
    kept = [None] * len(steps) if mask_BT is None else mask_BT.unsqueeze(-1).unbind(1)
    layers = list(zip(weights_CC, norm_weights_C, norm_biases_C, strict=True))
    outputs: list[list[Tensor]] = [[] for _ in layers]
    state_BC = initial_BC
    for projected_at_t, keep_B1 in zip(steps, kept, strict=True):
        context_BC = state_BC
        for outputs_l, p_BC, (w_CC, g_C, b_C) in zip(outputs, projected_at_t, layers, strict=True):
            context_BC = context_step(context_BC, p_BC, w_CC, g_C, b_C, eps)
            if keep_B1 is not None:
                context_BC = torch.where(keep_B1, context_BC, state_BC)
            outputs_l.append(context_BC)
        state_BC = context_BC
    return torch.stack([torch.stack(outputs_l, dim=1) for outputs_l in outputs])
