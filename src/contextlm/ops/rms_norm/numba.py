"""The gated norm in one pass over memory, for a CPU, with its gradient.

In plain torch it is a handful of passes forward and a dozen back.

X is the width of rows that gates are part of.
"""

from __future__ import annotations

import math
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


@compiled("contract", "reassoc", inlined=True)
def _root(x_C, z_C, gated, inner_C, size, eps):  # type: ignore[no-untyped-def]
    """One over the root of the mean square, of what is written into `inner`."""
    squares = inner_C[0] - inner_C[0]
    if gated:
        for c in range(x_C.shape[0]):
            z = load(z_C[c])
            inner_C[c] = load(x_C[c]) * z * sigmoid(z)
    else:
        for c in range(x_C.shape[0]):
            inner_C[c] = load(x_C[c])
    for c in range(x_C.shape[0]):
        squares += inner_C[c] * inner_C[c]
    return 1 / math.sqrt(squares / size + eps)


@compiled("contract")
def _forward(x_BTC, z_BTX, out_BTC, weight_C, first, gated, eps):  # type: ignore[no-untyped-def]
    batch, tokens, channels = x_BTC.shape
    kind = weight_C.dtype.type
    inner_C = np.zeros(channels, weight_C.dtype)
    for b in range(batch):
        for t in range(tokens):
            z_C, out_C = z_BTX[b, t, first : first + channels], out_BTC[b, t]
            root = kind(_root(x_BTC[b, t], z_C, gated, inner_C, kind(channels), eps))
            for c in range(channels):
                out_C[c] = store(weight_C[c] * root * inner_C[c], out_C[c])


@compiled("contract", "reassoc")
def _backward(  # type: ignore[no-untyped-def]
    x_BTC, z_BTX, grad_BTC, dx_BTC, dz_BTC, dweight_BC, weight_C, first, gated, eps
):
    batch, tokens, channels = x_BTC.shape
    kind = weight_C.dtype.type
    inner_C, part_C = np.zeros(channels, weight_C.dtype), np.empty(channels, weight_C.dtype)
    for b in range(batch):
        dweight_C = dweight_BC[b]
        dweight_C[:] = 0
        for t in range(tokens):
            x_C, grad_C, dx_C = x_BTC[b, t], grad_BTC[b, t], dx_BTC[b, t]
            z_C = z_BTX[b, t, first : first + channels]
            root = kind(_root(x_C, z_C, gated, inner_C, kind(channels), eps))
            along = kind(0)
            for c in range(channels):
                grad = load(grad_C[c])
                dweight_C[c] += grad * inner_C[c] * root
                part_C[c] = grad * weight_C[c]
                along += part_C[c] * inner_C[c]
            along *= root * root * root / kind(channels)
            if gated:
                dz_C = dz_BTC[b, t]
                for c in range(channels):
                    dinner = root * part_C[c] - along * inner_C[c]
                    z = load(z_C[c])
                    dx_C[c] = store(dinner * z * sigmoid(z), dx_C[c])
                    dz_C[c] = store(dinner * load(x_C[c]) * silu_slope(z), dz_C[c])
            else:
                for c in range(channels):
                    dx_C[c] = store(root * part_C[c] - along * inner_C[c], dx_C[c])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs_BTC: Tensor, weight_C: Tensor, gate: Tensor, eps: float) -> Tensor:
        inputs_BTC, weight_C, gated = inputs_BTC.contiguous(), weight_C.contiguous(), gate.dim() > 2
        rows_BTX, first = whole_rows(gate) if gated else (inputs_BTC, 0)
        out = torch.empty_like(inputs_BTC, dtype=gate.dtype)
        over_rows(_forward, (inputs_BTC, rows_BTX, out), weight_C, first, gated, eps)
        ctx.save_for_backward(inputs_BTC, weight_C, gate)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        inputs_BTC, weight_C, gate = ctx.saved_tensors
        gated = gate.dim() > 2
        rows_BTX, first = whole_rows(gate) if gated else (inputs_BTC, 0)
        dinputs, dgate = torch.empty_like(inputs_BTC), None
        if gated:
            dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        dweight_BC = weight_C.new_empty(len(inputs_BTC), len(weight_C))
        given = (inputs_BTC, rows_BTX, grad_BTC.contiguous())
        results = (dinputs, dinputs if dgate is None else dgate, dweight_BC)
        over_rows(_backward, (*given, *results), weight_C, first, gated, ctx.eps)
        return dinputs, dweight_BC.sum(0), dgate, None


def rms_norm_numba(inputs: Tensor, weight_C: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    """As `rms_norm`, on a CPU; once differentiable."""
    weight_C = weight_C.to(torch.promote_types(inputs.dtype, torch.float32))
    shape = inputs.shape
    rows = (shape[0] if len(shape) > 2 else 1, -1, shape[-1])
    # Without a gate an empty tensor says which type is wanted.
    gate = inputs.new_empty(0) if gate is None else gate.reshape(rows)
    return _RMSNorm.apply(inputs.reshape(rows), weight_C, gate, eps).view(shape)
