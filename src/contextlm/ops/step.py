"""One new token of each row in one compiled call, on a CPU: what the steps of several ops share.

While text is generated a layer's arithmetic is little and its operations are many: in plain torch
some forty, of which each costs more than its numbers. A step does all that stands between two
products, and changes in place what is kept. Its loop is handed addresses: to hand over an array
takes a microsecond, an address a tenth of that.

J is a number of taps here, or of those before the current token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import types
from numba.np.numpy_support import carray
from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.rows import NUMBERS_PER_THREAD, in_threads
from contextlm.ops.scalars import intrinsic

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.

_TYPES = {torch.float32: np.float32, torch.float64: np.float64}


def take_step(
    loop: Callable[..., None],
    rows: int,
    numbers: int,
    scalar: float,
    tensors: Sequence[Tensor | None],
    *sizes: float,
) -> None:
    """Run a step's loop on the rows of a batch, several of them at a time in threads.

    Args:
        loop: takes the first row and the one behind the last, the scalar, the tensors' addresses
            and the sizes. It must release the interpreter's lock and write to its rows only.
        rows: B.
        numbers: how many a row works on, to see how many threads are worth it.
        scalar: a number that the loop needs, in the type of the first tensor, float32 or float64.
        tensors: contiguous and on a CPU; None has the address 0.
        *sizes: from which the loop knows the tensors' shapes.
    """
    assert tensors[0] is not None
    typed = _TYPES[tensors[0].dtype](scalar)

    def work(part: slice) -> None:
        # Looked up here, so that an interrupted call leaves its threads the tensors they work on.
        addresses = [0 if each is None else each.data_ptr() for each in tensors]
        loop(part.start, part.stop, typed, *addresses, *sizes)

    in_threads(work, rows, rows * numbers // NUMBERS_PER_THREAD)


@intrinsic
def _pointer(typing, address, like):  # type: ignore[no-untyped-def]
    kind = types.CPointer(types.unliteral(like))

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64, like), generate


@compiled(inlined=True)
def array(address, shape, like):  # type: ignore[no-untyped-def]
    """The contiguous array at an address, of numbers of the type that `like` is of."""
    return carray(_pointer(address, like), shape)


@compiled("contract", inlined=True)
def softplus(x):  # type: ignore[no-untyped-def]
    """The logarithm of ``1 + e^x``, as torch's."""
    return x if x > 20 else math.log1p(math.exp(x))


@compiled("contract", "reassoc", inlined=True)
def convolve(x_C, taps_JC, weight_JC, bias_C, out_C):  # type: ignore[no-untyped-def]
    """The causal convolution's outputs for a token, whose inputs then become the newest taps.

    Weights for no token are no convolution: the outputs are the inputs.
    """
    if weight_JC.shape[0] == 0:
        out_C[:] = x_C
        return
    channels, before = x_C.shape[0], taps_JC.shape[0]
    weight_C = weight_JC[0]
    for c in range(channels):
        out_C[c] = bias_C[c] + weight_C[c] * x_C[c]
    for j in range(1, before + 1):
        weight_C, tap_C = weight_JC[j], taps_JC[before - j]
        for c in range(channels):
            out_C[c] += weight_C[c] * tap_C[c]
    for j in range(before):
        tap_C, later_C = taps_JC[j], x_C if j == before - 1 else taps_JC[j + 1]
        for c in range(channels):
            tap_C[c] = later_C[c]


@compiled("contract", "reassoc", inlined=True)
def normalise(x_C, weight_C, eps):  # type: ignore[no-untyped-def]
    """Divide by the root of the mean square and multiply by the weights, in place."""
    kind = x_C.dtype.type
    squares = kind(0)
    for c in range(x_C.shape[0]):
        squares += x_C[c] * x_C[c]
    root = kind(1 / math.sqrt(squares / x_C.shape[0] + eps))
    for c in range(x_C.shape[0]):
        x_C[c] *= root * weight_C[c]
