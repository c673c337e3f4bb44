"""All that S does for one token between its two projections, in one compiled call, on a CPU.

While text is generated a mixer's arithmetic is little and its operations are many: in plain torch
some forty, of which each costs more than its numbers. State and taps are changed in place.

X is the width of what the first projection gives: z, the convolution's inputs u, B and C, and d.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.rows import over_rows
from contextlm.ops.scalars import sigmoid

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", "reassoc")
def _step(  # type: ignore[no-untyped-def]
    projected_BX, taps_BJC, state_BHNP, out_BE,
    weight_JC, bias_C, step_H, rate_H, skip_H, norm_E, eps,
):  # fmt: skip
    batch, heads, numbers, width = state_BHNP.shape
    kind = out_BE.dtype.type
    inner, convolved = out_BE.shape[1], weight_JC.shape[1]
    before, mixed_C = taps_BJC.shape[1], np.empty(convolved, out_BE.dtype)
    for b in range(batch):
        z_E, x_C = projected_BX[b, :inner], projected_BX[b, inner : inner + convolved]
        for c in range(convolved):
            mixed_C[c] = bias_C[c] + weight_JC[0, c] * x_C[c]
        for j in range(1, before + 1):
            weight_C, tap_C = weight_JC[j], taps_BJC[b, before - j]
            for c in range(convolved):
                mixed_C[c] += weight_C[c] * tap_C[c]
        for j in range(before):
            later_C = x_C if j == before - 1 else taps_BJC[b, j + 1]
            taps_BJC[b, j] = later_C
        for c in range(convolved):
            mixed_C[c] *= sigmoid(mixed_C[c])
        squares = kind(0)
        for h in range(heads):
            start, stop = h * width, (h + 1) * width
            u_P, out_P, gate_P = mixed_C[start:stop], out_BE[b, start:stop], z_E[start:stop]
            given = projected_BX[b, inner + convolved + h] + step_H[h]
            step = kind(given if given > 20 else math.log1p(math.exp(given)))  # as torch's softplus
            decay = kind(math.exp(-step * math.exp(rate_H[h])))
            skip, state_NP = skip_H[h], state_BHNP[b, h]
            for p in range(width):
                out_P[p] = skip * u_P[p]
            for n in range(numbers):
                written, read = step * mixed_C[inner + n], mixed_C[inner + numbers + n]
                row_P = state_NP[n]
                for p in range(width):
                    value = decay * row_P[p] + written * u_P[p]
                    row_P[p] = value
                    out_P[p] += read * value
            for p in range(width):
                value = out_P[p] * gate_P[p] * sigmoid(gate_P[p])
                out_P[p] = value
                squares += value * value
        root = kind(1 / math.sqrt(squares / kind(inner) + eps))
        for e in range(inner):
            out_BE[b, e] *= root * norm_E[e]


def selective_step(
    projected_BX: Tensor,
    taps_BJC: Tensor,
    state_BHNP: Tensor,
    weight_JC: Tensor,
    bias_C: Tensor,
    step_H: Tensor,
    rate_H: Tensor,
    skip_H: Tensor,
    norm_E: Tensor,
    eps: float,
) -> Tensor:
    """What the second projection is given, ``[B, E]``; changes `taps` and `state`.

    Args:
        projected_BX: what the first one gave, contiguous as all others, of one type.
        taps_BJC: the convolution's last inputs, the newest last.
        state_BHNP: the state before the token.
        weight_JC: of the convolution, the current token's first.
        bias_C: of the convolution.
        step_H: b.
        rate_H: the logarithm of r.
        skip_H: s.
        norm_E: the norm's weights.
        eps: added to the mean square.
    """
    out_BE = projected_BX.new_empty(len(projected_BX), len(norm_E))
    shared = (weight_JC, bias_C, step_H, rate_H, skip_H, norm_E, eps)
    over_rows(_step, (projected_BX, taps_BJC, state_BHNP, out_BE), *shared)
    return out_BE
