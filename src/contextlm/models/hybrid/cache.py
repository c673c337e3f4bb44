"""What the mixers of `context_hybrid` keep while decoding.

Shape suffixes: B batch, T new tokens, C channels, J taps before the current token, S entries kept
and new.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from contextlm.models.alignment import newest
from contextlm.models.cache import ContextStateLayer, RecentLayer, RowStateLayer
from contextlm.models.steps import Steps


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
        both_BSC = torch.cat([old_BJC, new_BTC], dim=1)
        self.taps = newest(both_BSC, old_BJC.shape[1], steps.new_B, taps)
        return both_BSC


class RecurrenceLayer(Taps, ContextStateLayer):
    """Keeps a recurrence's state and its convolution's taps: ``(1 + J) C`` numbers a row."""

    kept: ClassVar[tuple[str, ...]] = ("counts", "state", "taps")


class WindowLayer(Taps, RecentLayer):
    """Keeps keys and values of the newest tokens, and a convolution's taps where there is one."""

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries", "taps")


class LatentLayer(Taps, RowStateLayer):
    """Keeps one entry for every token, and a convolution's taps where there is one.

    Args:
        is_croppable: nothing that is kept, here or by the model's other layers, forgets: then the
            newest tokens can be taken back, as far as none is padding.

    Attributes:
        entries: ``[B, S, C]``, each row's newest in the last column; None before the first token.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries", "taps")

    def __init__(self, is_croppable: bool = True) -> None:
        super().__init__()
        self.is_croppable = is_croppable
        self.entries: Tensor | None = None
        self._real_tail = 0  # newest tokens that were real in every row

    def append(self, new_BTC: Tensor, steps: Steps) -> Tensor:
        """Take in the entries of T new tokens, real ones first; old and new, ``[B, S, C]``.

        A row's entry of position p is in column ``K + p - seen`` for K old columns.
        """
        batch, tokens, _ = new_BTC.shape
        old_BKC = new_BTC[:, :0] if self.entries is None else self.entries
        both_BSC = torch.cat([old_BKC, new_BTC], dim=1)
        self.entries = both_BSC
        if steps.new_B is not None:
            self.entries = newest(both_BSC, old_BKC.shape[1], steps.new_B, both_BSC.shape[1])
        self._real_tail = _real_tail(self._real_tail, steps.mask_BT, tokens)
        self.advance(steps.mask_BT, batch, tokens, new_BTC.device)
        return both_BSC

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._real_tail = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every row.

        Args:
            tokens_to_remove: how many, as a negative number, as transformers' own layers take it.

        Raises:
            ValueError: it is positive, the cache cannot be cropped, or one of the tokens was
                padding.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): expected 0 or a negative number of tokens")
        if not self.is_croppable:
            super().crop(tokens_to_remove)
        if self.entries is None or self.counts is None or tokens_to_remove == 0:
            return
        if -tokens_to_remove >= self._seen:
            return self.reset()
        if -tokens_to_remove > self._real_tail:
            raise ValueError(
                f"crop({tokens_to_remove}): some of these tokens are padding in some rows; only "
                f"the newest {self._real_tail} can be taken back"
            )
        left = self.entries.shape[1] + tokens_to_remove
        self.entries = self.entries[:, :left].clone()
        self.counts = self.counts + tokens_to_remove
        self._seen += tokens_to_remove
        self._real_tail += tokens_to_remove


def _real_tail(before: int, mask_BT: Tensor | None, tokens: int) -> int:
    """How many of the newest tokens are real in every row, after T more."""
    if mask_BT is None:
        return before + tokens
    if torch.compiler.is_compiling() or mask_BT.device.type == "meta":
        return 0  # values cannot be looked at here
    return int(mask_BT.flip(1).long().cumprod(1).sum(1).min())
