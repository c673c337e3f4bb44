"""What ops check of their tensors, and the type that they compute in."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_shapes(op: str, wanted: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Compare each tensor's shape with the fitting one; None fits.

    Raises:
        ValueError: one differs.
    """
    for what, (tensor, fitting) in wanted.items():
        if tensor is not None and tensor.shape != tuple(fitting):
            found = tuple(tensor.shape)
            raise ValueError(f"{op} needs the {what} as {tuple(fitting)}, got {found}")


def computing_type(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 where that is given."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
