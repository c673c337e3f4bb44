"""The norm of a token in one compiled call, without a gate (see `ops.step`)."""

from __future__ import annotations

from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.step import array, normalise, take_step

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", "reassoc")
def _norm(first_row, last_row, eps, inputs, weight, out, channels):  # type: ignore[no-untyped-def]
    x_NC, y_NC = array(inputs, (last_row, channels), eps), array(out, (last_row, channels), eps)
    weight_C = array(weight, channels, eps)
    for n in range(first_row, last_row):
        y_NC[n] = x_NC[n]
        normalise(y_NC[n], weight_C, eps)


def norm_step(inputs: Tensor, weight_C: Tensor, *, eps: float) -> Tensor:
    """As `rms_norm`, for contiguous tensors of one type, float32 or float64; no gradient."""
    out, channels = inputs.new_empty(inputs.shape), len(weight_C)
    rows = inputs.numel() // channels
    take_step(_norm, rows, 2 * channels, eps, (inputs, weight_C, out), channels)
    return out
