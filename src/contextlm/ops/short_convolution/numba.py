"""The short convolution and its activation in one pass over memory, for a CPU, with its gradient.

In plain torch each tap reads and writes all of it once more, and so does the activation. Here the
inputs are read where they are, also as bfloat16 and as some columns of wider rows.

X is the width of rows that inputs are part of.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contextlm.ops.backends import compiled
from contextlm.ops.rows import over_rows, whole_rows
from contextlm.ops.scalars import load, sigmoid, silu_slope, store

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", inlined=True)
def _convolve(x_BTX, before_BJC, positions_BT, weight_JC, bias_C, first, b, t, out_C):  # type: ignore[no-untyped-def]
    """One token's outputs before the activation."""
    taps, channels = weight_JC.shape
    x_C, weight_C = x_BTX[b, t, first : first + channels], weight_JC[0]
    for c in range(channels):
        out_C[c] = bias_C[c] + weight_C[c] * load(x_C[c])
    for j in range(1, taps):
        weight_C = weight_JC[j]
        if positions_BT.shape[1] > 0 and positions_BT[b, t] < j:
            break
        if t >= j:
            x_C = x_BTX[b, t - j, first : first + channels]
            for c in range(channels):
                out_C[c] += weight_C[c] * load(x_C[c])
        elif before_BJC.shape[1] > 0:
            before_C = before_BJC[b, taps - 1 + t - j]
            for c in range(channels):
                out_C[c] += weight_C[c] * before_C[c]


@compiled("contract")
def _forward(x_BTX, before_BJC, positions_BT, out_BTC, weight_JC, bias_C, first, silu):  # type: ignore[no-untyped-def]
    for b in range(out_BTC.shape[0]):
        for t in range(out_BTC.shape[1]):
            out_C = out_BTC[b, t]
            _convolve(x_BTX, before_BJC, positions_BT, weight_JC, bias_C, first, b, t, out_C)
            if silu:
                for c in range(out_C.shape[0]):
                    out_C[c] *= sigmoid(out_C[c])


@compiled("contract")
def _backward(  # type: ignore[no-untyped-def]
    x_BTX, before_BJC, positions_BT, grad_BTC, dx_BTC, dbefore_BJC, dweight_BJC, dbias_BC,
    weight_JC, bias_C, first, silu,
):  # fmt: skip
    batch, tokens, channels = grad_BTC.shape
    taps = weight_JC.shape[0]
    # The newest gradients of what the activation gets, a token each, in turns.
    inner_JC = np.empty((taps, channels), grad_BTC.dtype)
    sum_C = np.empty(channels, grad_BTC.dtype)
    for b in range(batch):
        dweight_BJC[b] = 0
        dbias_BC[b] = 0
        dbefore_BJC[b] = 0
        for t in range(tokens - 1, -1, -1):
            grad_C, inner_C, dbias_C = grad_BTC[b, t], inner_JC[t % taps], dbias_BC[b]
            if silu:
                _convolve(x_BTX, before_BJC, positions_BT, weight_JC, bias_C, first, b, t, inner_C)
                for c in range(channels):
                    inner_C[c] = grad_C[c] * silu_slope(inner_C[c])
            else:
                for c in range(channels):
                    inner_C[c] = grad_C[c]
            for c in range(channels):
                dbias_C[c] += inner_C[c]
                sum_C[c] = 0
            for j in range(taps):
                weight_C, dweight_C = weight_JC[j], dweight_BJC[b, j]
                # What this token's input gave to the one j later.
                if t + j < tokens and not (
                    positions_BT.shape[1] > 0 and positions_BT[b, t + j] < j
                ):
                    later_C = inner_JC[(t + j) % taps]
                    for c in range(channels):
                        sum_C[c] += weight_C[c] * later_C[c]
                # What it was given by the one j earlier.
                if positions_BT.shape[1] > 0 and positions_BT[b, t] < j:
                    continue
                if t >= j:
                    x_C = x_BTX[b, t - j, first : first + channels]
                    for c in range(channels):
                        dweight_C[c] += inner_C[c] * load(x_C[c])
                elif before_BJC.shape[1] > 0:
                    place = taps - 1 + t - j
                    before_C, dbefore_C = before_BJC[b, place], dbefore_BJC[b, place]
                    for c in range(channels):
                        dweight_C[c] += inner_C[c] * before_C[c]
                        dbefore_C[c] += inner_C[c] * weight_C[c]
            dx_C = dx_BTC[b, t]
            for c in range(channels):
                dx_C[c] = store(sum_C[c], dx_C[c])


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, before: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        weight_JC, bias_C, silu = rest
        rows_BTX, first = whole_rows(inputs)
        given = (rows_BTX, before.contiguous(), positions)
        out_BTC = weight_JC.new_empty(inputs.shape)
        shared = (weight_JC.contiguous(), bias_C.contiguous())
        over_rows(_forward, (*given, out_BTC), *shared, first, silu)
        ctx.save_for_backward(inputs, before, positions, *shared)
        ctx.silu = silu
        return out_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        inputs, before, positions, weight_JC, bias_C = ctx.saved_tensors
        rows_BTX, first = whole_rows(inputs)
        dinputs = torch.empty(inputs.shape, dtype=inputs.dtype)
        dbefore = torch.empty_like(before, memory_format=torch.contiguous_format)
        dweight = grad_BTC.new_empty(len(inputs), *weight_JC.shape)
        dbias = grad_BTC.new_empty(len(inputs), *bias_C.shape)
        given = (rows_BTX, before.contiguous(), positions, grad_BTC.contiguous())
        results = (dinputs, dbefore, dweight, dbias)
        over_rows(_backward, (*given, *results), weight_JC, bias_C, first, ctx.silu)
        return dinputs, dbefore, None, dweight.sum(0), dbias.sum(0), None


def short_convolution_numba(
    inputs_BTC: Tensor,
    weight_JC: Tensor,
    bias_C: Tensor,
    before_BJC: Tensor | None,
    positions_BT: Tensor | None,
    *,
    silu: bool,
) -> Tensor:
    """As `short_convolution`, on a CPU; once differentiable."""
    batch, _, width = inputs_BTC.shape
    wanted = torch.promote_types(inputs_BTC.dtype, weight_JC.dtype)
    kind = torch.promote_types(wanted, torch.float32)
    if inputs_BTC.dtype != torch.bfloat16 or kind == torch.float64:
        inputs_BTC = inputs_BTC.to(kind)
    if before_BJC is None:
        before_BJC = inputs_BTC.new_empty(batch, 0, width)
    if positions_BT is None:
        positions_BT = torch.empty(batch, 0, dtype=torch.long)
    given = (inputs_BTC, before_BJC.to(kind), positions_BT.contiguous())
    return _ShortConvolution.apply(*given, weight_JC.to(kind), bias_C.to(kind), silu).to(wanted)
