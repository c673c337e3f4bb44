"""Numbers inside of loops that Numba compiles: bits, bfloat16, exponential and sigmoid.

Numba knows neither a float's bits nor bfloat16. In float32 none of these has a branch or a call, so
that a loop over them is vectorised.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic as _intrinsic
from numba.extending import overload

from contextlm.ops.backends import compiled

# Compiled functions have no annotations, hence the silenced checks.

# Called in compiled code with one argument less than it is defined with.
intrinsic: Any = _intrinsic


@intrinsic
def float_as_bits(typing, number):  # type: ignore[no-untyped-def]
    """A float32's bits as int32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def bits_as_float(typing, bits):  # type: ignore[no-untyped-def]
    """The float32 of these bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


def load(number):  # type: ignore[no-untyped-def]
    """A number of an array: a bfloat16, which comes as int16, as float32, others as they are."""
    raise NotImplementedError


@overload(load, inline="always")
def _choose_load(number):  # type: ignore[no-untyped-def]
    if number == types.int16:
        return lambda number: bits_as_float(np.int32(number) << np.int32(16))
    return lambda number: number


def store(number, like):  # type: ignore[no-untyped-def]
    """What to write into an array that `like` is an element of: rounded to the nearest, even."""
    raise NotImplementedError


@overload(store, inline="always")
def _choose_store(number, like):  # type: ignore[no-untyped-def]
    if like != types.int16:
        return lambda number, like: number

    def rounded(number, like):  # type: ignore[no-untyped-def]
        bits = float_as_bits(np.float32(number))
        last = (bits >> np.int32(16)) & np.int32(1)
        return np.int16((bits + np.int32(0x7FFF) + last) >> np.int32(16))

    return rounded


# e^r for |r| <= ln(2) / 2 by its series, within float32's rounding.
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(n)) for n in range(7))
_LOG2_E, _ONE = np.float32(1 / math.log(2)), np.float32(1)
_LN2_HIGH = np.float32(0.693359375)  # few bits, so that n times it is exact
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_ROUND = np.float32(1.5 * 2**23)  # added, it leaves an integer in the last bits
_LARGEST = np.float32(87)  # e^87 and e^-87 are within float32


@compiled("contract", inlined=True)
def _exp(x):  # type: ignore[no-untyped-def]
    """e^x in float32 as 2^n e^r, 2^n made of its bits. Sums must not be reordered here."""
    x = _LARGEST if x > _LARGEST else (-_LARGEST if x < -_LARGEST else x)  # a NaN passes both
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = _C3 + r * (_C4 + r * (_C5 + r * _C6))
    series = _C0 + r * (_C1 + r * (_C2 + r * series))
    return series * bits_as_float((float_as_bits(shifted) + np.int32(127)) << np.int32(23))


def exp(x):  # type: ignore[no-untyped-def]
    """The exponential, in float32 of what is cut off at -87 and 87."""
    raise NotImplementedError


@overload(exp, inline="always")
def _choose_exp(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: _exp(x)
    return lambda x: math.exp(x)


def sigmoid(x):  # type: ignore[no-untyped-def]
    """``1 / (1 + exp(-x))``, within 1e-6 in float32."""
    raise NotImplementedError


@overload(sigmoid, inline="always")
def _choose_sigmoid(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: _ONE / (_ONE + _exp(-x))
    return lambda x: 1 / (1 + math.exp(-x))


def silu_slope(x):  # type: ignore[no-untyped-def]
    """The derivative of ``x sigmoid(x)``."""
    raise NotImplementedError


@overload(silu_slope, inline="always")
def _choose_silu_slope(x):  # type: ignore[no-untyped-def]
    one = np.float32(1) if x == types.float32 else np.float64(1)

    def slope(x):  # type: ignore[no-untyped-def]
        s = sigmoid(x)
        return s * (one + x * (one - s))

    return slope
