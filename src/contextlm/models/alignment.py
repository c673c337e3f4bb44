"""Rows with padding, brought into step: each row's real tokens first, and back again.

A phase, a grid or a segment is counted over a row's real tokens. Once these stand in front, column
t is the row's t-th new token whatever the padding was; what is behind them is later than all of
them and, in a causal model, without effect.

Shape suffixes: B batch, T new tokens, K entries kept, S entries kept and new, E width of an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RealFirst:
    """The order that puts each row's real tokens in front, ``[B, T]``; None when all are real."""

    order_BT: Tensor | None

    @classmethod
    def of(cls, mask_BT: Tensor | None) -> RealFirst:
        """The order for a mask that is False at padding."""
        if mask_BT is None:
            return cls(None)
        return cls(torch.argsort(mask_BT.int(), dim=1, descending=True, stable=True))

    def to(self, device: torch.device) -> RealFirst:
        """The same on another device."""
        return RealFirst(None if self.order_BT is None else self.order_BT.to(device))

    def apply(self, values_BTE: Tensor) -> Tensor:
        """Real tokens first, in their own order, ``[B, T, E]``."""
        return values_BTE if self.order_BT is None else _take(values_BTE, self.order_BT)

    def undo(self, values_BTE: Tensor) -> Tensor:
        """Back to the order of the input, ``[B, T, E]``."""
        if self.order_BT is None:
            return values_BTE
        return _take(values_BTE, torch.argsort(self.order_BT, dim=1))


def newest(both_BSE: Tensor, old: int, new_B: Tensor | None, limit: int) -> Tensor:
    """The newest entries of each row.

    Args:
        both_BSE: K earlier ones, each row's newest in column K - 1, and behind them those of the
            T new tokens, each row's real ones first; S = K + T.
        old: K.
        new_B: how many of the new ones are real in each row; None: all T.
        limit: the most entries to keep.

    Returns:
        ``[B, min(limit, S), E]``, each row's newest in the last column; a copy.
    """
    total = both_BSE.shape[1]
    keep = min(limit, total)
    if new_B is None:
        return both_BSE[:, total - keep :].clone()
    ends_B1 = (old + new_B).unsqueeze(1)
    columns_BK = ends_B1 - keep + torch.arange(keep, device=new_B.device)
    return _take(both_BSE, columns_BK.clamp(min=0))


def _take(values_BTE: Tensor, columns_BK: Tensor) -> Tensor:
    return values_BTE.gather(1, columns_BK.unsqueeze(-1).expand(-1, -1, values_BTE.shape[-1]))
