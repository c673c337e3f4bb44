"""The product of a linear layer with few vectors as one compiled loop (see `ops.step`).

I is the width of what goes in here, O that of what comes out, N a number of vectors.
"""

from __future__ import annotations

from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.step import array, take_step

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", "reassoc")
def _product(first, last, like, inputs, weight, out, vectors, width):  # type: ignore[no-untyped-def]
    x_NI, y_NO = array(inputs, (vectors, width), like), array(out, (vectors, last), like)
    weight_OI = array(weight, (last, width), like)
    for o in range(first, last):
        weight_I = weight_OI[o]
        for n in range(vectors):
            x_I, total = x_NI[n], like
            for i in range(width):
                total += weight_I[i] * x_I[i]
            y_NO[n, o] = total


def linear_step(inputs: Tensor, weight_OI: Tensor) -> Tensor:
    """``inputs @ weight.T``, ``[..., O]``; no gradient.

    Args:
        inputs: ``[..., I]``, contiguous as the weight, of its type.
        weight_OI: float32 or float64.
    """
    outputs, width = weight_OI.shape
    out = inputs.new_empty(*inputs.shape[:-1], outputs)
    tensors = (inputs, weight_OI, out)
    take_step(_product, outputs, 0, 0.0, tensors, inputs.numel() // width, width)
    return out
