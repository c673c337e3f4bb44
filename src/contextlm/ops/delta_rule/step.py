"""All that K does for one token between its two projections (see `ops.step`).

X is the width of what the first projection gives: z, the convolution's inputs q, k and v, d and b.
D is the decays of a head, N or 1.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.delta_rule.chunked import LEAST
from contextlm.ops.scalars import sigmoid
from contextlm.ops.step import array, convolve, normalise, softplus, take_step

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.

_SHORTEST = 1e-12  # as torch's: what a vector is divided by at least


@compiled("contract", "reassoc", inlined=True)
def _to_length_1(x_N):  # type: ignore[no-untyped-def]
    kind = x_N.dtype.type
    squares = kind(0)
    for n in range(x_N.shape[0]):
        squares += x_N[n] * x_N[n]
    over = kind(1) / max(kind(math.sqrt(squares)), kind(_SHORTEST))
    for n in range(x_N.shape[0]):
        x_N[n] *= over


@compiled("contract", "reassoc")
def _step(  # type: ignore[no-untyped-def]
    first_row, last_row, eps, projected, taps, state, out,
    weight, bias, steps, rates, norm, seen, decays, heads, numbers, width,
):  # fmt: skip
    inner, keys = heads * width, heads * numbers
    convolved = 2 * keys + inner
    behind = inner + convolved
    projected_BX = array(projected, (last_row, behind + heads * decays + heads), eps)
    taps_BJC = array(taps, (last_row, max(0, seen - 1), convolved), eps)
    state_BHNP = array(state, (last_row, heads, numbers, width), eps)
    out_BE = array(out, (last_row, inner), eps)
    weight_JC, bias_C = array(weight, (seen, convolved), eps), array(bias, convolved, eps)
    step_HD, rate_H = array(steps, (heads, decays), eps), array(rates, heads, eps)
    norm_P = array(norm, width, eps)
    kind = out_BE.dtype.type
    least = kind(LEAST)
    mixed_C, error_P = np.empty(convolved, out_BE.dtype), np.empty(width, out_BE.dtype)
    for b in range(first_row, last_row):
        x_C = projected_BX[b, inner:behind]
        convolve(x_C, taps_BJC[b], weight_JC, bias_C, mixed_C)
        for c in range(convolved):
            mixed_C[c] *= sigmoid(mixed_C[c])
        for h in range(heads):
            q_N = mixed_C[h * numbers : (h + 1) * numbers]
            k_N = mixed_C[keys + h * numbers : keys + (h + 1) * numbers]
            v_P = mixed_C[2 * keys + h * width : 2 * keys + (h + 1) * width]
            z_P = projected_BX[b, h * width : (h + 1) * width]
            out_P = out_BE[b, h * width : (h + 1) * width]
            given_D = projected_BX[b, behind + h * decays : behind + (h + 1) * decays]
            beta = sigmoid(projected_BX[b, behind + heads * decays + h])
            _to_length_1(q_N)
            _to_length_1(k_N)
            state_NP, rate, decay = state_BHNP[b, h], math.exp(rate_H[h]), kind(0)
            for p in range(width):
                error_P[p] = v_P[p]
                out_P[p] = 0
            for n in range(numbers):
                if n < decays:
                    log = kind(-rate * softplus(given_D[n] + step_HD[h, n]))
                    if decays > 1:
                        log = least * kind(math.tanh(log / least))
                    decay = kind(math.exp(log))
                k, row_P = k_N[n], state_NP[n]
                for p in range(width):
                    value = decay * row_P[p]
                    row_P[p] = value
                    error_P[p] -= k * value
            for n in range(numbers):
                written, read, row_P = beta * k_N[n], q_N[n], state_NP[n]
                for p in range(width):
                    value = row_P[p] + written * error_P[p]
                    row_P[p] = value
                    out_P[p] += read * value
            normalise(out_P, norm_P, eps)
            for p in range(width):
                out_P[p] *= z_P[p] * sigmoid(z_P[p])


def delta_step(
    projected_B1X: Tensor,
    taps_BJC: Tensor | None,
    state_BHNP: Tensor,
    weight_JC: Tensor | None,
    bias_C: Tensor | None,
    step_D: Tensor,
    rate_H: Tensor,
    norm_P: Tensor,
    *,
    eps: float,
) -> Tensor:
    """What the second projection is given, ``[B, 1, H P]``; changes `taps` and `state`.

    Args:
        projected_B1X: what the first one gave, contiguous as all others, of one type.
        taps_BJC: the convolution's last inputs, the newest last; None where it has one tap or none.
        state_BHNP: the state before the token.
        weight_JC: of the convolution, the current token's first; None: no convolution.
        bias_C: of the convolution.
        step_D: c, of all heads.
        rate_H: the logarithm of r.
        norm_P: weights of each head's norm.
        eps: added to the mean square.
    """
    batch, heads, *sizes = state_BHNP.shape
    out_B1E = projected_B1X.new_empty(batch, 1, heads * sizes[1])
    tensors = (projected_B1X, taps_BJC, state_BHNP, out_B1E)
    weights = (weight_JC, bias_C, step_D, rate_H, norm_P)
    seen = 0 if weight_JC is None else len(weight_JC)
    numbers = 2 * heads * sizes[0] * sizes[1]
    given = (seen, len(step_D) // heads, heads, *sizes)
    take_step(_step, batch, numbers, eps, (*tensors, *weights), *given)
    return out_B1E
