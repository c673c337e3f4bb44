"""The noise as one compiled loop for a CPU, vectorised and in threads.

Its functions are within 1e-6 of the exact ones; polynomials are Taylor's, on ranges small enough.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.normal_noise.naive import MULTIPLIERS, ROUNDS, WEYL
from contextlm.ops.rows import in_threads
from contextlm.ops.scalars import bits_as_float, float_as_bits

_FLAGS = ("contract", "nsz", "arcp")
_ONE, _TWO = (np.uint64(each) for each in MULTIPLIERS)
_WEYL_ONE, _WEYL_TWO = (np.uint32(w) for w in WEYL)
_LN2 = np.float32(math.log(2))
_QUARTER_TURN = np.float32(math.pi / 2)
_UNIT = np.float32(2**-24)

# Compiled functions have no annotations, hence the silenced checks (see `context_scan.numba`).


@compiled(*_FLAGS, inlined=True)
def _radius(bits):  # type: ignore[no-untyped-def]
    """``sqrt(-2 log u)`` for u = (bits / 256 + 0.5) / 2^24."""
    one, half = np.float32(1), np.float32(0.5)
    u = (np.float32(np.int32(bits >> np.uint32(8))) + half) * _UNIT
    # u = 2^n m with m from sqrt(1/2) to sqrt(2), where log(m) is a series in (m - 1) / (m + 1).
    shifted = np.int32(float_as_bits(u) - np.int32(0x3F3504F3))
    n = np.float32(shifted >> np.int32(23))
    m = bits_as_float(np.int32((shifted & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)))
    s = (m - one) / (m + one)
    t = s * s
    p = np.float32(1 / 3) + t * (
        np.float32(1 / 5) + t * (np.float32(1 / 7) + t * np.float32(1 / 9))
    )
    log = n * _LN2 + (s + s) * (one + t * p)
    return np.sqrt(np.float32(-2) * log)


@compiled(*_FLAGS, inlined=True)
def _turn(bits):  # type: ignore[no-untyped-def]
    """Cosine and sine of a whole turn's share (bits / 256) / 2^24 - 1/2."""
    zero, half = np.float32(0), np.float32(0.5)
    quarters = (np.float32(np.int32(bits >> np.uint32(8))) * _UNIT - half) * np.float32(4)
    nearest = np.floor(quarters + half)
    x = (quarters - nearest) * _QUARTER_TURN
    t = x * x
    c = np.float32(1 / 24) + t * (np.float32(-1 / 720) + t * np.float32(1 / 40320))
    c = np.float32(1) + t * (np.float32(-0.5) + t * c)
    s = np.float32(1 / 120) + t * (np.float32(-1 / 5040) + t * np.float32(1 / 362880))
    s = x + x * t * (np.float32(-1 / 6) + t * s)
    k = np.int32(nearest)
    odd = (k & np.int32(1)) != 0
    cosine, sine = (s if odd else c), (c if odd else s)
    cosine = zero - cosine if ((k + np.int32(1)) & np.int32(2)) != 0 else cosine
    sine = zero - sine if (k & np.int32(2)) != 0 else sine
    return cosine, sine


@compiled(*_FLAGS)
def _fill(numbers_4Q, start, key_one, key_two):  # type: ignore[no-untyped-def]
    """Fills a part of the quarters, which begins at counter `start`."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    for g in range(numbers_4Q.shape[1]):
        a, b, c, d = np.uint32(start + g), np.uint32(0), np.uint32(0), np.uint32(0)
        k, m = key_one, key_two
        for _ in range(ROUNDS):
            p, q = _ONE * np.uint64(a), _TWO * np.uint64(c)
            a = np.uint32(q >> high) ^ b ^ k
            c = np.uint32(p >> high) ^ d ^ m
            b, d = np.uint32(q & low), np.uint32(p & low)
            k, m = np.uint32(k + _WEYL_ONE), np.uint32(m + _WEYL_TWO)
        radius = _radius(a)
        cosine, sine = _turn(b)
        numbers_4Q[0, g] = radius * cosine
        numbers_4Q[1, g] = radius * sine
        radius = _radius(c)
        cosine, sine = _turn(d)
        numbers_4Q[2, g] = radius * cosine
        numbers_4Q[3, g] = radius * sine


def normal_noise_numba(rows: int, columns: int, key: tuple[int, int]) -> Tensor:
    """As `normal_noise`."""
    numbers_4Q = torch.empty(4, -(-rows * columns // 4))
    array_4Q = numbers_4Q.numpy()
    one, two = (np.uint32(k) for k in key)
    in_threads(lambda part: _fill(array_4Q[:, part], part.start, one, two), array_4Q.shape[1])
    return numbers_4Q.flatten()[: rows * columns].view(rows, columns)
