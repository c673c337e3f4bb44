"""The nonlinear context recurrence, one public op.

For every token t and every context layer l (DESIGN 1.2)::

    c'  = LN_l(c + GELU(W_l c + p_l[t]))        p_l[t] = W_e,l e_t + b_l, projected beforehand
    c_t = the last layer's c';  layer 0 starts from c_{t-1}, layer l from layer l-1 at the same t

Shape suffixes: B batch, T tokens, L context layers, C context width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "eager"]


def context_step(
    context_NC: Tensor,
    projected_NC: Tensor,
    weight_CC: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """One context layer applied to N independent contexts.

    Args:
        context_NC: the contexts that go in.
        projected_NC: the tokens' part, ``W_e e + b``.
        weight_CC: the recurrent weight, ``[out, in]`` as in ``nn.Linear``.
        norm_weight_C: scale of the layer norm.
        norm_bias_C: shift of the layer norm.
        eps: of the layer norm.

    Returns:
        The new contexts, ``[N, C]``.
    """
    update_NC = F.gelu(torch.addmm(projected_NC, context_NC, weight_CC.t()))
    return F.layer_norm(
        context_NC + update_NC, norm_weight_C.shape, norm_weight_C, norm_bias_C, eps
    )


def context_scan(
    projected_BTC: Sequence[Tensor],
    weights_CC: Sequence[Tensor],
    norm_weights_C: Sequence[Tensor],
    norm_biases_C: Sequence[Tensor],
    initial_BC: Tensor,
    *,
    mask_BT: Tensor | None = None,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> Tensor:
    """Run the recurrence over T tokens; differentiable in every tensor.

    Args:
        projected_BTC: per layer, the tokens' part ``W_e e_t + b``.
        weights_CC: per layer, the recurrent weight.
        norm_weights_C: per layer, scale of the layer norm.
        norm_biases_C: per layer, shift of the layer norm.
        initial_BC: the context before the first token.
        mask_BT: False where a token is padding: the context passes it unchanged.
        eps: of the layer norms.
        backend: ``eager`` is the plain loop over tokens; ``auto`` picks the fastest that fits.

    Returns:
        Every layer's output at every token, ``[L, B, T, C]``; the recurrent context is the last
        layer's.

    Raises:
        ValueError: unknown backend, no layers, or no tokens.
    """
    if backend not in ("auto", "eager"):
        raise ValueError(f"unknown context_scan backend {backend!r} (known: auto, eager)")
    if not projected_BTC or projected_BTC[0].shape[1] == 0:
        raise ValueError("context_scan needs at least one layer and one token")
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
