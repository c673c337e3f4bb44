"""A compiled loop over the rows of a batch, several of them at a time in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Fewer numbers than this are not worth handing to another thread.
NUMBERS_PER_THREAD = 2**16


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """The pool of a process; a forked one has none of its parent's threads."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="contextlm")


def in_threads(work: Callable[[slice], object], rows: int, most: int | None = None) -> None:
    """Work on equal parts of so many rows in as many threads as torch's operations have.

    Args:
        work: does a part; it must release the interpreter's lock.
        rows: of all parts together.
        most: parts that are worth a thread; None: as many as there are rows.
    """
    parts = min(rows, torch.get_num_threads(), rows if most is None else most)
    if parts <= 1:
        work(slice(0, rows))
        return
    ends = [rows * part // parts for part in range(parts + 1)]
    own, *others = map(slice, ends, ends[1:])
    started = [_threads(os.getpid()).submit(work, part) for part in others]
    try:
        work(own)  # a thread that is awake already
    finally:
        wait(started)
    for other in started:
        other.result()  # raises what a thread raised


def over_rows(loop: Callable[..., None], tensors: Sequence[Tensor], *shared: Any) -> None:
    """Run `loop` on arrays of `tensors`, ``[B, ...]``, and on what all rows share behind them.

    Rows are shared out over torch's number of threads; the loop must release the interpreter's
    lock, write into the arrays of its rows only, and accept any number of rows. Numba knows no
    bfloat16, which it is given as int16 (`ops.scalars` reads and writes that).

    Args:
        loop: takes one array a tensor.
        tensors: on a CPU; the first one's size decides how many threads are worth it.
        *shared: tensors likewise, to be read only, and other values.
    """
    arrays = [_array(tensor) for tensor in tensors]
    others = [_array(each) if isinstance(each, Tensor) else each for each in shared]
    in_threads(
        lambda part: loop(*(array[part] for array in arrays), *others),
        len(arrays[0]),
        arrays[0].size // NUMBERS_PER_THREAD,
    )


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach()
    array: np.ndarray[Any, Any] = (
        tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    ).numpy()
    return array


def whole_rows(part_BTC: Tensor) -> tuple[Tensor, int]:
    """The wider rows that a tensor is some columns of, contiguous, and the first of these columns.

    So a loop reads what a projection made for several parts without a copy of each. What is no part
    of such rows is copied.

    Returns:
        ``[B, T, X]``, and a column.
    """
    batch, tokens, channels = part_BTC.shape
    width, start = part_BTC.stride(1), int(part_BTC.storage_offset())
    first = start % max(1, width)
    end = (start - first + batch * tokens * width) * part_BTC.element_size()
    if (
        part_BTC.stride(2) == 1
        and part_BTC.stride(0) == tokens * width
        and first + channels <= width
        and end <= part_BTC.untyped_storage().nbytes()
    ):
        strides = (tokens * width, width, 1)
        return part_BTC.as_strided((batch, tokens, width), strides, start - first), first
    return part_BTC.contiguous(), 0
