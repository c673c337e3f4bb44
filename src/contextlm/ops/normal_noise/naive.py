"""The generator and the transform written out in numpy, the latter in float64: the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key after each round
ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox_key(*numbers: int) -> tuple[int, int]:
    """A key for these numbers, none of them negative: well mixed, so that they may be near."""
    first, second = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return int(first), int(second)


def philox_naive(counters_4N: npt.NDArray[Any], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Four numbers of 32 bits for each counter of four, ``[4, N]``."""
    a, b, c, d = counters_4N.astype(np.uint64)
    one, two = (np.uint64(each) for each in MULTIPLIERS)
    for number in range(ROUNDS):
        k, m = (np.uint64((k + number * w) & 0xFFFFFFFF) for k, w in zip(key, WEYL, strict=True))
        p, q = one * a, two * c
        a, b, c, d = (q >> _32) ^ b ^ k, q & _LOW, (p >> _32) ^ d ^ m, p & _LOW
    return np.stack([a, b, c, d])


def normal_noise_naive(rows: int, columns: int, key: tuple[int, int]) -> npt.NDArray[np.float64]:
    """As `normal_noise`. Counter g gives the numbers g, Q + g, 2Q + g and 3Q + g of 4Q."""
    quarter = -(-rows * columns // 4)
    counters_4Q = np.zeros((4, quarter), np.uint64)
    counters_4Q[0] = np.arange(quarter)
    bits_4Q = philox_naive(counters_4Q, key)
    radius_2Q = np.sqrt(-2 * np.log(((bits_4Q[::2] >> np.uint64(8)) + 0.5) / 2**24))
    angle_2Q = 2 * np.pi * ((bits_4Q[1::2] >> np.uint64(8)) / 2**24 - 0.5)
    cosine_2Q, sine_2Q = radius_2Q * np.cos(angle_2Q), radius_2Q * np.sin(angle_2Q)
    numbers = np.stack([cosine_2Q[0], sine_2Q[0], cosine_2Q[1], sine_2Q[1]]).reshape(-1)
    return numbers[: rows * columns].reshape(rows, columns)
