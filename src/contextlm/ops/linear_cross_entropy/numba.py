"""Softmax, loss and the gradient of logits in one pass over each row, in place, for a CPU.

A row stays in the processor's second-level cache meanwhile, where torch's own functions go through
memory once each.

X is the width of the rows of memory that logits are part of.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.rows import over_rows
from contextlm.ops.scalars import exp, load, store

_FLAGS = ("reassoc", "contract", "nsz", "arcp")
_LANES = 64

# Compiled functions have no annotations, hence the silenced checks (see `context_scan.numba`).


@compiled(*_FLAGS, inlined=True)
def _highest(bits_V, lanes_L):  # type: ignore[no-untyped-def]
    """The largest logit. One running maximum would wait for itself at each of them."""
    lanes_L[:] = load(bits_V[0])
    whole = len(bits_V) - len(bits_V) % _LANES
    for first in range(0, whole, _LANES):
        part_L = bits_V[first : first + _LANES]
        for i in range(_LANES):
            x = load(part_L[i])
            lanes_L[i] = x if x > lanes_L[i] else lanes_L[i]
    for v in range(whole, len(bits_V)):
        x = load(bits_V[v])
        lanes_L[0] = x if x > lanes_L[0] else lanes_L[0]
    highest = lanes_L[0]
    for x in lanes_L:
        highest = x if x > highest else highest
    return highest


@compiled(*_FLAGS)
def _rows(logits_RX, targets_R, losses_R, entries):  # type: ignore[no-untyped-def]
    kind = losses_R.dtype.type
    row_V, lanes_L = np.empty(entries, losses_R.dtype), np.empty(_LANES, losses_R.dtype)
    for r in range(logits_RX.shape[0]):
        bits_V = logits_RX[r, :entries]
        highest = _highest(bits_V, lanes_L)
        chosen = load(bits_V[targets_R[r]])
        total = kind(0)
        for v in range(entries):
            e = exp(load(bits_V[v]) - highest)
            row_V[v] = e
            total += e
        losses_R[r] = math.log(total) + (highest - chosen)
        share = kind(1) / total
        row_V[targets_R[r]] -= total
        for v in range(entries):
            bits_V[v] = store(row_V[v] * share, bits_V[v])


def softmax_loss_numba(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Each row's loss, in float32 at least; turns its logits into their gradient, in place.

    Raises:
        IndexError: a target is no entry of the vocabulary, which compiled code would not notice.
    """
    entries = logits_RV.shape[1]
    strange = targets_R[(targets_R < 0) | (targets_R >= entries)]
    if len(strange):
        raise IndexError(f"Target {int(strange[0])} is out of bounds of {entries} entries.")
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    losses_R = torch.empty(len(logits_RV), dtype=dtype)
    # Of rows that lie apart Numba would not know that their entries do not.
    logits_RX = logits_RV.as_strided((len(logits_RV), logits_RV.stride(0)), logits_RV.stride())
    over_rows(_rows, (logits_RX, targets_R, losses_R), entries)
    return losses_R
