"""The short convolution before a recurrence or an attention: each channel, a few tokens back.

J is a number of taps here, or of those before the current token.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from contextlm.models.cache import newest
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import OwnStart


class Taps:
    """Mixed into a cache layer: the newest inputs of a causal convolution, ``[B, <=J, C]``."""

    taps: Tensor | None = None

    def with_taps(self, new_BTC: Tensor, taps: int, new: NewTokens) -> Tensor:
        """The J inputs before the new ones and these, ``[B, J + T, C]``; keeps the newest J.

        The new tokens' stand with the real ones first.
        """
        old_BJC = new_BTC.new_zeros(new_BTC.shape[0], taps, new_BTC.shape[2])
        old_BJC = old_BJC if self.taps is None else self.taps
        both_BSC = torch.cat([old_BJC, new_BTC], dim=1)
        self.taps = newest(both_BSC, new.ends(old_BJC.shape[1]), taps)
        return both_BSC


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

    def forward(self, inputs_BTC: Tensor, state: Taps | None, new: NewTokens) -> Tensor:
        """``[B, T, C]``, real tokens first; inputs before a document's first token are zero."""
        before, tokens = self.taps - 1, inputs_BTC.shape[1]
        if state is None:
            all_BSC = F.pad(inputs_BTC, (0, 0, before, 0))
        else:
            all_BSC = state.with_taps(inputs_BTC, before, new)
        out_BTC = torch.addcmul(self.bias, all_BSC[:, before:], self.weight[0])
        for back in range(1, self.taps):
            earlier_BTC = all_BSC[:, before - back : before - back + tokens]
            if new.places_BT is not None:
                outside_BT = new.places_BT < back
                earlier_BTC = earlier_BTC.masked_fill(outside_BT.unsqueeze(-1), 0)
            out_BTC = torch.addcmul(out_BTC, earlier_BTC, self.weight[back])
        return out_BTC
