"""What decoding with dual-context attention keeps, all of it bounded, and where it stands.

Shape suffixes: B batch (1 where no row can differ), T new tokens, S tokens kept and new, K entries
kept, N new spans, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from contextlm.models.alignment import RealFirst, newest
from contextlm.models.cache import RecentLayer
from contextlm.models.inputs import DecoderInputs


class DualContextLayer(RecentLayer):
    """The newest W hidden states of a layer, and the representatives of older spans (DESIGN 1.5).

    Hidden states rather than keys and values are kept, because both the keys and values of L0 and
    the mean of a span that leaves follow from them.

    Attributes:
        representatives: ``[B, <=max_representatives, D]``, each row's newest in the last column;
            None before the first span has left.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries", "representatives")

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.representatives: Tensor | None = None

    def remember(self, new_BND: Tensor, new_B: Tensor, keep: int) -> Tensor:
        """Take in the representatives of the spans that leave.

        Args:
            new_BND: of at most N spans, each row's real ones first.
            new_B: how many of them each row really has.
            keep: how many columns to keep, at most those of old and new together.

        Returns:
            Old and new ones, ``[B, K + N, D]``.
        """
        old_BKD = new_BND[:, :0] if self.representatives is None else self.representatives
        both_BSD = torch.cat([old_BKD, new_BND], dim=1)
        self.representatives = newest(both_BSD, old_BKD.shape[1], new_B, keep)
        return both_BSD


@dataclass(frozen=True)
class Timeline:
    """Where the new tokens of each row and those kept of it stand, in real tokens.

    Queries are in the order of the input. Keys have each row's real tokens first; padding is then
    later than all of them, and causality hides it.

    Attributes:
        query_BT: positions of the new tokens.
        start_B1: real tokens seen before.
        end_B1: real tokens seen, the new ones included.
        past: tokens that the cache has seen, padding included.
        tokens: T, padding included.
        mask_BT: False at padding, or None.
        align: the order that puts real tokens first.
        plain: the beginning of a sequence in each row, without padding.
    """

    query_BT: Tensor
    start_B1: Tensor
    end_B1: Tensor
    past: int
    tokens: int
    mask_BT: Tensor | None
    align: RealFirst
    plain: bool

    @classmethod
    def of(cls, inputs: DecoderInputs) -> Timeline:
        """The positions in a forward pass."""
        query_BT, mask_BT = inputs.positions(), inputs.mask_BT
        tokens = query_BT.shape[1]
        if inputs.seen_B is None:
            start_B1 = query_BT.new_zeros(1, 1)
            query_BT = query_BT[:1] if mask_BT is None else query_BT
        else:
            start_B1 = inputs.seen_B.unsqueeze(1)
        new_B1 = tokens if mask_BT is None else mask_BT.sum(1, keepdim=True)
        return cls(
            query_BT=query_BT,
            start_B1=start_B1,
            end_B1=start_B1 + new_B1,
            past=inputs.past,
            tokens=tokens,
            mask_BT=mask_BT,
            align=RealFirst.of(mask_BT),
            plain=mask_BT is None and inputs.past == 0,
        )

    def keys(self, limit: int) -> Tensor:
        """Positions of the columns where at most `limit` old tokens are kept, ``[B, S]``.

        They are negative where a column holds nothing.
        """
        kept = min(limit, self.past)
        columns_S = torch.arange(kept + self.tokens, device=self.start_B1.device)
        return self.start_B1 - kept + columns_S

    def keep(self, new_BTE: Tensor, layer: RecentLayer | None) -> Tensor:
        """Entries kept and new, ``[B, S, E]``, as `keys` counts them; moves the layer on."""
        new_BTE = self.align.apply(new_BTE)
        return new_BTE if layer is None else layer.append(new_BTE, self.mask_BT)
