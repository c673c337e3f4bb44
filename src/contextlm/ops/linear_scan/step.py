"""All that R does for one token between its projections in and out (see `ops.step`).

The convolution, the gates of `models.gated_recurrence`, the recurrence, and the gate behind it.

I is the number of a gate's blocks here, F the width of one.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.scalars import sigmoid
from contextlm.ops.step import array, convolve, softplus, take_step

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", "reassoc", inlined=True)
def _by_blocks(v_C, weight_IFF, bias_C, out_C):  # type: ignore[no-untyped-def]
    """A block-diagonal linear layer, and the sigmoid behind it."""
    blocks, size, _ = weight_IFF.shape
    for i in range(blocks):
        v_F, bias_F = v_C[i * size : (i + 1) * size], bias_C[i * size : (i + 1) * size]
        out_F = out_C[i * size : (i + 1) * size]
        for f in range(size):
            out_F[f] = bias_F[f]
        for e in range(size):
            v, weight_F = v_F[e], weight_IFF[i, e]
            for f in range(size):
                out_F[f] += v * weight_F[f]
        for f in range(size):
            out_F[f] = sigmoid(out_F[f])


@compiled("contract", "reassoc")
def _step(  # type: ignore[no-untyped-def]
    first_row, last_row, sharpness, inner, gate, taps, state, counts, out,
    weight, bias, decays, decay_weight, decay_bias, input_weight, input_bias,
    seen, blocks, channels,
):  # fmt: skip
    inner_BC = array(inner, (last_row, channels), sharpness)
    gate_BC = array(gate, (last_row, channels), sharpness)
    state_BC = array(state, (last_row, channels), sharpness)
    out_BC = array(out, (last_row, channels), sharpness)
    taps_BJC = array(taps, (last_row, max(0, seen - 1), channels), sharpness)
    count_B = array(counts, last_row, 0)
    weight_JC = array(weight, (seen, channels), sharpness)
    bias_C, decay_C = array(bias, channels, sharpness), array(decays, channels, sharpness)
    size = channels // max(1, blocks)
    decay_IFF = array(decay_weight, (blocks, size, size), sharpness)
    input_IFF = array(input_weight, (blocks, size, size), sharpness)
    decay_bias_C = array(decay_bias, channels, sharpness)
    input_bias_C = array(input_bias, channels, sharpness)
    kind = out_BC.dtype.type
    half, one, root_half = kind(0.5), kind(1), kind(math.sqrt(0.5))
    work_3C = np.empty((3, channels), out_BC.dtype)
    v_C, r_C, i_C = work_3C[0], work_3C[1], work_3C[2]
    for b in range(first_row, last_row):
        convolve(inner_BC[b], taps_BJC[b], weight_JC, bias_C, v_C)
        if blocks > 0:
            _by_blocks(v_C, decay_IFF, decay_bias_C, r_C)
            _by_blocks(v_C, input_IFF, input_bias_C, i_C)
        else:
            r_C[:] = one
            i_C[:] = one
        begins = count_B[b] == 0
        state_C, g_C, out_C = state_BC[b], gate_BC[b], out_BC[b]
        for c in range(channels):
            log = -sharpness * kind(softplus(decay_C[c])) * r_C[c]
            # 1 - a^2 without cancellation where a is near 1.
            scale = one if begins else kind(math.sqrt(-math.expm1(log + log)))
            h = kind(math.exp(log)) * state_C[c] + scale * i_C[c] * v_C[c]
            state_C[c] = h
            gelu = half * g_C[c] * (one + kind(math.erf(g_C[c] * root_half)))
            out_C[c] = gelu * h


def gated_step(
    inner_B1C: Tensor,
    gate_B1C: Tensor,
    taps_BJC: Tensor | None,
    state_BC: Tensor,
    count_B: Tensor,
    weight_JC: Tensor | None,
    bias_C: Tensor | None,
    decay_C: Tensor,
    decay_weight_IFF: Tensor | None,
    decay_bias_C: Tensor | None,
    input_weight_IFF: Tensor | None,
    input_bias_C: Tensor | None,
    *,
    sharpness: float,
) -> Tensor:
    """What the last projection is given, ``[B, 1, C]``; changes `taps` and `state`.

    Args:
        inner_B1C: what goes through the recurrence, contiguous as all others, of one type.
        gate_B1C: what is multiplied with its state.
        taps_BJC: the convolution's last inputs, the newest last; None where it has one tap or none.
        state_BC: the state before the token.
        count_B: int64, tokens that each row has seen; a text's first is scaled otherwise.
        weight_JC: of the convolution, the current token's first; None: no convolution.
        bias_C: of the convolution.
        decay_C: lambda.
        decay_weight_IFF: of the gate r; None: no gates.
        decay_bias_C: of the gate r.
        input_weight_IFF: of the gate i.
        input_bias_C: of the gate i.
        sharpness: the 8 in a_t.
    """
    out_B1C = inner_B1C.new_empty(inner_B1C.shape)
    batch, _, channels = inner_B1C.shape
    tensors = (inner_B1C, gate_B1C, taps_BJC, state_BC, count_B, out_B1C)
    gates = (decay_weight_IFF, decay_bias_C, input_weight_IFF, input_bias_C)
    weights = (weight_JC, bias_C, decay_C, *gates)
    seen = 0 if weight_JC is None else len(weight_JC)
    blocks = 0 if decay_weight_IFF is None else len(decay_weight_IFF)
    numbers = channels * (8 + 2 * channels // max(1, blocks))
    sizes = (seen, blocks, channels)
    take_step(_step, batch, numbers, sharpness, (*tensors, *weights), *sizes)
    return out_B1C
