"""The gated delta rule as one compiled loop over time, for a CPU, with its gradient.

As `selective_state.numba`: a head's state stays in the first levels of cache, and the gradient goes
backwards through chunks of tokens, whose states are computed again from the one kept before each.

J is a number of chunks here, K a token of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contextlm.ops.backends import compiled
from contextlm.ops.rows import over_rows

# Tokens of a chunk, N P numbers of state each in the gradient.
CHUNK = 16

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", inlined=True)
def _advance(state_NP, k_N, v_P, decay_N, beta, error_P):  # type: ignore[no-untyped-def]
    """Move the state on by a token, in place, and write down the error."""
    for p in range(v_P.shape[0]):
        error_P[p] = v_P[p]
    for n in range(k_N.shape[0]):
        k, decay, row_P = k_N[n], decay_N[n], state_NP[n]
        for p in range(v_P.shape[0]):
            value = decay * row_P[p]
            row_P[p] = value
            error_P[p] -= k * value
    for n in range(k_N.shape[0]):
        written, row_P = beta * k_N[n], state_NP[n]
        for p in range(v_P.shape[0]):
            row_P[p] += written * error_P[p]


@compiled("contract")
def _forward(  # type: ignore[no-untyped-def]
    q_BTHN, k_BTHN, v_BTHP, decay_BTHN, beta_BTH, y_BTHP, state_BHNP, kept_BJHNP
):
    """Fills y, moves the state on, and keeps it before each chunk where there is room for that."""
    batch, tokens, heads, width = v_BTHP.shape
    numbers, keeps = k_BTHN.shape[3], kept_BJHNP.shape[1] > 0
    error_P = np.empty(width, v_BTHP.dtype)
    for b in range(batch):
        for h in range(heads):
            state_NP = state_BHNP[b, h]
            for t in range(tokens):
                if keeps and t % CHUNK == 0:
                    kept_BJHNP[b, t // CHUNK, h] = state_NP
                k_N, v_P, decay_N = k_BTHN[b, t, h], v_BTHP[b, t, h], decay_BTHN[b, t, h]
                _advance(state_NP, k_N, v_P, decay_N, beta_BTH[b, t, h], error_P)
                y_P = y_BTHP[b, t, h]
                y_P[:] = 0
                for n in range(numbers):
                    read, row_P = q_BTHN[b, t, h, n], state_NP[n]
                    for p in range(width):
                        y_P[p] += read * row_P[p]


@compiled("contract", "reassoc")
def _backward(  # type: ignore[no-untyped-def]
    q_BTHN, k_BTHN, v_BTHP, decay_BTHN, beta_BTH, kept_BJHNP, dy_BTHP,
    dq_BTHN, dk_BTHN, dv_BTHP, ddecay_BTHN, dbeta_BTH, dstate_BHNP,
):  # fmt: skip
    """Fills the gradients; `dstate` comes as the final state's and leaves as the initial one's."""
    batch, tokens, heads, width = v_BTHP.shape
    numbers = k_BTHN.shape[3]
    states_KNP = np.empty((CHUNK + 1, numbers, width), v_BTHP.dtype)
    error_KP = np.empty((CHUNK, width), v_BTHP.dtype)
    zero = v_BTHP.dtype.type(0)
    for b in range(batch):
        for h in range(heads):
            dstate_NP = dstate_BHNP[b, h]
            for j in range(kept_BJHNP.shape[1] - 1, -1, -1):
                first, last = j * CHUNK, min((j + 1) * CHUNK, tokens)
                states_KNP[0] = kept_BJHNP[b, j, h]
                for t in range(first, last):
                    k_N, v_P, decay_N = k_BTHN[b, t, h], v_BTHP[b, t, h], decay_BTHN[b, t, h]
                    state_NP, beta = states_KNP[t - first + 1], beta_BTH[b, t, h]
                    state_NP[:] = states_KNP[t - first]
                    _advance(state_NP, k_N, v_P, decay_N, beta, error_KP[t - first])
                for t in range(last - 1, first - 1, -1):
                    dy_P, derror_P, error_P = (
                        dy_BTHP[b, t, h],
                        dv_BTHP[b, t, h],
                        error_KP[t - first],
                    )
                    beta, dbeta = beta_BTH[b, t, h], zero
                    derror_P[:] = 0
                    for n in range(numbers):
                        read, k, after_P = q_BTHN[b, t, h, n], k_BTHN[b, t, h, n], (
                            states_KNP[t - first + 1, n]
                        )  # fmt: skip
                        d_P, written = dstate_NP[n], beta * k
                        dread, dwritten = zero, zero
                        for p in range(width):
                            d = d_P[p] + read * dy_P[p]
                            d_P[p] = d
                            dread += after_P[p] * dy_P[p]
                            dwritten += d * error_P[p]
                            derror_P[p] += written * d
                        dq_BTHN[b, t, h, n] = dread
                        dk_BTHN[b, t, h, n] = beta * dwritten
                        dbeta += k * dwritten
                    dbeta_BTH[b, t, h] = dbeta
                    for n in range(numbers):
                        k, decay = k_BTHN[b, t, h, n], decay_BTHN[b, t, h, n]
                        d_P, before_P = dstate_NP[n], states_KNP[t - first, n]
                        dk, ddecay = zero, zero
                        for p in range(width):
                            d = d_P[p] - k * derror_P[p]
                            dk += before_P[p] * derror_P[p]
                            ddecay += d * before_P[p]
                            d_P[p] = decay * d
                        dk_BTHN[b, t, h, n] -= decay * dk
                        ddecay_BTHN[b, t, h, n] = ddecay


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        *along, initial_BHNP = (tensor.contiguous() for tensor in given)
        outputs_BTHP, state_BHNP = torch.empty_like(along[2]), initial_BHNP.clone()
        batch, tokens = along[0].shape[:2]
        chunks = -(-tokens // CHUNK) if any(ctx.needs_input_grad) else 0
        kept_BJHNP = state_BHNP.new_empty(batch, chunks, *state_BHNP.shape[1:])
        over_rows(_forward, (*along, outputs_BTHP, state_BHNP, kept_BJHNP))
        ctx.save_for_backward(*along, kept_BJHNP)
        return outputs_BTHP, state_BHNP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutputs_BTHP: Tensor, dfinal_BHNP: Tensor) -> tuple[Tensor, ...]:
        *along, kept_BJHNP = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in along]
        dstate_BHNP = dfinal_BHNP.clone(memory_format=torch.contiguous_format)
        given = (*along, kept_BJHNP, doutputs_BTHP.contiguous())
        over_rows(_backward, (*given, *gradients, dstate_BHNP))
        return *gradients, dstate_BHNP


def delta_rule_numba(
    queries_BTHN: Tensor,
    keys_BTHN: Tensor,
    values_BTHP: Tensor,
    logs_BTHX: Tensor,
    rates_BTH: Tensor,
    initial_BHNP: Tensor,
    begins_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, on a CPU, for tensors of float32 or float64; once differentiable."""
    decays_BTHX = logs_BTHX.exp()
    if begins_BT is not None:
        decays_BTHX = decays_BTHX.masked_fill(begins_BT[..., None, None], 0)
    decays_BTHN = decays_BTHX.expand_as(keys_BTHN)
    along = (queries_BTHN, keys_BTHN, values_BTHP, decays_BTHN, rates_BTH)
    outputs_BTHP, final_BHNP = _DeltaRule.apply(*along, initial_BHNP)
    return outputs_BTHP, final_BHNP
