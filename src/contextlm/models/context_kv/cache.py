"""What decoding keeps of the memory that Context-KV attention reads, and where in it to read.

Shape suffixes: B batch, T new tokens, K entries kept, M entries read by a query, E entry's width.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from contextlm.models.cache import RowStateLayer
from contextlm.ops.dilated_attention import multiples_below


class Reading(NamedTuple):
    """Which columns of old and new entries each new token reads, ``[B, T, M]`` each.

    Attributes:
        columns: of the memory; 0 at missing entries.
        real: False at missing entries.
    """

    columns: Tensor
    real: Tensor


def read_positions(seen_B: Tensor, kept: int, tokens: int, interval: int, size: int) -> Reading:
    """Anchor "position" after a `RecentLayer`: position i reads i, i - s, i - 2s, ...

    Args:
        seen_B: tokens of each row before the new ones.
        kept: K, the entries kept of them.
        tokens: T.
        interval: s.
        size: M.
    """
    device = seen_B.device
    back_M = interval * torch.arange(size, device=device)
    new_TM = torch.arange(tokens, device=device).unsqueeze(1) - back_M
    real = seen_B[:, None, None] + new_TM >= 0
    return Reading((kept + new_TM).where(real, 0), real)


class GridLayer(RowStateLayer):
    """Keeps the entries of each row's last K positions that are multiples of s: one in s.

    Entries end at the right, as in `RecentLayer`. Columns before a row's first hold nothing of use.

    Attributes:
        interval: s.
        limit: K, the most entries kept.
        entries: ``[B, <=K, E]``, or None before the first token.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries")

    def __init__(self, interval: int, limit: int) -> None:
        super().__init__()
        self.interval = interval
        self.limit = limit
        self.entries: Tensor | None = None

    def append(self, new_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Take in the entries of T new tokens.

        Args:
            new_BTE: of the new tokens, each row's real ones first (`alignment.RealFirst`).
            mask_BT: False where a token is padding, in the order of the input, or None.

        Returns:
            Old and new entries, ``[B, K' + T, E]``, which `read` refers to.
        """
        batch, tokens, width = new_BTE.shape
        seen_B = new_BTE.new_zeros(batch, dtype=torch.long) if self.counts is None else self.counts
        old_BKE = new_BTE[:, :0] if self.entries is None else self.entries
        both_BSE = torch.cat([old_BKE, new_BTE], dim=1)
        new_B = tokens if mask_BT is None else mask_BT.sum(1)
        self.advance(mask_BT, batch, tokens, new_BTE.device)
        # No row has more multiples of s among its tokens than the longest possible one.
        keep = min(self.limit, -(-self.get_seq_length() // self.interval))
        ends_B1 = multiples_below(seen_B + new_B, self.interval).unsqueeze(1)
        multiples_BK = ends_B1 - keep + torch.arange(keep, device=new_BTE.device)
        columns_BK = self._columns(multiples_BK, seen_B, old_BKE.shape[1]).clamp(min=0)
        self.entries = both_BSE.gather(1, columns_BK.unsqueeze(-1).expand(-1, -1, width))
        return both_BSE

    def read(self, seen_B: Tensor, kept: int, tokens: int) -> Reading:
        """Anchor "grid": position i reads i and the K largest multiples of s strictly below i.

        Args:
            seen_B: tokens of each row before the new ones, that is before `append`.
            kept: K', the entries kept of them.
            tokens: T.
        """
        device = seen_B.device
        new_BT = torch.arange(tokens, device=device).expand(seen_B.shape[0], -1)
        below_BT1 = multiples_below(seen_B.unsqueeze(1) + new_BT, self.interval).unsqueeze(-1)
        multiples_BTM = below_BT1 - 1 - torch.arange(self.limit, device=device)
        columns_BTM = self._columns(multiples_BTM.flatten(1), seen_B, kept).view_as(multiples_BTM)
        own_BT1 = (kept + new_BT).unsqueeze(-1)
        real = torch.cat([torch.ones_like(own_BT1, dtype=torch.bool), multiples_BTM >= 0], dim=-1)
        return Reading(torch.cat([own_BT1, columns_BTM], dim=-1).where(real, 0), real)

    def _columns(self, multiples_BN: Tensor, seen_B: Tensor, kept: int) -> Tensor:
        """Where the entry of position s * multiple stands among old and new entries."""
        seen_B1 = seen_B.unsqueeze(1)
        position_BN = self.interval * multiples_BN
        old_BN = kept - multiples_below(seen_B1, self.interval) + multiples_BN
        return torch.where(position_BN >= seen_B1, kept + position_BN - seen_B1, old_BN)
