"""The selective state as one compiled loop over time, for a CPU, with its gradient.

A head's state stays in the first level of cache while all that belongs to a token is done. With the
few numbers of state a channel that these models have this is less arithmetic than the matrix
products of `chunked`, and nothing but the result is written to memory. The gradient goes backwards
through chunks of tokens, whose states are computed again from the one kept before each.

J is a number of chunks here, K a token of one, X the width of rows that u, B and C are part of.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contextlm.ops.backends import compiled
from contextlm.ops.rows import over_rows, whole_rows

# Tokens of a chunk, N P numbers of state each in the gradient.
CHUNK = 32

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract")
def _forward(  # type: ignore[no-untyped-def]
    u_BTX, step_BTH, decay_BTH, write_BTX, read_BTX, y_BTHP, state_BHNP, kept_BJHNP,
    skip_H, first_u, first_write, first_read,
):  # fmt: skip
    """Fills y, moves the state on, and keeps it before each chunk where there is room for that."""
    batch, tokens, heads, width = y_BTHP.shape
    numbers, keeps = state_BHNP.shape[2], kept_BJHNP.shape[1] > 0
    for b in range(batch):
        for h in range(heads):
            state_NP, skip = state_BHNP[b, h], skip_H[h]
            for t in range(tokens):
                if keeps and t % CHUNK == 0:
                    kept_BJHNP[b, t // CHUNK, h] = state_NP
                first = first_u + h * width
                u_P, y_P = u_BTX[b, t, first : first + width], y_BTHP[b, t, h]
                step, decay = step_BTH[b, t, h], decay_BTH[b, t, h]
                for p in range(width):
                    y_P[p] = skip * u_P[p]
                for n in range(numbers):
                    written, read = (
                        step * write_BTX[b, t, first_write + n],
                        read_BTX[b, t, first_read + n],
                    )
                    row_P = state_NP[n]
                    for p in range(width):
                        value = decay * row_P[p] + written * u_P[p]
                        row_P[p] = value
                        y_P[p] += read * value


@compiled("contract", "reassoc")
def _backward(  # type: ignore[no-untyped-def]
    u_BTX, step_BTH, decay_BTH, write_BTX, read_BTX, kept_BJHNP, dy_BTHP,
    du_BTHP, dstep_BTH, ddecay_BTH, dwrite_BTN, dread_BTN, dstate_BHNP, dskip_BH,
    skip_H, first_u, first_write, first_read,
):  # fmt: skip
    """Fills the gradients; `dstate` comes as the final state's and leaves as the initial one's."""
    batch, tokens, heads, width = dy_BTHP.shape
    numbers = dstate_BHNP.shape[2]
    states_KNP = np.empty((CHUNK + 1, numbers, width), dy_BTHP.dtype)
    drawn_P = np.empty(width, dy_BTHP.dtype)
    zero = dy_BTHP.dtype.type(0)
    for b in range(batch):
        dwrite_BTN[b] = 0
        dread_BTN[b] = 0
        for h in range(heads):
            dstate_NP, skip, dskip = dstate_BHNP[b, h], skip_H[h], zero
            head = first_u + h * width
            for j in range(kept_BJHNP.shape[1] - 1, -1, -1):
                first, last = j * CHUNK, min((j + 1) * CHUNK, tokens)
                states_KNP[0] = kept_BJHNP[b, j, h]
                for t in range(first, last):
                    u_P = u_BTX[b, t, head : head + width]
                    step, decay = step_BTH[b, t, h], decay_BTH[b, t, h]
                    for n in range(numbers):
                        written = step * write_BTX[b, t, first_write + n]
                        before_P, after_P = states_KNP[t - first, n], states_KNP[t - first + 1, n]
                        for p in range(width):
                            after_P[p] = decay * before_P[p] + written * u_P[p]
                for t in range(last - 1, first - 1, -1):
                    u_P = u_BTX[b, t, head : head + width]
                    dy_P, du_P = dy_BTHP[b, t, h], du_BTHP[b, t, h]
                    step, decay = step_BTH[b, t, h], decay_BTH[b, t, h]
                    ddecay = zero
                    drawn_P[:] = 0  # B^T times the gradient of the state
                    for n in range(numbers):
                        write, read = (
                            write_BTX[b, t, first_write + n],
                            read_BTX[b, t, first_read + n],
                        )
                        before_P, after_P = states_KNP[t - first, n], states_KNP[t - first + 1, n]
                        d_P = dstate_NP[n]
                        dwrite, dread = zero, zero
                        for p in range(width):
                            d = d_P[p] + read * dy_P[p]
                            dread += after_P[p] * dy_P[p]
                            dwrite += d * u_P[p]
                            ddecay += d * before_P[p]
                            drawn_P[p] += write * d
                            d_P[p] = decay * d
                        dwrite_BTN[b, t, n] += step * dwrite
                        dread_BTN[b, t, n] += dread
                    dstep = zero
                    for p in range(width):
                        dstep += drawn_P[p] * u_P[p]
                        dskip += dy_P[p] * u_P[p]
                        du_P[p] = step * drawn_P[p] + skip * dy_P[p]
                    dstep_BTH[b, t, h], ddecay_BTH[b, t, h] = dstep, ddecay
            dskip_BH[b, h] = dskip


class _SelectiveState(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        inputs_BTHP, *_, initial_BHNP = given
        along, shared = _arranged(*given[:6])
        outputs_BTHP = inputs_BTHP.new_empty(inputs_BTHP.shape)
        state_BHNP = initial_BHNP.clone(memory_format=torch.contiguous_format)
        batch, tokens = inputs_BTHP.shape[:2]
        chunks = -(-tokens // CHUNK) if any(ctx.needs_input_grad) else 0
        kept_BJHNP = state_BHNP.new_empty(batch, chunks, *state_BHNP.shape[1:])
        over_rows(_forward, (*along, outputs_BTHP, state_BHNP, kept_BJHNP), *shared)
        ctx.save_for_backward(*given[:6], kept_BJHNP)
        return outputs_BTHP, state_BHNP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutputs_BTHP: Tensor, dfinal_BHNP: Tensor) -> tuple[Tensor, ...]:
        *given, kept_BJHNP = ctx.saved_tensors
        along, shared = _arranged(*given)
        gradients = [tensor.new_empty(tensor.shape) for tensor in given[:5]]
        dstate_BHNP = dfinal_BHNP.clone(memory_format=torch.contiguous_format)
        dskip_BH = dstate_BHNP.new_empty(dstate_BHNP.shape[:2])
        results = (*gradients, dstate_BHNP, dskip_BH)
        over_rows(_backward, (*along, kept_BJHNP, doutputs_BTHP.contiguous(), *results), *shared)
        return *gradients, dskip_BH.sum(0), dstate_BHNP


def _arranged(
    inputs_BTHP: Tensor,
    steps_BTH: Tensor,
    decays_BTH: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    skip_H: Tensor,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """What the loops take first, and behind all others."""
    wide, first = zip(
        *(whole_rows(part) for part in (inputs_BTHP.flatten(2), write_BTN, read_BTN)), strict=True
    )
    along = (wide[0], steps_BTH.contiguous(), decays_BTH.contiguous(), *wide[1:])
    return along, (skip_H.contiguous(), *first)


def selective_state_numba(
    inputs_BTHP: Tensor,
    steps_BTH: Tensor,
    rates_H: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    skip_H: Tensor,
    initial_BHNP: Tensor,
    begins_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `selective_state`, on a CPU, for tensors of float32 or float64; once differentiable."""
    decays_BTH = torch.exp(-steps_BTH * rates_H)
    if begins_BT is not None:
        decays_BTH = decays_BTH.masked_fill(begins_BT.unsqueeze(-1), 0)
    along = (inputs_BTHP, steps_BTH, decays_BTH, write_BTN, read_BTN)
    if not torch.is_grad_enabled():  # which a parameter does not know: nothing is kept for it
        skip_H = skip_H.detach()
    outputs_BTHP, final_BHNP = _SelectiveState.apply(*along, skip_H, initial_BHNP)
    return outputs_BTHP, final_BHNP
