"""What the mixers of `context_hybrid` keep while decoding, and where the new tokens stand.

Shape suffixes: B batch, T new tokens, C channels, J taps before the current token, S entries kept
and new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from contextlm.models.alignment import RealFirst, append_recent
from contextlm.models.cache import ContextStateLayer, RecentLayer, RowStateLayer
from contextlm.models.inputs import DecoderInputs


@dataclass(frozen=True)
class Steps:
    """The new tokens of a forward pass, each row's real ones first.

    Attributes:
        align: the order that puts them first.
        mask_BT: False at padding in the order of the input, or None.
        real_BT: False at padding in the new order, or None.
        new_B: real tokens of each row, or None: all T.
        seen_B: real tokens that each row had before, or None: none.
    """

    align: RealFirst
    mask_BT: Tensor | None
    real_BT: Tensor | None
    new_B: Tensor | None
    seen_B: Tensor | None

    @classmethod
    def of(cls, inputs: DecoderInputs) -> Steps:
        """Of a decoder's inputs."""
        align, mask_BT = RealFirst.of(inputs.mask_BT), inputs.mask_BT
        if mask_BT is None:
            return cls(align, None, None, None, inputs.seen_B)
        new_B = mask_BT.sum(1)
        real_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) < new_B.unsqueeze(1)
        return cls(align, mask_BT, real_BT, new_B, inputs.seen_B)

    def first(self, tokens: int, device: torch.device) -> Tensor:
        """Which of the T tokens begins its row's text, ``[B, T]`` or ``[1, T]``."""
        begins_T = torch.arange(tokens, device=device) == 0
        if self.seen_B is None:
            return begins_T.unsqueeze(0)
        return begins_T & (self.seen_B == 0).unsqueeze(1)

    def oldest(self, kept: int) -> Tensor | None:
        """The first of the columns, `kept` old ones before the new, that a row has filled.

        ``[B]`` int64, or None: all rows have filled all.
        """
        return None if self.seen_B is None else (kept - self.seen_B).clamp(min=0)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions of the T tokens in their rows' texts, ``[B, T]`` or ``[1, T]``."""
        positions_1T = torch.arange(tokens, device=device).unsqueeze(0)
        return positions_1T if self.seen_B is None else positions_1T + self.seen_B.unsqueeze(1)


class Taps:
    """Mixed into a cache layer: the newest inputs of a causal convolution, ``[B, <=J, C]``."""

    taps: Tensor | None = None

    def with_taps(self, new_BTC: Tensor, taps: int, steps: Steps) -> Tensor:
        """The inputs before the new ones and these, ``[B, J + T, C]``; keeps the newest J.

        Args:
            new_BTC: inputs of the new tokens, real ones first.
            taps: J.
            steps: the new tokens.
        """
        old_BJC = new_BTC.new_zeros(new_BTC.shape[0], taps, new_BTC.shape[2])
        old_BJC = old_BJC if self.taps is None else self.taps
        self.taps = append_recent(old_BJC, new_BTC, steps.new_B, taps)
        return torch.cat([old_BJC, new_BTC], dim=1)


class RecurrenceLayer(Taps, ContextStateLayer):
    """Keeps a recurrence's state and its convolution's taps: ``(1 + J) C`` numbers a row."""

    kept: ClassVar[tuple[str, ...]] = ("counts", "state", "taps")


class WindowLayer(Taps, RecentLayer):
    """Keeps keys and values of the newest tokens, and a convolution's taps where there is one."""

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries", "taps")


class LatentLayer(RowStateLayer):
    """Keeps one entry for every token: memory grows with the text.

    Attributes:
        entries: ``[B, S, C]``, each row's newest in the last column; None before the first token.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries")
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.entries: Tensor | None = None

    def append(self, new_BTC: Tensor, steps: Steps) -> Tensor:
        """Take in the entries of T new tokens, real ones first; old and new, ``[B, S, C]``.

        A row's entry of position p is in column ``K + p - seen`` for K old columns.
        """
        batch, tokens, _ = new_BTC.shape
        old_BKC = new_BTC[:, :0] if self.entries is None else self.entries
        both_BSC = torch.cat([old_BKC, new_BTC], dim=1)
        self.entries = both_BSC
        if steps.new_B is not None:
            self.entries = append_recent(old_BKC, new_BTC, steps.new_B, both_BSC.shape[1])
        self.advance(steps.mask_BT, batch, tokens, new_BTC.device)
        return both_BSC

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every row, which must be real ones."""
        if self.entries is None or self.counts is None or tokens_to_remove == 0:
            return
        left = self.entries.shape[1] - tokens_to_remove
        self.entries = self.entries[:, :left].clone()
        self.counts = self.counts - tokens_to_remove
        self._seen -= tokens_to_remove
