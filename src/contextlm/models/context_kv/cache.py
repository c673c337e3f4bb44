"""What decoding keeps of the memory that Context-KV attention reads, and where in it to read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contextlm.models.cache import EntriesLayer
from contextlm.models.inputs import NewTokens, take
from contextlm.ops.dilated_attention import multiples_below


class Reading(NamedTuple):
    """Which columns of old and new entries each new token reads, ``[B, T, M]`` each.

    Attributes:
        columns: of the memory; 0 at missing entries.
        real: False at missing entries.
    """

    columns: Tensor
    real: Tensor


def read_positions(new: NewTokens, kept: int, interval: int, size: int) -> Reading:
    """Anchor "position" after K entries of an `EntriesLayer`: i reads i, i - s, i - 2s, ..."""
    back_M = interval * torch.arange(size, device=new.device)
    new_TM = torch.arange(new.tokens, device=new.device).unsqueeze(1) - back_M
    real = new.starts.unsqueeze(2) + new_TM >= 0
    return Reading((kept + new_TM).where(real, 0), real)


class GridLayer(EntriesLayer):
    """Keeps the entries of each row's last K positions that are multiples of s: one in s.

    Attributes:
        interval: s.
        size: K, the most entries kept.
    """

    def __init__(self, interval: int, size: int) -> None:
        super().__init__()
        self.interval = interval
        self.size = size

    def remaining(self, both_BSE: Tensor, kept: int, new: NewTokens) -> Tensor:
        """Those of multiples of s."""
        # No row has more multiples of s among its tokens than the longest possible one.
        keep = min(self.size, -(-(new.past + new.tokens) // self.interval))
        ends_B1 = multiples_below(new.starts + new.counts.unsqueeze(1), self.interval)
        multiples_BK = ends_B1 - keep + torch.arange(keep, device=new.device)
        return take(both_BSE, self._columns(multiples_BK, new, kept).clamp(min=0))

    def read(self, new: NewTokens, kept: int) -> Reading:
        """Anchor "grid": position i reads i and the K largest multiples of s strictly below i."""
        below_BT1 = multiples_below(new.columns(0), self.interval).unsqueeze(-1)
        multiples_BTM = below_BT1 - 1 - torch.arange(self.size, device=new.device)
        columns_BTM = self._columns(multiples_BTM.flatten(1), new, kept).view_as(multiples_BTM)
        own_T = kept + torch.arange(new.tokens, device=new.device)
        own_BT1 = own_T.expand(below_BT1.shape[0], -1).unsqueeze(-1)
        real = torch.cat([torch.ones_like(own_BT1, dtype=torch.bool), multiples_BTM >= 0], dim=-1)
        return Reading(torch.cat([own_BT1, columns_BTM], dim=-1).where(real, 0), real)

    def _columns(self, multiples_BM: Tensor, new: NewTokens, kept: int) -> Tensor:
        """Where the entry of position s * multiple stands among old and new entries."""
        position_BM = self.interval * multiples_BM
        old_BM = kept - multiples_below(new.starts, self.interval) + multiples_BM
        return torch.where(position_BM >= new.starts, kept + position_BM - new.starts, old_BM)
