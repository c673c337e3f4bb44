"""The short convolution before a recurrence or an attention: each channel, a few tokens back.

J is a number of taps here, or of those before the current token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from contextlm.models.cache import newest
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import OwnStart
from contextlm.ops.short_convolution import short_convolution


class Taps:
    """Mixed into a cache layer: the newest inputs of a causal convolution, ``[B, J, C]``."""

    taps: Tensor | None = None

    def swap_taps(self, new_BTC: Tensor, taps: int, new: NewTokens) -> Tensor:
        """The J inputs before the new ones, ``[B, J, C]``; keeps the newest J of all.

        The new tokens' stand with the real ones first.
        """
        old_BJC = self.taps
        if old_BJC is None:
            old_BJC = new_BTC.new_zeros(new_BTC.shape[0], taps, new_BTC.shape[2])
        both_BSC = torch.cat(
            [old_BJC, new_BTC[:, -taps:] if new.mask_BT is None else new_BTC], dim=1
        )
        self.taps = newest(both_BSC, new.ends(taps), taps)
        return old_BJC


class CausalConvolution(OwnStart):
    """A depthwise convolution over a token and those before it.

    Args:
        width: C.
        taps: J, tokens that each output sees, itself included; at least 1.
        start: as the identity, or evenly in ``[-1 / sqrt(J), 1 / sqrt(J)]``.
    """

    def __init__(self, width: int, taps: int, start: Literal["identity", "uniform"] = "identity"):
        super().__init__()
        self.taps, self.start = taps, start
        self.weight = nn.Parameter(torch.empty(taps, width))  # the current token's first
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the weights anew."""
        if self.start == "uniform":
            most = self.taps**-0.5
            init.uniform_(self.weight, -most, most)
            init.uniform_(self.bias, -most, most)
            return
        identity = torch.zeros_like(self.weight)
        identity[0] = 1
        init.copy_(self.weight, identity)  # whole: what a checkpoint brought must not be touched
        init.zeros_(self.bias)

    def forward(
        self, inputs_BTC: Tensor, state: Taps | None, new: NewTokens, *, silu: bool = False
    ) -> Tensor:
        """``[B, T, C]``, real tokens first; inputs before a document's first token are zero.

        Args:
            inputs_BTC: in any type; the outputs are in the widest of it and the weights'.
            state: keeps the taps; None to keep nothing.
            new: the tokens.
            silu: whether SiLU follows.
        """
        before_BJC = None
        if state is not None and self.taps > 1:
            before_BJC = state.swap_taps(inputs_BTC, self.taps - 1, new)
        return short_convolution(
            inputs_BTC, self.weight, self.bias, before_BJC, silu=silu, positions_BT=new.packed_BT
        )
