"""Softmax, loss and the gradient of logits in one pass over each row, in place, for a CPU.

A row stays in the processor's second-level cache meanwhile, where torch's own functions go through
memory once each. Numba has no bfloat16: its sixteen bits are read and written as whole numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from contextlm.ops.backends import compiled, in_threads
from contextlm.ops.bits import bits_as_float, float_as_bits

# exp(r) for |r| <= log(2) / 2: Taylor's, to float32's rounding.
_EXP = tuple(1 / math.factorial(n) for n in range(8))
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4  # in two parts
_LOWEST = -87.0  # below, exp is no normal float32
_FLAGS = ("reassoc", "contract", "nsz", "arcp")

# Compiled functions have no annotations, hence the silenced checks (see `context_scan.numba`).


def _read(x):  # type: ignore[no-untyped-def]
    """A number as it is, a bfloat16's bits as float32."""


def _written(x, like):  # type: ignore[no-untyped-def]
    """The inverse of `_read` for an array of `like`'s type; rounds to the nearest, ties to even."""


def exp(x):  # type: ignore[no-untyped-def]
    """The exponential of what is not positive; in float32 without branch or call."""


@overload(_read, inline="always")
def _choose_read(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return lambda x: bits_as_float(np.uint32(x) << np.uint32(16))
    return lambda x: x


@overload(_written, inline="always")
def _choose_written(x, like):  # type: ignore[no-untyped-def]
    if like != types.uint16:
        return lambda x, like: x

    def rounded(x, like):  # type: ignore[no-untyped-def]
        bits = float_as_bits(x)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16((bits + half) >> np.uint32(16))

    return rounded


@overload(exp, inline="always")
def _choose_exp(x):  # type: ignore[no-untyped-def]
    if x != types.float32:
        return lambda x: math.exp(x)
    c0, c1, c2, c3, c4, c5, c6, c7 = (types.float32(c) for c in _EXP)
    lowest, log2e, half = types.float32(_LOWEST), types.float32(_LOG2E), types.float32(0.5)
    high, low = types.float32(_LN2_HIGH), types.float32(_LN2_LOW)

    def polynomial(x):  # type: ignore[no-untyped-def]
        x = lowest if x < lowest else x  # a NaN passes
        n = np.floor(x * log2e + half)
        r = x - n * high - n * low
        p = c4 + r * (c5 + r * (c6 + r * c7))
        p = c0 + r * (c1 + r * (c2 + r * (c3 + r * p)))
        return p * bits_as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))

    return polynomial


@compiled(*_FLAGS)
def _rows(logits_RV, targets_R, losses_R, zero):  # type: ignore[no-untyped-def]
    """Fills `losses_R`; `zero` is one in the type to compute in."""
    entries = logits_RV.shape[1]
    row_V = np.empty(entries, losses_R.dtype)
    for r in range(logits_RV.shape[0]):
        bits_V = logits_RV[r]
        highest = _read(bits_V[0])
        for v in range(entries):
            x = _read(bits_V[v])
            highest = x if x > highest else highest
        chosen = _read(bits_V[targets_R[r]])
        total = zero
        for v in range(entries):
            e = exp(_read(bits_V[v]) - highest)
            row_V[v] = e
            total += e
        losses_R[r] = math.log(total) + (highest - chosen)
        share = (zero + 1) / total
        row_V[targets_R[r]] -= total
        for v in range(entries):
            bits_V[v] = _written(row_V[v] * share, bits_V[v])


def softmax_loss_numba(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Each row's loss, in float32 at least; turns its logits into their gradient, in place."""
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    losses_R = torch.empty(len(logits_RV), dtype=dtype)
    if logits_RV.dtype == torch.bfloat16:
        array_RV: Any = logits_RV.view(torch.int16).numpy().view(np.uint16)
    else:
        array_RV = logits_RV.numpy()
    given = targets_R.numpy(), losses_R.numpy()
    zero = losses_R.numpy().dtype.type(0)
    in_threads(
        lambda rows: _rows(array_RV[rows], *(each[rows] for each in given), zero), len(logits_RV)
    )
    return losses_R
