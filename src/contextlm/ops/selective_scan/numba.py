"""The selective scan as one compiled loop over time, for a CPU, with its gradient.

The state of a row, N x D, stays in the processor's first cache, and all channels of a token are
processed together. Of the states one in `_KEPT` tokens is kept; the gradient computes the others
again, with their decays, part by part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contextlm.ops.backends import compiled
from contextlm.ops.rows import over_rows
from contextlm.ops.scalars import exp

_KEPT = 16

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", inlined=True)
def _decays(delta_D, a_ND, decay_ND):  # type: ignore[no-untyped-def]
    """Not where sums may be reordered, which would spoil the exponential's rounding."""
    for n in range(a_ND.shape[0]):
        a_D, decay_D = a_ND[n], decay_ND[n]
        for d in range(a_ND.shape[1]):
            decay_D[d] = exp(delta_D[d] * a_D[d])


@compiled("contract")
def _forward(  # type: ignore[no-untyped-def]
    inputs_BTD, delta_BTD, b_BTN, c_BTN, initial_BND, out_BTD, kept_BKND, final_BND, a_ND
):
    """Fills `out_BTD`; keeps states where there is room for any."""
    batch, tokens, channels = inputs_BTD.shape
    decay_ND, drive_D = a_ND.copy(), np.empty(channels, a_ND.dtype)
    keeps = kept_BKND.shape[1] > 0
    for row in range(batch):
        state_ND = final_BND[row]
        state_ND[:] = initial_BND[row]
        for t in range(tokens):
            if keeps and t % _KEPT == 0:
                kept_BKND[row, t // _KEPT] = state_ND
            u_D, delta_D, out_D = inputs_BTD[row, t], delta_BTD[row, t], out_BTD[row, t]
            _decays(delta_D, a_ND, decay_ND)
            for d in range(channels):
                drive_D[d] = delta_D[d] * u_D[d]
                out_D[d] = 0
            for n in range(a_ND.shape[0]):
                b, c = b_BTN[row, t, n], c_BTN[row, t, n]
                decay_D, state_D = decay_ND[n], state_ND[n]
                for d in range(channels):
                    state = decay_D[d] * state_D[d] + drive_D[d] * b
                    state_D[d] = state
                    out_D[d] += c * state


@compiled("contract", "reassoc")
def _backward(  # type: ignore[no-untyped-def]
    inputs_BTD,
    delta_BTD,
    b_BTN,
    c_BTN,
    kept_BKND,
    grad_BTD,
    dfinal_BND,
    dinputs_BTD,
    ddelta_BTD,
    db_BTN,
    dc_BTN,
    da_BND,
    dinitial_BND,
    a_ND,
):
    batch, tokens, channels = inputs_BTD.shape
    size = a_ND.shape[0]
    states = np.empty((_KEPT + 1, size, channels), a_ND.dtype)
    decays = np.empty((_KEPT, size, channels), a_ND.dtype)
    ddrive_D = np.empty(channels, a_ND.dtype)
    for row in range(batch):
        carry_ND, da_ND = dinitial_BND[row], da_BND[row]
        carry_ND[:] = dfinal_BND[row]
        da_ND[:] = 0
        for part in range(kept_BKND.shape[1] - 1, -1, -1):
            first = part * _KEPT
            length = min(_KEPT, tokens - first)
            states[0] = kept_BKND[row, part]
            for i in range(length):
                u_D, delta_D = inputs_BTD[row, first + i], delta_BTD[row, first + i]
                _decays(delta_D, a_ND, decays[i])
                for n in range(size):
                    b = b_BTN[row, first + i, n]
                    decay_D, before_D, after_D = decays[i, n], states[i, n], states[i + 1, n]
                    for d in range(channels):
                        after_D[d] = decay_D[d] * before_D[d] + delta_D[d] * u_D[d] * b
            for i in range(length - 1, -1, -1):
                t = first + i
                u_D, delta_D, grad_D = inputs_BTD[row, t], delta_BTD[row, t], grad_BTD[row, t]
                du_D, ddelta_D = dinputs_BTD[row, t], ddelta_BTD[row, t]
                for d in range(channels):
                    ddelta_D[d] = 0
                    ddrive_D[d] = 0
                for n in range(size):
                    b, c = b_BTN[row, t, n], c_BTN[row, t, n]
                    db, dc = b - b, c - c  # zeros of the arrays' type
                    a_D, da_D, carry_D, decay_D = a_ND[n], da_ND[n], carry_ND[n], decays[i, n]
                    before_D, after_D = states[i, n], states[i + 1, n]
                    for d in range(channels):
                        carry = carry_D[d] + c * grad_D[d]
                        dc += grad_D[d] * after_D[d]
                        db += carry * (delta_D[d] * u_D[d])
                        ddrive_D[d] += carry * b
                        carry *= decay_D[d]
                        slope = carry * before_D[d]  # of the exponent
                        ddelta_D[d] += slope * a_D[d]
                        da_D[d] += slope * delta_D[d]
                        carry_D[d] = carry
                    db_BTN[row, t, n], dc_BTN[row, t, n] = db, dc
                for d in range(channels):
                    du_D[d] = ddrive_D[d] * delta_D[d]
                    ddelta_D[d] += ddrive_D[d] * u_D[d]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        inputs, delta, b, c, initial_BND, a_ND = (tensor.contiguous() for tensor in given)
        batch, tokens, _ = inputs.shape
        keeps = any(ctx.needs_input_grad)
        kept = inputs.new_empty(batch, -(-tokens // _KEPT) if keeps else 0, *a_ND.shape)
        out, final = torch.empty_like(inputs), torch.empty_like(initial_BND)
        over_rows(_forward, (inputs, delta, b, c, initial_BND, out, kept, final), a_ND)
        ctx.save_for_backward(inputs, delta, b, c, kept, a_ND)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor, dfinal_BND: Tensor) -> tuple[Tensor, ...]:
        inputs, delta, b, c, kept, a_ND = ctx.saved_tensors
        dinputs, ddelta, db, dc = (torch.empty_like(each) for each in (inputs, delta, b, c))
        da_BND = torch.empty_like(kept[:, 0])
        dinitial_BND = torch.empty_like(da_BND)
        given = (inputs, delta, b, c, kept, grad_BTD.contiguous(), dfinal_BND.contiguous())
        over_rows(_backward, (*given, dinputs, ddelta, db, dc, da_BND, dinitial_BND), a_ND)
        return dinputs, ddelta, db, dc, dinitial_BND, da_BND.sum(0)


def selective_scan_numba(
    inputs_BTD: Tensor,
    delta_BTD: Tensor,
    a_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    initial_BDN: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `selective_scan`, on a CPU, for tensors of float32 or float64; once differentiable."""
    if not torch.is_grad_enabled():  # which a parameter does not know: nothing is kept for it
        a_DN = a_DN.detach()
    out_BTD, final_BND = _SelectiveScan.apply(
        inputs_BTD, delta_BTD, b_BTN, c_BTN, initial_BDN.mT, a_DN.t()
    )
    return out_BTD, final_BND.mT
