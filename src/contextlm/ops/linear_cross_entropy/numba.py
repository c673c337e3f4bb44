"""Softmax, loss and the gradient of logits in one pass over each row, in place, for a CPU.

A row stays in the processor's second-level cache meanwhile, where torch's own functions go through
memory once each.
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

# Compiled functions have no annotations, hence the silenced checks (see `context_scan.numba`).


@compiled(*_FLAGS)
def _rows(logits_RV, targets_R, losses_R, zero):  # type: ignore[no-untyped-def]
    """Fills `losses_R`; `zero` is one in the type to compute in."""
    entries = logits_RV.shape[1]
    row_V = np.empty(entries, losses_R.dtype)
    for r in range(logits_RV.shape[0]):
        bits_V = logits_RV[r]
        highest = load(bits_V[0])
        for v in range(entries):
            x = load(bits_V[v])
            highest = x if x > highest else highest
        chosen = load(bits_V[targets_R[r]])
        total = zero
        for v in range(entries):
            e = exp(load(bits_V[v]) - highest)
            row_V[v] = e
            total += e
        losses_R[r] = math.log(total) + (highest - chosen)
        share = (zero + 1) / total
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
    over_rows(_rows, (logits_RV, targets_R, losses_R), losses_R.numpy().dtype.type(0))
    return losses_R
