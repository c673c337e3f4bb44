"""All that C does for one token between its two projections (see `ops.step`)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.step import array, convolve, take_step

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", "reassoc")
def _step(  # type: ignore[no-untyped-def]
    first_row, last_row, like, projected, taps, out, weight, bias, seen, channels
):
    projected_B3C = array(projected, (last_row, 3, channels), like)
    taps_BJC = array(taps, (last_row, seen - 1, channels), like)
    out_BC = array(out, (last_row, channels), like)
    weight_JC, bias_C = array(weight, (seen, channels), like), array(bias, channels, like)
    gated_C = np.empty(channels, out_BC.dtype)
    for b in range(first_row, last_row):
        before_C, behind_C, inner_C = projected_B3C[b, 0], projected_B3C[b, 1], projected_B3C[b, 2]
        out_C = out_BC[b]
        for c in range(channels):
            gated_C[c] = before_C[c] * inner_C[c]
        convolve(gated_C, taps_BJC[b], weight_JC, bias_C, out_C)
        for c in range(channels):
            out_C[c] *= behind_C[c]


def gated_convolution_step(
    projected_B1X: Tensor, taps_BJC: Tensor | None, weight_JC: Tensor, bias_C: Tensor
) -> Tensor:
    """What the second projection is given, ``[B, 1, C]``; changes `taps`.

    Args:
        projected_B1X: what the first one gave: the gate before the convolution, that behind it, and
            what goes through both; contiguous as all others, of one type.
        taps_BJC: the convolution's last inputs, the newest last; None where it has one tap.
        weight_JC: of the convolution, the current token's first.
        bias_C: of the convolution.
    """
    seen, channels = weight_JC.shape
    out_B1C = projected_B1X.new_empty(len(projected_B1X), 1, channels)
    tensors = (projected_B1X, taps_BJC, out_B1C, weight_JC, bias_C)
    take_step(_step, len(out_B1C), channels * (seen + 2), 0, tensors, seen, channels)
    return out_B1C
