"""The context recurrence as one compiled loop, for a CPU, a few rows and no gradients.

In the eager loop a step of a few rows is a handful of calls into torch, which cost more than the
arithmetic. Here a whole sequence is one call, and the recurrent weight stays in the processor's
second-level cache from step to step: reading it from there is what limits the speed.

I and O are the dimensions of a C x C weight: in and out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from contextlm.ops.backends import compiled

# erf(x) = x P(x^2) / Q(x^2) up to |x| = 3.919, where erf is 1 to float32's rounding. Fitted for
# this file by iteratively reweighted least squares in 40 digits: within 1.9e-8 exactly computed,
# within 1e-6 in float32.
_ERF_END = 3.9192059
_P = (1.128379147, 0.1903551977, 0.05274242572, 0.003763535543, 2.84857789e-4, 2.050783872e-6)
_Q = (1.0, 0.5020306503, 0.1140883566, 0.01496504928, 0.001162070201, 3.809758646e-5)

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.

# A layer's sums may be reordered.
_FLAGS = ("reassoc", "contract", "nsz", "arcp")


def erf(x):  # type: ignore[no-untyped-def]
    """The error function: to rounding in float64, by a rational function in float32.

    The latter has no branch and no call, so that a loop over it is vectorised.
    """
    return math.erf(x)


@overload(erf, inline="always")
def _choose_erf(x):  # type: ignore[no-untyped-def]
    if x != types.float32:
        return lambda x: math.erf(x)
    end, one = types.float32(_ERF_END), types.float32(1)
    p0, p1, p2, p3, p4, p5 = (types.float32(c) for c in _P)
    _, q1, q2, q3, q4, q5 = (types.float32(c) for c in _Q)

    def rational(x):  # type: ignore[no-untyped-def]
        x = end if x > end else (-end if x < -end else x)  # a NaN passes both comparisons
        t = x * x
        p = p0 + t * (p1 + t * (p2 + t * (p3 + t * (p4 + t * p5))))
        q = one + t * (q1 + t * (q2 + t * (q3 + t * (q4 + t * q5))))
        return x * p / q

    return rational


@compiled(*_FLAGS, inlined=True)
def _add_product(weight_IO, vector_I, sum_O):  # type: ignore[no-untyped-def]
    """Add the product to `sum_O`, four inputs at a time: the sums are read and written less."""
    inputs, outputs = weight_IO.shape
    whole = inputs - inputs % 4
    for i in range(0, whole, 4):
        a, b, c, d = vector_I[i], vector_I[i + 1], vector_I[i + 2], vector_I[i + 3]
        w_O, x_O, y_O, z_O = weight_IO[i], weight_IO[i + 1], weight_IO[i + 2], weight_IO[i + 3]
        for o in range(outputs):
            sum_O[o] += a * w_O[o] + b * x_O[o] + c * y_O[o] + d * z_O[o]
    for i in range(whole, inputs):
        for o in range(outputs):
            sum_O[o] += vector_I[i] * weight_IO[i, o]


@compiled(*_FLAGS, inlined=True)
def _add_gelu(context_C, update_C, one):  # type: ignore[no-untyped-def]
    """Put ``c + GELU(u)`` in the place of u; returns its sum."""
    half, root = one / (one + one), one / math.sqrt(one + one)
    total = one - one
    for i in range(context_C.shape[0]):
        u = update_C[i]
        u = context_C[i] + half * u * (one + erf(u * root))
        update_C[i] = u
        total += u
    return total


@compiled(*_FLAGS, inlined=True)
def _normalise(sum_C, mean, width, eps, scale_C, shift_C, out_C):  # type: ignore[no-untyped-def]
    """The layer norm of `sum_C`, whose mean is known."""
    squares = width - width
    for i in range(sum_C.shape[0]):
        squares += (sum_C[i] - mean) * (sum_C[i] - mean)
    deviation = math.sqrt(squares / width + eps)
    for i in range(sum_C.shape[0]):
        out_C[i] = (sum_C[i] - mean) / deviation * scale_C[i] + shift_C[i]


@compiled(*_FLAGS)
def _scan(  # type: ignore[no-untyped-def]
    projected_LBTC, weights_LIO, scale_LC, shift_LC, initial_BC, mask_BT, constants, out_LBTC
):
    """Fills `out_LBTC`. `constants` are 1, C and epsilon in the tensors' own type."""
    layers, batch, tokens, _ = projected_LBTC.shape
    one, width, eps = constants
    update_C = initial_BC[0].copy()
    for b in range(batch):
        state_C = initial_BC[b]
        for t in range(tokens):
            context_C = state_C
            for layer in range(layers):
                out_C = out_LBTC[layer, b, t]
                if mask_BT[b, t]:
                    update_C[:] = projected_LBTC[layer, b, t]
                    _add_product(weights_LIO[layer], context_C, update_C)
                    mean = _add_gelu(context_C, update_C, one) / width
                    _normalise(update_C, mean, width, eps, scale_LC[layer], shift_LC[layer], out_C)
                else:
                    out_C[:] = state_C
                context_C = out_C
            state_C = context_C


def context_scan_numba(
    projected_BTC: Sequence[Tensor],
    weights_CC: Sequence[Tensor],
    norm_weights_C: Sequence[Tensor],
    norm_biases_C: Sequence[Tensor],
    initial_BC: Tensor,
    *,
    mask_BT: Tensor | None,
    eps: float,
) -> Tensor:
    """As `context_scan`, for tensors of one type, float32 or float64, on a CPU, in one thread."""
    projected_LBTC = _stacked(projected_BTC)
    _, batch, tokens, width = projected_LBTC.shape
    out_LBTC = torch.empty_like(projected_LBTC)
    if mask_BT is None:
        mask_BT = torch.ones(batch, tokens, dtype=torch.bool)
    arrays = (
        projected_LBTC,
        _stacked([weight_CC.t() for weight_CC in weights_CC]),
        _stacked(norm_weights_C),
        _stacked(norm_biases_C),
        initial_BC.contiguous(),
        mask_BT.contiguous(),
    )
    constants = torch.tensor([1.0, width, eps], dtype=out_LBTC.dtype).numpy()
    _scan(*(array.detach().numpy() for array in arrays), tuple(constants), out_LBTC.numpy())
    return out_LBTC


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One contiguous tensor with the layers in front; a view where one layer is contiguous."""
    tensors = [tensor.detach() for tensor in tensors]
    return tensors[0].contiguous()[None] if len(tensors) == 1 else torch.stack(tensors)
