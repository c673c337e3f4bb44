"""Normal noise from a counter-based generator: any part of it can be drawn by itself.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) makes four whole
numbers of a counter and a key, and Box and Muller's transform two normal numbers of two of them. So
the numbers are the same however the work is shared out.
"""

from __future__ import annotations

import torch

from contextlm.ops.normal_noise.naive import philox_key as philox_key


def normal_noise(rows: int, columns: int, key: tuple[int, int]) -> torch.Tensor:
    """Numbers of N(0, 1) in float32, ``[rows, columns]``, that depend on the arguments alone.

    Args:
        rows, columns: the shape.
        key: two numbers of 32 bits, as `philox_key` makes them.
    """
    from contextlm.ops.normal_noise.numba import normal_noise_numba

    return normal_noise_numba(rows, columns, key)
