"""The bits of a float32 inside a compiled loop, which Numba does not offer by itself."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def bits_as_float(context, bits):  # type: ignore[no-untyped-def]
    """The float32 of 32 bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def float_as_bits(context, number):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate
