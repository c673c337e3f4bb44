"""All that S does for one token between its two projections (see `ops.step`).

X is the width of what the first projection gives: z, the convolution's inputs u, B and C, and d.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.scalars import sigmoid
from contextlm.ops.step import array, convolve, normalise, softplus, take_step

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", "reassoc")
def _step(  # type: ignore[no-untyped-def]
    first_row, last_row, eps, projected, taps, state, out,
    weight, bias, steps, rates, skips, norm, seen, heads, numbers, width,
):  # fmt: skip
    inner = heads * width
    convolved = inner + 2 * numbers
    projected_BX = array(projected, (last_row, inner + convolved + heads), eps)
    taps_BJC = array(taps, (last_row, seen - 1, convolved), eps)
    state_BHNP = array(state, (last_row, heads, numbers, width), eps)
    out_BE = array(out, (last_row, inner), eps)
    weight_JC, bias_C = array(weight, (seen, convolved), eps), array(bias, convolved, eps)
    step_H, rate_H = array(steps, heads, eps), array(rates, heads, eps)
    skip_H, norm_E = array(skips, heads, eps), array(norm, inner, eps)
    kind = out_BE.dtype.type
    mixed_C = np.empty(convolved, out_BE.dtype)
    for b in range(first_row, last_row):
        z_E, x_C = projected_BX[b, :inner], projected_BX[b, inner : inner + convolved]
        convolve(x_C, taps_BJC[b], weight_JC, bias_C, mixed_C)
        for c in range(convolved):
            mixed_C[c] *= sigmoid(mixed_C[c])
        for h in range(heads):
            start, stop = h * width, (h + 1) * width
            u_P, out_P, gate_P = mixed_C[start:stop], out_BE[b, start:stop], z_E[start:stop]
            step = kind(softplus(projected_BX[b, inner + convolved + h] + step_H[h]))
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
                out_P[p] *= gate_P[p] * sigmoid(gate_P[p])
        normalise(out_BE[b], norm_E, eps)


def selective_step(
    projected_B1X: Tensor,
    taps_BJC: Tensor | None,
    state_BHNP: Tensor,
    weight_JC: Tensor,
    bias_C: Tensor,
    step_H: Tensor,
    rate_H: Tensor,
    skip_H: Tensor,
    norm_E: Tensor,
    *,
    eps: float,
) -> Tensor:
    """What the second projection is given, ``[B, 1, E]``; changes `taps` and `state`.

    Args:
        projected_B1X: what the first one gave, contiguous as all others, of one type.
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
    batch, *sizes = state_BHNP.shape
    out_B1E = projected_B1X.new_empty(batch, 1, len(norm_E))
    tensors = (projected_B1X, taps_BJC, state_BHNP, out_B1E)
    weights = (weight_JC, bias_C, step_H, rate_H, skip_H, norm_E)
    numbers = len(norm_E) * sizes[1]
    take_step(_step, batch, numbers, eps, (*tensors, *weights), len(weight_JC), *sizes)
    return out_B1E
