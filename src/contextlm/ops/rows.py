"""A compiled loop over the rows of a batch, several of them at a time in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Fewer numbers than this are not worth handing to another thread.
_NUMBERS_PER_THREAD = 2**16


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """The pool of a process; a forked one has none of its parent's threads."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="rows")


def over_rows(loop: Callable[..., None], tensors: Sequence[Tensor], *shared: Tensor) -> None:
    """Run `loop` on arrays of `tensors`, ``[B, ...]``, and of what all rows share behind them.

    Rows are shared out over torch's number of threads; the loop must release the interpreter's
    lock, write into the arrays of its rows only, and accept any number of rows.

    Args:
        loop: takes one array a tensor.
        tensors: on a CPU; the first one's size decides how many threads are worth it.
        *shared: likewise, read only.
    """
    arrays: list[Any] = [tensor.detach().numpy() for tensor in tensors]
    others: list[Any] = [tensor.detach().numpy() for tensor in shared]
    rows = len(arrays[0])
    groups = min(rows, torch.get_num_threads(), arrays[0].size // _NUMBERS_PER_THREAD)
    if groups <= 1:
        loop(*arrays, *others)
        return
    ends = [rows * group // groups for group in range(groups + 1)]
    parts = ([array[start:end] for array in arrays] for start, end in pairwise(ends))
    for _ in _threads(os.getpid()).map(lambda part: loop(*part, *others), parts):
        pass  # raises what a thread raised
