"""Rows with padding, brought into step: each row's real tokens first, and back again.

A phase, a grid or a segment is counted over a row's real tokens. Once these stand in front, column
t is the row's t-th new token whatever the padding was; what is behind them is later than all of
them and, in a causal model, without effect.

Shape suffixes: B batch, T new tokens, K entries kept, E width of an entry.
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

    def apply(self, values_BTE: Tensor) -> Tensor:
        """Real tokens first, in their own order, ``[B, T, E]``."""
        return values_BTE if self.order_BT is None else _take(values_BTE, self.order_BT)

    def undo(self, values_BTE: Tensor) -> Tensor:
        """Back to the order of the input, ``[B, T, E]``."""
        if self.order_BT is None:
            return values_BTE
        return _take(values_BTE, torch.argsort(self.order_BT, dim=1))


def append_recent(old_BKE: Tensor, new_BTE: Tensor, new_B: Tensor | None, limit: int) -> Tensor:
    """The newest entries of each row.

    Args:
        old_BKE: earlier ones, each row's newest in the last column.
        new_BTE: entries of the new tokens, each row's real ones first.
        new_B: how many of these are real in each row; None: all T.
        limit: the most entries to keep.

    Returns:
        ``[B, min(limit, K + T), E]``, each row's newest in the last column; a copy.
    """
    both_BSE = torch.cat([old_BKE, new_BTE], dim=1)
    total = both_BSE.shape[1]
    keep = min(limit, total)
    if new_B is None:
        return both_BSE[:, total - keep :].clone()
    ends_B1 = (old_BKE.shape[1] + new_B).unsqueeze(1)
    columns_BK = ends_B1 - keep + torch.arange(keep, device=new_B.device)
    return _take(both_BSE, columns_BK.clamp(min=0))


def _take(values_BTE: Tensor, columns_BK: Tensor) -> Tensor:
    return values_BTE.gather(1, columns_BK.unsqueeze(-1).expand(-1, -1, values_BTE.shape[-1]))
